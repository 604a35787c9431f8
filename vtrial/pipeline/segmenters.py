"""Segmenters of our own: which are bundled, and fitting one: phantoms, training, and its score on unseen ones."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vtrial.cohort.registry import find_spec
from vtrial.records import InputError
from vtrial.segmentation import SegmenterCard, list_segmenters, read_segmenter_card
from vtrial.segmentation.card import CARD
from vtrial.segmentation.choice import check_package
from vtrial.segmentation.fit import (
    SegmenterConfig,
    finish_segmenter,
    prepare_phantoms,
    read_segmenter_config,
    train_segmenter,
    trained_on,
)
from vtrial.training import hardware, held, writing

PHANTOMS, SEED = 200, 101  # 1 GB on the 3 mm grid
# Every segmenter is judged on the same people, whatever it was trained on.
UNSEEN, UNSEEN_SEED = "autopet-test", 90_101
NOT_FOR_PATIENTS = "For phantoms and twins of models trained on phantoms, not for patients."


def segmenters() -> list[dict[str, Any]]:
    """The bundled segmenters; Dice and volume bias (%) are those on phantoms that no training has seen."""
    cards = map(read_segmenter_card, list_segmenters())
    return [
        {
            "name": card.name,
            "description": card.description,
            "data": card.training_data,
            "dice": card.dice,
            "volume bias": card.volume_bias,
            "sha256": card.sha256,
        }
        for card in cards
    ]


def is_segmenter(config: Path) -> bool:
    """Whether a configuration is a segmenter's (`heads`) and not a stage's (`stage`); InputError if it has neither.

    A file that cannot be read passes for a stage's: that its reader tells.
    """
    try:
        found = tomllib.loads(config.read_text())
    except (OSError, ValueError):
        return False
    if "heads" in found or "stage" in found:
        return "heads" in found
    raise InputError(
        f"{config}: has neither `stage`, as the configuration of a model, nor `heads`, as that of a segmenter; for "
        "examples see configs/"
    )


def fit_segmenter(
    config: Path,
    data: Path,
    out: Path,
    progress: Callable[[dict[str, object]], None],
    max_seconds: float | None = None,
) -> SegmenterCard:
    """Train a segmenter in `out`/training for at most `max_seconds`, judge it, and write it to `out`.

    `data` is a set of `prepare_phantoms`, or a cohort spec: its phantoms are rendered once, to `out`/training/phantoms.
    The same call again goes on where it was, and does nothing where all is done. InputError for bad input, for an `out`
    that holds something else and where another training is at work; CannotGoOn if the disk is full.
    """
    settings = read_segmenter_config(config)
    check_package(own=True)
    known = _known(out, settings)
    run = out / "training"
    with writing(out), held(run):
        return _fit(settings, data, out, run, known, progress, max_seconds)


def _fit(
    settings: SegmenterConfig,
    data: Path,
    out: Path,
    run: Path,
    known: SegmenterCard | None,
    progress: Callable[[dict[str, object]], None],
    max_seconds: float | None,
) -> SegmenterCard:
    phantoms = data
    if not data.is_dir():
        phantoms = prepare_phantoms(
            settings,
            find_spec(data),
            run / "phantoms",
            PHANTOMS,
            SEED,
            progress=lambda done: progress({"phantoms": f"{done} of {PHANTOMS}"}),
        )
    state = train_segmenter(settings, phantoms, run, max_seconds=max_seconds, progress=progress)
    if known is not None and known.training_data == trained_on(settings, state):
        return known
    card, _ = finish_segmenter(
        run,
        out,
        find_spec(UNSEEN),
        seed=UNSEEN_SEED,
        threads=torch.get_num_threads(),
        description=(known.description if known else "") or NOT_FOR_PATIENTS,
        hardware=hardware(),
        progress=lambda what, done: progress({what: done}),
    )
    return card


def _known(out: Path, settings: SegmenterConfig) -> SegmenterCard | None:
    """The card that is in `out`; InputError if it is a model's, or that of another segmenter."""
    if not (out / CARD).is_file():
        return None
    card = read_segmenter_card(out.absolute())  # a name alone would be a bundled segmenter's
    if card.name != settings.name:
        raise InputError(f"{out}: holds the segmenter {card.name}; choose another --out for {settings.name}")
    return card
