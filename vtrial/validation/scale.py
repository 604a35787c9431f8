"""Where a model's scale ends: twins' CT at -500 and 500 HU, their PET at SUV 25, and a patient's beyond.

A value that ends with the scale (SUVmax, SUVpeak, 95th percentile) is set to the ceiling on both sides and goes by its
order. An average over an organ of which a part lies beyond is another number in the twin than in the patient, however
good the model is: `sides.off_scale` names such cells, and they are not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtrial.records import MODEL_HU, MODEL_SUV, InputError
from vtrial.validation.tables import LIVER_RATIO

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Values that end with the scale, and from which part of the ceiling on they count as at it. A sphere that holds clipped
# voxels has others beside them: on phantoms clipped at 25, peaks of 25 to 31 become 23.4 to 25.
ENDING = {"suv_max": 1.0, "suv_peak": 0.9, "suv_p95": 1.0}
AVERAGES = ("suv_mean", "suv_sd", LIVER_RATIO)
# Of the subjects of a side. Where a tenth of the averages is cut, their mean moves by 1.6 % (phantoms' hearts) to 4.8 %
# (their bladders): less than half of the usual margin.
CUT_SHARE = 0.1
_ROUNDING = 1e-4  # 25 through the logarithm and back in float32


@dataclass(frozen=True)
class Ends:
    """Which scans of a cohort show nothing beyond a model's scale; CT tells by lungs, and False where it has none."""

    ct: bool = False
    pet: bool = False


NO_ENDS = Ends()


def ceiling_of(metric: str, suv_ceiling: float) -> float:
    """Where a metric of `ENDING` ends."""
    return ENDING[metric] * suv_ceiling


def ct_ends(lungs_hu: Array) -> bool:
    """Whether mean HU of lungs show a CT that ends at -500 HU; they are the one organ that is always beyond."""
    known = lungs_hu[np.isfinite(lungs_hu)]
    return bool(len(known) and known.min() >= MODEL_HU[0])


def pet_ends(suv: Mapping[str, Array]) -> bool:
    """Whether no uptake lies beyond a model's scale."""
    return not any((values > MODEL_SUV * (1.0 + _ROUNDING)).any() for m, values in suv.items() if m != LIVER_RATIO)


def at_ceiling(
    name: str, suv: Mapping[str, Array], flagged: Mask, suv_ceiling: float
) -> tuple[dict[str, Array], dict[str, Mask]]:
    """Values of `ENDING` up to the ceiling, and where they reached it; all by metric, (subjects, organs).

    `flagged` tells where SUVmax reached 25, which says nothing of a higher ceiling: InputError if no more is known.
    """
    highest = suv.get("suv_max")
    if suv_ceiling > MODEL_SUV and highest is not None and flagged.any() and pet_ends({"suv_max": highest}):
        raise InputError(
            f"{name}: all SUVmax end at {MODEL_SUV:g}, so that nothing is known up to a suv_ceiling of "
            f"{suv_ceiling:g}; set that to {MODEL_SUV:g} or less"
        )
    values, reached = {}, {}
    for metric in ENDING.keys() & suv.keys():
        ceiling = ceiling_of(metric, suv_ceiling)
        reached[metric] = suv[metric] >= ceiling * (1.0 if metric == "suv_max" else 1.0 - _ROUNDING)
        if metric == "suv_max" and suv_ceiling <= MODEL_SUV:
            reached[metric] |= flagged
        values[metric] = np.where(reached[metric], ceiling, suv[metric])
    return values, reached


def cut_averages(suv: Mapping[str, Array], flagged: Mask) -> Mask:
    """Whose averages are, or would be, cut where a model's scale ends, (subjects, organs).

    Where a twentieth of the organ lies beyond, if that is known, else where any of it does: on phantoms clipped at 25
    those lose 2 to 46 % of their SUVmean, the others less than 1 %.
    """
    for metric in ("suv_p95", "suv_max"):
        if metric in suv and np.isfinite(suv[metric]).any():
            cut: Mask = suv[metric] >= MODEL_SUV * (1.0 - _ROUNDING)
            return cut | flagged if metric == "suv_max" else cut
    return flagged
