"""What a step trains on: parts of phantoms, made to look more like twins. Depends on (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtrial.phantom.render import blur
from vtrial.segmentation.fit.config import AugmentConfig, SegmenterConfig
from vtrial.segmentation.fit.data import StoredPhantoms
from vtrial.segmentation.fit.grid import FULL, GridCase

_AIR_HU = -800.0  # what is emptier has no tissue to shift
_LEAST_BLUR = 0.15  # voxels; less changes nothing


@dataclass(frozen=True)
class Batch:
    """`image` (b, 1, z, y, x) as nnU-Net normalises it; `regions` (b, heads, z, y, x), the part inside of a voxel."""

    image: Tensor
    regions: Tensor


def make_batch(config: SegmenterConfig, data: StoredPhantoms, files: list[Path], step: int) -> Batch:
    """The batch of a step (from 1)."""
    rng = np.random.default_rng([config.seed, step])
    images, regions = [], []
    for _ in range(config.batch):
        case = data.draw(files, rng, config.training_patch)
        hu = augmented(config.augment, case, rng, config.spacing_mm)
        images.append(normalised(config, hu))
        regions.append(region_parts(config, case))
    return Batch(torch.stack(images)[:, None], torch.stack(regions))


def batches(config: SegmenterConfig, data: StoredPhantoms, first: int, last: int) -> Iterator[Batch]:
    """The batches of steps `first` to `last`, each prepared while the one before is in use."""
    files = data.files
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make_batch, config, data, files, first)
        for step in range(first, last + 1):
            batch = waiting.result()
            if step < last:
                waiting = pool.submit(make_batch, config, data, files, step + 1)
            yield batch


def augmented(augment: AugmentConfig, case: GridCase, rng: np.random.Generator, grid_mm: float) -> Tensor:
    """The CT of a case in HU with other tissue values, noise and sharpness; float32 (z, y, x)."""
    shift = torch.from_numpy(rng.normal(0.0, 1.0, 256).astype(np.float32) * augment.tissue_hu)
    hu = torch.from_numpy(case.ct.astype(np.float32))
    hu += torch.where(hu > _AIR_HU, shift[torch.from_numpy(case.label.astype(np.int64))], 0.0)
    hu += rng.uniform(0.0, augment.noise_hu) * _white(rng, case.ct.shape)
    sigma = max(0.0, rng.uniform(-1.0, 1.0)) * augment.blur_mm / grid_mm
    if sigma > _LEAST_BLUR:
        hu = blur(hu, (sigma, sigma, sigma))
    return hu + rng.uniform(0.0, augment.noise_hu / 2.0) * _white(rng, case.ct.shape)


def _white(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def normalised(config: SegmenterConfig, hu: Tensor) -> Tensor:
    """HU as nnU-Net's scheme for CT has them: clipped, less the mean, over the SD."""
    known = config.intensity
    return (hu.clamp(known.percentile_00_5, known.percentile_99_5) - known.mean) / max(known.std, 1e-8)


def region_parts(config: SegmenterConfig, case: GridCase) -> Tensor:
    """The part of each voxel that lies in each head's region, float32 (heads, z, y, x)."""
    inside = np.zeros((len(config.regions), 256), dtype=np.float32)
    for row, head in zip(inside, config.regions, strict=True):
        row[list(head.covers)] = 1.0
    parts: NDArray[np.float32] = inside[:, case.label]
    mixed = case.share < FULL
    share = case.share[mixed] / np.float32(FULL)
    parts[:, mixed] = inside[:, case.label[mixed]] * share + inside[:, case.other[mixed]] * (np.float32(1.0) - share)
    return torch.from_numpy(parts)
