"""Models: which there are, and fitting one, or a segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtrial.diffusion.denoiser import StageName
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import CARD, WEIGHT_FILES, ModelCard, list_models, read_card
from vtrial.generation import describe_models
from vtrial.pipeline.segmenters import fit_segmenter, is_segmenter
from vtrial.records import InputError
from vtrial.segmentation import SegmenterCard
from vtrial.training import TrainingConfig, export_model, hardware, read_config
from vtrial.training import train as fit
from vtrial.training.checkpoint import CHECKPOINT
from vtrial.training.data import read_extent

# What a freshly trained stage is sampled with until its card says otherwise; noise levels of decision 011.
FRESH_SAMPLERS: dict[StageName, SamplerConfig] = {
    "global": SamplerConfig(steps=32, sigma_max=2000.0),
    "global-detail": SamplerConfig(sigma_max=0.8),  # where it takes over; how it is sampled, "global" says
    "super-resolution": SamplerConfig(name="dpmpp-2m", steps=12, sigma_max=20.0),
}


def models() -> list[dict[str, Any]]:
    """The bundled models."""
    return describe_models(list_models())


def train(
    config: Path,
    data: Path,
    out: Path,
    progress: Callable[[dict[str, object]], None],
    start_from: str | None = None,
    max_seconds: float | None = None,
) -> ModelCard | SegmenterCard:
    """Fit what a configuration is of: a stage of a model, or a segmenter, going on from the last checkpoint."""
    if not is_segmenter(config):
        return fit_stage(config, data, out, progress, start_from, max_seconds)
    if start_from is not None:
        raise InputError(f"{config}: a segmenter begins with no other's weights; leave out --start-from")
    return fit_segmenter(config, data, out, progress, max_seconds)


def fit_stage(
    config: Path,
    data: Path,
    out: Path,
    progress: Callable[[dict[str, object]], None],
    start_from: str | None,
    max_seconds: float | None,
) -> ModelCard:
    """Fit one stage, going on from its last checkpoint, and export the stages that `out` holds.

    Checkpoints lie in `out`/training/<stage>; the samplers of a card that is there already are kept, and a new stage is
    sampled over the noise levels that it was trained on.
    """
    settings = read_config(config)
    fit(
        settings,
        data,
        out / "training" / settings.stage,
        start_from=start_from,
        max_seconds=max_seconds,
        progress=progress,
    )
    runs: dict[StageName, Path] = {stage: out / "training" / stage for stage in WEIGHT_FILES}
    runs = {stage: folder for stage, folder in runs.items() if (folder / CHECKPOINT).is_file()}
    known = read_card(out) if (out / CARD).is_file() else None
    return export_model(
        out,
        runs,
        _samplers(settings, known, list(runs)),
        name=out.name,
        description=known.description if known else "",
        data=str(data),
        hardware=hardware(),
        extent=read_extent(data),
    )


def _samplers(
    settings: TrainingConfig, known: ModelCard | None, stages: Sequence[StageName]
) -> dict[StageName, SamplerConfig]:
    """Those of the card that is there; a new stage is sampled over the noise levels that it was trained on."""
    levels = {"sigma_min": settings.noise.sigma_min, "sigma_max": settings.noise.sigma_max}
    if settings.stage == "global-detail":
        levels["sigma_max"] /= 2.0  # the expert takes over in the middle of what it knows
    fresh = FRESH_SAMPLERS | {settings.stage: FRESH_SAMPLERS[settings.stage].model_copy(update=levels)}
    samplers = {
        stage: known.stages[stage].sampler if known and stage in known.stages else fresh[stage] for stage in stages
    }
    if {"global", "global-detail"} <= samplers.keys():  # with the expert, stage 1 goes on to its least noise
        least = {"sigma_min": samplers["global-detail"].sigma_min}
        samplers["global"] = samplers["global"].model_copy(update=least)
    return samplers
