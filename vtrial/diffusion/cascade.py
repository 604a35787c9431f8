"""The cascade: demographics → 56×56×96 → exact linear upsampling → residual → 224×224×384."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtrial.diffusion.conditions import Demographics, coordinates, upsample
from vtrial.diffusion.denoiser import Denoiser, StageConfig, StageName, load_denoiser
from vtrial.diffusion.network import Conditions, Prepared
from vtrial.diffusion.sampler import SAMPLERS, Denoise, SamplerConfig, sample
from vtrial.diffusion.tiles import Triple, Where, blend_tiles, body_box
from vtrial.diffusion.weights import ModelCard, load_weights, model_folder, verify_model
from vtrial.geometry import LOW_SHAPE, SHAPE
from vtrial.memory import keep_freed_memory
from vtrial.precision import usual_dtype
from vtrial.records import InputError

Progress = Callable[[str, int, int], None]
"""Called after each step with the stage's name, the steps done and all steps."""
TILE_OVERLAP = 32
"""Least overlap of neighbouring tiles in voxels."""


@dataclass(frozen=True)
class CascadeSampler:
    """How both stages are sampled."""

    low: SamplerConfig
    high: SamplerConfig
    tile: Triple | None = None
    """Stage 2 in tiles of this many voxels, to save memory; the whole volume in one pass when None, unless the machine
    is too small for it (`vtrial.diffusion.tiles.tile_for`)."""

    @classmethod
    def of(cls, card: ModelCard) -> CascadeSampler:
        """The settings that a model asks for."""
        return cls(card.stages["global"].sampler, card.stages["super-resolution"].sampler)

    def with_options(
        self,
        name: str | None = None,
        steps_global: int | None = None,
        steps_sr: int | None = None,
        tile: str | None = None,
        divisor: int = 1,
    ) -> CascadeSampler:
        """The same with what a user asked for; `tile` is a length along z in voxels, or "none": one pass anywhere.

        InputError for an unknown name, a step count below 2, or a tile that stage 2 (of that `divisor`) cannot take.
        """
        problems = []
        if name is not None and name not in SAMPLERS:
            problems.append(f"--sampler {name}: not known; choose {', '.join(SAMPLERS)}")
        for option, steps in (("--steps-global", steps_global), ("--steps-sr", steps_sr)):
            if steps is not None and steps < 2:
                problems.append(f"{option} {steps}: at least 2 steps are needed")
        lengths = range((TILE_OVERLAP // divisor + 1) * divisor, SHAPE[2] + 1, divisor)
        length = SHAPE[2] if tile == "none" else int(tile) if tile and tile.isdecimal() else None
        if tile is not None and length not in lengths:
            kinds = f"multiples of {divisor} from {lengths[0]} to {lengths[-1]}"
            problems.append(f"--tile {tile}: this model takes {kinds} (voxels along z), or none")
        if problems:
            raise InputError(problems)

        def changed(config: SamplerConfig, steps: int | None) -> SamplerConfig:
            update = {"name": name or config.name, "steps": config.steps if steps is None else steps}
            return config.model_copy(update=update)

        chosen = self.tile if length is None else (SHAPE[0], SHAPE[1], length)
        return CascadeSampler(changed(self.low, steps_global), changed(self.high, steps_sr), chosen)


@dataclass(frozen=True)
class Cascade:
    """Both stages, ready to sample on `device` in `dtype`."""

    card: ModelCard
    low: Denoiser
    detail: Denoiser | None
    """The expert of stage 1 at low noise, if the model has one."""
    high: Denoiser
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def sample(
        self,
        demographics: Demographics,
        *,
        global_noise: torch.Generator,
        sr_noise: torch.Generator,
        sampler: CascadeSampler | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """A twin (2, 224, 224, 384) in model space, float32, on the CPU or the cascade's device.

        The two generators are the only randomness: a subject's noise must not depend on other subjects.
        """
        sampler = sampler or CascadeSampler.of(self.card)
        low = self.sample_low([demographics], noise=global_noise, sampler=sampler.low, progress=progress)
        return self.refine(
            low[0], demographics, noise=sr_noise, sampler=sampler.high, tile=sampler.tile, progress=progress
        )

    @torch.inference_mode()
    def sample_low(
        self,
        people: list[Demographics],
        *,
        noise: torch.Generator,
        sampler: SamplerConfig | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Stage 1 for a batch: (b, 2, 56, 56, 96) in model space, clipped to [0, 1]."""
        stage, patch = self.low.config, self.low.config.network.patch
        denoise = self._whole_low(self.low, people)
        if self.detail is not None:
            denoise = _hand_over(
                (stage, denoise), (self.detail.config, self._whole_low(self.detail, people)), self.card.handover
            )
        x = self._noise((len(people), stage.network.grid_channels, *_grid_shape(LOW_SHAPE, patch)), noise)
        return stage.decode(self._run("global", denoise, x, noise, sampler, progress)).clamp(0.0, 1.0)

    def _whole_low(self, denoiser: Denoiser, people: list[Demographics]) -> Denoise:
        """D on the grid of `denoiser`, for whole low-resolution volumes of `people`."""
        stage, patch = denoiser.config, denoiser.config.network.patch
        vector = torch.tensor([stage.vector(person) for person in people], device=self.device)
        where = None
        if stage.network.coordinates:
            where = coordinates((0, 0, 0), LOW_SHAPE, LOW_SHAPE, patch).to(self.device)
            where = where.expand(len(people), -1, -1, -1, -1)
        prepared = denoiser.network.prepare(Conditions(vector, None, where), _grid_shape(LOW_SHAPE, patch), self.dtype)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return _call(denoiser, x, sigma, prepared, self.dtype)

        return denoise

    @torch.inference_mode()
    def refine(
        self,
        low: Tensor,
        demographics: Demographics,
        *,
        noise: torch.Generator,
        sampler: SamplerConfig | None = None,
        tile: Triple | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Stage 2: a low-resolution pair (2, x, y, z) in model space to (2, 4x, 4y, 4z), clipped to [0, 1].

        Where there is air alone nothing is added to the upsampled pair: the network sees the box around the body.
        `tile` in voxels bounds the memory: tiles overlap by 32 voxels or more and are blended at every step.
        """
        stage, patch = self.high.config, self.high.config.network.patch
        low = low.to(self.device)
        out = upsample(low)
        whole: Triple = (out.shape[1], out.shape[2], out.shape[3])
        corner, shape = body_box(low, patch, stage.network.divisor)
        body = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        if any(stage.low_noise):
            low = stage.disturb_low(low, torch.randn(low.shape, generator=noise, device=noise.device).to(low))
        upsampled = upsample(low[None], corner, shape)
        where = None
        if stage.network.coordinates:
            where = coordinates(corner, shape, whole, patch)[None].to(self.device)
        vector = torch.tensor([stage.vector(demographics)], device=self.device)
        conditions = Conditions(vector, stage.encode_low(upsampled), where)
        prepared = self.high.network.prepare(conditions, _grid_shape(shape, patch), self.dtype)
        del conditions

        def denoise(x: Tensor, sigma: float) -> Tensor:
            if tile is None or all(t >= s for t, s in zip(tile, shape, strict=True)):
                return _call(self.high, x, sigma, prepared, self.dtype)

            def part(where: Where) -> Tensor:
                inside = x[(slice(None), slice(None), *where)].contiguous(memory_format=torch.channels_last_3d)
                return _call(self.high, inside, sigma, prepared.crop(where), self.dtype)

            align = stage.network.divisor // patch
            return blend_tiles(part, x, _grid_shape(tile, patch), TILE_OVERLAP // patch, align)

        x = self._noise((1, stage.network.grid_channels, *_grid_shape(whole, patch)), noise)
        x = x[(slice(None), slice(None), *(slice(part.start // patch, part.stop // patch) for part in body))]
        residual = stage.decode(self._run("super-resolution", denoise, x, noise, sampler, progress))
        out[(slice(None), *body)] = residual.add_(upsampled)[0]
        return out.clamp_(0.0, 1.0)

    def _noise(self, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(self.device)

    def _run(
        self,
        name: StageName,
        denoise: Denoise,
        x: Tensor,
        generator: torch.Generator,
        sampler: SamplerConfig | None,
        progress: Progress | None,
    ) -> Tensor:
        config = sampler or self.card.stages[name].sampler
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for i, state in enumerate(sample(denoise, x, config, generator), start=1):
            x = state
            if progress is not None:
                progress(name, i, config.steps)
        return x


def _hand_over(high: tuple[StageConfig, Denoise], low: tuple[StageConfig, Denoise], sigma_below: float) -> Denoise:
    """`high` down to `sigma_below`, then the expert `low`, both on the grid of `high` (eDiff-I, arXiv 2211.01324).

    Grids are rotations of the same scaled voxels, so noise is white in both.
    """
    (outer, above), (inner, below) = high, low

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if sigma >= sigma_below:
            return above(x, sigma)
        return outer.grid_of(inner.voxels_of(below(inner.grid_of(outer.voxels_of(x)), sigma)))

    return denoise


def _call(denoiser: Denoiser, x: Tensor, sigma: float, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    out: Tensor = denoiser(x, x.new_full((x.shape[0],), sigma), prepared, dtype)
    return out


def _grid_shape(shape: Triple, patch: int) -> Triple:
    return shape[0] // patch, shape[1] // patch, shape[2] // patch


def load_cascade(
    name_or_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Cascade:
    """A cascade from a bundled model's name or a model folder, to compute in `dtype`: by default what suits the device.

    InputError if there is no such model, a stage is missing, or a file's hash differs from the card's.
    """
    folder, card = model_folder(name_or_dir), verify_model(name_or_dir)
    place = torch.device(device)
    dtype = dtype or usual_dtype(place)
    stages: dict[StageName, Denoiser] = {}
    for name, stage in card.stages.items():
        weights = load_weights(folder / stage.file, stage.sha256)
        try:
            stages[name] = load_denoiser(stage.config, weights, dtype).to(place)
        except RuntimeError as error:
            raise InputError(f"{folder / stage.file}: does not fit the network of the card: {error}") from None
    if place.type == "cpu":
        keep_freed_memory()
    return Cascade(card, stages["global"], stages.get("global-detail"), stages["super-resolution"], place, dtype)
