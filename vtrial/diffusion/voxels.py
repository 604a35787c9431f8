"""What comes after the U-Net, where each voxel is decided by itself (docs/decisions/018-where-training-looks.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtrial.diffusion.conditions import VOLUME_CHANNELS, from_grid

VOXEL_FEATURES = 12  # that the U-Net tells of each voxel


@dataclass(frozen=True)
class VoxelView:
    """What a voxel head sees of a noisy input as denoised so far, (b, 2, x, y, z) each: the `pair` in model space and
    `scaled` to SD 1, and the `noise` that was taken away, in units of σ."""

    pair: Tensor
    scaled: Tensor
    noise: Tensor


# F of the U-Net -> what a head sees of it, and how its correction of the pair becomes one of F.
Look = Callable[[Tensor], tuple[VoxelView, Callable[[Tensor], Tensor]]]


class VoxelHead(nn.Module):
    """Corrects voxel by voxel what the U-Net's blocks of voxels leave: zero at initialisation.

    Intensities gather near those of tissues, and at the rims of the scale exactly on it. Which of them a voxel belongs
    to is a sharp function of its value, which sines and cosines of that value make easy to learn. Plain layers and
    Adam: as a magnitude-preserving one behind a learned gain it learned ten times more slowly.
    """

    FREQUENCIES = (1, 2, 4, 8, 16)
    SEEN = VOLUME_CHANNELS * (2 + 2 * len(FREQUENCIES))

    def __init__(self, features: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.spread = nn.Conv3d(features, VOXEL_FEATURES * patch**3, 1, bias=False)
        self.mix = nn.Conv3d(self.SEEN + VOXEL_FEATURES, channels, 1)
        self.modulate = nn.Linear(1, 2 * channels)
        self.join = nn.Conv3d(channels, channels, 3, padding=1)
        self.exit = nn.Conv3d(channels, VOLUME_CHANNELS, 1)
        for silent in (*self.modulate.parameters(), *self.exit.parameters()):
            nn.init.zeros_(silent)

    def forward(self, features: Tensor, c_noise: Tensor, view: VoxelView) -> Tensor:
        """Features (b, c, x/p, y/p, z/p) of the U-Net -> a correction (b, 2, x, y, z) of the pair in `view`."""
        dtype = features.dtype
        angles = [math.pi * k * view.pair for k in self.FREQUENCIES]
        waves = [wave(angle).to(dtype) for angle in angles for wave in (torch.sin, torch.cos)]
        spread = from_grid(_plain(self.spread, features), self.patch)
        known = torch.cat([view.scaled.to(dtype), view.noise.to(dtype), *waves, spread], 1)
        known = known.contiguous(memory_format=torch.channels_last_3d)
        gain, shift = self.modulate(4.0 * c_noise[:, None])[:, :, None, None, None].to(dtype).chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, _plain(self.mix, known), 1.0 + gain))
        return _plain(self.exit, F.silu(_plain(self.join, h)))


def _plain(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution in the type and layout of its input."""
    weight = layer.weight.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.conv3d(x, weight, bias, padding=layer.padding)
