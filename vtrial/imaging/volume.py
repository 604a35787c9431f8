"""A volume in the world: its voxels, where they lie in the patient, and how two of them lie to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from vtrial.imaging.files import spacing_of

LEAST_COVERAGE = 0.5  # of a PET's length, by its CT
_LEAST_IN_PLANE = 0.5  # of the smaller field of view
_axes: Any = nibabel.orientations  # not typed

Affine = NDArray[np.float64]
Box = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The lowest and the highest corner (RAS, mm) of a field of view."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (x, y, z) with their 4x4 affine to world millimetres; the axes run to the right, front and head."""

    voxels: NDArray[Any]
    affine: Affine

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z."""
        return spacing_of(self.affine)

    @property
    def box_mm(self) -> Box:
        """The field of view, voxel edges included."""
        return box_of(self.voxels.shape, self.affine)


def box_of(shape: tuple[int, ...], affine: Affine) -> Box:
    """The field of view of a grid, voxel edges included."""
    ends = np.array([(-0.5, size - 0.5) for size in shape])
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    return world.min(axis=0), world.max(axis=0)


def upright(voxels: NDArray[Any], affine: Affine) -> Volume:
    """Voxels with their axes put in the order right, front, head, without interpolation; an oblique grid stays oblique.

    A left-handed grid is mirrored in memory, not in the patient.
    """
    turn = _axes.io_orientation(affine)
    turned = np.ascontiguousarray(_axes.apply_orientation(voxels, turn))
    return Volume(turned, np.asarray(affine @ _axes.inv_ornt_aff(turn, voxels.shape), dtype=np.float64))


def covered_length(ct: Box, pet: Box) -> float:
    """The part of a PET's length (along the body) that a CT covers; 0 where they do not lie side by side."""
    (ct_low, ct_high), (pet_low, pet_high) = ct, pet
    common = np.minimum(ct_high, pet_high) - np.maximum(ct_low, pet_low)
    smaller = np.minimum(ct_high - ct_low, pet_high - pet_low)
    if (common[:2] < _LEAST_IN_PLANE * smaller[:2]).any() or common[2] <= 0.0:
        return 0.0
    return float(min(common[2] / (pet_high[2] - pet_low[2]), 1.0))
