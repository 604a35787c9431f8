"""Whole volumes through a network of limited reach: the box of the body, in one pass or in overlapping tiles.

Tiles are blended at every step. Bar-Tal et al. 2023 (MultiDiffusion, arXiv 2302.08113): the denoised tiles are averaged
with weights before the sampler moves on, so tiles agree and no seam forms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vtrial.diffusion.network import NetworkConfig
from vtrial.diffusion.voxels import VOXEL_FEATURES, VoxelHead
from vtrial.geometry import FACTOR, SHAPE

Where = tuple[slice, slice, slice]
Triple = tuple[int, int, int]


WHOLE_VOLUME_BYTES = 6 * 10**9
"""With less memory than this there are tiles however small the network: the bundled one's whole pass takes 2.6 GB."""
TILES: tuple[Triple, ...] = tuple((SHAPE[0], SHAPE[1], length) for length in (128, 96, 64))


AIR, MARGIN = 0.05, 8
"""What is below in both channels of model space (-450 HU, 0.18 g/ml) is air; voxels of it kept around a body."""


def body_box(low: Tensor, patch: int, divisor: int) -> tuple[Triple, Triple]:
    """Corner and sides, in the full grid, of the box of a low-resolution pair beyond which there is but air.

    The pair (2, x, y, z) is in model space; the corner is a multiple of `patch` voxels, the sides of `divisor`. All of
    a volume without a body.
    """
    corner, shape = [], []
    body = (low > AIR).any(0)
    for axis, count in enumerate(body.shape):
        side = FACTOR * count
        there = body.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist() or [0, count - 1]
        start = max(0, FACTOR * there[0] - MARGIN) // patch * patch
        stop = min(side, FACTOR * (there[-1] + 1) + MARGIN)
        length = -(-(stop - start) // divisor) * divisor
        corner.append(min(start, side - length))
        shape.append(length)
    return (corner[0], corner[1], corner[2]), (shape[0], shape[1], shape[2])


def pass_bytes(network: NetworkConfig, shape: Triple, value_bytes: int = 2) -> int:
    """About the most bytes at once of one evaluation of a grid of `shape` voxels, in numbers of `value_bytes`.

    That is where the decoder is back at full resolution: the context, the skips of this level, what comes up from the
    level below, and both of them scaled and joined; besides, three grids in float32. Counted on tensors without content
    it is 33.0 GB for the published network in bfloat16 and 0.6 GB for the bundled one. Kernels' own memory comes on top
    (measured on a CPU: a fifth), as do attention's scores where they are kept.
    """
    finest, below = network.channels[0], network.channels[:2][-1]
    if network.layout == "edm2":
        channels = (network.blocks[0] + 4) * finest + 3 * below
    else:
        channels = 7 * finest  # one skip, and what comes up has the channels of this level already
    if network.voxel_channels:  # it comes after the U-Net, of which only the last features are left
        channels = max(channels, 2 * finest + 6 * (VoxelHead.SEEN + VOXEL_FEATURES) * network.patch**3)
    return math.prod(shape) * (value_bytes * channels // network.patch**3 + 24)


def tile_for(memory_bytes: int, network: NetworkConfig, value_bytes: int = 2) -> Triple | None:
    """Tile (voxels) for a machine or GPU with so much memory in all; None: the whole volume in one pass.

    A pass may take half of the memory: the other half is for kernels, the whole volume's context and the sampler's
    state.
    """
    if memory_bytes >= max(WHOLE_VOLUME_BYTES, 2 * pass_bytes(network, SHAPE, value_bytes)):
        return None
    return next((tile for tile in TILES if memory_bytes >= 2 * pass_bytes(network, tile, value_bytes)), TILES[-1])


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of length `tile` begin so that they cover `side` with at least `overlap` in common, evenly spread."""
    if tile >= side:
        return [0]
    if overlap >= tile:
        raise ValueError(f"overlap {overlap} must be below the tile's length {tile}")
    count = math.ceil((side - tile) / (tile - overlap)) + 1
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def tiles(shape: Triple, tile: Triple, overlap: int, align: int) -> Iterator[Where]:
    """The tiles of a grid; their corners are multiples of `align`, as the sides of the grid and the tile must be."""
    if any(s % align or t % align for s, t in zip(shape, tile, strict=True)):
        raise ValueError(f"grid {shape} and tile {tile} must be multiples of {align}")
    axes = [
        [align * i for i in starts(s // align, min(t, s) // align, math.ceil(overlap / align))]
        for s, t in zip(shape, tile, strict=True)
    ]
    for corner in itertools.product(*axes):
        x, y, z = (slice(c, c + min(t, s)) for c, t, s in zip(corner, tile, shape, strict=True))
        yield x, y, z


def _window(where: Where, shape: Triple, overlap: int, like: Tensor) -> Tensor:
    """Smooth weights (x, y, z) of a tile: 1 inside, a raised cosine over `overlap` at faces inside the grid."""
    axes = []
    for part, side in zip(where, shape, strict=True):
        n = part.stop - part.start
        place = torch.arange(n, dtype=like.dtype, device=like.device) + 0.5
        rise = (place / overlap).clamp(max=1.0) if part.start > 0 else torch.ones_like(place)
        fall = ((n - place) / overlap).clamp(max=1.0) if part.stop < side else torch.ones_like(place)
        axes.append(0.5 - 0.5 * torch.cos(math.pi * torch.minimum(rise, fall)))
    return axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]


def blend_tiles(apply: Callable[[Where], Tensor], like: Tensor, tile: Triple, overlap: int, align: int) -> Tensor:
    """`apply` on each tile of a grid shaped as `like` (b, c, x, y, z), and the results' weighted mean."""
    shape = (like.shape[2], like.shape[3], like.shape[4])
    total = torch.zeros_like(like)
    weights = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for where in tiles(shape, tile, overlap, align):
        window = _window(where, shape, max(overlap, 1), like)
        total[(slice(None), slice(None), *where)] += apply(where) * window
        weights[where] += window
    return total / weights
