"""How long a body is in the grid: the field of view that its organ mask asks for, and extents fitted on heights.

Yoon et al. 2025 and the authors' released preprocessing: the box along z of heart, liver, pancreas, kidneys, spleen,
sacrum, clavicles, scapulae and hips, with 20 slices of 2 mm more at each end, is stretched to 384 slices; at generation
its length comes back from a robust fit on height.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import theilslopes

from vtrial.diffusion.weights import ExtentFit
from vtrial.geometry import EXTENT_SLICES_PER_M, IN_PLANE_MM
from vtrial.imaging.volume import Volume
from vtrial.organs import labels_of
from vtrial.preparation.grid import covering, sample

BOUNDS = ("heart", "liver", "pancreas", "kidneys", "spleen", "sacrum", "clavicles", "scapulae", "hips")
MARGIN_MM = 40.0
# For masks without hips: how far those reach below the sacrum, of the length from sacrum bottom to clavicle top. The
# published field of view of a man of 1.76 m (737 mm) less that length (568 mm, ICRP 110) and both margins.
_HIPS_BELOW = 0.13
_WHOLE_MM = 3.0  # a bone that ends nearer to the end of the field of view may go on beyond it
_SHORT_MM = 5.0  # of a margin that lacks, worth telling
_SPECK_ML = 2.0
_GAP_MM = 10.0  # between the planes of one organ; what lies further off is a speck of the segmenter's
_LOOK_MM = (4.0, 4.0, 2.0)

FEWEST_HEIGHTS = 20
_LEAST_SPREAD_CM = 3.0  # SD; a slope from less is noise
_MOST_HEIGHTS = 2000  # Theil–Sen takes all pairs


@dataclass(frozen=True)
class Place:
    """Where an organ lies in the world, in mm: its ends along z, and its middle towards the patient's right."""

    low_mm: float
    high_mm: float
    x_mm: float


@dataclass(frozen=True)
class FieldOfView:
    """The part along z that is taken (mm in the world), why it is partial where it is, which margins are short of what
    they should be, and whether the lower end is an estimate."""

    low_mm: float
    high_mm: float
    partial: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    estimated: bool = False


def organ_places(labels: Volume) -> dict[str, Place]:
    """Where `BOUNDS` and humeri lie in a mask of TotalSegmentator ids; what is not there is left out.

    Of planes with gaps of more than 10 mm between them the run with most voxels counts, and less than 2 ml is none.
    """
    grid = covering(*labels.box_mm, _LOOK_MM)
    values, _ = sample(labels, grid, 0, nearest=True)
    along_x, along_z = (_counts(values, axis) for axis in (0, 2))
    x_mm, bottom_mm, step = grid.centres_mm(0), grid.corner_mm[2], grid.spacing_mm[2]
    places = {}
    for organ in (*BOUNDS, "humerus_left", "humerus_right"):
        ids = list(labels_of(organ))
        planes = along_z[:, ids].sum(axis=1)
        first, last = _longest_run(planes, round(_GAP_MM / step))
        if planes[first:last].sum() * np.prod(_LOOK_MM) / 1000.0 < _SPECK_ML:
            continue
        middle = float(np.average(x_mm, weights=along_x[:, ids].sum(axis=1)))
        places[organ] = Place(bottom_mm + first * step, bottom_mm + last * step, middle)
    return places


def _counts(values: NDArray[np.uint8], axis: int) -> NDArray[np.int64]:
    """How often each of 256 labels occurs in each plane across an axis."""
    planes = np.moveaxis(values, axis, 0)
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in planes])


def _longest_run(planes: NDArray[np.int64], gap: int) -> tuple[int, int]:
    """First plane and last plane + 1 of the run with most voxels, over gaps of less than `gap` planes."""
    padded = np.pad(planes > 0, gap)
    runs, count = ndimage.label(ndimage.binary_closing(padded, structure=np.ones(gap)))
    if count == 0:
        return 0, 0
    runs = runs[gap:-gap] * (planes > 0)
    best = int(np.argmax(ndimage.sum_labels(planes, runs, np.arange(1, count + 1)))) + 1
    found = np.flatnonzero(runs == best)
    return int(found[0]), int(found[-1]) + 1


def field_of_view(places: Mapping[str, Place], low_mm: float, high_mm: float) -> FieldOfView:
    """From below the hips to above the clavicles, as far as CT and PET both reach (`low_mm` to `high_mm` in the world).

    Partial is a field of view without whole clavicles or sacrum, or that lacks more than a margin at an end: then what
    is there is taken. Where the mask has no hips (not every segmenter draws them) their end is estimated.
    """
    partial, short = [], []
    top, bottom = places.get("clavicles"), places.get("sacrum")
    for name, place, end in (("clavicles", top, "upper"), ("sacrum", bottom, "lower")):
        if place is None:
            partial.append(f"the organ mask has no {name}")
        elif (high_mm - place.high_mm if end == "upper" else place.low_mm - low_mm) < _WHOLE_MM:
            partial.append(f"the {name} reach the {end} end of what CT and PET both show: they may be cut")
    wanted_low, wanted_high = low_mm, high_mm
    if top is not None:
        wanted_high = max(place.high_mm for name, place in places.items() if name in BOUNDS) + MARGIN_MM
    if bottom is not None:
        wanted_low = min(place.low_mm for name, place in places.items() if name in BOUNDS) - MARGIN_MM
    hips, estimated = places.get("hips"), False
    if top is not None and bottom is not None and (hips is None or hips.low_mm - low_mm < _WHOLE_MM):
        estimate = bottom.low_mm - _HIPS_BELOW * (top.high_mm - bottom.low_mm) - MARGIN_MM
        wanted_low = min(wanted_low, estimate)
        estimated = hips is None
    for end, lacking in (("lower", low_mm - wanted_low), ("upper", wanted_high - high_mm)):
        told = f"{lacking:.0f} mm are missing at the {end} end of the field of view"
        if lacking > MARGIN_MM:
            partial.append(told)
        elif lacking > _SHORT_MM:
            short.append(told)
    low_mm, high_mm = max(low_mm, wanted_low), min(high_mm, wanted_high)
    return FieldOfView(low_mm, high_mm, tuple(partial), tuple(short), estimated)


@dataclass(frozen=True)
class FittedExtents:
    """Extent on height, for a model's card; from how many people, and the middle half-width of what it leaves (mm)."""

    fit: ExtentFit
    people: int
    median_residual_mm: float
    slope_is_the_papers: bool


def fit_extents(heights_cm: Sequence[float], extents_mm: Sequence[float], *, level_only: bool = False) -> FittedExtents:
    """Extent in 2 mm slices on height in m, by Theil and Sen: up to 29 % of wild points hardly move it.

    With fewer than 20 people, heights too alike (SD below 3 cm) or `level_only`, the slope is the paper's and only its
    level is fitted. ValueError without people.
    """
    heights = np.asarray(heights_cm, dtype=np.float64) / 100.0
    slices = np.asarray(extents_mm, dtype=np.float64) / IN_PLANE_MM
    if heights.size == 0:
        raise ValueError("no extents to fit")
    papers = level_only or heights.size < FEWEST_HEIGHTS or 100.0 * heights.std() < _LEAST_SPREAD_CM
    slope = EXTENT_SLICES_PER_M
    if not papers:
        kept = np.argsort(heights, kind="stable")
        kept = kept[np.linspace(0, kept.size - 1, min(kept.size, _MOST_HEIGHTS)).round().astype(int)]
        slope = float(theilslopes(slices[kept], heights[kept]).slope)
    level = float(np.median(slices - slope * heights))
    left = float(np.median(np.abs(slices - slope * heights - level))) * IN_PLANE_MM
    fit = ExtentFit(slices_per_m=round(slope, 3), slices_at_0=round(level, 3))
    return FittedExtents(fit, int(heights.size), round(left, 2), papers)
