"""Models: which there are, and fitting one, or a segmenter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vtrial.diffusion.denoiser import StageName
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import CARD, WEIGHT_FILES, ExtentFit, ModelCard, list_models, read_card
from vtrial.generation import describe_models
from vtrial.pipeline.segmenters import fit_segmenter, is_segmenter
from vtrial.records import InputError
from vtrial.segmentation import SegmenterCard
from vtrial.training import (
    Job,
    Share,
    TrainingConfig,
    export_model,
    hardware,
    held,
    in_turn,
    read_config,
    saved_step,
    usual_device,
    writing,
)
from vtrial.training.checkpoint import CHECKPOINT, check_run
from vtrial.training.data import data_sha256, read_extent
from vtrial.training.estimate import Estimate, estimate
from vtrial.training.export import kept_stages
from vtrial.training.fitting import open_source

Progress = Callable[[dict[str, object]], None]
Trainer = Callable[[Job, Progress], None]
"""Does a job, telling of every line of metrics."""

# What a freshly trained stage is sampled with until its card says otherwise; noise levels of decision 011.
FRESH_SAMPLERS: dict[StageName, SamplerConfig] = {
    "global": SamplerConfig(steps=32, sigma_max=2000.0),
    "global-detail": SamplerConfig(sigma_max=0.8),  # where it takes over; how it is sampled, "global" says
    "super-resolution": SamplerConfig(name="dpmpp-2m", steps=12, sigma_max=20.0),
}


def models() -> list[dict[str, Any]]:
    """The bundled models."""
    return describe_models(list_models())


def train_here(job: Job, progress: Progress, device: torch.device | None = None) -> None:
    """Do a job in this process, on the first GPU or else the CPU, or on `device`.

    InputError if the job is not sound or another training is at work in its folder; CannotGoOn if the disk is full.
    """
    job.check(progress)
    with writing(job.out), held(job.out):
        job.run(Share(device=device or usual_device()), progress)


def train(
    config: Path,
    data: Path,
    out: Path,
    progress: Progress,
    start_from: str | None = None,
    max_seconds: float | None = None,
    trainer: Trainer | None = None,
    ema: float | None = None,
) -> ModelCard | SegmenterCard:
    """Fit what a configuration is of: a stage of a model, or a segmenter, going on from the last checkpoint.

    `trainer` trains a stage elsewhere than in this process; `ema` is the length of the average that the model gets.
    """
    if not is_segmenter(config):
        return fit_stage(config, data, out, progress, start_from, max_seconds, trainer or train_here, ema)
    wrong = {
        "begins with no other's weights; leave out --start-from": start_from is not None,
        "has one average; leave out --ema": ema is not None,
        "is trained in one process; leave out --workers, --gpus-per-worker, --address and --executor": bool(trainer),
    }
    if any(wrong.values()):
        raise InputError([f"{config}: a segmenter {text}" for text, found in wrong.items() if found])
    return fit_segmenter(config, data, out, progress, max_seconds)


def fit_stage(
    config: Path,
    data: Path,
    out: Path,
    progress: Progress,
    start_from: str | None,
    max_seconds: float | None,
    trainer: Trainer,
    ema: float | None = None,
) -> ModelCard:
    """Fit one stage, going on from its last checkpoint, and export the stages that `out` holds.

    A stage whose checkpoint is gone stays in the model as it is. Lengths of bodies are those of stage 1's data.
    Checkpoints lie in `out`/training/<stage>; the samplers of a card that is there already are kept, and a new stage is
    sampled over the noise levels that it was trained on.
    """
    settings = read_config(config)
    until = None if max_seconds is None else time.time() + max_seconds
    job = Job(settings, data.absolute(), _folder(out, settings.stage), start_from, until)
    check_average(config, settings, ema)
    extent = read_extent(data)
    trainer(job, progress)
    # the card is read, changed and written: two stages that end at once must not lose one another
    with writing(out), in_turn(_folder(out, settings.stage).parent):
        return _export(settings, data, extent, out, ema)


def check_average(config: Path, settings: TrainingConfig, ema: float | None) -> None:
    """InputError for an averaging length that a training neither tracks nor can make of snapshots."""
    if ema is not None and ema not in settings.ema and not settings.watch.snapshot_steps:
        tracked = ", ".join(f"{length:g}" for length in settings.ema)
        raise InputError(f"--ema {ema:g}: {config} tracks {tracked}; choose one of these or set watch.snapshot_steps")


def _export(settings: TrainingConfig, data: Path, extent: ExtentFit | None, out: Path, ema: float | None) -> ModelCard:
    """Export what `out` holds after a stage was trained: stages with a checkpoint anew, others as its card has them."""
    runs: dict[StageName, Path] = {stage: _folder(out, stage) for stage in WEIGHT_FILES}
    runs = {stage: folder for stage, folder in runs.items() if (folder / CHECKPOINT).is_file()}
    known = read_card(out) if (out / CARD).is_file() else None
    trained = known.stages if known else {}
    lengths = {stage: card.ema_length for stage, card in trained.items() if stage != settings.stage}
    text = str(data)
    if known and settings.stage != "global":  # bodies and their lengths are stage 1's
        text, extent = known.data, known.extent
    return export_model(
        out,
        runs,
        _samplers(settings, known, [*runs, *kept_stages(out, known, runs)]),
        name=out.absolute().name,
        ema=lengths if ema is None else {**lengths, settings.stage: ema},
        known=known,
        data=text,
        data_sha256={stage: card.data_sha256 for stage, card in trained.items()},
        hardware=hardware(),
        extent=extent,
    )


def foresee(
    config: Path, data: Path, out: Path, workers: int, device: torch.device | None
) -> tuple[TrainingConfig, Estimate]:
    """The whole configuration of a stage, and what the steps that `out` still lacks will take; nothing is written."""
    if is_segmenter(config):
        raise InputError(f"{config}: a segmenter's training is not estimated; leave out --dry-run")
    settings, device = read_config(config), device or usual_device()
    folder = _folder(out, settings.stage)
    source = open_source(data, settings, device, workers)
    check_run(folder, settings, data_sha256(data))
    return settings, estimate(settings, source, saved_step(folder), workers, device)


def _folder(out: Path, stage: StageName) -> Path:
    return (out / "training" / stage).absolute()


def _samplers(
    settings: TrainingConfig, known: ModelCard | None, stages: Sequence[StageName]
) -> dict[StageName, SamplerConfig]:
    """Those of the card that is there; a new stage is sampled as its configuration says, or over the noise levels that
    it was trained on."""
    usual = FRESH_SAMPLERS[settings.stage]
    # the expert takes over in the middle of what it knows
    highest = settings.noise.sigma_max / (2.0 if settings.stage == "global-detail" else 1.0)
    levels: dict[str, object] = {"sigma_min": settings.noise.sigma_min, "sigma_max": highest}
    if settings.objective == "flow" and usual.name == "heun":
        levels["name"] = "flow-heun"
    fresh = FRESH_SAMPLERS | {settings.stage: settings.sampler or usual.model_copy(update=levels)}
    samplers = {
        stage: known.stages[stage].sampler if known and stage in known.stages else fresh[stage] for stage in stages
    }
    if {"global", "global-detail"} <= samplers.keys():  # with the expert, stage 1 goes on to its least noise
        least = {"sigma_min": samplers["global-detail"].sigma_min}
        samplers["global"] = samplers["global"].model_copy(update=least)
    return samplers
