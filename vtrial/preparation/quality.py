"""What is wrong with a PET/CT pair, or doubtful: refused where it would teach a model falsehoods, else told.

A problem is a sentence for `InputError`; a doubt is a `Doubt`, whose name goes into the table of a training set and
whose sentence into its notes. Neither says who the patient is. Every limit stands here with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from vtrial.imaging.volume import LEAST_COVERAGE, Volume, covered_length
from vtrial.preparation.alignment import Sketch
from vtrial.preparation.body import TISSUE_HU, Mask
from vtrial.preparation.extent import FieldOfView, Place

DoubtName = Literal[
    "partial",
    "short_margin",
    "end_estimated",
    "arms_down",
    "body_cut",
    "pet_outside",
    "misaligned",
    "breathing",
    "mirrored",
]

# Air around the patient is -1000 HU. Raw values (0) and windowed CTs (-200, -500) are not, lungs at -850 are.
AIR_AT_MOST_HU = -800.0
# Median of the body above -300 HU: a fat body -100, a lean one with contrast 80.
TISSUE_MEDIAN_HU = (-160.0, 130.0)
# SUV is relative to the mean of the whole body. Were all activity in a trunk of half the weight, it would be 2 there;
# half as much again is left for a wrong weight. Bq/ml are thousands, %ID/g hundredths.
BODY_SUV = (0.1, 3.0)
LEAST_SUV = -1.0  # some reconstructions dip below zero, none that far
LEAST_BODY_ML = 1000.0
LEAST_LENGTH_MM = 100.0  # of the field of view
MOST_MEAN_SUV = 20.0  # of the whole field of view; true means are 0.1 to 1, of Bq/ml some hundred or more
LEAST_DICE = 0.7  # of CT and PET outlines: a shift of a third of the body's width, or another body
MOST_GAP_MM = 10.0  # mean distance of the outlines; a shift of 15 mm gives that
MOST_BREATHING_MM = 15.0  # free breathing against shallow breathing is 5 to 10
MOST_OUTSIDE_ML = 200.0  # uptake beyond the CT's body: an arm is a litre or two, a urine bag less
MOST_CUT = 0.01  # of the body
_ARM_CM2 = 10.0  # cross-section; a forearm has 40
_ARM_SLICES = 0.2  # of the middle half of the view
_SLICES = 16  # looked at for arms


@dataclass(frozen=True)
class Doubt:
    """What should be known of a volume: a name for tables, and a sentence."""

    name: DoubtName
    told: str


def pair_problems(ct: Volume, suv: Volume) -> list[str]:
    """Why a CT and a PET cannot be a pair in HU and SUV, by their values and fields of view, before any resampling."""
    problems = []
    for name, volume in (("CT", ct), ("PET", suv)):
        if volume.voxels.ndim != 3 or min(volume.voxels.shape) < 2:
            return [f"the {name} has the shape {volume.voxels.shape}; a volume has three axes of 2 voxels at least"]
        if not np.isfinite(volume.affine).all() or abs(np.linalg.det(volume.affine[:3, :3])) < 1e-9:
            return [f"the {name}'s affine has no inverse or is not finite; write its header again"]
        if not np.isfinite([np.min(volume.voxels), np.max(volume.voxels)]).all():
            problems.append(f"the {name} has voxels that are NaN or infinite; write air (-1000 HU) or 0 there")
    if problems:
        return problems
    air = float(np.percentile(ct.voxels[::4, ::4, ::4], 2))
    if air > AIR_AT_MOST_HU:
        problems.append(
            f"the CT's lowest values are {air:.0f}; air is -1000 HU: is an offset of 1024 left in it, or a window cut?"
        )
    least, mean = float(np.min(suv.voxels)), float(np.mean(suv.voxels, dtype=np.float64))
    if least < LEAST_SUV:
        problems.append(f"the PET goes down to {least:.3g}; SUV is not negative: is it a PET, and in SUV?")
    if mean > MOST_MEAN_SUV:
        problems.append(f"the PET's mean is {mean:.3g}, far too high for SUV in g/ml: is it Bq/ml? Convert it")
    if float(np.max(suv.voxels)) <= 0.0:
        problems.append("the PET is empty")
    covered = covered_length(ct.box_mm, suv.box_mm)
    if covered < LEAST_COVERAGE:
        problems.append(
            f"the CT covers {covered:.0%} of the PET's length, side by side in part at least; {LEAST_COVERAGE:.0%} are "
            "needed: do they belong together, and are their affines right?"
        )
    return problems


def place_problems(places: Mapping[str, Place], view: FieldOfView) -> list[str]:
    """Why an organ mask cannot be that of an upright volume, or leaves nothing of it."""
    problems = []
    top, bottom = places.get("clavicles"), places.get("sacrum")
    if top is not None and bottom is not None and top.low_mm < bottom.high_mm:
        problems.append("the clavicles do not lie above the sacrum: the affine is head down, or the mask wrong")
    elif view.high_mm - view.low_mm < LEAST_LENGTH_MM:
        problems.append(
            "the organ mask and what CT and PET both show hardly meet: is it the mask of this CT?"
            if places
            else f"CT and PET share {view.high_mm - view.low_mm:.0f} mm; {LEAST_LENGTH_MM:g} mm are needed"
        )
    return problems


def body_problems(of: Sketch) -> list[str]:
    """Why what was found in the CT is no patient, or the PET not the same patient in SUV."""
    volume_ml = float(of.body.sum()) * of.grid.voxel_ml
    if volume_ml < LEAST_BODY_ML:
        return [f"only {volume_ml:.0f} ml of the CT are connected and as dense as tissue: is it a patient's, in HU?"]
    problems = []
    hu = of.ct_hu[of.body]
    median = float(np.median(hu[hu > TISSUE_HU]))
    if not TISSUE_MEDIAN_HU[0] <= median <= TISSUE_MEDIAN_HU[1]:
        expected = f"{TISSUE_MEDIAN_HU[0]:.0f} to {TISSUE_MEDIAN_HU[1]:.0f}"
        problems.append(f"the body's tissue has a median of {median:.0f} HU; expected {expected}: is it in HU?")
    mean = float(of.suv[of.body].mean())
    if not BODY_SUV[0] <= mean <= BODY_SUV[1]:
        problems.append(
            f"the body's mean SUV is {mean:.3g}; expected {BODY_SUV[0]:g} to {BODY_SUV[1]:g}: is the PET in SUV by "
            "body weight (g/ml), with the right dose and weight?"
        )
        return problems
    dice = 2.0 * float((of.body & of.outline).sum()) / float(of.body.sum() + of.outline.sum())
    if dice < LEAST_DICE:
        problems.append(
            f"the body's outlines in CT and PET agree by a Dice of {dice:.2f} only; {LEAST_DICE:g} is needed: do they "
            "belong together?"
        )
    return problems


def alignment_doubts(gap_mm: float | None, dome_mm: float | None, outside_ml: float) -> list[Doubt]:
    """What the figures of CT against PET give reason to doubt."""
    doubts = []
    if gap_mm is not None and gap_mm > MOST_GAP_MM:
        doubts.append(Doubt("misaligned", f"the outlines of CT and PET are {gap_mm:.0f} mm apart at the diaphragm"))
    if dome_mm is not None and abs(dome_mm) > MOST_BREATHING_MM:
        doubts.append(Doubt("breathing", f"the liver's dome lies {dome_mm:+.0f} mm higher in the PET than in the CT"))
    if outside_ml > MOST_OUTSIDE_ML:
        told = f"{outside_ml:.0f} ml of uptake lie beyond the CT's body (arms moved or out of its field): removed"
        doubts.append(Doubt("pet_outside", told))
    return doubts


def arms_down(places: Mapping[str, Place], of: Sketch) -> bool:
    """Whether an arm lies along the trunk: a humerus that reaches below the heart, else limbs beside the trunk.

    In the middle half of the view a body with arms raised has one cross-section in each slice.
    """
    humeri = [places[name].low_mm for name in ("humerus_left", "humerus_right") if name in places]
    if humeri and "heart" in places:
        return min(humeri) < places["heart"].low_mm
    size = of.body.shape[2]
    slices = np.linspace(size // 4, 3 * size // 4, _SLICES).astype(int)
    least = 100.0 * _ARM_CM2 / (of.grid.spacing_mm[0] * of.grid.spacing_mm[1])
    return float(np.mean([_parts(of.body[:, :, z], least) > 1 for z in slices])) > _ARM_SLICES


def _parts(section: Mask, least: float) -> int:
    """How many parts of so many voxels at least a cross-section has."""
    parts, _ = ndimage.label(section)
    return int((np.bincount(parts.ravel())[1:] >= least).sum())


def mirrored(places: Mapping[str, Place]) -> bool:
    """Whether the liver lies to the left of the spleen, as it does where left and right are swapped."""
    return "liver" in places and "spleen" in places and places["liver"].x_mm < places["spleen"].x_mm
