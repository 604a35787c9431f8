"""Subject → PET/CT: by the cascade of a model, or by the phantom."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vtrial.diffusion.cascade import CascadeSampler, load_cascade
from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.denoiser import StageName
from vtrial.diffusion.sampler import SamplerConfig, SamplerName
from vtrial.diffusion.tiles import tile_for
from vtrial.diffusion.weights import MODELS, ExtentFit, ModelCard, model_folder, read_card, verify_model
from vtrial.execution import Resources
from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.imaging.codec import decode
from vtrial.imaging.scans import LoadRenderer, Renderer, Scan
from vtrial.memory import total_memory_bytes
from vtrial.phantom import make_phantom
from vtrial.randomness import Purpose, subject_torch_seed
from vtrial.records import Subject, Support
from vtrial.runs import Identity


@dataclass(frozen=True)
class CascadePlan:
    """A checked choice of model and sampler: how to load it, what names it, whom it can make.

    `standard` says that the sampler is the model's own, `extent` how long the model's bodies are.
    """

    load: LoadRenderer
    identity: Identity
    facts: dict[str, Any]
    support: Support
    standard: bool
    extent: ExtentFit = field(default_factory=ExtentFit)


def cascade_plan(
    model: str,
    sampler: SamplerName | None = None,
    steps_global: int | None = None,
    steps_sr: int | None = None,
    tile: str | None = None,
) -> CascadePlan:
    """The plan for a bundled model or model folder; InputError if there is none, or its weights are not its card's.

    `tile` is a length along z in voxels, "none" for one pass on any machine, or None for what each machine can hold.
    """
    folder, card = model_folder(model), verify_model(model)
    own = CascadeSampler.of(card)
    divisor = card.stages["super-resolution"].config.network.divisor
    chosen = own.with_options(sampler, steps_global, steps_sr, tile, divisor)
    # A bundled model goes by its name: on another machine of a cluster the package may lie elsewhere.
    location = model if folder.parent == MODELS else str(folder.absolute())
    return CascadePlan(
        load=LoadCascade(location, chosen),
        identity={
            "model": card.name,
            "model_sha256": model_sha256(card),
            "sampler": _sampler_text(chosen, card.handover),
        },
        facts={"model": model, "model_files": card.files, "model_data": card.data},
        support=card.support,
        standard=chosen == own,
        extent=card.extent,
    )


def model_sha256(card: ModelCard) -> str:
    """One hash for all weight files of a model."""
    return hashlib.sha256(json.dumps(card.files, sort_keys=True).encode()).hexdigest()


def _sampler_text(sampler: CascadeSampler, handover: float) -> str:
    expert = f", global-detail below {handover:g}" if handover else ""
    tile = f", tiles of {sampler.tile[2]}" if sampler.tile else ""  # the machine's choice has never been named
    return f"global {sampler.low.model_dump_json()}, super-resolution {sampler.high.model_dump_json()}{expert}{tile}"


@dataclass(frozen=True)
class LoadCascade:
    """Loads the cascade `model` (a bundled name or an absolute folder) and samples it with `sampler`."""

    model: str
    sampler: CascadeSampler

    def __call__(self, resources: Resources) -> Renderer:
        """The cascade on the worker's device as a renderer."""
        torch.set_num_threads(resources.threads)
        cascade = load_cascade(self.model, resources.device)
        gpu = cascade.device.type == "cuda"
        memory = torch.cuda.get_device_properties(cascade.device).total_memory if gpu else total_memory_bytes()
        tile = self.sampler.tile or tile_for(memory, cascade.high.config.network, cascade.dtype.itemsize)
        sampler = replace(self.sampler, tile=tile)

        def render(subject: Subject) -> Scan:
            volume = cascade.sample(
                Demographics(subject.sex, subject.age_years, subject.height_cm, subject.weight_kg),
                global_noise=_generator(subject, Purpose.GLOBAL),
                sr_noise=_generator(subject, Purpose.SUPER_RESOLUTION),
                sampler=sampler,
            )
            return Scan(decode(volume, twin_spacing_mm(cascade.card.extent, subject.height_cm)))

        return render


def twin_spacing_mm(extent: ExtentFit, height_cm: float) -> tuple[float, float, float]:
    """Voxel size in mm of a twin: its length along z follows its height by the model's fit."""
    slices = extent.slices_per_m * height_cm / 100.0 + extent.slices_at_0
    return IN_PLANE_MM, IN_PLANE_MM, IN_PLANE_MM * slices / SHAPE[2]


@dataclass(frozen=True)
class LoadPhantom:
    """The procedural phantom as a renderer."""

    def __call__(self, resources: Resources) -> Renderer:
        """The phantom on the worker's device."""
        torch.set_num_threads(resources.threads)

        def render(subject: Subject) -> Scan:
            phantom = make_phantom(subject, device=resources.device)
            return Scan(phantom.pet_ct, phantom.labels, phantom.truth)

        return render


def _generator(subject: Subject, purpose: Purpose) -> torch.Generator:
    """On the CPU whatever the device: the numbers drawn are then the same on all of them."""
    return torch.Generator().manual_seed(subject_torch_seed(subject.seed, subject.index, purpose))


def _sampler_words(stage: StageName, sampler: SamplerConfig) -> str:
    if stage == "global-detail":
        return f"takes over from global below sigma {sampler.sigma_max:g}"
    return f"{sampler.name}, {sampler.steps} steps"


def describe_models(names: list[str]) -> list[dict[str, Any]]:
    """Name, data, support, size and samplers of models, for a listing."""
    described = []
    for name in names:
        card, folder = read_card(name), Path(model_folder(name))
        described.append(
            {
                "name": card.name,
                "description": card.description,
                "data": card.data,
                "objective": {stage: s.config.objective for stage, s in card.stages.items()},
                "license": card.license,
                "support": {"sex": card.support.sex} | asdict(card.support),
                "megabytes": round(sum((folder / file).stat().st_size for file in card.files) / 1e6, 1),
                "samplers": {stage: _sampler_words(stage, s.sampler) for stage, s in card.stages.items()},
                "sha256": model_sha256(card),
            }
        )
    return described
