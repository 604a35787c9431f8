"""How well a CT and a PET of one body lie over each other, in figures: outlines, the liver's dome, uptake off the CT.

The CT is one breath and the PET is minutes of them, so some millimetres are usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.preparation.body import PET_MARGIN_MM, Mask, filled, grown, largest_part, reach, shrunk
from vtrial.preparation.grid import Grid

OUTLINE_PART = 0.25  # of the body's median SUV: on a real scan the PET's outline is then the skin to 3 mm
PET_OUTSIDE_MM = 2.0 * PET_MARGIN_MM
_NEAR_MM = 30.0  # of the diaphragm
_DOME_MM = 60.0  # above and below the dome's top; liver and lung are what is more than half of it away
_CONTRAST = 1.3  # of liver to lung; usual is 3 to 5

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Sketch:
    """Every second voxel along each axis of a pair on one grid, enough to judge it by.

    HU, SUV, the body by the CT, its outline by the PET (bool), and where the voxels lie.
    """

    ct_hu: Array
    suv: Array
    body: Mask
    outline: Mask
    grid: Grid


def sketch(ct_hu: Array, suv: Array, body: Mask, grid: Grid) -> Sketch:
    """The sketch of a pair. The PET's outline is its largest uptake above a quarter of the body's median, filled."""
    ct_hu, suv, body = ct_hu[::2, ::2, ::2], suv[::2, ::2, ::2], body[::2, ::2, ::2]
    outline = filled(largest_part(_uptake(suv, body)))
    x, y, z = grid.spacing_mm
    corner = (grid.corner_mm[0] - x / 2.0, grid.corner_mm[1] - y / 2.0, grid.corner_mm[2] - z / 2.0)
    shape = (body.shape[0], body.shape[1], body.shape[2])
    return Sketch(ct_hu, suv, body, outline, Grid(shape, (2.0 * x, 2.0 * y, 2.0 * z), corner))


def outline_gap_mm(of: Sketch, z_mm: float) -> float | None:
    """Mean distance in mm of the CT's and the PET's outlines within 30 mm of a height; None without a body there.

    It is the area that one has and the other has not, over the length of the CT's outline.
    """
    near = np.abs(of.grid.centres_mm(2) - z_mm) < _NEAR_MM
    body, outline = of.body[:, :, near], of.outline[:, :, near]
    skin = body & ~shrunk(body, (3, 3, 1))
    if not skin.any():
        return None
    return float((body ^ outline).sum()) / float(skin.sum()) * of.grid.spacing_mm[0]


def breathing_mm(of: Sketch, liver: Mask) -> float | None:
    """How much higher the liver's dome lies in the PET than in the CT's mask, in mm; None where neither tells.

    Over the columns of the dome the mean SUV falls from liver to lung; it should cross their middle at the mask's top.
    """
    if not liver.any():
        return None
    size, step = liver.shape[2], of.grid.spacing_mm[2]
    tops = np.where(liver.any(axis=2), size - 1 - liver[:, :, ::-1].argmax(axis=2), -size)
    dome = np.nonzero(tops > tops.max() - _DOME_MM / 2.0 / step)
    offsets = np.arange(-round(_DOME_MM / step), round(_DOME_MM / step) + 1)
    at = tops[dome][:, None] + offsets
    if at.min() < 0 or at.max() >= size:  # the dome is too near to an end
        return None
    profile = of.suv[dome[0][:, None], dome[1][:, None], at].mean(axis=0)
    half = len(offsets) // 4
    inner, outer = float(profile[:half].mean()), float(profile[-half:].mean())
    if inner < _CONTRAST * outer:
        return None
    after = int(np.argmax(profile < (inner + outer) / 2.0))
    before, below = float(profile[after - 1]), float(profile[after])
    crossing = after - 1 + (before - (inner + outer) / 2.0) / (before - below)
    return (float(offsets[0]) + crossing - 0.5) * step  # the mask's top is half a voxel above its last centre


def outside_ml(of: Sketch) -> float:
    """The largest connected uptake that lies further off the CT's body than breathing and blur explain, in ml."""
    x, y, _ = reach(PET_OUTSIDE_MM, of.grid.spacing_mm)
    off = _uptake(of.suv, of.body) & ~grown(of.body, (x, y, 1))
    return float(largest_part(off).sum()) * of.grid.voxel_ml


def _uptake(suv: Array, body: Mask) -> Mask:
    usual = float(np.median(suv[body])) if body.any() else 0.0
    return np.asarray(suv > OUTLINE_PART * max(usual, 1e-6))
