"""Volumes sampled on upright grids: one interpolation from the scanner's voxels to ours, whatever lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vtrial.imaging.volume import Volume

Triple = tuple[int, int, int]
Point = tuple[float, float, float]

_STRAIGHT = 1e-4  # voxels of drift over an axis: below it a turned grid cannot be told from a straight one


@dataclass(frozen=True)
class Grid:
    """A RAS+ grid: voxels (x, y, z), their size, and the world position of the low corner of the first, in mm."""

    shape: Triple
    spacing_mm: Point
    corner_mm: Point

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel indices to world mm (4, 4)."""
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = np.add(self.corner_mm, np.multiply(0.5, self.spacing_mm))
        return affine

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    def centres_mm(self, axis: int) -> NDArray[np.float64]:
        """World positions of the voxel centres along an axis."""
        steps = np.arange(self.shape[axis], dtype=np.float64) + 0.5
        return np.asarray(self.corner_mm[axis] + steps * self.spacing_mm[axis], dtype=np.float64)


def covering(low_mm: NDArray[np.float64], high_mm: NDArray[np.float64], spacing_mm: Point) -> Grid:
    """The smallest grid of a spacing that covers a box, centred on it."""
    shape = np.maximum(np.ceil((high_mm - low_mm) / spacing_mm - 1e-6), 1).astype(int)
    corner = (low_mm + high_mm - shape * spacing_mm) / 2.0
    return Grid(_triple(shape), spacing_mm, (float(corner[0]), float(corner[1]), float(corner[2])))


def sample(volume: Volume, grid: Grid, outside: float, *, nearest: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """A volume's values at the voxel centres of a grid, and where the grid lies in its field of view (bool).

    Linear, as the CTs of AutoPET came to their PETs, and float32; with `nearest` the value of the nearest voxel in its
    own type. In the half voxel between the last centres and the edge the last value holds; beyond is `outside`. Any
    invertible affine is right: mirrored, oblique or sheared.
    """
    mapping = np.linalg.inv(volume.affine) @ grid.affine
    matrix, offset = mapping[:3, :3], mapping[:3, 3]
    drift = np.abs(matrix - np.diag(np.diag(matrix))) * grid.shape
    straight = bool(drift.max() < _STRAIGHT)
    values = ndimage.affine_transform(
        volume.voxels,
        np.diag(matrix) if straight else matrix,
        offset,
        output_shape=grid.shape,
        output=volume.voxels.dtype if nearest else np.float32,
        order=0 if nearest else 1,
        mode="nearest",
    )
    inside = np.ones(grid.shape, dtype=bool)
    steps = np.meshgrid(*(np.arange(size, dtype=np.float32) for size in grid.shape), indexing="ij", sparse=True)
    for row, start, size in zip(matrix.astype(np.float32), offset, volume.voxels.shape, strict=True):
        at = sum((factor * step for factor, step in zip(row, steps, strict=True) if factor), np.float32(start))
        inside &= (at >= -0.5) & (at <= size - 0.5)
    values[~inside] = outside
    return values, inside


def _triple(values: NDArray[Any]) -> Triple:
    return int(values[0]), int(values[1]), int(values[2])
