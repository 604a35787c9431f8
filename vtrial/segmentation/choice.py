"""From what the user names to a checked segmenter, before anything runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vtrial.diffusion.weights import load_weights
from vtrial.records import InputError
from vtrial.segmentation.adapter import NEEDS_SMOOTH, SMOOTH, LoadTotalSegmentator
from vtrial.segmentation.card import SEGMENTERS, WEIGHTS, Mode, read_segmenter_card, segmenter_folder
from vtrial.segmentation.nnunet import BUILD
from vtrial.segmentation.official import official_sha256, official_weights
from vtrial.segmentation.resident import totalsegmentator_release, totalsegmentator_version
from vtrial.segmentation.segmenter import SegmenterPlan

OFFICIAL = "totalsegmentator"
_SMOOTH_SINCE = (2, 15)  # of TotalSegmentator


def segmenter_plan(
    name: str,
    *,
    mode: Mode | None = None,
    weights: str | Path | None = None,
    cache: Path | None = None,
    resident: bool = True,
) -> SegmenterPlan:
    """The plan for "totalsegmentator" (in a mode, with its weights in a folder), a bundled segmenter or a folder.

    InputError if there is no such segmenter, its weights are missing or not its card's, or the options do not fit.
    `cache` is where the nnU-Net folder of a segmenter of our own is kept.
    """
    check_package(own=name.lower() != OFFICIAL)
    if name.lower() == OFFICIAL:
        return _official_plan(mode or "total", weights, resident=resident)
    if mode is not None or weights is not None:
        raise InputError(f"segmenter {name}: its grid and weights are its own; leave --fast, --fastest and --weights")
    return _own_plan(name, cache, resident=resident)


def check_package(*, own: bool) -> None:
    """InputError unless the totalsegmentator package is there, for segmenters of our `own` recent enough."""
    found = totalsegmentator_version()
    if not found:
        raise InputError("segmentation needs the totalsegmentator package; install it: pip install totalsegmentator")
    if own and totalsegmentator_release() < _SMOOTH_SINCE:
        raise InputError(f"totalsegmentator {found} has no option {SMOOTH}, which {NEEDS_SMOOTH}")


def _official_plan(mode: Mode, weights: str | Path | None, *, resident: bool) -> SegmenterPlan:
    place = official_weights(mode, weights)
    sha256 = official_sha256(place, mode)
    return SegmenterPlan(
        name=OFFICIAL if mode == "total" else f"{OFFICIAL}-{mode}",
        sha256=_identity("official", mode, sha256),
        load=LoadTotalSegmentator(mode, weights=str(place), resident=resident),
        phantoms_only=False,
        facts={
            "task": "total",
            "mode": mode,
            "weights_sha256": sha256,
            "totalsegmentator": totalsegmentator_version(),
        },
    )


def _own_plan(name: str, cache: Path | None, *, resident: bool) -> SegmenterPlan:
    folder, card = segmenter_folder(name), read_segmenter_card(name)
    load_weights(folder / WEIGHTS, card.sha256)  # InputError now, not in every worker
    # A bundled segmenter goes by its name: on another machine of a cluster the package may lie elsewhere.
    bundled = folder.parent == SEGMENTERS
    location = name if bundled else str(folder.absolute())
    kept = "" if cache is None else str(cache.absolute())
    return SegmenterPlan(
        name=card.name,
        sha256=_identity("own", str(BUILD), SMOOTH, card.sha256, card.identity),
        load=LoadTotalSegmentator(card.mode, model=location, cache=kept, resident=resident),
        phantoms_only=card.phantoms_only,
        organs=card.organs,
        facts={
            "description": card.description,
            "training_data": card.training_data,
            "license": card.license,
            "mode": card.mode,
            "options": [SMOOTH],
            "organs": list(card.organs),
            "weights_sha256": card.sha256,
            "totalsegmentator": totalsegmentator_version(),
        },
        folder="" if bundled else location,
    )


def _identity(*parts: str) -> str:
    """A hash of what decides the masks: model, mode, and the package around it up to its minor version."""
    package = ".".join(totalsegmentator_version().split(".")[:2])
    return hashlib.sha256(json.dumps([*parts, package]).encode()).hexdigest()
