"""A CT and a PET as NIfTI files: read and turned upright, or refused where they are no volumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtrial.imaging.dicom.series import AIR_HU
from vtrial.imaging.files import Array, NoOrientation, nifti_from_bytes, spacing_of
from vtrial.imaging.volume import Affine, Volume, upright
from vtrial.records import CannotRead, InputError

STEP_MM = (0.2, 20.0)  # a voxel's side; NIfTI files in metres or without spacing lie outside
FEWEST = 10  # voxels along an axis
_SHEAR = 0.01  # cosine between two axes that should be at right angles: 0.6 degrees


@dataclass(frozen=True, repr=False)
class NiftiPair:
    """A loader of two NIfTI files."""

    ct: Path
    suv: Path

    def __call__(self) -> tuple[Volume, Volume]:
        """CT in HU (int16) and PET in SUV (float32, g/ml), each upright on its own grid; InputError with the
        reason, CannotRead where a file cannot be read now."""
        hu, affine = _read(self.ct, "CT")
        ct = upright(_hounsfield(hu), affine)
        del hu
        suv, affine = _read(self.suv, "PET")
        return ct, upright(suv.astype(np.float32, copy=False), affine)


def _hounsfield(values: Array) -> NDArray[np.int16]:
    """Rounded to whole HU, slice by slice, as a CT may have a hundred million voxels of any type."""
    hu = np.empty(values.shape, dtype=np.int16, order="F")  # as NIfTI files have them
    for k in range(values.shape[2]):
        hu[..., k] = np.clip(np.rint(values[..., k]), AIR_HU, 32767)
    return hu


def _read(path: Path, what: str) -> tuple[Array, Affine]:
    """One file. Neither its name nor what readers say of its content is told."""
    try:
        voxels, affine = nifti_from_bytes(path.read_bytes(), f"the {what}")
    except NoOrientation:
        raise
    except OSError as error:
        raise CannotRead(f"the {what} cannot be read ({error.strerror})") from None
    except InputError:
        raise InputError(f"the {what} is truncated or no NIfTI file: copy it again") from None
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        raise InputError(f"the {what} has {voxels.ndim} axes of type {voxels.dtype.name}: one 3D volume is needed")
    if min(voxels.shape) < FEWEST:
        raise InputError(f"the {what} has {min(voxels.shape)} voxels along an axis: too few for a volume")
    if not all(np.isfinite(voxels[..., k]).all() for k in range(voxels.shape[2])):
        raise InputError(f"the {what} holds values that are not finite")
    try:
        _straight(affine)
    except InputError as error:
        raise InputError(f"the {what}: {error}") from None
    return voxels, affine


def _straight(affine: Affine) -> None:
    """InputError where the axes are not at right angles, as in a sheared grid, or the spacing is not one in mm."""
    step = spacing_of(affine)
    if not np.isfinite(affine).all() or not all(STEP_MM[0] <= s <= STEP_MM[1] for s in step):
        raise InputError(f"the voxel size is not within {STEP_MM[0]:g} to {STEP_MM[1]:g} mm along each axis")
    along = affine[:3, :3] / step
    if np.abs(along.T @ along - np.eye(3)).max() > _SHEAR:
        raise InputError("the affine is sheared, its axes are not at right angles: resample it to a straight grid")
