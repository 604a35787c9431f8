"""The training loop as a generator of steps, and `train`, which adds checkpoints, metrics and a time budget to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vtrial.course import Metrics, follow
from vtrial.memory import keep_freed_memory
from vtrial.records import InputError
from vtrial.training.batches import Batch, batches, measure_scaling
from vtrial.training.checkpoint import CHECKPOINT, TrainingState, new_state, restore_state, save_checkpoint, warm_state
from vtrial.training.config import TrainingConfig, read_config
from vtrial.training.data import StoredVolumes, VolumeSource
from vtrial.training.stream import PhantomStream

METRICS = "metrics.jsonl"
# Edges of the noise-level buckets in which the error is reported, in units of sigma.
BUCKETS = (0.05, 0.2, 1.0, 5.0, 20.0)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: `loss` is what was minimised, `errors` the plain weighted errors at `sigmas`, per example."""

    step: int
    loss: float
    sigmas: tuple[float, ...]
    errors: tuple[float, ...]
    skipped: bool


def steps(
    config: TrainingConfig, source: VolumeSource, state: TrainingState, last: int | None = None
) -> Iterator[StepReport]:
    """Train `state` in place from its step to `last` (config.steps by default), yielding after each step."""
    for batch in batches(config, source, state.step + 1, last or config.steps):
        yield _step(config, state, batch)


def _step(config: TrainingConfig, state: TrainingState, batch: Batch) -> StepReport:
    state.step += 1
    rate = config.optimizer.rate(state.step, config.steps)
    state.optimizer.set_rates(rate, rate * (config.optimizer.matrix_lr or 0.0) / config.optimizer.lr)
    device = batch.target.device
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + state.step)
    count = config.examples(state.step)
    sigma = config.noise.draw(count, generator)
    state.optimizer.zero_grad()
    losses, errors = [], []
    size = min(config.microbatch or count, count)
    for start in range(0, count, size):
        part = batch.part(start, size)
        clean = state.stage.encode(part.target)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noise = noise.contiguous(memory_format=torch.channels_last_3d)
        loss, error = state.denoiser.loss(
            clean, sigma[start : start + size], noise, part.conditions(state.stage), _DTYPES[config.precision]
        )
        (loss * (size / count)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        errors.append(error)
    loss_value = float(torch.stack(losses).mean())
    finite = math.isfinite(loss_value) and _gradients_finite(state)
    if finite:
        state.optimizer.step()
        state.denoiser.normalize_()
        state.ema.update(state.parameters(), state.step - state.skipped)
    else:
        state.skipped += 1
    return StepReport(
        state.step, loss_value, tuple(sigma.tolist()), tuple(torch.cat(errors).tolist()), skipped=not finite
    )


def _gradients_finite(state: TrainingState) -> bool:
    gradients = [p.grad for p in state.denoiser.parameters() if p.grad is not None]
    norms: list[Tensor] = list(torch._foreach_norm(gradients))
    return bool(torch.isfinite(torch.stack(norms)).all())


def _described(
    config: TrainingConfig, state: TrainingState, reports: Sequence[StepReport], elapsed: float
) -> dict[str, object]:
    """A line of metrics."""
    buckets: dict[str, list[float]] = defaultdict(list)
    good = [r for r in reports if not r.skipped]
    for r in good:
        for sigma, error in zip(r.sigmas, r.errors, strict=True):
            buckets[_bucket(sigma)].append(error)
    errors = [e for values in buckets.values() for e in values]
    step = reports[-1].step
    return {
        "step": step,
        "images": config.images(step),
        "loss": sum(r.loss for r in good) / max(len(good), 1),
        "error": sum(errors) / max(len(errors), 1),
        "error_by_sigma": {k: round(sum(v) / len(v), 5) for k, v in sorted(buckets.items())},
        "skipped": state.skipped,
        "images_per_second": round(sum(len(r.sigmas) for r in reports) / elapsed, 3),
        "seconds": round(state.seconds, 1),
        "eta_seconds": round((config.steps - step) * elapsed / len(reports)),
    }


def _bucket(sigma: float) -> str:
    above = [edge for edge in BUCKETS if edge <= sigma]
    return f">={above[-1]:g}" if above else f"<{BUCKETS[0]:g}"


def open_source(data: Path, config: TrainingConfig) -> VolumeSource:
    """A folder is a stored training set; a file is a cohort spec, whose phantoms are rendered endlessly."""
    if data.is_file():
        return PhantomStream(data, seed=config.seed)
    return StoredVolumes(data, phases=config.data.phases, seed=config.seed)


def train(
    config: TrainingConfig | str | Path,
    data: VolumeSource | str | Path,
    out: str | Path,
    *,
    resume: bool = True,
    start_from: str | Path | None = None,
    max_seconds: float | None = None,
    progress: Callable[[dict[str, object]], None] | None = None,
) -> TrainingState:
    """Train one stage into the folder `out` (checkpoint.pt, metrics.jsonl) until config.steps or `max_seconds`.

    `data` is a stored training set, or a cohort spec whose phantoms are rendered endlessly. The same call again goes on
    from the last checkpoint, exactly. A new run starts from scratch, or from the weights of the model `start_from`.
    `progress` gets every metrics line. Raises InputError
    for an unreadable configuration or data set and for an `out` that holds a run with another configuration.
    """
    if not isinstance(config, TrainingConfig):
        config = read_config(config)
    if isinstance(data, str | Path):
        data = open_source(Path(data), config)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if (folder / CHECKPOINT).exists():
        if not resume:
            raise InputError(f"{folder}: holds a training run already; resume it or choose another --out")
        state = restore_state(folder, config, data.device)
    elif start_from is not None:
        state = warm_state(config, start_from, data.support, data.device)
    else:
        state = new_state(config, measure_scaling(config, data), data.support, data.device)
    metrics = Metrics(folder / METRICS, config, state.step, partial(_described, config, state))
    todo = steps(config, data, state) if state.step < config.steps else ()
    follow(todo, config, state, metrics, lambda: save_checkpoint(folder, config, state), max_seconds, progress)
    return state
