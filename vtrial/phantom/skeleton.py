"""Bones: spine with cord and discs, sacrum, hips and femora, ribs, sternum, clavicles, scapulae, humeri."""

from __future__ import annotations

import numpy as np
import torch

from vtrial.organs import ORGAN_IDS
from vtrial.phantom.canvas import rotation
from vtrial.phantom.tissues import Material as M
from vtrial.phantom.workbench import Workbench

LUMBAR = {"M": (0.197, 0.465), "F": (0.178, 0.460)}  # z fractions of L5's bottom and L1's top
THORACIC_TOP = {"M": 0.981, "F": 0.950}


def vertebral_bounds(sex: str) -> np.ndarray:
    """z fractions between the vertebrae, L5's bottom to C4's top: 22 values for 5 lumbar, 12 thoracic, 4 cervical."""
    low, high = LUMBAR[sex]
    lumbar = np.linspace(low, high, 6)
    heights = np.linspace(0.050, 0.036, 12)
    thoracic = high + np.cumsum(heights) / heights.sum() * (THORACIC_TOP[sex] - high)
    cervical = thoracic[-1] + 0.03 * np.arange(1, 5)
    return np.concatenate([lumbar, thoracic, cervical])


VERTEBRAE = [
    *(f"vertebrae_L{i}" for i in (5, 4, 3, 2, 1)),
    *(f"vertebrae_T{i}" for i in range(12, 0, -1)),
    *(f"vertebrae_C{i}" for i in (7, 6, 5, 4)),
]


def paint_spine(w: Workbench) -> None:
    """Vertebral bodies with discs, arches with processes, the cord in its canal, and the sacrum."""
    sex, length = w.plan.sex, w.length
    bounds = vertebral_bounds(sex)
    size = (1.0 if sex == "M" else 0.9) * float(np.exp(0.05 * w.rng.normal()))
    for i, name in enumerate(VERTEBRAE):
        z0, z1 = bounds[i] * length, bounds[i + 1] * length
        middle, half = (z0 + z1) / 2, (z1 - z0) / 2
        y = w.spine(middle / length)
        t = min(i / 16, 1.0)  # 0 at L5, 1 at T1
        rx, ry = size * (25.0 - 10.5 * t), size * (18.0 - 7.5 * t)
        box = w.canvas.box((-48, y - 75, z0 - 10), (48, y + 28, z1 + 2))
        label = ORGAN_IDS[name]
        disc = half * (0.80 if i < 5 else 0.86)
        radial = ((box.x / rx) ** 2 + ((box.y - y) / ry) ** 2).sqrt_().sub_(1).mul_((rx + ry) / 2)
        radial += 1.8 * ((box.z - middle) / half).square().clamp_(max=1.5) * -1 + 1.2
        height = (box.z - middle).abs_()
        canal_y = y - ry - 8.5
        canal = (box.x.square() * 0.75 + (box.y - canal_y) ** 2).sqrt_()
        within = height <= half
        w.canvas.paint(box, canal - 5.2, M.CORD, ORGAN_IDS["spinal_cord"], within=within)
        w.canvas.paint(box, canal - 8.2, M.VISCERAL_FAT, within=within)
        w.canvas.paint_bone(box, torch.maximum(radial, height - disc), label, M.MARROW)
        w.canvas.paint(box, radial, M.DISC, within=within)
        arch = torch.maximum(canal - 12.5, (box.z - middle + 2).abs() - half * 0.75)
        reach = 36.0 if i < 5 else 26.0
        slope = 0.15 if i < 5 else 0.55  # thoracic spinous processes point down
        spinous = torch.maximum(
            (box.x.abs() - 3.6), (box.z - middle + 4 - slope * (box.y - canal_y)).abs() - half * 0.45
        )
        spinous = torch.maximum(spinous, torch.maximum(canal_y - reach - box.y, box.y - canal_y))
        wing = torch.maximum((box.z - middle - 2).abs() - 5.0, (box.y - canal_y - 2 + 0.12 * box.x.abs()).abs() - 5.0)
        wing = torch.maximum(wing, box.x.abs() - (36.0 - 8 * t))
        w.canvas.paint_bone(box, torch.minimum(arch, torch.minimum(spinous, wing)), label)
    _paint_sacrum(w, bounds[0])


def _paint_sacrum(w: Workbench, top: float) -> None:
    length = w.length
    box = w.canvas.box((-75, -90, -10), (75, 30, top * length + 4))
    f = (box.z / (top * length)).clamp(0, 1.05)
    heights = np.linspace(0, top, 8)
    centre = torch.zeros_like(box.z)
    values = [w.spine(h) - (0 if h > 0.15 else 4) for h in heights]
    for a, b, va, vb in zip(heights[:-1], heights[1:], values[:-1], values[1:]):
        t = ((box.z / length - a) / (b - a)).clamp(0, 1)
        centre += t * (vb - va)
    centre += values[0]
    rx = 14 + 42 * f.pow(1.2)
    ry = 7 + 12 * f
    field = ((box.x / rx).abs().pow(2.4) + ((box.y - centre + 0.0022 * box.x.square()) / ry).abs().pow(2.4)).pow(
        1 / 2.4
    )
    field = (field - 1) * ry
    field = torch.maximum(field, torch.maximum(-box.z, box.z - top * length))
    canal = (box.x.square() * 0.5 + (box.y - centre + 7) ** 2).sqrt_() - 5
    w.canvas.paint(box, torch.maximum(canal, 0.06 * length - box.z), M.VISCERAL_FAT)
    w.canvas.paint_bone(box, field, ORGAN_IDS["sacrum"], M.MARROW)


def paint_hips(w: Workbench) -> None:
    """Iliac wings, acetabula, pubis and ischium, and the upper femora."""
    length = w.length
    wide = 1.0 if w.female else 0.98
    cavity = w.outlines.cavity
    for side, name in ((-1.0, "left"), (1.0, "right")):
        label = ORGAN_IDS[f"hip_{name}"]
        head = (side * 88 * wide, 6.0, -0.035 * length)
        box = w.canvas.box(
            (min(side * 30, side * 175), -75, -0.2 * length), (max(side * 30, side * 175), 100, 0.25 * length)
        )
        joint = box.ellipsoid(head, (24, 24, 24))
        neck = box.tube(
            [head, (side * 122 * wide, -4, -0.075 * length), (side * 132 * wide, -6, -0.10 * length)], [14, 15, 17]
        )
        shaft = box.tube([(side * 130 * wide, -6, -0.10 * length), (side * 118 * wide, -2, -0.24 * length)], [17, 15])
        femur = torch.minimum(joint, torch.minimum(neck, shaft))
        w.canvas.paint_bone(box, femur, ORGAN_IDS[f"femur_{name}"], shell_mm=3.5)
        crest = (0.225 if not w.female else 0.205) * length
        plate = (cavity[box.index] - 9).abs() - 5.5 + (box.z / length - 0.02).clamp(min=0) * 8
        rim = box.z - crest + ((box.y - 8) / 100).square() * 0.09 * length
        front = box.y - 62 + (crest - box.z).clamp(min=0) * 0.28
        medial = 40 - (side * box.x) + (box.z - 0.12 * length).clamp(min=0) * 0.1
        wing = torch.maximum(
            torch.maximum(plate, rim), torch.maximum(front, torch.maximum(medial, 0.0 * length - box.z))
        )
        cup = torch.maximum(box.ellipsoid(head, (36, 36, 36)), 27 - (joint + 24))
        cup = torch.maximum(cup, side * box.x - 106 * wide)
        pubis = box.tube(
            [(side * 66, 28, -0.05 * length), (side * 30, 60, -0.055 * length), (side * 5, 64, -0.085 * length)],
            [11, 8, 9],
        )
        ischium = box.tube([(side * 80, -14, -0.06 * length), (side * 64, -26, -0.125 * length)], [15, 14])
        ramus = box.tube([(side * 62, -22, -0.13 * length), (side * 8, 58, -0.105 * length)], [9, 7])
        ring = torch.minimum(torch.minimum(pubis, ischium), ramus)
        w.canvas.paint_bone(box, torch.minimum(torch.minimum(wing, cup), ring), label, M.MARROW, shell_mm=2.6)


def paint_ribs(w: Workbench) -> None:
    """Twelve pairs of ribs and their cartilages on the outside of the thoracic cavity."""
    sex, length = w.plan.sex, w.length
    bounds = torch.tensor(vertebral_bounds(sex)[5:18] * length, dtype=torch.float32, device=w.canvas.x.device)
    box = w.canvas.box((-190, -120, 0.34 * length), (190, 190, 1.02 * length))
    cavity = w.outlines.cavity[box.index]
    shell = (cavity - 5.5) / 4.6
    dy = box.y - 18 if sex == "M" else box.y + 6
    cosine = -dy / (box.x.square() + dy.square()).sqrt_().clamp_(min=1)
    around = 0.5 - 0.5 * cosine  # 0 at the spine, 1 at the sternum
    fall = (38 + 42 * ((THORACIC_TOP[sex] * length - box.z) / (0.5 * length)).clamp(0, 1)) * 1.25
    source = box.z + fall * around.clamp(max=0.62) - 40 * (around - 0.66).clamp(min=0) - 4
    index = torch.bucketize(source, bounds).clamp_(1, 12)
    low, high = bounds[index - 1], bounds[index]
    rib = 13 - index  # 1 at the top
    offset = (source - (low + high) / 2) / 6.8
    field = (shell.square() + offset.square()).sqrt_() - 1
    ends = torch.tensor([0, 0.9, 0.88, 0.86, 0.84, 0.82, 0.80, 0.78, 0.72, 0.66, 0.6, 0.42, 0.3], device=source.device)
    end = ends[rib]
    reach = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0.9, 0.84, 0.76, 0.42, 0.3], device=source.device)[rib]
    valid = (source > bounds[0]) & (source < bounds[-1]) & (box.x.abs() > 12)
    labels = torch.where(box.x < 0, 91 + rib, 103 + rib).to(torch.uint8)
    bone = torch.where(around < end, field, torch.ones_like(field)).mul_(5.0)
    w.canvas.paint_bone(box, torch.where(valid, bone, torch.ones_like(bone)), labels, shell_mm=2.4)
    cartilage = torch.where(valid & (around >= end) & (around < reach), field, torch.ones_like(field))
    w.canvas.paint(box, cartilage, M.CARTILAGE, ORGAN_IDS["costal_cartilages"])


def paint_sternum(w: Workbench) -> None:
    """Manubrium and body of the sternum on the front of the cage."""
    length = w.length
    low, high = (0.635, 0.905) if not w.female else (0.59, 0.862)
    box = w.canvas.box((-40, -20, low * length), (40, 190, high * length))
    cavity = w.outlines.cavity[box.index]
    width = 14 + 12 * ((box.z / length - high + 0.075) / 0.04).clamp(0, 1)
    field = torch.maximum(box.x.abs() - width, (cavity - 7).abs() - 5.5)
    field = torch.maximum(field, torch.maximum(low * length - box.z, box.z - high * length))
    field = torch.where(box.y > -10, field, torch.ones_like(field))
    w.canvas.paint_bone(box, field, ORGAN_IDS["sternum"], M.MARROW)


def paint_shoulders(w: Workbench) -> None:
    """Clavicles, scapulae turned by the raised arms, and humeri."""
    s = w.plan.lean_scale * (0.88 if w.female else 1.0)
    length, back = w.length, -8.0 if not w.female else -26.0
    top = 0.885 * length
    for side, name in ((-1.0, "left"), (1.0, "right")):
        joint = (side * 152 * s, back, top)
        start = w.at(side * 22, 62, 0.905)
        bend = w.at(side * 75, 48, 0.955)
        end = (side * 132 * s, back + 8, 0.972 * length)
        box = w.canvas.around([start, bend, end], 14)
        w.canvas.paint_bone(box, box.tube([start, bend, end], [8.5, 6, 6.5]), ORGAN_IDS[f"clavicula_{name}"])
        hand = (side * 176 * s, back + 14, 1.3 * length)
        box = w.canvas.around([joint, hand], 30)
        bone = torch.minimum(box.ellipsoid(joint, (23, 23, 23)), box.tube([joint, hand], [15, 11.5]))
        w.canvas.paint_bone(box, bone, ORGAN_IDS[f"humerus_{name}"], shell_mm=3.6)
        _paint_scapula(w, side, name, joint)


def _paint_scapula(w: Workbench, side: float, name: str, joint: tuple[float, float, float]) -> None:
    length = w.length
    glenoid = (joint[0] - side * 27, joint[1] - 3, joint[2] - 2)
    centre = (side * 112 * w.plan.lean_scale * (0.9 if w.female else 1), joint[1] - 48, 0.83 * length)
    near, far = sorted((centre[0] - side * 48, joint[0]))
    box = w.canvas.box((near, centre[1] - 40, centre[2] - 76), (far, joint[1] + 12, max(centre[2] + 76, joint[2] + 42)))
    turn = rotation(-12, side * 22, side * -28)
    plate = box.ellipsoid(centre, (42, 3.6, 72), turn)
    neck = box.tube([glenoid, (centre[0] + side * 10, centre[1] + 8, centre[2] + 22)], [13, 5])
    acromion = box.tube(
        [(centre[0] - side * 20, centre[1] - 12, centre[2] + 30), (joint[0] - side * 6, joint[1] - 14, joint[2] + 34)],
        [4, 7],
    )
    field = torch.minimum(torch.minimum(plate, neck), acromion)
    outside = w.outlines.cavity[box.index] > 11
    w.canvas.paint_bone(
        box, torch.where(outside, field, torch.ones_like(field)), ORGAN_IDS[f"scapula_{name}"], shell_mm=2.0
    )


def paint_skeleton(w: Workbench) -> None:
    """All bones, the spine first."""
    paint_spine(w)
    paint_hips(w)
    paint_shoulders(w)
    paint_sternum(w)
    paint_ribs(w)
