"""What the networks are told: demographics, the sampling phase, positions; and the grids volumes live on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtrial.geometry import FACTOR
from vtrial.records import Sex

VOLUME_CHANNELS = 2  # CT, PET
PHASE = (1, 1, 1)
"""Offset of the low-resolution voxels in the full grid wherever the two stages meet: LR[i] = HR[4 i + 1]."""


@dataclass(frozen=True)
class Demographics:
    """What a twin is made from."""

    sex: Sex
    age_years: float
    height_cm: float
    weight_kg: float

    def vector(self) -> tuple[float, float, float, float]:
        """The published conditions: height in m - 1, (kg - 30)/100, sex (0 F, 1 M), age/100."""
        sex = 1.0 if self.sex == "M" else 0.0
        return self.height_cm / 100.0 - 1.0, (self.weight_kg - 30.0) / 100.0, sex, self.age_years / 100.0


def phase_vector(phase: tuple[int, int, int]) -> tuple[float, float, float]:
    """A sampling phase as conditions centred on 0: where the sampled voxel lies in its block of 4 × 4 × 4."""
    x, y, z = (p - (FACTOR - 1) / 2.0 for p in phase)
    return x, y, z


def to_grid(volume: Tensor, patch: int) -> Tensor:
    """Space to depth: (b, c, x, y, z) -> (b, c p³, x/p, y/p, z/p), channels_last_3d."""
    b, c, x, y, z = volume.shape
    if patch == 1:
        return volume.contiguous(memory_format=torch.channels_last_3d)
    blocks = volume.reshape(b, c, x // patch, patch, y // patch, patch, z // patch, patch)
    last = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, x // patch, y // patch, z // patch, c * patch**3)
    return last.permute(0, 4, 1, 2, 3)


def from_grid(grid: Tensor, patch: int) -> Tensor:
    """Depth to space, the inverse of `to_grid`: (b, c p³, x, y, z) -> (b, c, x p, y p, z p)."""
    b, c, x, y, z = grid.shape
    if patch == 1:
        return grid.contiguous()
    blocks = grid.reshape(b, c // patch**3, patch, patch, patch, x, y, z)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // patch**3, x * patch, y * patch, z * patch)


def coordinates(
    origin: tuple[int, int, int], shape: tuple[int, int, int], whole: tuple[int, int, int], patch: int
) -> Tensor:
    """Positions (3, x/p, y/p, z/p) from -1 to 1 in the `whole` volume of a part of `shape` voxels at `origin`."""
    axes = []
    for start, size, full in zip(origin, shape, whole, strict=True):
        centers = start + patch * torch.arange(size // patch) + (patch - 1) / 2.0
        axes.append(2.0 * centers / (full - 1) - 1.0)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def interpolation_matrix(n_low: int, start: int, size: int, phase: int) -> Tensor:
    """Rows `start` to `start + size` of the linear interpolation from voxels FACTOR·i + phase, clamped at the edges.

    Shape (size, n_low). At a sampled voxel the row is a unit vector, so upsampling keeps the samples exactly.
    """
    position = ((torch.arange(start, start + size, dtype=torch.float64) - phase) / FACTOR).clamp(0.0, n_low - 1.0)
    below = position.floor().long().clamp(max=n_low - 1)
    above = (below + 1).clamp(max=n_low - 1)
    weight = position - below
    matrix = torch.zeros(size, n_low, dtype=torch.float64)
    rows = torch.arange(size)
    matrix[rows, below] += 1.0 - weight
    matrix[rows, above] += weight
    return matrix.float()


def upsample(
    low: Tensor,
    origin: tuple[int, int, int] = (0, 0, 0),
    shape: tuple[int, int, int] | None = None,
    phase: tuple[int, int, int] = PHASE,
) -> Tensor:
    """Linear interpolation of `low` (…, x, y, z) to a part of the full grid (all of it by default).

    The low-resolution voxel i stands at the full-resolution voxel 4 i + phase; beyond the outermost samples the edge
    value is kept. `origin` and `shape` are in full-resolution voxels.
    """
    sides = shape or tuple(FACTOR * n for n in low.shape[-3:])
    matrices = [
        interpolation_matrix(n, start, size, p).to(low.device, low.dtype)
        for n, start, size, p in zip(low.shape[-3:], origin, sides, phase, strict=True)
    ]
    out = torch.einsum("...xyz,ax->...ayz", low, matrices[0])
    out = torch.einsum("...ayz,by->...abz", out, matrices[1])
    return out @ matrices[2].T
