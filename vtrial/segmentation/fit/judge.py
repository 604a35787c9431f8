"""How well a segmenter draws unseen phantoms, through the code that users run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtrial.cohort.recruit import recruit
from vtrial.cohort.spec import read_spec
from vtrial.imaging.files import nifti_bytes, nifti_from_bytes
from vtrial.organs import GROUPS
from vtrial.phantom.population import Phantom, make_phantom
from vtrial.segmentation.card import Head
from vtrial.segmentation.segmenter import Segmenter

_IDS = 256  # labels are uint8


@dataclass(frozen=True)
class Judgement:
    """Of each head, and of each sum of organs that the heads make up, one number a phantom.

    `dice` is NaN where an organ is neither there nor found; `volume` is the volume found over the true one, NaN where
    there is none. `seconds` are wall time; the first case is loaded with.
    """

    dice: dict[str, tuple[float, ...]]
    volume: dict[str, tuple[float, ...]]
    seconds: tuple[float, ...]

    @property
    def mean_dice(self) -> dict[str, float]:
        """Over phantoms, without those where it is NaN."""
        return {name: _mean(values) for name, values in self.dice.items()}

    @property
    def volume_bias(self) -> dict[str, float]:
        """Mean of volume found over true, less 1."""
        return {name: _mean(values) - 1.0 for name, values in self.volume.items()}


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def held_out(spec: str | Path, n: int, seed: int) -> Iterator[Phantom]:
    """Phantoms of a cohort spec, rendered one by one. The seed must not be that of the training set."""
    return (make_phantom(subject) for subject in recruit(read_spec(spec), n, seed))


def judge(
    segment: Segmenter,
    phantoms: Iterable[Phantom],
    heads: Sequence[Head],
    progress: Callable[[int], None] | None = None,
) -> Judgement:
    """Segment phantoms and compare with their exact masks. `progress` gets the number of those done."""
    regions = compared(heads)
    dice: dict[str, list[float]] = {name: [] for name in regions}
    volume: dict[str, list[float]] = {name: [] for name in regions}
    seconds = []
    for number, phantom in enumerate(phantoms, start=1):
        ct, _ = nifti_bytes(phantom.pet_ct.ct_hu, phantom.pet_ct.spacing_mm)
        begun = time.perf_counter()
        mask, _ = nifti_from_bytes(segment(ct), "mask")
        seconds.append(time.perf_counter() - begun)
        table = _confusion(phantom.labels, mask)
        for name, (true, drawn) in regions.items():
            both = table[np.ix_(true, drawn)].sum()
            there, found = table[true, :].sum(), table[:, drawn].sum()
            dice[name].append(float(2.0 * both / (there + found)) if there + found else float("nan"))
            volume[name].append(float(found / there) if there else float("nan"))
        if progress is not None:
            progress(number)
    return Judgement(
        {name: tuple(values) for name, values in dice.items()},
        {name: tuple(values) for name, values in volume.items()},
        tuple(seconds),
    )


def compared(heads: Sequence[Head]) -> dict[str, tuple[list[int], list[int]]]:
    """What is compared by name: the true class ids, and the ids that the segmenter writes for them."""
    regions = {head.name: (list(head.covers), [head.writes]) for head in heads}
    for name, labels in GROUPS.items():
        parts = [head for head in heads if set(head.covers) <= set(labels)]
        if name not in regions and {label for head in parts for label in head.covers} == set(labels):
            regions[name] = (list(labels), [head.writes for head in parts])
    return regions


def _confusion(true: NDArray[np.uint8], found: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Voxels by true and found label, (256, 256)."""
    pair = true.astype(np.uint16).ravel() * np.uint16(_IDS) + found.astype(np.uint16).ravel()
    return np.bincount(pair, minlength=_IDS * _IDS).reshape(_IDS, _IDS)
