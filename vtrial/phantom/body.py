"""The outline of the body: where the cavity, the lean body and the skin end, slice by slice.

Half-widths and depths in reference mm over z fractions (0 sacrum bottom, 1 clavicle top), read off the trunk profiles
and organ extents of the ICRP 110 reference persons; arms are raised, so the shoulders are drawn apart.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.phantom.anthropometry import BodyPlan
from vtrial.phantom.canvas import Canvas, smooth_min, smooth_noise


def _read_profiles() -> dict[tuple[str, str], NDArray[np.float64]]:
    """Tables (z fraction, values…) by (profile, sex) from profiles.csv beside this module."""
    text = resources.files("vtrial.phantom").joinpath("profiles.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        values = [float(row[c]) for c in ("z_fraction", "a", "b", "c") if row[c]]
        tables.setdefault((row["profile"], row["sex"]), []).append(values)
    return {key: np.array(rows) for key, rows in tables.items()}


PROFILES = _read_profiles()
WALL_MM = {"side": 15.0, "front": 11.0, "back": 18.0}


@dataclass(frozen=True)
class Frame:
    """The plan laid on slices: z fraction and profiles of every slice, each (384,) in reference mm."""

    z: NDArray[np.float64]
    lean: NDArray[np.float64]  # (3, 384): half-width, front, back
    cavity: NDArray[np.float64]
    fat: NDArray[np.float64]
    y_centre: float  # reference y at the centre of the grid


@dataclass(frozen=True)
class Outlines:
    """Signed distances in reference mm over the canvas: to the cavity wall, the lean body, and the skin."""

    cavity: Tensor
    lean: Tensor
    skin: Tensor
    breast: Tensor | None


def spine_y(sex: str, z_fraction: float) -> float:
    """Reference y of the centre of the vertebral bodies at a z fraction."""
    return float(np.interp(z_fraction, *PROFILES["spine", sex].T))


def lay_frame(plan: BodyPlan) -> Frame:
    """Scale the reference profiles to the plan and sample them at the 384 slices."""
    length = plan.reference_length_mm
    z_mm = plan.bottom_mm + (np.arange(SHAPE[2]) + 0.5) * plan.extent_mm / SHAPE[2] / plan.scale_z
    z = z_mm / length
    at, *columns = PROFILES["cavity", plan.sex].T
    cavity = np.stack([np.interp(z, at, column) for column in columns])
    at, *columns = PROFILES["lean", plan.sex].T
    lean = np.stack([np.interp(z, at, column) for column in columns])
    cage = 1 + (plan.cage_scale - 1) * np.clip((z - 0.42) / 0.15, 0, 1)
    belly = plan.belly_mm * np.exp(-(((z - 0.33) / np.where(z < 0.33, 0.16, 0.24)) ** 2))
    middle = (cavity[1] + cavity[2]) / 2
    cavity = np.stack([cavity[0] * cage, middle + (cavity[1] - middle) * cage, middle + (cavity[2] - middle) * cage])
    cavity += np.stack([0.55 * belly, belly, 0 * belly])
    middle = (lean[1] + lean[2]) / 2
    s = plan.lean_scale
    lean = np.stack([lean[0] * s, middle + (lean[1] - middle) * s, middle + (lean[2] - middle) * s])
    lean += np.stack([0.55 * belly, belly, 0 * belly])
    trunk = np.clip((0.9 - z) / 0.1, 0, 1)
    lean[0] = np.maximum(lean[0], (cavity[0] + WALL_MM["side"]) * trunk)
    lean[1] = np.maximum(lean[1], np.where(trunk > 0, cavity[1] + WALL_MM["front"], -999))
    lean[2] = np.minimum(lean[2], np.where(trunk > 0, cavity[2] - WALL_MM["back"], 999))
    fat = np.interp(z, *PROFILES["fat", plan.sex].T)
    body = slice(40, 330)
    y_centre = float(lean[1][body].max() + lean[2][body].min()) / 2
    return Frame(z=z, lean=lean, cavity=cavity, fat=fat, y_centre=y_centre)


def _fat_thickness(plan: BodyPlan, frame: Frame) -> float:
    """Subcutaneous fat in mm (at relative thickness 1) that brings the trunk to its planned volume, roughly."""
    step = float(frame.z[1] - frame.z[0]) * plan.reference_length_mm * plan.scale_x * plan.scale_y * plan.scale_z
    half = (frame.lean[1] - frame.lean[2]) / 2
    grid = np.arange(3.0, 70.0)[:, None] * frame.fat
    volumes = (3.45 * (frame.lean[0] + grid) * (half + grid)).sum(1) * step / 1000.0
    return float(np.interp(plan.body_ml, volumes, np.arange(3.0, 70.0)))


def make_canvas(
    plan: BodyPlan, frame: Frame, rng: np.random.Generator, generator: torch.Generator
) -> tuple[Canvas, tuple[slice, slice, slice]]:
    """Coordinates of the part of the grid that the body can fill, smoothly deformed (4 mm SD over about 55 mm)."""
    device = generator.device
    fat = _fat_thickness(plan, frame) * frame.fat + 22.0
    low = float((frame.lean[2] - fat).min()) - frame.y_centre
    high = float((frame.lean[1] + fat).max()) - frame.y_centre + (18.0 if plan.sex == "F" else 0.0)
    centre, mm = SHAPE[1] / 2, plan.scale_y / IN_PLANE_MM
    rows = slice(max(0, int(centre + low * mm)), min(SHAPE[1], int(centre + high * mm) + 1))
    window = (slice(0, SHAPE[0]), rows, slice(0, SHAPE[2]))
    shift = rng.normal(0, 2.0, 2)
    x = (np.arange(SHAPE[0]) + 0.5 - SHAPE[0] / 2) * IN_PLANE_MM / plan.scale_x + shift[0]
    y = (np.arange(SHAPE[1]) + 0.5 - SHAPE[1] / 2) * IN_PLANE_MM / plan.scale_y + frame.y_centre + shift[1]
    axes = [x, y[window[1]], frame.z * plan.reference_length_mm]
    shape = tuple(len(a) for a in axes)
    spacing = [float(a[1] - a[0]) for a in axes]
    cells = [max(4, round(n * s / 55)) for n, s in zip(shape, spacing)]
    grids = []
    for axis, values in enumerate(axes):
        view = [1, 1, 1]
        view[axis] = -1
        base = torch.tensor(values, dtype=torch.float32, device=device).view(view)
        grids.append(smooth_noise(shape, cells, generator).mul_(4.0).add_(base))
    voxel_ml = IN_PLANE_MM**2 * plan.extent_mm / SHAPE[2] / 1000.0
    return Canvas(grids[0], grids[1], grids[2], [float(a[0]) for a in axes], spacing, voxel_ml), window


def _superellipse(canvas: Canvas, profile: NDArray[np.float64]) -> Tensor:
    """Radial distance in mm to superellipses (exponent 2.5) given by half-width, front and back of every slice."""
    rows = torch.tensor(profile, dtype=torch.float32, device=canvas.x.device)
    width, front, back = (row.view(1, 1, -1) for row in rows)
    middle, depth = (front + back) / 2, (front - back) / 2
    u = (canvas.x / width).abs_()
    v = ((canvas.y - middle) / depth).abs_()
    q = (u.square() * u.sqrt()).add_(v.square() * v.sqrt()).pow_(0.4).clamp_(min=0.02)
    radius: Tensor = (canvas.x.square() + (canvas.y - middle).square_()).sqrt_()
    return radius.mul_(1 - q.reciprocal_())


def draw_outlines(
    plan: BodyPlan, frame: Frame, canvas: Canvas, rng: np.random.Generator, generator: torch.Generator
) -> Outlines:
    """Cavity, lean body with raised arms and parted thighs, and the skin at which the body has its planned volume."""
    length = plan.reference_length_mm
    cavity = _superellipse(canvas, frame.cavity)
    lean = _superellipse(canvas, frame.lean)
    s = plan.lean_scale
    shoulder_x = (150.0 if plan.sex == "M" else 132.0) * s
    back = -8.0 if plan.sex == "M" else -24.0
    tilt = rng.normal(0, 8, 2)
    for side in (-1.0, 1.0):
        joint = (side * shoulder_x, back, 0.885 * length)
        hand = (side * (shoulder_x + 22 + tilt[0]), back + 14 + tilt[1], 1.3 * length)
        chest = (side * (shoulder_x - 42), back, 0.80 * length)
        box = canvas.around([joint, hand, chest], 130)
        arm = box.tube([chest, joint, hand], [46 * s, 50 * s, 41 * s])
        lean[box.index] = smooth_min(lean[box.index], arm, 34.0)
    gap = (-0.125 * length - canvas.z).clamp_(min=0).mul_(0.3).sub_(canvas.x.abs())
    lean = torch.maximum(lean, gap)
    weight = torch.tensor(frame.fat, dtype=torch.float32, device=canvas.x.device).view(1, 1, -1)
    cells = [max(4, round(n * sp / 60)) for n, sp in zip(canvas.x.shape, canvas.spacing)]
    weight = weight * (1 + 0.12 * smooth_noise(canvas.x.shape, cells, generator))
    low = (1 - (canvas.z / (0.16 * length)).square_()).clamp_(min=0)  # buttocks
    weight = weight + (0.45 if plan.sex == "F" else 0.25) * low * (canvas.y < -20)
    breast = _breasts(plan, frame, canvas) if plan.sex == "F" else None
    return Outlines(cavity, lean, _skin(plan, canvas, lean, weight, gap, breast), breast)


def _breasts(plan: BodyPlan, frame: Frame, canvas: Canvas) -> Tensor:
    """Signed distance to both breasts: flattened ellipsoids on the chest wall, lying back."""
    length = plan.reference_length_mm
    front = float(np.interp(0.70, frame.z, frame.lean[1]))
    size = (plan.breast_ml / 330.0) ** (1 / 3)
    out = torch.full_like(canvas.x, 99.0)
    for side in (-1.0, 1.0):
        centre = (side * 74.0 * plan.lean_scale, front - 12.0, 0.715 * length)
        box = canvas.around([centre], 75 * size)
        out[box.index] = torch.minimum(out[box.index], box.ellipsoid(centre, (60 * size, 36 * size, 58 * size)))
    return out


def _skin(plan: BodyPlan, canvas: Canvas, lean: Tensor, weight: Tensor, gap: Tensor, breast: Tensor | None) -> Tensor:
    """Signed distance to the skin: fat of relative thickness `weight` over the lean body, at the planned volume."""
    ratio = lean / weight
    ratio = torch.where(gap > 6.0, torch.full_like(ratio, 1e4), ratio)
    target = round(plan.body_ml / canvas.voxel_ml)
    if breast is not None:
        in_breast = (breast < 0) & (lean > 0)
        target -= int((in_breast & (ratio > 12)).sum())
    k = min(max(target, 1), ratio.numel())
    thickness = ratio.view(-1).kthvalue(k).values.clamp(min=2.5)
    skin = (ratio - thickness).mul_(weight)
    return skin if breast is None else torch.minimum(skin, breast)
