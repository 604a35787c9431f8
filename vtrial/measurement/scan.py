"""A PET/CT with its organ mask, checked before anything is measured on it.

What cannot be right is refused with every reason at once: grids that differ, voxels that are not numbers, a CT of air,
a PET that is not in SUV, labels that name no organ. Nothing is resampled or mended here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.organs import ORGAN_NAMES
from vtrial.records import HIGHEST_SUV, LOWEST_SUV, InputError, PetCt

GRID_TOLERANCE = 0.05  # of the smallest voxel edge: what headers lose in rounding, far below what a mask could suffer
AIR_BELOW_HU = -200.0
# The SUV of a whole scan times its volume is the patient's mass at most, if all that was injected is in view.
HEAVIEST_KG = 500.0

Array = NDArray[Any]
Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """A volume as a file holds it: `name` for messages, `voxels` (x, y, z), `affine` (4, 4) voxel to world in mm."""

    name: str
    voxels: Array
    affine: Affine


@dataclass(frozen=True)
class LabelledScan:
    """CT in HU, PET in SUV (g/ml) and TotalSegmentator labels: three volumes that should share one grid."""

    ct: Volume
    suv: Volume
    labels: Volume


@dataclass(frozen=True)
class CheckedScan:
    """A sound scan in C order, its axes in any order or direction: only lengths and volumes are read from the grid.

    `ct_hu` of any type, `suv` float32, `labels` uint8, all of one shape; `steps_mm` (3, 3) has the step of one voxel
    along each array axis as its columns.
    """

    ct_hu: Array
    suv: NDArray[np.float32]
    labels: NDArray[np.uint8]
    steps_mm: Affine

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml, sheared ones included."""
        return _voxel_ml(self.steps_mm)


def labelled_scan(pet_ct: PetCt, labels: Array, affine: Affine | None = None, name: str = "scan") -> LabelledScan:
    """A PET/CT in memory with labels (x, y, z) on its grid; `affine` where the grid is not straight."""
    grid = np.diag([*pet_ct.spacing_mm, 1.0]) if affine is None else affine
    return LabelledScan(
        Volume(f"{name}, CT", pet_ct.ct_hu, grid),
        Volume(f"{name}, PET", pet_ct.suv, grid),
        Volume(f"{name}, labels", labels, grid),
    )


def check_scan(scan: LabelledScan) -> CheckedScan:
    """The scan in the form that measuring needs; InputError with all that is wrong with it."""
    problems = [p for volume in (scan.ct, scan.suv, scan.labels) for p in _grid_problems(volume)]
    if not problems:
        problems = [p for other in (scan.suv, scan.labels) for p in _mismatches(scan.ct, other)]
    values = [_ct_problems(scan.ct), _suv_problems(scan.suv, None if problems else _voxel_ml(scan.suv.affine[:3, :3]))]
    problems += [*itertools.chain(*values), *_label_problems(scan.labels)]
    if problems:
        raise InputError(problems)
    steps = np.asarray(scan.ct.affine[:3, :3], dtype=np.float64)
    arrays = [scan.ct.voxels, scan.suv.voxels, scan.labels.voxels]
    if arrays[2].flags.f_contiguous and not arrays[2].flags.c_contiguous:  # as files are read: no copy needed
        arrays, steps = [array.T for array in arrays], steps[:, ::-1]
    ct, suv, labels = (np.ascontiguousarray(array) for array in arrays)
    return CheckedScan(ct, suv.astype(np.float32, copy=False), labels.astype(np.uint8, copy=False), steps)


def _voxel_ml(steps_mm: Affine) -> float:
    return float(abs(np.linalg.det(steps_mm))) / 1000.0


def _grid_problems(volume: Volume) -> list[str]:
    problems = []
    if volume.voxels.ndim != 3 or volume.voxels.size == 0:
        problems.append(f"{volume.name}: shape {volume.voxels.shape} is not that of one 3D volume; give one volume")
    affine = np.asarray(volume.affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not _voxel_ml(affine[:3, :3]) > 0.0:
        problems.append(f"{volume.name}: its affine gives voxels no volume; repair the header (sform or qform)")
    return problems


def _mismatches(ct: Volume, other: Volume) -> list[str]:
    """How the grid of another volume differs from that of the CT."""
    remedy = f"bring it onto the grid of {ct.name} first; nothing is resampled here"
    if other.voxels.shape != ct.voxels.shape:
        return [f"{other.name}: shape {other.voxels.shape}, but {ct.name} has {ct.voxels.shape}; {remedy}"]
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, size - 1) for size in ct.voxels.shape))])
    apart = float(np.linalg.norm(corners @ (other.affine - ct.affine).T, axis=1).max())
    if apart > GRID_TOLERANCE * float(np.linalg.norm(ct.affine[:3, :3], axis=0).min()):
        return [f"{other.name}: its corners lie up to {apart:.3g} mm from those of {ct.name}; {remedy}"]
    return []


def _unreal(volume: Volume) -> list[str]:
    """Voxels that are no numbers. A sum tells at the price of one pass; only a bad volume is looked at again."""
    voxels = volume.voxels
    if voxels.dtype.kind not in "iuf":
        return [f"{volume.name}: voxels of type {voxels.dtype}; store plain numbers"]
    with np.errstate(all="ignore"):
        if voxels.dtype.kind != "f" or np.isfinite(voxels.sum()):
            return []
    count = voxels.size - int(np.isfinite(voxels).sum())
    return [f"{volume.name}: {count} voxels are NaN or infinite; write the file again"] if count else []


def _ct_problems(ct: Volume) -> list[str]:
    problems = _unreal(ct)
    if problems or ct.voxels.size == 0:
        return problems
    low, high = float(ct.voxels.min()), float(ct.voxels.max())
    if high < AIR_BELOW_HU or low == high:
        return [f"{ct.name}: nothing but air (HU from {low:g} to {high:g}); give the CT in Hounsfield units"]
    return []


def _suv_problems(suv: Volume, voxel_ml: float | None) -> list[str]:
    problems = _unreal(suv)
    if problems or suv.voxels.size == 0:
        return problems
    low, high = float(suv.voxels.min()), float(suv.voxels.max())
    mass_kg = 0.0 if voxel_ml is None else float(suv.voxels.sum(dtype=np.float64)) * voxel_ml / 1000.0
    if high > HIGHEST_SUV or mass_kg > HEAVIEST_KG:
        told = f"the highest voxel is {high:.4g} and SUV times volume adds up to a body of {mass_kg:.4g} kg"
        return [f"{suv.name}: not in SUV, perhaps in Bq/ml ({told}); convert it to body-weight SUV (g/ml)"]
    if low < LOWEST_SUV:
        return [f"{suv.name}: the lowest voxel is {low:.4g}, below any SUV; is it the CT? Give the PET in SUV (g/ml)"]
    if high <= 0.0:
        return [f"{suv.name}: no activity (the highest voxel is {high:g}); give the PET in SUV (g/ml)"]
    return []


def _label_problems(labels: Volume) -> list[str]:
    problems = _unreal(labels)
    voxels = labels.voxels
    if problems or voxels.size == 0:
        return problems
    fits = voxels.min() >= 0 and voxels.max() <= max(ORGAN_NAMES)
    if fits and (voxels.dtype.kind in "iu" or bool((voxels == np.rint(voxels)).all())):
        return []  # the ids are all those from 1 to the last
    values, counts = np.unique(voxels, return_counts=True)
    strange = [(v, n) for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v != 0 and v not in ORGAN_NAMES]
    listed = ", ".join(f"{value:g} ({count} voxels)" for value, count in strange[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    return [f"{labels.name}: labels that are no TotalSegmentator id (1-{max(ORGAN_NAMES)}): {listed}{more}; map them"]
