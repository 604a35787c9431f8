"""Abdomen and pelvis: kidneys, liver, spleen, stomach, pancreas, bowel, bladder. Positions from ICRP 110 centroids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtrial.organs import ORGAN_IDS
from vtrial.phantom.canvas import Box, rotation
from vtrial.phantom.thorax import diaphragm, w_front
from vtrial.phantom.tissues import Material as M
from vtrial.phantom.workbench import Workbench


def paint_kidneys(w: Workbench) -> None:
    """Both kidneys at the planned volume: cortex, medullary pyramids, and urine in calyces and pelvis."""
    total = w.plan.volumes["kidneys"]
    left_share = 0.51 + 0.02 * float(np.clip(w.rng.normal(), -2, 2))
    for side, name, share in ((-1.0, "left", left_share), (1.0, "right", 1 - left_share)):
        volume = total * share
        size = (volume / 150.0) ** (1 / 3)
        x, y, z = w.at(side * 70, -6, 0.470 if side < 0 else 0.448, 0.35)
        centre = np.array([x + side * 3 * (size - 1), y, z]) + w.jitter(5.0)
        behind = w.spine(z / w.length) - 14
        centre[1] = max(centre[1], behind)
        turn = rotation(float(w.rng.normal(-12, 4)), side * float(w.rng.normal(16, 4)), side * 25)
        box = w.canvas.around([centre], 85 * size)
        radii = np.array([25.0, 29.0, 54.0]) * size
        body = box.ellipsoid(centre, radii, turn)
        hilum = centre + np.array([-side * 21.0, 9.0, 0.0]) * size
        notch = box.ellipsoid(hilum, np.array([15.0, 11.0, 17.0]) * size, turn)
        field = torch.maximum(body, -notch) + w.bumps(box, 1.2)
        ok = w.inside(box, -4) & (diaphragm(w, box) < 0)
        kidney = w.canvas.paint(box, field, M.RENAL_CORTEX, ORGAN_IDS[f"kidney_{name}"], volume, ok)
        _collecting_system(w, box, kidney, body, centre, hilum, turn, size)
        gland = w.at(side * 50, -12, 0.525 if side < 0 else 0.512, 0.5)
        adrenal = w.canvas.around([gland], 24)
        shape = torch.minimum(
            adrenal.tube([gland, (gland[0] + 9, gland[1] - 14, gland[2] - 8)], [3.5, 2.5]),
            adrenal.tube([gland, (gland[0] - 9, gland[1] - 14, gland[2] - 8)], [3.5, 2.5]),
        )
        w.canvas.paint(adrenal, shape, M.ADRENAL, ORGAN_IDS[f"adrenal_gland_{name}"])


def _collecting_system(
    w: Workbench,
    box: Box,
    kidney: Tensor,
    body: Tensor,
    centre: np.ndarray,
    hilum: np.ndarray,
    turn: np.ndarray,
    size: float,
) -> None:
    deep = kidney & (body < -8.5 * size)
    pyramids = (w.fine[0][box.index] > -0.3) & deep
    w.canvas.repaint(box, pyramids, M.RENAL_MEDULLA)
    inner = 0.45 * centre + 0.55 * hilum
    long = turn[2] * 17.0 * size
    calyces = box.tube(
        [inner + long, inner + 0.4 * (hilum - inner), inner - long], [3.2 * size, 3.8 * size, 3.2 * size]
    )
    w.canvas.repaint(box, kidney & (calyces < 0), M.RENAL_PELVIS)
    # What lies outside the kidney's mask: the extrarenal pelvis and the start of the ureter.
    end = (float(hilum[0]), float(hilum[1]) + 4, float(hilum[2]) - 26 * size)
    w.canvas.paint(box, box.tube([hilum, end], [4.0, 2.2]), M.RENAL_PELVIS)


def paint_liver(w: Workbench) -> None:
    """Liver under the diaphragm, cut by its sloping lower face, with vessels; gallbladder under it."""
    volume = w.plan.volumes["liver"]
    if w.female:
        centre = np.array([40.0, 20.0, 0.520 * w.length])
    else:
        centre = np.array([52.0, 40.0, 0.560 * w.length])
    centre = centre + np.array([0, 0, w.lift_mm]) + w.jitter(4.0)
    box = w.canvas.box(list(centre - np.array([150, 130, 170])), list(centre + np.array([110, 140, 110])))
    right = box.ellipsoid(centre + np.array([22, -8, -8]), (92, 92, 92))
    left = box.ellipsoid(centre + np.array([-62, 32, 26]), (72, 46, 40), rotation(0, 20, -15))
    dome = torch.minimum(right, left)
    slope = np.array([-0.50, -0.30, -0.81]) + w.rng.normal(0, 0.05, 3)
    slope = slope / np.linalg.norm(slope)
    p = centre + np.array([-18, -22, -34])
    below = (box.x - p[0]) * slope[0] + (box.y - p[1]) * slope[1] + (box.z - p[2]) * slope[2]
    field = torch.maximum(dome, below * 0.9 - 10) + w.bumps(box, 3.0)
    ok = w.inside(box, 2) & (diaphragm(w, box) < -1.5)
    bladder_at = centre + np.array([4, 16, -62])
    pouch = w.canvas.around([bladder_at], 60)
    turn = rotation(35, 10, 0)
    w.canvas.paint(
        pouch,
        pouch.ellipsoid(bladder_at, (14, 15, 34), turn),
        M.GALLBLADDER,
        4,
        w.plan.volumes["gallbladder"],
        w.inside(pouch, 2),
    )
    liver = w.canvas.paint(box, field, M.LIVER, ORGAN_IDS["liver"], volume, ok)
    tubes = (w.coarse[0][box.index].square() + w.fine[1][box.index].square() * 0.35).sqrt_()
    w.canvas.repaint(box, liver & (tubes < 0.13), M.LIVER_VESSEL)


def paint_spleen(w: Workbench) -> None:
    """Spleen against the left back wall under the diaphragm."""
    x, y, z = w.at(-97, -14, 0.572, 0.9)
    centre = np.array([x, y, z]) + w.jitter(4.0)
    size = (w.plan.volumes["spleen"] / 200.0) ** (1 / 3)
    box = w.canvas.around([centre], 95 * size)
    turn = rotation(-25, -28, 20)
    field = box.ellipsoid(centre, (27, 42, 62), turn) + w.bumps(box, 2.0)
    ok = w.inside(box, 2) & (diaphragm(w, box) < -1.5)
    w.canvas.paint(box, field, M.SPLEEN, ORGAN_IDS["spleen"], w.plan.volumes["spleen"], ok)


def paint_pancreas(w: Workbench) -> None:
    """Pancreas across the spine, before the liver can take its place."""
    path = [w.at(38, 44, 0.452, 0.2), w.at(12, 62, 0.468, 0.2), w.at(-22, 52, 0.487, 0.3), w.at(-66, 24, 0.522, 0.5)]
    gland = w.canvas.around(path, 40)
    shape = gland.tube(path, [16, 10, 10, 8]) + w.bumps(gland, 2.0)
    w.canvas.paint(gland, shape, M.PANCREAS, ORGAN_IDS["pancreas"], w.plan.volumes["pancreas"], w.inside(gland, 3))


def paint_stomach(w: Workbench) -> None:
    """Stomach from the fundus under the left dome to the antrum, with an air bubble in front; duodenum after it."""
    volume = w.plan.volumes["stomach"]
    fundus = np.array(w.at(-62, 28, 0.598, 0.9)) + w.jitter(4)
    corpus = np.array(w.at(-66, 66, 0.53, 0.7)) + w.jitter(6)
    antrum = np.array(w.at(-14, 80, 0.475, 0.4)) + w.jitter(6)
    pylorus = np.array(w.at(26, 62, 0.482, 0.3))
    box = w.canvas.around([fundus, corpus, antrum, pylorus], 60)
    field = box.tube([fundus, corpus, antrum, pylorus], [30, 28, 18, 10]) + w.bumps(box, 2.5)
    ok = w.inside(box, 3) & (diaphragm(w, box) < -2)
    stomach = w.canvas.paint(box, field, M.STOMACH_WALL, ORGAN_IDS["stomach"], volume, ok)
    level = field[stomach].max()
    lumen = stomach & (field < level - 4.5)
    w.canvas.repaint(box, lumen, M.STOMACH_CONTENT)
    air = float(corpus[1] + w.rng.uniform(8, 30))
    w.canvas.repaint(box, lumen & (box.y > air), M.GAS)
    loop = [w.at(26, 60, 0.482, 0.3), w.at(52, 38, 0.475, 0.2), w.at(54, 32, 0.405), w.at(10, 34, 0.392)]
    duodenum = w.canvas.around(loop, 26)
    w.canvas.paint(
        duodenum, duodenum.tube(loop, [12, 12, 12, 11]), M.BOWEL, ORGAN_IDS["duodenum"], None, w.inside(duodenum, 3)
    )


def paint_colon(w: Workbench) -> None:
    """Colon from caecum to rectum: haustra, stool, and gas that rises to the front."""
    out = 0.4 * w.plan.belly_mm
    j = w.jitter(7)
    front = 0.6 * w.plan.belly_mm
    path = [
        w.at(88 + out, 34, 0.13), w.at(96 + out, 36, 0.27), w.at(92 + out, 30, 0.40, 0.2),
        w.at(56, 84 + front, 0.40 + j[0] / 500), w.at(0, 98 + front, 0.36 + j[1] / 500),
        w.at(-62, 84 + front, 0.42 + j[0] / 500), w.at(-106 - out, 16, 0.53, 0.5), w.at(-106 - out, 24, 0.40),
        w.at(-104 - out, 30, 0.25), w.at(-84, 36, 0.14), w.at(-44, 50, 0.105), w.at(-8, 22 + j[2], 0.15),
        w.at(4, -16, 0.13), w.at(0, -30, 0.06), w.at(0, -24, -0.03), w.at(0, -10, -0.10),
    ]  # fmt: skip
    radii = [24, 23, 20, 18, 18, 17, 17, 15, 14, 13, 13, 13, 14, 17, 16, 8]
    scale = float(np.exp(0.12 * w.rng.normal()))
    content = float(w.rng.uniform(0.1, 0.45))
    for i in range(len(path) - 1):
        points, size = path[i : i + 2], [r * scale for r in radii[i : i + 2]]
        box = w.canvas.around(points, 30)
        field = (
            box.tube(points, size) + 2.6 * torch.sin((box.z + box.x) / 6.0) * torch.cos(box.y / 9.0) + w.bumps(box, 2.0)
        )
        ok = w.inside(box, 3) & (diaphragm(w, box) < -3)
        part = w.canvas.paint(box, field, M.COLON_WALL, ORGAN_IDS["colon"], None, ok)
        lumen = part & (field < -3.2)
        w.canvas.repaint(box, lumen, M.COLON_CONTENT)
        middle = (points[0][1] + points[1][1]) / 2
        gas = lumen & ((box.y - middle) / 14 + 0.8 * w.coarse[1][box.index] > 1.3 - 2.2 * content)
        w.canvas.repaint(box, gas, M.GAS)


def paint_pelvis(w: Workbench) -> None:
    """Bladder full of urine, and prostate or uterus."""
    x, y, z = w.at(0, 40, 0.012)
    volume = w.plan.volumes["bladder"]
    size = (volume / 150.0) ** (1 / 3)
    centre = np.array([x, y + 6 * (size - 1), z + 22 * (size - 1)]) + w.jitter(3)
    box = w.canvas.around([centre], 80 * size)
    field = box.ellipsoid(centre, (43, 33, 32)) + w.bumps(box, 2.0)
    bladder = w.canvas.paint(box, field, M.BLADDER_WALL, ORGAN_IDS["urinary_bladder"], volume, w.inside(box, 1))
    w.canvas.repaint(box, bladder & (field < field[bladder].max() - 3.0), M.URINE)
    if w.female:
        womb = np.array(w.at(4, 8, 0.07)) + w.jitter(5)
        box = w.canvas.around([womb], 60)
        if w.rng.uniform() < 0.8:  # the others had it taken out
            shape = box.ellipsoid(womb, (24, 30, 22), rotation(30, 0, 0)) + w.bumps(box, 2)
            w.canvas.paint(box, shape, M.PELVIC_ORGAN, 0, None, w.inside(box, 2))
    else:
        gland = (0.0, y - 16, z - 38)
        box = w.canvas.around([gland], 40)
        volume = float(22 + 0.35 * max(w.plan.age_years - 40, 0)) * float(np.exp(0.25 * w.rng.normal()))
        w.canvas.paint(box, box.ellipsoid(gland, (24, 18, 20)), M.PELVIC_ORGAN, ORGAN_IDS["prostate"], volume)


def paint_small_bowel(w: Workbench) -> None:
    """Loops of small bowel through what is left of the abdomen, with mesenteric fat between them."""
    centre = w.at(-6, 42 + 0.35 * w.plan.belly_mm, 0.27)
    box = w.canvas.around([centre], 165)
    radii = (104 + 0.3 * w.plan.belly_mm, 66 + 0.25 * w.plan.belly_mm, 128)
    region = box.ellipsoid(centre, radii) < 0
    front = box.y > w_front(w, 0.27) + 8
    loops = (w.fine[0][box.index].square() + w.fine[1][box.index].square()).sqrt_()
    share = 1.30 - 0.018 * w.plan.belly_mm
    part = w.canvas.paint(
        box, loops - share, M.BOWEL, ORGAN_IDS["small_bowel"], None, region & front & w.inside(box, 5)
    )
    w.canvas.repaint(box, part & (loops < 0.16) & (w.coarse[0][box.index] > 0.9), M.GAS)


def paint_abdomen(w: Workbench) -> None:
    """Everything below the diaphragm, solid organs first, small bowel last."""
    paint_kidneys(w)
    paint_pelvis(w)
    paint_spleen(w)
    paint_pancreas(w)
    paint_liver(w)
    paint_stomach(w)
    paint_colon(w)
    paint_small_bowel(w)
