"""A grid to paint a body on: warped body coordinates, signed distances, and volumes met by level sets.

Positions are in millimetres of the sex's reference body (ICRP 110): x to the right from the midline, y forward from the
lumbar vertebrae, z up from the bottom of the sacrum. A structure is a field that is negative inside; `Canvas.paint`
fills voxels not yet taken, at the level of the field that gives the volume asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vtrial.phantom.tissues import Material

Point = Sequence[float] | NDArray[np.float64]


def smooth_noise(shape: Sequence[int], cells: Sequence[int], generator: torch.Generator) -> Tensor:
    """Smooth unit-variance Gaussian field of `shape`, from white noise on a grid of `cells` blurred by one cell."""
    device = generator.device
    white = torch.randn([1, 1, *(c + 4 for c in cells)], generator=generator, device=device)
    kernel = torch.tensor([0.06, 0.24, 0.4, 0.24, 0.06], device=device)
    for axis in range(3):
        view = [1, 1, 1, 1, 1]
        view[2 + axis] = 5
        pad = [0, 0, 0]
        pad[axis] = 2
        white = F.conv3d(white, kernel.view(view), padding=pad)
    inner = white[:, :, 2:-2, 2:-2, 2:-2]
    inner = (inner - inner.mean()) / inner.std()
    return F.interpolate(inner, size=list(shape), mode="trilinear", align_corners=True)[0, 0]


def rotation(degrees_x: float, degrees_y: float, degrees_z: float) -> np.ndarray:
    """Rotation matrix about x, then y, then z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad([degrees_x, degrees_y, degrees_z])):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


@dataclass(frozen=True)
class Box:
    """An index box of the canvas with its coordinates in reference millimetres, each (x, y, z)."""

    index: tuple[slice, slice, slice]
    x: Tensor
    y: Tensor
    z: Tensor

    def ellipsoid(self, centre: Point, radii: Point, turn: np.ndarray | None = None) -> Tensor:
        """Approximate signed distance in mm to an ellipsoid; rows of `turn` are its axes."""
        dx, dy, dz = self.x - centre[0], self.y - centre[1], self.z - centre[2]
        rows = np.eye(3) if turn is None else turn
        q: Tensor | float = 0.0
        for row, radius in zip(rows, radii):
            a, b, c = (float(v) / radius for v in row)
            q = q + (a * dx + b * dy + c * dz).square_()
        assert isinstance(q, Tensor)
        return q.sqrt_().sub_(1.0).mul_(float(np.prod(radii)) ** (1 / 3))

    def tube(self, points: Sequence[Point], radii: Sequence[float]) -> Tensor:
        """Signed distance in mm to a polyline with a radius at every point (round cone approximation)."""
        best: Tensor | None = None
        for p, q, r0, r1 in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            d = [float(b - a) for a, b in zip(p, q)]
            length2 = max(sum(v * v for v in d), 1e-6)
            rx, ry, rz = self.x - p[0], self.y - p[1], self.z - p[2]
            along = (rx * d[0]).add_(ry, alpha=d[1]).add_(rz, alpha=d[2])
            square = rx.square_().addcmul_(ry, ry).addcmul_(rz, rz)
            t = (along / length2).clamp_(0, 1)
            dist = square.sub_(t * (2 * along).sub_(t, alpha=length2)).clamp_(min=0).sqrt_()
            dist.sub_(t, alpha=r1 - r0).sub_(r0)
            best = dist if best is None else torch.minimum(best, dist)
        assert best is not None
        return best


class Canvas:
    """Labels and materials under construction, with the coordinates of every voxel.

    `labels` uint8 TotalSegmentator ids, `material` uint8, both (x, y, z) over the window `window` of the full grid.
    """

    def __init__(self, x: Tensor, y: Tensor, z: Tensor, start_mm: Point, spacing_mm: Point, voxel_ml: float) -> None:
        self.x, self.y, self.z = x, y, z
        # Unwarped coordinates of the first voxel and steps: boxes are found from them, widened by the largest warp.
        self.start = [float(s) for s in start_mm]
        self.spacing = [float(s) for s in spacing_mm]
        self.voxel_ml = voxel_ml
        self.labels = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        self.material = torch.zeros_like(self.labels)
        self.margin = 14.0

    def box(self, low: Point, high: Point) -> Box:
        """The part of the canvas that holds every point between two corners (reference mm)."""
        index = []
        for axis, size in enumerate(self.x.shape):
            a = int((low[axis] - self.margin - self.start[axis]) / self.spacing[axis])
            b = int((high[axis] + self.margin - self.start[axis]) / self.spacing[axis]) + 2
            a = min(max(a, 0), size - 1)
            index.append(slice(a, min(max(b, a + 1), size)))
        at = (index[0], index[1], index[2])
        return Box(at, self.x[at], self.y[at], self.z[at])

    def around(self, points: Sequence[Point], reach: float) -> Box:
        """The box that holds all points and `reach` mm about them."""
        array = np.asarray(points, dtype=float)
        return self.box(array.min(0) - reach, array.max(0) + reach)

    def free(self, box: Box) -> Tensor:
        """Mask (box shape) of voxels that nothing has been painted on."""
        return self.material[box.index] == 0

    def paint(
        self,
        box: Box,
        field: Tensor,
        material: Material,
        label: int | Tensor = 0,
        volume_ml: float | None = None,
        within: Tensor | None = None,
    ) -> Tensor:
        """Fill free voxels (of `within`) where `field` < 0, or below the level that gives `volume_ml`.

        Returns the mask (box shape) of the voxels painted.
        """
        allowed = self.free(box) if within is None else self.free(box) & within
        level = 0.0 if volume_ml is None else self.level(field, allowed, volume_ml)
        mask = allowed & (field < level)
        self.material[box.index].masked_fill_(mask, int(material))
        if isinstance(label, Tensor):
            target = self.labels[box.index]
            target.copy_(torch.where(mask, label, target))
        elif label:
            self.labels[box.index].masked_fill_(mask, label)
        return mask

    def paint_bone(
        self, box: Box, field: Tensor, label: int | Tensor, inside: Material = Material.BONE, shell_mm: float = 2.3
    ) -> None:
        """Paint a bone: `inside` under a cortical shell of `shell_mm`."""
        mask = self.paint(box, field, inside, label)
        self.repaint(box, mask & (field > -shell_mm), Material.CORTICAL)

    def level(self, field: Tensor, allowed: Tensor, volume_ml: float) -> Tensor:
        """Level of `field` below which the allowed voxels hold `volume_ml`."""
        values = field[allowed]
        k = min(max(round(volume_ml / self.voxel_ml), 1), max(values.numel() - 1, 1))
        return values.kthvalue(k).values

    def repaint(self, box: Box, mask: Tensor, material: Material, label: int | None = None) -> None:
        """Overwrite a mask (box shape) whatever it holds."""
        self.material[box.index].masked_fill_(mask, int(material))
        if label is not None:
            self.labels[box.index].masked_fill_(mask, label)


def smooth_min(a: Tensor, b: Tensor, width_mm: float) -> Tensor:
    """Minimum of two distances with a fillet of `width_mm` (polynomial blend)."""
    h = (0.5 + 0.5 * (b - a) / width_mm).clamp_(0, 1)
    return torch.lerp(b, a, h) - width_mm * h * (1 - h)
