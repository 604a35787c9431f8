"""One real PET/CT pair, with its organ mask, as a training volume: framed, resampled once, cleared of the table.

Both images go straight from their own voxels to the method's grid (vtrial.geometry) in one linear interpolation: RAS+,
2 mm and 224×224 in plane around the body, the field of view stretched to 384 slices with its length kept as spacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.execution import Saved
from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.imaging.scans import save_arrays
from vtrial.imaging.volume import Volume
from vtrial.organs import ORGAN_IDS
from vtrial.preparation.alignment import Sketch, breathing_mm, outline_gap_mm, outside_ml, sketch
from vtrial.preparation.body import AIR_HU, Mask, clear_outside, find_body
from vtrial.preparation.extent import FieldOfView, Place, field_of_view, organ_places
from vtrial.preparation.grid import Grid, Point, covering, sample
from vtrial.preparation.quality import (
    MOST_CUT,
    Doubt,
    alignment_doubts,
    arms_down,
    body_problems,
    mirrored,
    pair_problems,
    place_problems,
)
from vtrial.records import InputError, PetCt
from vtrial.storage import Folder

_COARSE_MM = (4.0, 4.0, 4.0)  # to find the body before the grid is laid around it
_SEGMENTED_MM = (1.5, 1.5, 1.5)  # of TotalSegmentator's finest models
_HIGHEST_SUV = 60_000.0  # float16 ends at 65,504
_DIAPHRAGM = 0.6  # of the field of view, from below
_OUTLIERS = 0.02  # of the longest line of body along an axis: less is a hand, not the trunk


@dataclass(frozen=True, eq=False)
class TrainingVolume:
    """A PET/CT (224, 224, 384) on the method's grid, what it leaves in doubt, and the figures behind that.

    `pet_ct` has int16 HU and float32 SUV, −1000 and 0 off the body. `figures`: extent_mm, body_l, suv_mean, and where
    they can be told outline_gap_mm and breathing_mm.
    """

    pet_ct: PetCt
    doubts: tuple[Doubt, ...]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """The columns that a volume brings to the table of a training set."""
        return {
            **self.figures,
            "spacing_z_mm": round(self.pet_ct.spacing_mm[2], 5),
            "partial": any(doubt.name == "partial" for doubt in self.doubts),
            "flags": ";".join(dict.fromkeys(doubt.name for doubt in self.doubts)),
            "notes": "; ".join(doubt.told for doubt in self.doubts),
        }


def check_pair(ct: Volume, suv: Volume) -> None:
    """InputError with every reason why a CT (HU) and a PET (SUV) are no pair, by their values and where they lie."""
    problems = pair_problems(ct, suv)
    if problems:
        raise InputError(problems)


def ct_to_segment(ct: Volume, suv: Volume) -> Volume:
    """The CT (int16 HU) upright at the segmenter's own 1.5 mm, as far along z as the PET goes: what to draw organs on.

    Files of CTs carry spacings alone (`imaging.files.nifti_bytes`), so an oblique or tilted grid must be straightened
    before; and no segmenter sees more than this, in a third of the bytes of a fine CT.
    """
    (low, high), (pet_low, pet_high) = ct.box_mm, suv.box_mm
    low[2], high[2] = max(low[2], pet_low[2]), min(high[2], pet_high[2])
    grid = covering(low, np.maximum(high, low + _SEGMENTED_MM), _SEGMENTED_MM)
    hu, _ = sample(ct, grid, AIR_HU)
    return Volume(np.rint(hu).astype(np.int16), grid.affine)


def fit_volume(ct: Volume, suv: Volume, labels: Volume | None, *, allow_partial: bool = False) -> TrainingVolume:
    """A CT (HU), a PET (SUV, g/ml) and the CT's TotalSegmentator labels, on grids of their own in one world, as one.

    The pair is one that `check_pair` has passed. A partial field of view, or no mask, is refused unless
    `allow_partial`, which takes what is there. InputError with every reason for a pair that cannot be used.
    """
    places = {} if labels is None else organ_places(labels)
    view = _view(ct, suv, labels, places)
    problems = place_problems(places, view)
    if view.partial and not allow_partial:
        problems += [f"{reason} (--allow-partial takes what is there)" for reason in view.partial]
    if problems:
        raise InputError(problems)
    grid, cut = _around_body(ct, view)
    ct_hu, ct_inside = sample(ct, grid, AIR_HU)
    pet, pet_inside = sample(suv, grid, 0.0)
    body = find_body(ct_hu, grid.spacing_mm)
    judged = sketch(ct_hu, pet, body, grid)
    problems = body_problems(judged)
    if problems:
        raise InputError(problems)
    cut = max(cut, _part_outside(body, pet_inside), _part_outside(judged.outline, ct_inside[::2, ::2, ::2]))
    gap, dome = _alignment(judged, places, labels)
    doubts = [*_doubts(view, places, judged, cut), *alignment_doubts(gap, dome, outside_ml(judged))]
    told = {
        "extent_mm": view.high_mm - view.low_mm,
        "body_l": float(body.sum()) * grid.voxel_ml / 1000.0,
        "suv_mean": float(pet[body].mean()),
        "outline_gap_mm": gap,
        "breathing_mm": dome,
    }
    figures = {name: round(value, 3) for name, value in told.items() if value is not None}
    clear_outside(ct_hu, pet, body, grid.spacing_mm)
    voxels = np.clip(np.rint(ct_hu), -1024, 32767).astype(np.int16)
    return TrainingVolume(PetCt(voxels, np.clip(pet, 0.0, _HIGHEST_SUV), grid.spacing_mm), tuple(doubts), figures)


def _view(ct: Volume, suv: Volume, labels: Volume | None, places: Mapping[str, Place]) -> FieldOfView:
    """What the mask asks for along z, of what both images show."""
    (ct_low, ct_high), (pet_low, pet_high) = ct.box_mm, suv.box_mm
    low, high = float(max(ct_low[2], pet_low[2])), float(min(ct_high[2], pet_high[2]))
    if labels is None:
        return FieldOfView(low, high, ("there is no organ mask to tell where clavicles and sacrum are",))
    return field_of_view(places, low, high)


def _around_body(ct: Volume, view: FieldOfView) -> tuple[Grid, float]:
    """The method's grid around the body in the field of view, and what part of the body (0 to 1) it leaves out."""
    low, high = ct.box_mm
    low[2], high[2] = view.low_mm, view.high_mm
    coarse = covering(low, high, _COARSE_MM)
    hu, _ = sample(ct, coarse, AIR_HU)
    body = find_body(hu, _COARSE_MM)
    size_mm = IN_PLANE_MM * SHAPE[0]
    corner, kept = [], body
    for axis in (0, 1):
        at_mm = coarse.centres_mm(axis)
        start = _middle(body, at_mm, axis) - size_mm / 2.0
        corner.append(start)
        kept = np.compress((at_mm > start) & (at_mm < start + size_mm), kept, axis=axis)
    spacing: Point = (IN_PLANE_MM, IN_PLANE_MM, (view.high_mm - view.low_mm) / SHAPE[2])
    cut = 1.0 - float(kept.sum()) / max(float(body.sum()), 1.0)
    return Grid(SHAPE, spacing, (corner[0], corner[1], view.low_mm)), cut


def _part_outside(body: Mask, field: Mask) -> float:
    """What part of a body (0 to 1) lies beyond a field of view."""
    return float((body & ~field).sum()) / max(float(body.sum()), 1.0)


def _middle(body: Mask, at_mm: NDArray[np.float64], axis: int) -> float:
    """Half way between the ends of the body along an axis, hands and the like not counted."""
    other = tuple(i for i in range(3) if i != axis)
    profile = body.sum(axis=other)
    ends = at_mm[profile > _OUTLIERS * profile.max()] if profile.any() else at_mm
    return float(ends[0] + ends[-1]) / 2.0


def _alignment(of: Sketch, places: Mapping[str, Place], labels: Volume | None) -> tuple[float | None, float | None]:
    """Outline gap and breathing in mm. The diaphragm is where the liver ends; without a mask, above the middle."""
    if labels is None or "liver" not in places:
        z_mm = of.grid.corner_mm[2] + _DIAPHRAGM * of.grid.spacing_mm[2] * of.grid.shape[2]
        return outline_gap_mm(of, z_mm), None
    found, _ = sample(labels, of.grid, 0, nearest=True)
    return outline_gap_mm(of, places["liver"].high_mm), breathing_mm(of, found == ORGAN_IDS["liver"])


def _doubts(view: FieldOfView, places: Mapping[str, Place], of: Sketch, cut: float) -> list[Doubt]:
    doubts = [Doubt("partial", reason) for reason in view.partial]
    doubts += [Doubt("short_margin", reason) for reason in view.short]
    if view.estimated:
        doubts.append(Doubt("end_estimated", "the organ mask has no hips: where the view ends below is an estimate"))
    if arms_down(places, of):
        doubts.append(Doubt("arms_down", "an arm lies along the trunk"))
    if cut > MOST_CUT:
        told = f"{100.0 * cut:.0f} % of the body lie beyond the grid, the CT (air was put there) or the PET (0 was)"
        doubts.append(Doubt("body_cut", told))
    if mirrored(places):
        doubts.append(Doubt("mirrored", "the liver lies left of the spleen: left and right may be swapped"))
    return doubts


def save_volume(folder: Folder, subject_id: str, volume: TrainingVolume) -> Saved:
    """Write the arrays of a volume (`imaging.scans.save_arrays`) and give their sizes and its row; OSError if that
    cannot be."""
    saved = save_arrays(folder, subject_id, volume.pet_ct)
    return Saved(saved.files, {**volume.row, **saved.row})
