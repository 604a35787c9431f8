"""What is measured on one subject: volume, density and uptake of every organ, and of left and right together.

An organ that the mask does not hold is missing with a reason, never 0, and a sum of organs is missing where one of its
parts is: half a pair is no pair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from vtrial.measurement.peak import suv_peaks
from vtrial.measurement.scan import CheckedScan, LabelledScan, check_scan
from vtrial.organs import GROUPS, ORGAN_IDS, ORGAN_NAMES, labels_of
from vtrial.records import MODEL_SUV, InputError

VERSION = 2  # of the definitions below: what was measured under another one is measured again
_CENSORED_FROM = MODEL_SUV * (1.0 - 1e-4)  # 25 through the logarithm and back in float32 may fall short of 25
NOT_FOUND = "not found in the mask"


@dataclass(frozen=True)
class Measurement:
    """One organ, or sum of organs, of one subject.

    `volume_ml` is the number of voxels times the determinant of the affine; `hu_mean`, `suv_mean` average over voxels
    (HU, g/ml), `suv_sd` is their spread within the organ (divisor n), `suv_max` the hottest voxel, `suv_peak` the
    highest mean in a sphere of 1 ml centred in the organ (`vtrial.measurement.peak`), `suv_p95` the 95th percentile
    (interpolated linearly). `touches_border`: a voxel of it lies on a face of the image, so part of it may be out of
    view. `censored`: `suv_max` reached 25. `missing` says why there are no numbers (NaN), and is empty where there are.
    """

    organ: str
    volume_ml: float = math.nan
    hu_mean: float = math.nan
    suv_mean: float = math.nan
    suv_sd: float = math.nan
    suv_max: float = math.nan
    suv_peak: float = math.nan
    suv_p95: float = math.nan
    touches_border: bool = False
    censored: bool = False
    missing: str = ""

    def to_dict(self) -> dict[str, str | float | bool]:
        """Column to value."""
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Measurement))


@dataclass(frozen=True)
class _Region:
    """One label or several: its voxels' uptake and what adds up over labels."""

    suv: NDArray[np.float32]
    hu_sum: float
    peak: float
    at_border: bool

    def measured(self, organ: str, voxel_ml: float) -> Measurement:
        n = len(self.suv)
        mean = float(self.suv.mean(dtype=np.float64))
        highest = float(self.suv.max())
        return Measurement(
            organ=organ,
            volume_ml=n * voxel_ml,
            hu_mean=self.hu_sum / n,
            suv_mean=mean,
            suv_sd=math.sqrt(float(np.square(self.suv - np.float32(mean)).mean(dtype=np.float64))),
            suv_max=highest,
            suv_peak=self.peak,
            suv_p95=float(np.percentile(self.suv, 95.0)),
            touches_border=self.at_border,
            censored=highest >= _CENSORED_FROM,
        )


def measure(scan: LabelledScan, organs: Collection[str] | None = None) -> tuple[Measurement, ...]:
    """Measure every organ of a scan, by class id, then the sums of `vtrial.organs.GROUPS`.

    `organs` are those that whoever made the mask can find; what is not there of them is a row with the reason. By
    default all of TotalSegmentator's. A label that is not named has no row of its own: it may stand for several organs,
    as where all ribs have the first one's. A sum has the parts that are named or found.
    Raises InputError with all that is wrong with the scan or the names.
    """
    known = known_organs(organs)
    checked = check_scan(scan)
    regions = _regions(checked)
    rows = []
    for organ, labels in _asked(known, known | {ORGAN_NAMES[label] for label in regions}):
        lacking = [ORGAN_NAMES[label] for label in labels if label not in regions]
        if lacking:
            reason = NOT_FOUND if lacking == [organ] else f"{', '.join(lacking)} {NOT_FOUND}"
            rows.append(Measurement(organ, missing=reason))
        else:
            rows.append(_joined([regions[label] for label in labels]).measured(organ, checked.voxel_ml))
    return tuple(rows)


def not_measured(reason: str, organs: Collection[str] | None = None) -> tuple[Measurement, ...]:
    """The rows of a subject that could not be measured, of all that is known beforehand, each with the reason."""
    known = known_organs(organs)
    return tuple(Measurement(organ, missing=reason) for organ, _ in _asked(known, known))


def known_organs(organs: Collection[str] | None) -> set[str]:
    """Organ names as a set, all of TotalSegmentator's for None; InputError for names that are not among them."""
    unknown = sorted(set(organs or ()) - set(ORGAN_IDS))
    if unknown:
        raise InputError(f"no TotalSegmentator organ: {', '.join(unknown)}; see vtrial.organs for the names")
    return set(ORGAN_IDS if organs is None else organs)


def _asked(known: Collection[str], parts_known: Collection[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and labels of what gets a row: organs that are `known`, and sums of `parts_known`."""
    for name in ORGAN_IDS:
        if name in known:
            yield name, labels_of(name)
    for group, labels in GROUPS.items():
        parts = tuple(label for label in labels if ORGAN_NAMES[label] in parts_known)
        if parts:
            yield group, parts


def _regions(scan: CheckedScan) -> dict[int, _Region]:
    """Every label of the mask. Voxels are picked once and sorted by label, so that each organ is one stretch."""
    labels = scan.labels.reshape(-1)
    voxels = np.flatnonzero(labels != 0)
    found = labels[voxels]
    voxels = voxels[np.argsort(found, kind="stable")]
    counts = np.bincount(found)
    present = np.flatnonzero(counts)
    if not len(present):
        return {}
    starts = np.concatenate([[0], np.cumsum(counts[present])[:-1]])
    hu_sums = np.add.reduceat(scan.ct_hu.reshape(-1)[voxels], starts, dtype=np.float64)
    suv = np.split(scan.suv.reshape(-1)[voxels], starts[1:])
    peaks = suv_peaks(scan.suv, scan.steps_mm, np.split(voxels, starts[1:]))
    faces = [face for axis in range(3) for face in (scan.labels.take(0, axis), scan.labels.take(-1, axis))]
    outermost = set(np.concatenate([np.unique(face) for face in faces]).tolist())
    return {
        label: _Region(values, float(hu_sum), float(peak), label in outermost)
        for label, values, hu_sum, peak in zip(present.tolist(), suv, hu_sums, peaks, strict=True)
    }


def _joined(parts: list[_Region]) -> _Region:
    """Several labels as one. The spheres of a sum are those of its parts, and so is the highest."""
    if len(parts) == 1:
        return parts[0]
    return _Region(
        suv=np.concatenate([part.suv for part in parts]),
        hu_sum=sum(part.hu_sum for part in parts),
        peak=max(part.peak for part in parts),
        at_border=any(part.at_border for part in parts),
    )
