"""The search for copies: volumes of twins, held-out people and the training set, each read once at low resolution.

A low-resolution volume is every fourth voxel along each axis, as stage 1 of the cascade sees it, in model space
(`imaging.codec`), averaged over blocks of 2×2×2 of them or more, so that noise counts for little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vtrial.execution import cpu_count
from vtrial.geometry import FACTOR
from vtrial.pipeline.originals import TRIED, UNREADABLE, TrainingSet, Triple, low_of, shape_of
from vtrial.pipeline.parts import Parts, Steps
from vtrial.pipeline.scans import Scans
from vtrial.pipeline.sides import Side
from vtrial.records import InputError
from vtrial.validation import AnalysisSettings
from vtrial.validation.nearest import copies, nearest_distances

Volumes = NDArray[np.float32]
MEMORY = 2**30  # bytes of all low-resolution volumes together; larger sets are averaged over larger blocks
READERS = 4  # scans unpacked at once, of 120 MB each
FEWEST = 10  # held-out volumes; of fewer the training set itself tells more
_SAME = 0.25  # of the usual distance within the training set: nearer is no other person


def grid_problems(scans: Scans, training: TrainingSet) -> list[str]:
    """Why the scans cannot be searched for copies, by the first that can be read; empty where they can."""
    for case in scans.ct_cases[:TRIED]:
        with suppress(*UNREADABLE):
            shape = shape_of(low_of(scans.read(case.subject_id)))
            if shape != training.shape:
                return [
                    f"--train {training.folder}: {_grids(training.shape, shape)} in {scans.name}; leave out --train"
                ]
            break
    return []


def search(
    training: TrainingSet, twins: Side, real: Side | None, reference: str, settings: AnalysisSettings, steps: Steps
) -> pd.DataFrame:
    """`validation.nearest.copies` of the twins, by the scans of `real` where there are enough, else by leaving one out.

    Further `attrs`: training_set, held_out (what the yardstick is, in words), block_voxels (edge of what one value is
    the mean of) and notes. `reference` is what the comparison calls the other side. InputError where no twin, or no two
    training volumes, can be read.
    """
    sides = [twins] if real is None else [twins, real]
    block = _block(training.shape, len(training.ids) + sum(len(side.scans.ct_cases) for side in sides))
    notes: list[str] = []

    def read(what: str, names: Sequence[str], low: Callable[[str], torch.Tensor]) -> tuple[Volumes, list[str]]:
        with steps(f"read {what}") as report:
            volumes, kept = _read(names, low, training.shape, block, Parts(report, len(names)))
        if len(kept) < len(names):
            notes.append(f"copies: {len(names) - len(kept)} of {len(names)} volumes of {what} could not be used")
        return volumes, kept

    known, training_ids = read(f"training set {training.folder.name}", training.ids, training.low)
    if training.of > len(training.ids):
        notes.append(f"copies: the training set has volumes of {len(training.ids)} of its {training.of} subjects")
    made, twin_ids = read(twins.scans.name, *_scans(twins))
    if len(training_ids) < 2 or not twin_ids:
        raise InputError(f"{len(training_ids)} training volumes and {len(twin_ids)} of {twins.scans.name} can be read")
    held_out, told = None, f"{reference} has no volumes"
    if real is not None:
        theirs, _ = read(real.scans.name, *_scans(real))
        held_out, told = _unseen(theirs, known, real.scans.name)
    table = copies(
        made,
        known,
        held_out,
        copy_ratio=settings.collapse.copy_ratio,
        alpha=settings.alpha,
        seed=settings.seed,
        twin_ids=twin_ids,
        training_ids=training_ids,
    )
    if held_out is None:
        told = f"each training volume against the others (p: either half against the other), as {told}"
    facts = {"training_set": training.folder.name, "held_out": told, "block_voxels": block * FACTOR, "notes": notes}
    table.attrs |= facts
    return table


def _unseen(volumes: Volumes, known: Volumes, name: str) -> tuple[Volumes | None, str]:
    """Volumes that are not in the training set, and what they are; None where they are too few, and why."""
    if len(volumes):
        (distance, _), (within, _) = nearest_distances(volumes, known), nearest_distances(known, known, itself=True)
        unseen = volumes[distance >= _SAME * np.median(within)]
    else:
        unseen = volumes
    own = len(volumes) - len(unseen)
    also = f"; {own} more are in the training set themselves" if own else ""
    if len(unseen) < FEWEST:
        return None, f"{name} has {len(unseen)} held-out volumes on this grid{also}"
    return unseen, f"{len(unseen)} volumes of {name}{also}"


def _scans(side: Side) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    return [case.subject_id for case in side.scans.ct_cases], lambda name: low_of(side.scans.read(name))


def _read(
    names: Sequence[str], low: Callable[[str], torch.Tensor], shape: Triple, block: int, parts: Parts
) -> tuple[Volumes, list[str]]:
    """Coarse volumes (subjects, values) in model space of those that can be read, and who they are."""

    def coarse(name: str) -> Volumes | str:
        """The volume, or why it cannot be had."""
        try:
            voxels = low(name)
            if shape_of(voxels) != shape:
                raise ValueError(_grids(shape, shape_of(voxels)))
            if not bool(torch.isfinite(voxels).all()):
                raise ValueError("voxels are not finite")
        except UNREADABLE as error:
            return str(error)
        pooled: Volumes = torch.nn.functional.avg_pool3d(voxels[None], block).flatten().numpy()
        return pooled

    volumes = np.empty((len(names), 2 * math.prod(n // block for n in shape)), dtype=np.float32)
    kept: list[str] = []
    with ThreadPoolExecutor(min(READERS, cpu_count())) as pool:  # most of the time is spent unpacking
        for name, found in zip(names, pool.map(coarse, names), strict=True):
            if isinstance(found, str):
                parts.ended(name, found)
                continue
            volumes[len(kept)] = found
            kept.append(name)
            parts.ended(name)
    return volumes[: len(kept)], kept


def _block(shape: Triple, count: int) -> int:
    """Edge of the blocks, in low-resolution voxels: 2, or more where all volumes together would not fit."""
    edges = [edge for edge in (2, 4, 8) if edge <= min(shape)] or [1]
    fitting = (e for e in edges if count * 2 * math.prod(n // e for n in shape) * 4 <= MEMORY)
    return next(fitting, edges[-1])


def _grids(training: Triple, other: Triple) -> str:
    grids = ["×".join(str(FACTOR * n) for n in shape) for shape in (training, other)]
    return f"training volumes of about {grids[0]} voxels, but {grids[1]}"
