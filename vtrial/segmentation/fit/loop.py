"""The training of a segmenter: steps, metrics, and a state that resumes exactly."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtrial.course import Metrics, follow, save_whole, unless_all_skipped
from vtrial.memory import keep_freed_memory
from vtrial.optimizer import Optimizer, is_matrix
from vtrial.precision import usual_dtype
from vtrial.records import InputError
from vtrial.segmentation.fit.average import Average
from vtrial.segmentation.fit.batches import Batch, batches
from vtrial.segmentation.fit.config import SegmenterConfig, read_segmenter_config
from vtrial.segmentation.fit.data import StoredPhantoms
from vtrial.segmentation.fit.network import build

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
FREE_FIELDS = {"steps", "checkpoint_steps", "metric_steps"}  # may change between a training and its continuation
_ABSENT = 10.0  # voxels: how much of a region must be in a batch for its Dice to count


@dataclass
class FitState:
    """Everything that changes while training, and what on (`source`). Random numbers depend on (seed, step) alone."""

    network: nn.Module
    optimizer: Optimizer
    average: Average
    source: str
    step: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class FitReport:
    """One step: its loss, and the soft Dice of each head over the batch (NaN where it was not in it)."""

    step: int
    loss: float
    dice: tuple[float, ...]
    skipped: bool


def new_state(config: SegmenterConfig, source: str) -> FitState:
    """An untrained network, its weights drawn from the configuration's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.network, len(config.heads), normalise=True).train()
    return FitState(network, Optimizer(network.parameters(), _is_kernel), Average(network, config.ema), source)


def region_loss(logits: Tensor, regions: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor]:
    """Mean Dice loss of the heads present plus weighted cross-entropy; and each head's Dice, NaN where it is absent.

    `logits` and `regions` (b, heads, z, y, x). The Dice is that of squares (Milletari et al. 2016, "V-Net"), which is
    highest where outputs equal soft targets; a head's is of all voxels of the batch. Cross-entropies add up over heads.
    """
    over = (0, 2, 3, 4)
    probability = torch.sigmoid(logits)
    both = (probability * regions).sum(over)
    size = regions.square().sum(over)
    dice = (2.0 * both + _ABSENT) / (probability.square().sum(over) + size + _ABSENT)
    entropy = F.binary_cross_entropy_with_logits(logits, regions) * regions.shape[1]
    plain = 2.0 * both / (probability.square().sum(over) + size)
    # Where a head is absent the Dice would only push it down, which cross-entropy does as well.
    there = (size >= _ABSENT).float()
    missed = ((1.0 - dice) * there).sum() / there.sum().clamp(min=1.0)
    return missed + entropy_weight * entropy, plain.detach().masked_fill(size < _ABSENT, math.nan)


def steps(
    config: SegmenterConfig, data: StoredPhantoms, state: FitState, last: int | None = None
) -> Iterator[FitReport]:
    """Train `state` in place from its step to `last` (config.steps by default), yielding after each step.

    CannotGoOn where too many in a row were skipped (`vtrial.course.unless_all_skipped`).
    """
    reports = (_step(config, state, batch) for batch in batches(config, data, state.step + 1, last or config.steps))
    return unless_all_skipped(reports, state, 'lower optimizer.lr and matrix_lr, or set precision = "float32"')


def _step(config: SegmenterConfig, state: FitState, batch: Batch) -> FitReport:
    state.step += 1
    course = config.optimizer.course(state.step, config.steps)
    state.optimizer.set_rates(course * config.optimizer.lr, course * config.optimizer.matrix_lr)
    state.optimizer.zero_grad()
    images = batch.image.contiguous(memory_format=torch.channels_last_3d)
    dtype = usual_dtype(images.device, config.precision)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        logits = state.network(images)
    loss, dice = region_loss(logits.float(), batch.regions, config.entropy_weight)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.norm() for p in state.network.parameters() if p.grad is not None]
    finite = bool(torch.isfinite(torch.stack([loss.detach(), *gradients])).all())
    if finite:
        state.optimizer.step()
        state.average.update(state.network, state.step - state.skipped)
    else:
        state.skipped += 1
    return FitReport(state.step, float(loss.detach()), tuple(dice.tolist()), skipped=not finite)


def train_segmenter(
    config: SegmenterConfig | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = True,
    max_seconds: float | None = None,
    progress: Callable[[dict[str, object]], None] | None = None,
) -> FitState:
    """Train into the folder `out` (checkpoint.pt, metrics.jsonl) until config.steps or `max_seconds`.

    `data` is a set made by `prepare_phantoms`. The same call again goes on from the last checkpoint, exactly.
    `progress` gets every line of metrics. InputError for an unreadable configuration or set, and for an `out` that
    holds a training with another configuration or set.
    """
    if not isinstance(config, SegmenterConfig):
        config = read_segmenter_config(config)
    phantoms = StoredPhantoms(Path(data), config.spacing_mm)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if (folder / CHECKPOINT).exists():
        if not resume:
            raise InputError(f"{folder}: holds a training already; resume it or choose another --out")
        state = restore_state(folder, config, phantoms.source)
    else:
        state = new_state(config, phantoms.source)
    metrics = Metrics(folder / METRICS, config, state.step, partial(_described, config, state))
    todo = steps(config, phantoms, state) if state.step < config.steps else ()
    follow(todo, config, state, metrics, lambda: save_checkpoint(folder, config, state), max_seconds, progress)
    return state


def _described(
    config: SegmenterConfig, state: FitState, reports: Sequence[FitReport], elapsed: float
) -> dict[str, object]:
    """A line of metrics, without loss and Dice where all steps were skipped."""
    step, good = reports[-1].step, [r for r in reports if not r.skipped]
    found: dict[str, object] = {}
    if good:
        dice = torch.tensor([r.dice for r in good]).nanmean(0).tolist()
        found = {
            "loss": round(sum(r.loss for r in good) / len(good), 5),
            "dice": {name: round(value, 4) for name, value in zip(config.heads, dice) if not math.isnan(value)},
        }
    return {
        "step": step,
        **found,
        "skipped": state.skipped,
        "seconds": round(state.seconds, 1),
        "eta_seconds": round((config.steps - step) * elapsed / len(reports)),
    }


def save_checkpoint(folder: Path, config: SegmenterConfig, state: FitState) -> Path:
    """Write the state; the previous checkpoint stays until the new one is on the disk. OSError if it cannot be."""
    content = {
        "config": config.model_dump_json(),
        "source": state.source,
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "average": state.average.values,
        "step": state.step,
        "skipped": state.skipped,
        "seconds": state.seconds,
    }
    save_whole(folder / CHECKPOINT, content)
    return folder / CHECKPOINT


def read_checkpoint(folder: Path) -> tuple[SegmenterConfig, FitState]:
    """Configuration and state of a training; InputError if there is none that can be read."""
    path = folder / CHECKPOINT
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        config = SegmenterConfig.model_validate_json(content["config"])
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a readable checkpoint: {error}") from None
    state = new_state(config, content["source"])
    state.network.load_state_dict(content["network"])
    state.optimizer.load_state_dict(content["optimizer"])
    for name, value in content["average"].items():
        state.average.values[name].copy_(value)
    state.step, state.skipped, state.seconds = content["step"], content["skipped"], content["seconds"]
    return config, state


def restore_state(folder: Path, config: SegmenterConfig, source: str) -> FitState:
    """The state of an interrupted training; InputError if its configuration or its phantoms were others."""
    then, state = read_checkpoint(folder)
    old, new = (c.model_dump(mode="json", exclude=FREE_FIELDS) for c in (then, config))
    changed = [name for name in new if new[name] != old[name]]
    if state.source != source:
        changed.append(f"with {state.source}, now {source}")
    if changed:
        raise InputError(f"{folder}: trained with another configuration ({', '.join(changed)}); choose another --out")
    return state


def _is_kernel(parameter: nn.Parameter) -> bool:
    """Kernels with neighbours; the outputs' 1×1×1 ones stay with Adam."""
    return is_matrix(parameter) and parameter[0, 0].numel() > 1
