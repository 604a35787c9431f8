"""From a plan to labels: the order in which a body is painted. What comes first keeps its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtrial.geometry import SHAPE
from vtrial.organs import ORGAN_IDS
from vtrial.phantom.abdomen import paint_abdomen
from vtrial.phantom.anthropometry import BodyPlan
from vtrial.phantom.body import draw_outlines, lay_frame, make_canvas
from vtrial.phantom.canvas import smooth_noise
from vtrial.phantom.skeleton import paint_skeleton
from vtrial.phantom.thorax import paint_thorax, w_front
from vtrial.phantom.tissues import Material as M
from vtrial.phantom.workbench import Workbench

LUNGS_AT_REFERENCE_ML = {"M": 3400.0, "F": 2600.0}  # what the reference cage holds over the reference diaphragm
DIAPHRAGM_ML_PER_MM = 32.0


@dataclass(frozen=True)
class Anatomy:
    """Painted body over a window of the full grid: `labels` and `material` uint8, `coarse` and `fine` noise fields."""

    window: tuple[slice, slice, slice]
    labels: Tensor
    material: Tensor
    coarse: tuple[Tensor, Tensor]
    fine: tuple[Tensor, Tensor]

    def full(self, values: Tensor, fill: float) -> Tensor:
        """Window values set into a full grid of `fill`."""
        out = torch.full(SHAPE, fill, dtype=values.dtype, device=values.device)
        out[self.window] = values
        return out


def paint_muscles(w: Workbench) -> None:
    """Back muscles, iliopsoas and gluteals with their names; the rest of the lean wall as muscle without one."""
    length, s = w.length, w.plan.lean_scale
    lean, cavity = w.outlines.lean, w.outlines.cavity
    for side, name in ((-1.0, "left"), (1.0, "right")):
        back = [
            (side * (30 if z > 0.1 else 24) * s, w.spine(z) - 40 * s + (10 if z < 0.1 else 0), z * length)
            for z in (0.02, 0.2, 0.4, 0.6, 0.8, 1.0)
        ]
        box = w.canvas.around(back, 45)
        ok = (lean[box.index] < -2) & (cavity[box.index] > -30)
        w.canvas.paint(
            box,
            box.tube(back, [14 * s, 28 * s, 29 * s, 25 * s, 22 * s, 15 * s]),
            M.MUSCLE,
            ORGAN_IDS[f"autochthon_{name}"],
            None,
            ok,
        )
        psoas = [(side * 24, w_front(w, 0.45) - 14, 0.45 * length), (side * 42, w_front(w, 0.33) - 12, 0.33 * length),
                 (side * 56, w_front(w, 0.22) - 4, 0.22 * length), (side * 76, 30.0, 0.10 * length),
                 (side * 88, 44.0, -0.01 * length), (side * 98, 24.0, -0.09 * length)]  # fmt: skip
        box = w.canvas.around(psoas, 40)
        w.canvas.paint(
            box,
            box.tube(psoas, [8 * s, 19 * s, 24 * s, 22 * s, 19 * s, 13 * s]),
            M.MUSCLE,
            ORGAN_IDS[f"iliopsoas_{name}"],
        )
        for muscle, centre, radii in (
            ("maximus", (side * 78 * s, -56.0, -0.01 * length), (58 * s, 40 * s, 88)),
            ("minimus", (side * 112, 12.0, 0.06 * length), (30, 26, 46)),
            ("medius", (side * 122 * s, -2.0, 0.09 * length), (46, 52, 62)),
        ):
            box = w.canvas.around([centre], max(radii) + 4)
            ok = (lean[box.index] < -1) & (cavity[box.index] > 4)
            w.canvas.paint(box, box.ellipsoid(centre, radii), M.MUSCLE, ORGAN_IDS[f"gluteus_{muscle}_{name}"], None, ok)


def fill_tissues(w: Workbench) -> None:
    """Everything not painted yet: wall muscle streaked with fat, visceral fat, subcutaneous fat, breast, skin, air."""
    o, canvas = w.outlines, w.canvas
    free = canvas.material == 0
    outside = o.skin > 0
    # Fat between muscles: thin sheets where a noise field crosses zero, more of them in fat and in old people.
    marbling = 0.025 + 0.001 * max(w.plan.bmi - 22, 0) + 0.0004 * max(w.plan.age_years - 30, 0)
    streak = ((w.coarse[0] + 0.25 * w.fine[0]).abs() < marbling) & (w.coarse[1] > 0)
    wall = (o.lean < 0) & (o.cavity > -0.5)
    chest_fat = (o.cavity > 9.5) & (o.cavity < 11.0)
    fill = torch.where(o.cavity <= -0.5, int(M.VISCERAL_FAT), int(M.FAT))
    fill = torch.where(wall & ~streak & ~chest_fat, int(M.MUSCLE), fill)
    if o.breast is not None:
        gland = (
            (o.breast < -9) & (w.fine[1] + 0.5 * w.coarse[0] > -0.25 + 0.012 * (w.plan.age_years - 50)) & (o.lean > 0)
        )
        fill = torch.where(gland, int(M.BREAST), fill)
    fill = torch.where((o.skin > -2.2) & (o.lean > 0), int(M.SKIN), fill)
    fill = torch.where(outside, int(M.AIR), fill)
    canvas.material = torch.where(free | outside, fill.to(torch.uint8), canvas.material)
    canvas.labels.masked_fill_(outside, 0)


def paint_body(plan: BodyPlan, rng: np.random.Generator, generator: torch.Generator) -> Anatomy:
    """Paint one body. Deterministic for the state of both generators on one device."""
    frame = lay_frame(plan)
    canvas, window = make_canvas(plan, frame, rng, generator)
    outlines = draw_outlines(plan, frame, canvas, rng, generator)
    shape = canvas.x.shape
    fields = []
    for scale_mm in (24.0, 24.0, 9.0, 9.0):
        cells = [max(4, round(n * s / scale_mm)) for n, s in zip(shape, canvas.spacing)]
        fields.append(smooth_noise(shape, cells, generator))
    scale = plan.scale_x * plan.scale_y * plan.scale_z * plan.cage_scale**2
    lift = (LUNGS_AT_REFERENCE_ML[plan.sex] - plan.volumes["lungs"] / scale) / DIAPHRAGM_ML_PER_MM
    w = Workbench(
        plan,
        frame,
        canvas,
        outlines,
        rng,
        (fields[0], fields[1]),
        (fields[2], fields[3]),
        float(np.clip(lift, -30, 30)),
    )
    paint_skeleton(w)
    paint_thorax(w)
    paint_abdomen(w)
    paint_muscles(w)
    fill_tissues(w)
    return Anatomy(window, canvas.labels, canvas.material, w.coarse, w.fine)
