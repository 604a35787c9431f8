"""From volumes to what a step trains on. Every batch depends on (seed, step) alone, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtrial.diffusion.bands import to_bands
from vtrial.diffusion.conditions import coordinates, upsample
from vtrial.diffusion.denoiser import Scaling, StageConfig
from vtrial.diffusion.network import Conditions
from vtrial.geometry import FACTOR
from vtrial.training.config import TrainingConfig
from vtrial.training.data import Triple, VolumeSource, patch_pair

SCALING_EXAMPLES = 48


@dataclass(frozen=True)
class Batch:
    """Before scaling: `target` (b, 2, x, y, z) in model space, or the residual; `vector` (b, k); `upsampled` like the
    target for stage 2; `origins` of the patches in volumes of `whole` voxels."""

    target: Tensor
    vector: Tensor
    upsampled: Tensor | None
    origins: tuple[Triple, ...]
    whole: Triple

    def part(self, start: int, count: int) -> Batch:
        """Examples `start` to `start + count`."""
        s = slice(start, start + count)
        low = None if self.upsampled is None else self.upsampled[s]
        return Batch(self.target[s], self.vector[s], low, self.origins[s], self.whole)

    def conditions(self, stage: StageConfig) -> Conditions:
        """What the network is told."""
        shape: Triple = (self.target.shape[2], self.target.shape[3], self.target.shape[4])
        patch = stage.network.patch
        where = None
        if stage.network.coordinates:
            parts = [coordinates(origin, shape, self.whole, patch) for origin in self.origins]
            where = torch.stack(parts).to(self.target.device)
        low = None if self.upsampled is None else stage.encode_low(self.upsampled)
        return Conditions(self.vector, low, where)


def _rng(config: TrainingConfig, step: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, step])


def make_batch(config: TrainingConfig, source: VolumeSource, step: int) -> Batch:
    """The batch of a step (from 1)."""
    if config.stage != "super-resolution":
        return _global_batch(config, source, step)
    return _patch_batch(config, source, step)


def _global_batch(config: TrainingConfig, source: VolumeSource, step: int) -> Batch:
    rng = _rng(config, step)
    epoch = config.data.epoch(step)
    drawn = [source.draw_low(rng, epoch) for _ in range(config.examples(step))]
    stage = config.stage_config(Scaling(), Scaling())
    vector = torch.tensor([stage.vector(who, phase) for _, phase, who in drawn], device=source.device)
    whole: Triple = drawn[0][0].shape[1:]  # type: ignore[assignment]
    shape = whole if config.sees_whole(step) else config.data.patch_shape
    origins = tuple(_origin(rng, whole, shape, config.network.patch) for _ in drawn)
    parts = [
        low[:, x : x + shape[0], y : y + shape[1], z : z + shape[2]] for (low, _, _), (x, y, z) in zip(drawn, origins)
    ]
    return Batch(torch.stack(parts), vector, None, origins, whole)


def _patch_batch(config: TrainingConfig, source: VolumeSource, step: int) -> Batch:
    rng, epoch = _rng(config, step), config.data.epoch(step)
    residuals, upsampled, vectors, origins = [], [], [], []
    stage = config.stage_config(Scaling(), Scaling())
    volume = source.draw(rng, epoch)
    align = max(FACTOR, config.network.patch)
    shape = config.data.patch_shape
    for i in range(config.batch):
        if i and i % config.data.patches_per_volume == 0:
            volume = source.draw(rng, epoch)
        x, y, z = _origin(rng, volume.shape, shape, align)
        high, block, inner = patch_pair(volume, (x, y, z), shape)
        if config.data.low_noise:
            noise = rng.uniform(0.0, config.data.low_noise) * rng.standard_normal(block.shape, dtype=np.float32)
            block = block + torch.from_numpy(noise).to(block)
        smooth = upsample(block, inner, shape)
        residuals.append(high - smooth)
        upsampled.append(smooth)
        vectors.append(stage.vector(volume.demographics))
        origins.append((x, y, z))
    vector = torch.tensor(vectors, device=source.device)
    return Batch(torch.stack(residuals), vector, torch.stack(upsampled), tuple(origins), volume.shape)


def _origin(rng: np.random.Generator, whole: Triple, shape: Triple, align: int) -> Triple:
    """A place for a patch. In plane, the mean of two uniform draws: the body is in the middle, the rim is air."""
    places = [(n - s) // align + 1 for n, s in zip(whole, shape, strict=True)]
    draws = [(rng.random() + rng.random()) / 2.0, (rng.random() + rng.random()) / 2.0, rng.random()]
    x, y, z = (align * int(u * n) for u, n in zip(draws, places, strict=True))
    return x, y, z


def batches(config: TrainingConfig, source: VolumeSource, first: int, last: int) -> Iterator[Batch]:
    """The batches of steps `first` to `last`, each prepared while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make_batch, config, source, first)
        for step in range(first, last + 1):
            batch = waiting.result()
            if step < last:
                waiting = pool.submit(make_batch, config, source, step + 1)
            yield batch


def measure_scaling(config: TrainingConfig, source: VolumeSource) -> StageConfig:
    """The stage with its scalings measured on a few batches, where the configuration leaves them open.

    Residuals keep center 0, so that no residual stays no residual.
    """
    if config.scaling and (config.low_scaling or config.stage != "super-resolution") and not config.bands:
        return config.stage_config(config.scaling, config.low_scaling or Scaling())
    count = -(-SCALING_EXAMPLES // config.batch)
    # steps that no training reaches, so these batches are not trained on
    drawn = [make_batch(config, source, 10**9 + i) for i in range(count)]
    scaling = _moments([b.target for b in drawn], centered=config.stage != "super-resolution")
    low = _moments([b.upsampled for b in drawn if b.upsampled is not None], centered=True)
    stage = config.stage_config(scaling, low)
    if not config.bands:
        return stage
    return config.stage_config(scaling, low, _band_sd(stage, [b.target for b in drawn]))


def _band_sd(stage: StageConfig, volumes: list[Tensor]) -> tuple[float, ...]:
    bands = torch.cat([to_bands(stage.encode(v), stage.network.patch).transpose(0, 1).flatten(1) for v in volumes], 1)
    return tuple(round(float(sd), 5) for sd in bands.double().square().mean(1).sqrt().clamp(min=1e-3))


def _moments(volumes: list[Tensor], centered: bool) -> Scaling:
    if not volumes:
        return Scaling()
    values = torch.cat(volumes).double().transpose(0, 1).flatten(1)
    center = values.mean(1) if centered else torch.zeros(2, dtype=values.dtype, device=values.device)
    sd = (values - center[:, None]).square().mean(1).sqrt().clamp(min=1e-6)
    return Scaling(
        center=(round(float(center[0]), 5), round(float(center[1]), 5)),
        sd=(round(float(sd[0]), 5), round(float(sd[1]), 5)),
    )
