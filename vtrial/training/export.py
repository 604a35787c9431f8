"""From training runs to a model folder: averaged weights as safetensors, and the card that tells what they are."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from vtrial.course import read_lines
from vtrial.diffusion.denoiser import StageConfig, StageName
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import WEIGHT_FILES, ExtentFit, ModelCard, StageCard, save_weights, write_card
from vtrial.records import InputError, Support
from vtrial.training.checkpoint import CHECKPOINT, config_of, data_of, read_checkpoint, read_support
from vtrial.training.fitting import METRICS
from vtrial.training.snapshots import averaged

LOSS_POINTS = 60


def hardware() -> str:
    """What this machine trains on, for the card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def export_model(
    out: str | Path,
    runs: Mapping[StageName, str | Path],
    samplers: Mapping[StageName, SamplerConfig],
    *,
    name: str,
    ema: float | Mapping[StageName, float] | None = None,
    known: ModelCard | None = None,
    data: str = "",
    data_sha256: Mapping[StageName, str] | None = None,
    hardware: str = "",
    extent: ExtentFit | None = None,
) -> ModelCard:
    """Write `out` with a safetensors file for each stage of `runs` (folders of `train`) and card.json.

    `ema` is the averaging length to take, of all stages or of some, tracked or made of snapshots; by default the
    shortest tracked. `known` is the card that `out` has: its stages without a run stay (`kept_stages`), and so do
    description and license, and what was measured of it where no weights change. `data_sha256` are the training sets'
    of runs whose checkpoints do not tell, `extent` that of the people trained on, by default the paper's. InputError
    for an unreadable run, a run of another stage, a length that cannot be had; OSError if the model cannot be written.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stages: dict[StageName, StageCard] = {}
    supports: dict[StageName, Support] = {}
    for stage, run in runs.items():
        length = ema.get(stage) if isinstance(ema, Mapping) else ema
        card, supports[stage] = _export_stage(folder, stage, Path(run), samplers[stage], length)
        sha256 = card.data_sha256 or (data_sha256 or {}).get(stage, "")
        stages[stage] = card.model_copy(update={"data_sha256": sha256})
    for stage, card in kept_stages(folder, known, runs).items():
        stages[stage] = card.model_copy(update={"sampler": samplers.get(stage, card.sampler)})
        if known and stage == "global":
            supports[stage] = known.support
    facts = {"data": data, "hardware": hardware, "extent": extent or ExtentFit()}
    if known:
        facts |= {"description": known.description, "license": known.license}
        if known.files == {card.file: card.sha256 for card in stages.values()}:
            facts |= {"hardware": known.hardware, "fidelity": known.fidelity, "extent": extent or known.extent}
    # the first stage decides what bodies can be made
    support = supports.get("global") or next(iter(supports.values()))
    ordered = {stage: stages[stage] for stage in WEIGHT_FILES if stage in stages}
    try:
        card_of_all = ModelCard.model_validate({"name": name, "support": support, "stages": ordered, **facts})
    except ValidationError as error:
        told = "; ".join(e["msg"] for e in error.errors())
        raise InputError(f"{folder}: these stages do not make a model: {told}; what was trained is safe") from None
    write_card(folder, card_of_all)
    return card_of_all


def kept_stages(folder: Path, known: ModelCard | None, runs: Container[StageName]) -> dict[StageName, StageCard]:
    """The stages of the card in `folder` that none of `runs` makes anew, where their weights are there."""
    stages = known.stages if known else {}
    return {stage: card for stage, card in stages.items() if stage not in runs and (folder / card.file).is_file()}


def _export_stage(
    folder: Path, stage: StageName, run: Path, sampler: SamplerConfig, ema: float | None
) -> tuple[StageCard, Support]:
    content = read_checkpoint(run / CHECKPOINT)
    config = config_of(content, run)
    if config.stage != stage:
        raise InputError(f"{run}: a training run of the {config.stage} stage, not of {stage}")
    length = min(float(length) for length in content["ema"]) if ema is None else ema
    average, _ = averaged(run, length)
    # buffers (Fourier features) are not averaged: they come from the network itself
    weights = {**content["denoiser"], **average}
    file = WEIGHT_FILES[stage]
    sha256 = save_weights(folder / file, weights, small=True)
    card = StageCard(
        config=StageConfig.model_validate_json(content["stage"]),
        file=file,
        sha256=sha256,
        parameters=sum(v.numel() for v in average.values()),
        steps=content["step"],
        images=config.images(content["step"]),
        seconds=round(content["seconds"], 1),
        ema_length=length,
        loss=_loss_curve(run / METRICS),
        data_sha256=data_of(content),
        training=config.model_dump(mode="json", exclude=set(StageConfig.model_fields)),
        sampler=sampler,
    )
    return card, read_support(content["support"])


def _loss_curve(path: Path) -> tuple[tuple[int, float], ...]:
    found = [(int(str(line["step"])), float(str(line["error"]))) for line in read_lines(path) if "error" in line]
    every = max(1, len(found) // LOSS_POINTS)
    return tuple((step, round(error, 5)) for step, error in found[::every])
