"""Chest: airways, great vessels, heart, diaphragm and lungs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtrial.organs import ORGAN_IDS
from vtrial.phantom.canvas import Box
from vtrial.phantom.tissues import Material as M
from vtrial.phantom.workbench import Workbench

# ICRP 110: centroid (x, y mm, z fraction), semi-axes and directions (base to apex first), volume in ml.
HEART = {
    "M": ((-30.0, 48.0, 0.712), (78.0, 58.8, 47.4), 795.0),
    "F": ((-31.0, 24.0, 0.684), (77.8, 49.7, 43.0), 620.0),
}
HEART_AXES = np.array([[-0.55, 0.45, -0.70], [0.83, 0.35, -0.43], [0.05, -0.82, -0.57]])
DOMES = {"M": (0.660, 0.638), "F": (0.622, 0.600)}  # z fraction of the right and left dome of the diaphragm


def diaphragm(w: Workbench, box: Box) -> Tensor:
    """Height in mm above the diaphragm (negative in the abdomen): two domes, falling to the chest wall."""
    tops = [d * w.length + w.lift_mm for d in DOMES[w.plan.sex]]
    shift = -24.0 if w.female else 0.0
    s = (0.9 if w.female else 1.0) * w.plan.cage_scale
    heights = []
    for side, top in zip((1.0, -1.0), tops):
        dx, dy = side * box.x - 58 * s, box.y - (34 + shift)
        a = torch.where(dx > 0, 74.0 * s, 120.0 * s)
        b = torch.where(dy > 0, 95.0 * s, 78.0 * s)
        rho = ((dx / a).square() + (dy / b).square()).clamp_(max=2.6)
        heights.append(top - 40.0 * rho.pow(1.25))
    return box.z - torch.maximum(heights[0], heights[1])


def paint_airways(w: Workbench) -> None:
    """Trachea with main bronchi, and the oesophagus behind them."""
    carina = w.at(2, w_front(w, 0.845) + 12, 0.845)
    top = w.at(-2, 42, 1.03)
    upper = w.at(-2, 38, 1.15)
    right = w.at(44, carina[1] - 4, 0.805)
    left = w.at(-48, carina[1] - 6, 0.80)
    right = (right[0], carina[1] - 8, right[2])
    left = (left[0], carina[1] - 10, left[2])
    for points, radii in (([carina, top, upper], [8.5, 9, 9]), ([carina, right], [7, 5]), ([carina, left], [6.5, 5])):
        box = w.canvas.around(points, 16)
        tube = box.tube(points, radii)
        w.canvas.paint(box, tube, M.AIRWAY, ORGAN_IDS["trachea"])
        w.canvas.paint(box, tube - 2.0, M.MUSCLE)
    path = []
    for z in (0.64, 0.70, 0.78, 0.86, 0.95, 1.1):
        x, _, height = w.at(-10 - 30 * max(0.0, 0.70 - z), 0, z)
        path.append((x, w_front(w, z) + 7, height))
    box = w.canvas.around(path, 14)
    w.canvas.paint(box, box.tube(path, [8, 7, 7, 6.5, 6.5, 6.5]), M.OESOPHAGUS, ORGAN_IDS["esophagus"])


def w_front(w: Workbench, z_template: float) -> float:
    """Reference y of the front of the vertebral bodies at a z fraction of the male template."""
    _, _, height = w.at(0, 0, z_template)
    t = np.clip((z_template - 0.2) / 0.78, 0, 1)
    return w.spine(height / w.length) + (18.0 - 7.5 * float(t)) * (0.9 if w.female else 1.0)


def paint_vessels(w: Workbench) -> None:
    """Aorta with arch and iliac arteries, venae cavae and iliac veins, the neck and the pulmonary vessels."""
    wide = float(np.exp(0.08 * w.rng.normal())) * (1 + 0.004 * (w.plan.age_years - 55)) * (0.88 if w.female else 1.0)
    front = {z: w_front(w, z) for z in (0.12, 0.28, 0.35, 0.5, 0.65, 0.8, 0.865)}
    j = w.jitter(3.0)
    arch = [
        w.at(-6, 46, 0.768), w.at(17 + j[0], 57, 0.83), w.at(6, 38, 0.888),
        _y(w.at(-18, 0, 0.872), front[0.865] + 16), _y(w.at(-24, 0, 0.80), front[0.8] + 8),
    ]  # fmt: skip
    down = [arch[-1]] + [
        _y(w.at(x + j[1] * 0.5, 0, z), front[z] + 10) for x, z in ((-20, 0.65), (-13, 0.5), (-8, 0.35), (-4, 0.28))
    ]
    iliac = {
        s: [down[-1], _y(w.at(s * 38, 0, 0.14), front[0.12] + 14), w.at(s * 78, 44, -0.02), w.at(s * 84, 52, -0.22)]
        for s in (-1, 1)
    }
    _vessel(w, arch, [14, 15, 13.5, 12.5, 12.5], wide, M.BLOOD, "aorta")
    _vessel(w, down, [12.5, 12, 11, 9.5, 8.5], wide, M.BLOOD, "aorta")
    course = [(16, 0.27, 7, 0.28, 0), (20, 0.36, 9, 0.35, 0), (24, 0.5, 14, 0.5, 0.5), (24, 0.62, 24, 0.65, 1.0)]
    course.append((20, 0.69, 30, 0.65, 0.5))
    cava = [_y(w.at(x, 0, z, lift), front[near] + y) for x, z, y, near, lift in course]
    _vessel(w, cava, [9, 10, 11, 12, 12], 1.0, M.VEIN, "inferior_vena_cava")
    for side, name in ((-1, "left"), (1, "right")):
        _vessel(w, iliac[side], [6.5, 5.5, 5, 4.5], wide, M.BLOOD, f"iliac_artery_{name}")
        vein = [cava[0]] + [(p[0] * 0.9, p[1] - 11, p[2]) for p in iliac[side][1:]]
        _vessel(w, vein, [8, 6.5, 6, 5.5], 1.0, M.VEIN, f"iliac_vena_{name}")
        hilum = w.at(side * 46, 22, 0.795)
        _vessel(
            w,
            [w.at(-12, 52, 0.79), w.at(-10, 34, 0.828), hilum, w.at(side * 62, 14, 0.765)],
            [13, 12, 9, 6],
            1.0,
            M.BLOOD,
        )
        _vessel(w, [w.at(-8, 22, 0.765), w.at(side * 52, 14, 0.768)], [9, 6.5], 1.0, M.BLOOD, "pulmonary_vein")
        neck = [w.at(side * 16, 36, 0.885), w.at(side * 24, 24, 0.99), w.at(side * 27, 20, 1.14)]
        _vessel(w, neck, [5, 4.2, 4], 1.0, M.BLOOD, f"common_carotid_artery_{name}")
        drain = [w.at(22, 40, 0.872), w.at(side * 32, 34, 0.96), w.at(side * 36, 22, 1.14)]
        _vessel(w, drain, [7, 6.5, 6], 1.0, M.VEIN, f"brachiocephalic_vein_{name}")
    _vessel(w, [w.at(26, 36, 0.872), w.at(24, 38, 0.77)], [9, 9.5], 1.0, M.VEIN, "superior_vena_cava")
    for side in (-1, 1):
        lobe = w.at(side * 17, 44, 0.985)
        box = w.canvas.around([lobe], 26)
        w.canvas.paint(box, box.ellipsoid(lobe, (9, 9, 21)), M.THYROID, ORGAN_IDS["thyroid_gland"])


def _y(point: tuple[float, float, float], y: float) -> tuple[float, float, float]:
    return point[0], y, point[2]


def _vessel(
    w: Workbench, points: list[tuple[float, float, float]], radii: list[float], wide: float, material: M, name: str = ""
) -> None:
    box = w.canvas.around(points, 20)
    w.canvas.paint(box, box.tube(points, [r * wide for r in radii]), material, ORGAN_IDS[name] if name else 0)


def paint_heart(w: Workbench) -> None:
    """The heart at its planned volume: left ventricle with a thick wall, thin walls elsewhere, blood inside."""
    (x, y, z), radii, reference_ml = HEART[w.plan.sex]
    size = (w.plan.volumes["heart"] / reference_ml) ** (1 / 3)
    centre = np.array([x, y, z * w.length + 0.8 * w.lift_mm]) + w.jitter(3.0)
    axes = HEART_AXES / np.linalg.norm(HEART_AXES, axis=1, keepdims=True)
    box = w.canvas.around([centre], 100 * size)
    field = box.ellipsoid(centre, [r * size for r in radii], axes) + w.bumps(box, 1.5)
    apex, right = axes[0], axes[1]
    domain = w.inside(box, 4) & (diaphragm(w, box) > 1)
    whole = w.canvas.paint(box, field, M.BLOOD, ORGAN_IDS["heart"], w.plan.volumes["heart"], domain)
    level = field[whole].max()
    # Pericardial fat, mostly under the heart: no lung slips between heart and diaphragm.
    under = box.ellipsoid(centre - np.array([4.0, -4.0, 14.0 * size]), [r * size * 1.04 for r in radii], axes)
    w.canvas.paint(box, torch.minimum(field - level - 3.5, under), M.VISCERAL_FAT, 0, None, w.inside(box, 2))
    w.canvas.repaint(box, whole & (field > level - 3.5), M.HEART_WALL)
    chamber = centre + (20 * apex - 17 * right - 4 * axes[2]) * size
    outer = box.ellipsoid(chamber, [50 * size, 33 * size, 33 * size], axes)
    inner = box.ellipsoid(chamber - 4 * apex * size, [42 * size, 22.5 * size, 22.5 * size], axes)
    depth = (box.x - chamber[0]) * apex[0] + (box.y - chamber[1]) * apex[1] + (box.z - chamber[2]) * apex[2]
    wall = whole & (outer < 0) & (inner > 0) & (depth > -26 * size)
    w.canvas.repaint(box, wall, M.LV_WALL)
    w.canvas.repaint(box, whole & (inner <= 0), M.BLOOD)


def paint_lungs(w: Workbench) -> None:
    """Both lungs above the diaphragm at the planned volume, split into five lobes, with vessels."""
    length = w.length
    box = w.canvas.box((-170, -100, 0.48 * length + min(w.lift_mm, 0)), (170, 150, 1.0 * length))
    height = diaphragm(w, box)
    field = torch.maximum(w.outlines.cavity[box.index] + 2.0, -height / 3.0)  # the diaphragm gives way first
    centre = w.at(0, 30, 0.79)
    beside = 10 + 6 * ((box.z / length - 0.85) / 0.08).clamp(0, 1)
    domain = (box.x.abs() > beside - 6 * (box.y < centre[1] - 10)) & (field < 6)
    lung = w.canvas.paint(box, field, M.LUNG, 0, w.plan.volumes["lungs"], domain)
    shift = -22.0 if w.female else 0.0
    # Fissures: the oblique runs from high behind to low in front; the horizontal parts the right middle lobe.
    oblique = box.z - 0.745 * length - 0.5 * w.lift_mm + 0.75 * (box.y - (20 + shift)) + w.bumps(box, 2)
    horizontal = box.z - 0.765 * length - 0.3 * w.lift_mm + w.bumps(box, 2)
    left, upper = box.x < 0, oblique > 0
    lobes = torch.where(left, torch.where(upper, 10, 11), torch.where(upper, torch.where(horizontal > 0, 12, 13), 14))
    target = w.canvas.labels[box.index]
    target.copy_(torch.where(lung, lobes.to(torch.uint8), target))
    hilum = ((box.x.abs() - 40).square() + (box.y - centre[1]).square() + (box.z - centre[2]).square()).sqrt_()
    tubes = (w.fine[0][box.index].square() + w.fine[1][box.index].square()).sqrt_()
    w.canvas.repaint(box, lung & (tubes < 0.46 - hilum / 280), M.LUNG_VESSEL)


def paint_thorax(w: Workbench) -> None:
    """Everything in the chest, the lungs last."""
    paint_airways(w)
    paint_vessels(w)
    paint_heart(w)
    paint_lungs(w)
