"""`train`: the steps of the loop with checkpoints, metrics and a time budget, at one worker or at each of several."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vtrial.course import Line, Metrics, follow
from vtrial.memory import keep_freed_memory
from vtrial.records import InputError
from vtrial.training.batches import measure_scaling
from vtrial.training.checkpoint import (
    CHECKPOINT,
    TrainingState,
    check_run,
    keep_checkpoints,
    new_state,
    restore_state,
    save_checkpoint,
    stage_to_start_from,
    warm_state,
)
from vtrial.training.config import TrainingConfig, read_config
from vtrial.training.data import StoredVolumes, VolumeSource, data_sha256, memory_for_volumes
from vtrial.training.loop import StepReport, steps
from vtrial.training.share import Share, usual_device
from vtrial.training.stream import PhantomStream
from vtrial.training.tracking import event_writer
from vtrial.training.watch import Watch, held_out

METRICS = "metrics.jsonl"
# Edges of the noise-level buckets in which the error is reported, in units of sigma.
BUCKETS = (0.05, 0.2, 1.0, 5.0, 20.0)


@dataclass(frozen=True)
class Job:
    """One stage to train, as it is told to workers: absolute paths, of folders that all of them see."""

    config: TrainingConfig
    data: Path
    out: Path
    start_from: str | None = None
    until: float | None = None
    """When to end, in seconds of `time.time`."""

    def check(self, tell: Callable[[Line], None]) -> None:
        """InputError for data that cannot be read, a model that cannot be started from, or an `out` that holds a run
        with another configuration or on other data: workers would find out one after the other. `tell` hears what there
        is not."""
        source = open_source(self.data, self.config, torch.device("cpu"))
        apart = held_out(self.data, self.config) if self.config.watch.validate_steps else None
        for stored in (source, apart):
            if isinstance(stored, StoredVolumes):
                stored.check()
        check_run(self.out, self.config, data_sha256(self.data))
        if self.start_from is not None:
            stage_to_start_from(self.config, self.start_from)
        if self.config.watch.validate_steps and apart is None:
            tell({"validation": f"none: {self.data.name} has nobody in a split validation"})

    def run(
        self,
        share: Share,
        progress: Callable[[Line], None] | None = None,
        saved: Callable[[TrainingState], None] | None = None,
    ) -> TrainingState:
        """Train a worker's share: `train`."""
        return train(
            self.config,
            self.data,
            self.out,
            start_from=self.start_from,
            max_seconds=None if self.until is None else self.until - time.time(),
            progress=progress,
            share=share,
            saved=saved,
        )


def open_source(data: Path, config: TrainingConfig, device: torch.device, workers: int = 1) -> VolumeSource:
    """A folder is a stored training set; a file is a cohort spec, whose phantoms are rendered endlessly on `device`.

    Each of the `workers` has a source of its own, and its part of the memory.
    """
    if data.is_file():
        return PhantomStream(data, seed=config.seed, device=device)
    return StoredVolumes(data, phases=config.data.phases, seed=config.seed, memory=memory_for_volumes(workers))


def train(
    config: TrainingConfig | str | Path,
    data: VolumeSource | str | Path,
    out: str | Path,
    *,
    resume: bool = True,
    start_from: str | Path | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Line], None] | None = None,
    share: Share | None = None,
    saved: Callable[[TrainingState], None] | None = None,
) -> TrainingState:
    """Train one stage into the folder `out` (checkpoint.pt, metrics.jsonl) until config.steps or `max_seconds`.

    `data` is a stored training set, or a cohort spec whose phantoms are rendered endlessly. The same call again goes on
    from the last checkpoint, exactly. A new run starts from scratch, or from the weights of the model `start_from`.
    Several workers call this alike, each with its `share`; the first one writes, into a folder that all of them see.
    What `config.watch` asks for lies beside the metrics. `progress` gets every line of metrics and validation, and
    `saved` the state after every checkpoint, at each worker. Raises InputError for an unreadable configuration or data
    set and for an `out` that holds a run with another configuration or on another set.
    """
    if not isinstance(config, TrainingConfig):
        config = read_config(config)
    apart, sha256 = None, ""
    if isinstance(data, str | Path):
        sha256 = data_sha256(Path(data))
        apart = held_out(Path(data), config) if config.watch.validate_steps else None
        share = share or Share(device=usual_device())
        data = open_source(Path(data), config, share.device, share.world)
    share = share or Share(device=data.device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if (folder / CHECKPOINT).exists() and not resume:
        raise InputError(f"{folder}: holds a training run already; resume it or choose another --out")
    state = _begin(config, data, sha256, folder, start_from, share)
    describe = partial(_described, config, state, share, state.step)
    metrics = Metrics(folder / METRICS if share.leads else None, config, state.step, describe)

    def save() -> None:
        if share.leads:
            save_checkpoint(folder, config, state)
            keep_checkpoints(folder, config.watch, state.step)
        if saved is not None:
            saved(state)

    events = event_writer(folder, state.step) if share.leads else None

    def tell(line: Line) -> None:
        for listener in (progress, events):
            if listener is not None:
                listener(line)

    watch = Watch(config, folder, data, apart, state.step, share, tell)
    todo = _watched(steps(config, data, state, share=share), watch, state) if state.step < config.steps else ()
    follow(todo, config, state, metrics, save, max_seconds, tell, share.any)
    share.wait()  # until the last checkpoint is there
    return state


def _watched(reports: Iterable[StepReport], watch: Watch, state: TrainingState) -> Iterator[StepReport]:
    for report in reports:
        watch.look(state)
        yield report


def _begin(
    config: TrainingConfig,
    data: VolumeSource,
    sha256: str,
    folder: Path,
    start_from: str | Path | None,
    share: Share,
) -> TrainingState:
    """The state to go on from. Workers take it from the checkpoint, so that all begin with the same bits."""
    if share.leads and not (folder / CHECKPOINT).exists():
        if start_from is not None:
            state = warm_state(config, start_from, data.support, share.device)
        else:
            state = new_state(config, measure_scaling(config, data), data.support, share.device)
        state.data_sha256 = sha256
        if share.world == 1:
            return state
        save_checkpoint(folder, config, state)
    share.wait()
    return restore_state(folder, config, share.device, sha256)


def _described(
    config: TrainingConfig,
    state: TrainingState,
    share: Share,
    begun: int,
    reports: Sequence[StepReport],
    elapsed: float,
) -> Line:
    """A line of metrics, without loss and error where all steps were skipped; `begun` is the step from which the
    present workers went on."""
    buckets: dict[str, list[float]] = defaultdict(list)
    good = [r for r in reports if not r.skipped]
    for r in good:
        for sigma, error in zip(r.sigmas, r.errors, strict=True):
            buckets[bucket(sigma)].append(error)
    errors = [e for values in buckets.values() for e in values]
    step = reports[-1].step
    found: Line = {}
    if good:
        found = {
            "loss": sum(r.loss for r in good) / len(good),
            "error": sum(errors) / len(errors),
            "error_by_sigma": {k: round(sum(v) / len(v), 5) for k, v in sorted(buckets.items())},
        }
    return {
        "step": step,
        "images": config.images(step),
        **found,
        "skipped": state.skipped,
        "workers": share.world,
        "begun": begun,
        "images_per_second": round(sum(len(r.sigmas) for r in reports) / elapsed, 3),
        "seconds": round(state.seconds, 1),
        "eta_seconds": round((config.steps - step) * elapsed / len(reports)),
    }


def bucket(sigma: float) -> str:
    """The name of the range of noise levels that `sigma` lies in."""
    above = [edge for edge in BUCKETS if edge <= sigma]
    return f">={above[-1]:g}" if above else f"<{BUCKETS[0]:g}"
