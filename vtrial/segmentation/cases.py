"""What is to be segmented: each subject's CT, how to read it, whether it can be segmented, and where its mask goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.imaging.files import nifti_from_bytes, segmentation_name, spacing_of
from vtrial.records import InputError
from vtrial.runs import read_journal, read_manifest
from vtrial.storage import Folder

MASKS = "segmentations"
BODY_ABOVE_HU = -300.0
LEAST_BODY = 0.001  # of the voxels; less is no patient
_EDGE_MM = (0.2, 20.0)
_FIELD_MM = (20.0, 3000.0)
_HIGHEST_HU, _LOWEST_HU = 100_000.0, -20_000.0

Array = NDArray[Any]


@dataclass(frozen=True)
class CtCase:
    """One subject's CT by name, the name of its mask inside the folder for masks, and the CT's hash.

    `voxel_sha256` is the hash of the voxels where a run has written it down; where it is empty, the file's own counts.
    """

    subject_id: str
    ct: str
    mask: str
    voxel_sha256: str = ""


def run_ct_cases(folder: Folder) -> list[CtCase]:
    """The finished subjects of a run by index; InputError if the folder holds no run, or one without scans."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder.location}: no run is there; name the folder of one")
    latest = {entry.index: entry for entry in read_journal(folder)}
    cases = []
    for entry in (latest[index] for index in sorted(latest) if latest[index].status == "ok"):
        if "ct_sha256" not in entry.row:
            raise InputError(f"{folder.location}: a training set, not a run of scans; nothing to segment there")
        name = segmentation_name(entry.subject_id, entry.index, sharded=manifest.sharded)
        cases.append(
            CtCase(entry.subject_id, entry.row["ct_path"], name.removeprefix(f"{MASKS}/"), entry.row["ct_sha256"])
        )
    return cases


def has_truth(folder: Folder) -> bool:
    """Whether a folder is a run that came with exact masks of its own, as phantoms do."""
    try:
        manifest = read_manifest(folder)
    except InputError:  # not a run
        return False
    return manifest is not None and any("segmentation_path" in entry.row for entry in read_journal(folder))


def check_ct(data: bytes, name: str) -> tuple[Array, NDArray[np.float64]]:
    """Voxels and affine of a CT's file; InputError with all that keeps it from being segmented."""
    voxels, affine = nifti_from_bytes(data, name)
    problems = [*_grid_problems(voxels, affine), *_voxel_problems(voxels)]
    if problems:
        raise InputError([f"{name}: {problem}" for problem in problems])
    return voxels, affine


def _grid_problems(voxels: Array, affine: NDArray[np.float64]) -> list[str]:
    if voxels.ndim != 3:
        return [f"has {voxels.ndim} dimensions, {voxels.shape}; a CT has three: write one volume"]
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return ["the affine has no inverse or is not finite; write the header again"]
    edges = spacing_of(affine)
    if not all(_EDGE_MM[0] <= edge <= _EDGE_MM[1] for edge in edges):
        told = " x ".join(f"{edge:g}" for edge in edges)
        return [f"voxels of {told} mm; expected {_EDGE_MM[0]:g} to {_EDGE_MM[1]:g}: is the affine in millimetres?"]
    extent = [edge * size for edge, size in zip(edges, voxels.shape)]
    if not all(_FIELD_MM[0] <= length <= _FIELD_MM[1] for length in extent):
        told = " x ".join(f"{length:.0f}" for length in extent)
        return [f"a field of view of {told} mm; expected {_FIELD_MM[0]:g} to {_FIELD_MM[1]:g}: check the affine"]
    return []


def _voxel_problems(voxels: Array) -> list[str]:
    if voxels.size == 0:
        return ["has no voxels"]
    if voxels.dtype.kind not in "iuf":
        return [f"holds {voxels.dtype}, not numbers; write HU as int16"]
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        return [f"{int((~np.isfinite(voxels)).sum())} voxels are NaN or infinite; write air there (-1024 HU)"]
    low, high = float(voxels.min()), float(voxels.max())
    if low < _LOWEST_HU or high > _HIGHEST_HU:
        return [f"values from {low:g} to {high:g} are not HU; check the rescaling"]
    if low == high:
        return [f"every voxel is {low:g}; no CT looks like that"]
    if float(np.mean(voxels > BODY_ABOVE_HU)) < LEAST_BODY:
        return [f"all air: nothing above {BODY_ABOVE_HU:g} HU; is it a CT in HU?"]
    return []


def check_mask(
    data: bytes, name: str, shape: tuple[int, ...], affine: NDArray[np.float64]
) -> tuple[Array, NDArray[np.float64]]:
    """Voxels and affine of a segmenter's mask; ValueError unless it is uint8 and on the grid of its CT."""
    labels, found = nifti_from_bytes(data, name)
    if labels.shape != shape or not np.allclose(found, affine, atol=1e-3):
        raise ValueError(f"the segmenter's mask is on another grid: {labels.shape} for a CT of {shape}")
    if labels.dtype != np.uint8:
        raise ValueError(f"the segmenter's mask is {labels.dtype}, not uint8")
    return labels, found
