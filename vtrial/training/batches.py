"""From volumes to what a step trains on.

Every example depends on (seed, step, its place in the batch) alone: resuming needs no state, and a worker makes its
own part of a batch without the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vtrial.diffusion.bands import to_bands
from vtrial.diffusion.conditions import PHASE, coordinates, upsample
from vtrial.diffusion.denoiser import Scaling, StageConfig
from vtrial.diffusion.network import Conditions
from vtrial.geometry import FACTOR
from vtrial.records import InputError
from vtrial.training.config import TrainingConfig, times
from vtrial.training.data import Triple, Volume, VolumeSource, sample_low
from vtrial.training.share import Share

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

    def part(self, start: int, count: int, device: torch.device) -> Batch:
        """Examples `start` to `start + count`, on a device."""
        s = slice(start, start + count)
        low = None if self.upsampled is None else self.upsampled[s].to(device)
        return Batch(self.target[s].to(device), self.vector[s].to(device), low, self.origins[s], self.whole)

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


# what a generator decides: the volume that patches share, or all the rest of an example
_VOLUME, _EXAMPLE = 1, 2


def _rng(config: TrainingConfig, step: int, kind: int, which: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, step, kind, which])


def make_batch(config: TrainingConfig, source: VolumeSource, step: int, which: range | None = None) -> Batch:
    """The batch of a step (from 1), or its examples `which` (one at least)."""
    which = range(config.examples(step)) if which is None else which
    if config.stage != "super-resolution":
        return _global_batch(config, source, step, which)
    return _patch_batch(config, source, step, which)


def _global_batch(config: TrainingConfig, source: VolumeSource, step: int, which: range) -> Batch:
    epoch = config.data.epoch(step, source.refresh_steps)
    stage = config.stage_config(Scaling(), Scaling())
    parts, vectors, origins = [], [], []
    for i in which:
        rng = _rng(config, step, _EXAMPLE, i)
        low, phase, who = source.draw_low(rng, epoch)
        whole: Triple = (low.shape[1], low.shape[2], low.shape[3])
        shape = whole if config.sees_whole(step) else _patch_shape(config, whole)
        region = config.data.region
        if region is not None and shape != whole and rng.random() < config.data.region_share:
            x, y, z = _origin_within(rng, region, whole, shape, config.network.patch)
        else:
            x, y, z = _origin(rng, whole, shape, config.network.patch)
        parts.append(low[:, x : x + shape[0], y : y + shape[1], z : z + shape[2]])
        vectors.append(stage.vector(who, phase))
        origins.append((x, y, z))
    vector = torch.tensor(vectors, device=source.device)
    return Batch(torch.stack(parts), vector, None, tuple(origins), whole)


def _patch_batch(config: TrainingConfig, source: VolumeSource, step: int, which: range) -> Batch:
    epoch = config.data.epoch(step, source.refresh_steps)
    residuals, upsampled, vectors, origins = [], [], [], []
    stage = config.stage_config(Scaling(), Scaling())
    align = max(FACTOR, config.network.patch)
    drawn = -1
    for i in which:
        if i // config.data.patches_per_volume != drawn:
            drawn = i // config.data.patches_per_volume
            volume = source.draw(_rng(config, step, _VOLUME, drawn), epoch)
            shape = _patch_shape(config, volume.shape)
            sharp = sharpness(sample_low(volume, PHASE)[1]) if config.data.peak_share else None
        rng = _rng(config, step, _EXAMPLE, i)
        if sharp is not None and rng.random() < config.data.peak_share:
            x, y, z = origin_at_peak(rng, sharp, volume.shape, shape, align)
        else:
            x, y, z = _origin(rng, volume.shape, shape, align)
        high, block, inner = patch_pair(volume, (x, y, z), shape)
        if any(config.low_noise):
            block = stage.disturb_low(block, torch.from_numpy(rng.standard_normal(block.shape, np.float32)).to(block))
        smooth = upsample(block, inner, shape)
        residuals.append(high - smooth)
        upsampled.append(smooth)
        vectors.append(stage.vector(volume.demographics))
        origins.append((x, y, z))
    vector = torch.tensor(vectors, device=source.device)
    return Batch(torch.stack(residuals), vector, torch.stack(upsampled), tuple(origins), volume.shape)


def _patch_shape(config: TrainingConfig, whole: Triple) -> Triple:
    """Sides of the patches to cut; InputError if a volume is smaller."""
    shape = config.data.patch_shape
    if any(s > n for s, n in zip(shape, whole, strict=True)):
        raise InputError(
            f"data.patch_shape: patches of {times(shape)} voxels do not fit into a volume of {times(whole)}; choose "
            "smaller ones in the configuration, or other --data"
        )
    return shape


def patch_pair(volume: Volume, origin: Triple, shape: Triple) -> tuple[Tensor, Tensor, Triple]:
    """A patch (2, *shape) at `origin` (multiples of 4), the low-resolution block (2, …) that its upsampling needs (one
    voxel more at each side where there is one), and the patch's origin in that block's full-resolution voxels."""
    part = tuple(slice(o, o + s) for o, s in zip(origin, shape, strict=True))
    first = [max(o // FACTOR - 1, 0) for o in origin]
    last = [min((o + s) // FACTOR, n // FACTOR - 1) for o, s, n in zip(origin, shape, volume.shape, strict=True)]
    block = [slice(FACTOR * a + p, FACTOR * b + p + 1, FACTOR) for a, b, p in zip(first, last, PHASE, strict=True)]
    inner = tuple(o - FACTOR * a for o, a in zip(origin, first, strict=True))
    return (
        volume.read((part[0], part[1], part[2])),
        volume.read((block[0], block[1], block[2])),
        (inner[0], inner[1], inner[2]),
    )


def _origin(rng: np.random.Generator, whole: Triple, shape: Triple, align: int) -> Triple:
    """A place for a patch. In plane, the mean of two uniform draws: the body is in the middle, the rim is air."""
    places = [(n - s) // align + 1 for n, s in zip(whole, shape, strict=True)]
    draws = [(rng.random() + rng.random()) / 2.0, (rng.random() + rng.random()) / 2.0, rng.random()]
    x, y, z = (align * int(u * n) for u, n in zip(draws, places, strict=True))
    return x, y, z


def _origin_within(
    rng: np.random.Generator, region: tuple[Sequence[float], Sequence[float]], whole: Triple, shape: Triple, align: int
) -> Triple:
    """A place for a patch inside a box of the volume, or around its middle where the box is smaller."""
    places = []
    for low, high, n, s in zip(*region, whole, shape, strict=True):
        first, last = sorted((low * n, high * n - s))
        place = align * round(rng.uniform(first, last) / align)
        places.append(min(max(place, 0), (n - s) // align * align))
    return places[0], places[1], places[2]


def sharpness(pet: Tensor) -> NDArray[np.float64]:
    """How much each voxel of a low-resolution PET (x, y, z) stands out from its six neighbours: the fourth power of the
    second difference, as squares would let the noise of many voxels outweigh a few hot ones. Sums up to 1.

    It tells of the low-resolution volume alone, which stage 2 is given, so choosing patches by it leaves the
    distribution that the stage learns as it is.
    """
    weight: NDArray[np.float64] = ndimage.laplace(pet.double().cpu().numpy(), mode="nearest") ** 4 + 1e-12
    share: NDArray[np.float64] = weight / weight.sum()
    return share


def origin_at_peak(
    rng: np.random.Generator, sharp: NDArray[np.float64], whole: Triple, shape: Triple, align: int
) -> Triple:
    """A place for a patch that holds a low-resolution voxel drawn by `sharp`, anywhere in the patch."""
    voxel = np.unravel_index(int(np.searchsorted(np.cumsum(sharp), rng.random())), sharp.shape)
    places = []
    for v, p, n, s in zip(voxel, PHASE, whole, shape, strict=True):
        center = FACTOR * int(v) + p
        first, last = max(center - s + 1, 0), min(center, n - s)
        places.append(int(rng.integers(-(-first // align), last // align + 1)) * align)
    return places[0], places[1], places[2]


def batches(
    config: TrainingConfig, source: VolumeSource, first: int, last: int, share: Share
) -> Iterator[Batch | None]:
    """A worker's share of the batches of steps `first` to `last`, each prepared while the one before is in use.

    None where a batch has fewer examples than there are workers, and none is left for this one.
    """

    def prepare(step: int) -> Batch | None:
        mine = share.of(config.examples(step))
        return make_batch(config, source, step, mine) if mine else None

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prepare, first)
        for step in range(first, last + 1):
            batch = waiting.result()
            if step < last:
                waiting = pool.submit(prepare, step + 1)
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
