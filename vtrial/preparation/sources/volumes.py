"""A CT and a PET as NIfTI files: read, turned upright, and refused where they cannot be what they are said to be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.imaging.dicom.series import AIR_HU, Volume
from vtrial.imaging.files import nifti_from_bytes, spacing_of
from vtrial.preparation.grid import box_mm
from vtrial.records import InputError

STEP_MM = (0.2, 20.0)  # a voxel's side; NIfTI files in metres or without spacing lie outside
FEWEST = 10  # voxels along an axis
_SHEAR = 0.01  # cosine between two axes that should be at right angles: 0.6 degrees
_AIR_HU = -300.0  # every PET/CT has air around the patient, and in the lungs
_NO_SUV = 20.0  # g/ml on average over the field of view; true means are 0.1 to 1, Bq/ml some hundred or more
_LEAST_IN_PLANE = 0.5  # of the smaller field of view, as for DICOM
_BELOW_ZERO = -20.0  # g/ml; reconstructions undershoot by a few at most, HU are far below

Affine = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class NiftiPair:
    """A loader of two NIfTI files. CT that lies off the PET by more than `least_coverage` allows is refused."""

    ct: Path
    suv: Path
    least_coverage: float

    def __call__(self) -> tuple[Volume, Volume]:
        """CT in HU (int16) and PET in SUV (float32, g/ml), each upright on its own grid; InputError with the reason."""
        ct, suv = _read(self.ct, "CT"), _read(self.suv, "PET")
        _refuse_other_units(ct, suv)
        covered = covered_length(ct, suv)
        if covered == 0.0 or covered < self.least_coverage:
            raise InputError(f"the CT covers {covered:.0%} of the PET's length: {self.least_coverage:.0%} are needed")
        hu = np.clip(np.rint(ct.voxels), AIR_HU, 32767).astype(np.int16)
        return Volume(hu, ct.affine), Volume(suv.voxels.astype(np.float32, copy=False), suv.affine)


def _read(path: Path, what: str) -> Volume:
    """One file. Neither its name nor what readers say of its content is told."""
    try:
        voxels, affine = nifti_from_bytes(path.read_bytes(), what)
    except OSError as error:
        raise InputError(f"the {what} cannot be read ({error.strerror})") from None
    except InputError:
        raise InputError(f"the {what} is truncated or no NIfTI file: copy it again") from None
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        raise InputError(f"the {what} has {voxels.ndim} axes of type {voxels.dtype.name}: one 3D volume is needed")
    if min(voxels.shape) < FEWEST:
        raise InputError(f"the {what} has {min(voxels.shape)} voxels along an axis: too few for a volume")
    if not np.isfinite(voxels).all():
        raise InputError(f"the {what} holds values that are not finite")
    try:
        return upright(voxels, affine)
    except InputError as error:
        raise InputError(f"the {what}: {error}") from None


def upright(voxels: NDArray[Any], affine: Affine) -> Volume:
    """Voxels with their axes put in the order right, front, head, without interpolation; an oblique grid stays oblique.

    A left-handed grid is mirrored in memory, not in the patient. InputError where the axes are not at right angles, as
    those of a sheared grid, or the spacing is not one in mm.
    """
    step = spacing_of(affine)
    if not np.isfinite(affine).all() or not all(STEP_MM[0] <= s <= STEP_MM[1] for s in step):
        raise InputError(f"the voxel size is not within {STEP_MM[0]:g} to {STEP_MM[1]:g} mm along each axis")
    along = affine[:3, :3] / step
    if np.abs(along.T @ along - np.eye(3)).max() > _SHEAR:
        raise InputError("the affine is sheared, its axes are not at right angles: resample it to a straight grid")
    order = max(permutations(range(3)), key=lambda axes: sum(abs(along[row, axis]) for row, axis in enumerate(axes)))
    turned, moved = voxels.transpose(order), affine[:, [*order, 3]].copy()
    for axis in range(3):
        if moved[axis, axis] < 0.0:
            turned = np.flip(turned, axis)
            moved[:, 3] += moved[:, axis] * (turned.shape[axis] - 1)
            moved[:, axis] *= -1.0
    return Volume(np.ascontiguousarray(turned), moved)


def covered_length(ct: Volume, pet: Volume) -> float:
    """The part of the PET's length (along the body) that the CT covers; 0 where they do not lie side by side."""
    (ct_low, ct_high), (pet_low, pet_high) = box_mm(ct), box_mm(pet)
    common = np.minimum(ct_high, pet_high) - np.maximum(ct_low, pet_low)
    smaller = np.minimum(ct_high - ct_low, pet_high - pet_low)
    if (common[:2] < _LEAST_IN_PLANE * smaller[:2]).any() or common[2] <= 0.0:
        return 0.0
    return float(min(common[2] / (pet_high[2] - pet_low[2]), 1.0))


def _refuse_other_units(ct: Volume, suv: Volume) -> None:
    problems = []
    if ct.voxels.min() > _AIR_HU:
        problems.append(f"the CT has no air (nothing below {_AIR_HU:g}): these are no Hounsfield units")
    if suv.voxels.min() < _BELOW_ZERO:
        problems.append("the PET is far below zero in places: it is no SUV (is it the CT?)")
    mean = float(suv.voxels.mean(dtype=np.float64))
    if mean > _NO_SUV:
        problems.append("the PET is far too high for SUV (is it Bq/ml?): convert it")
    if suv.voxels.max() <= 0.0:
        problems.append("the PET is empty")
    if problems:
        raise InputError(problems)
