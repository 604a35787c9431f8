"""Whole volumes through a network of limited reach: in one pass, or in overlapping tiles blended at every step.

Bar-Tal et al. 2023 (MultiDiffusion, arXiv 2302.08113): the denoised tiles are averaged with weights before the sampler
moves on, so tiles agree and no seam forms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Where = tuple[slice, slice, slice]
Triple = tuple[int, int, int]


WHOLE_VOLUME_BYTES = 6 * 10**9
"""With less memory than this, a 224×224×384 volume is refined in tiles: one pass takes up to 2.6 GB."""


def tile_for(memory_bytes: int) -> Triple | None:
    """Tile (voxels) for a machine or GPU with so much memory in all; None: the whole volume in one pass."""
    return None if memory_bytes >= WHOLE_VOLUME_BYTES else (224, 224, 128)


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
