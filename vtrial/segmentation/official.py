"""TotalSegmentator's official weights: found, checked and named before anything runs. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from vtrial.diffusion.weights import sha256_of
from vtrial.records import InputError
from vtrial.segmentation.card import Mode
from vtrial.segmentation.nnunet import CHECKPOINT, DATASETS, STAMP, trainer_folder

WEIGHTS_VARIABLE, HOME_VARIABLE = "TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR"
_RESULTS = Path("nnunet") / "results"
_TASKS: dict[Mode, str] = {"total": "total", "fast": "total_fast", "fastest": "total_fast"}  # of the download command


def official_weights(
    mode: Mode, weights: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> Path:
    """The absolute folder that holds all data set folders of a mode.

    Looked for in `weights` alone if given; else where TotalSegmentator would: $TOTALSEG_WEIGHTS_PATH,
    $TOTALSEG_HOME_DIR/nnunet/results, ~/.totalsegmentator/nnunet/results. InputError that says what is missing where,
    and how to get it.
    """
    places = _places(weights, os.environ if environment is None else environment)
    problems: list[str] = []
    for told, place in places:
        faults = _faults(place, mode)
        if not faults:
            return place
        problems += [f"{told}: {fault}" for fault in faults]
    wanted, place = _TASKS[mode], places[0][1]
    problems.append(
        f"TotalSegmentator's weights for {mode} are not there and are never downloaded silently. Get them with "
        f"`totalseg_download_weights -t {wanted}` (set {WEIGHTS_VARIABLE}={place} to have them there), or give the "
        f"folder with {DATASETS[mode][0]} in it as --weights or in {WEIGHTS_VARIABLE}"
    )
    raise InputError(problems)


def _places(weights: str | Path | None, environment: Mapping[str, str]) -> list[tuple[str, Path]]:
    """Where to look, each with what the user calls it."""
    if weights is not None:
        return [("--weights", Path(weights).expanduser().absolute())]
    places = []
    if given := environment.get(WEIGHTS_VARIABLE):
        places.append((WEIGHTS_VARIABLE, Path(given).expanduser().absolute()))
    if given := environment.get(HOME_VARIABLE):
        places.append((HOME_VARIABLE, Path(given).expanduser().absolute() / _RESULTS))
    places.append(("TotalSegmentator's own folder", Path.home() / ".totalsegmentator" / _RESULTS))
    return places


def _faults(place: Path, mode: Mode) -> list[str]:
    """What keeps a folder from being used for a mode."""
    if not place.is_dir():
        return [f"{place}: no such folder"]
    faults = []
    for dataset in DATASETS[mode]:
        model = place / dataset / trainer_folder(mode)
        if not (place / dataset).is_dir():
            faults.append(f"{place / dataset}: not there (task total, mode {mode})")
            continue
        for name in ("dataset.json", "plans.json", CHECKPOINT):
            path = model / name
            if not path.is_file() or path.stat().st_size == 0:
                faults.append(f"{path}: missing or empty, as an interrupted download leaves it; remove {dataset}")
        faults += _not_official(model / "dataset.json")
    return faults


def _not_official(path: Path) -> list[str]:
    """A model of ours in this layout must never pass for the official one."""
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read ({error})"]
    if isinstance(known, dict) and STAMP not in known:
        return []
    return [f"{path}: a model of vtrial's own in TotalSegmentator's layout, not the official weights"]


def official_sha256(place: Path, mode: Mode) -> str:
    """One hash for all the files of a mode's models."""
    digest = hashlib.sha256()
    for dataset in DATASETS[mode]:
        for name in ("dataset.json", "plans.json", CHECKPOINT):
            digest.update(sha256_of(place / dataset / trainer_folder(mode) / name).encode())
    return digest.hexdigest()
