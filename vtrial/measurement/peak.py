"""SUVpeak: the highest mean uptake in a sphere of 1 ml centred on a voxel of an organ.

A sphere of 1 ml as in PERCIST (Wahl et al. 2009), tried at every voxel of the region as in the global intensity peak
of the Image Biomarker Standardisation Initiative (Zwanenburg et al. 2020, feature 0F91). It may reach beyond the organ.
Each voxel counts by the part of it that lies inside, so the sphere holds 1 ml on any grid. Where the image ends, the
mean is that of the part inside the image.

Few spheres need to be computed. Let P(v) be the mean around voxel v, w the weights, s the image, and a the centre of a
small block of voxels. As the weights w(i - a) average s(i) - P(a) to zero, for any g > 0 Cauchy and Schwarz give

    P(v) = P(a) + sum_i [w(i - v) - w(i - a)] [s(i) - P(a)]
        <= P(a) + sqrt(sum_i [w(i - v) - w(i - a)]^2 / g(i - a)) sqrt(sum_i g(i - a) [s(i) - P(a)]^2),

so one sphere a block bounds them all, and blocks that cannot hold an organ's maximum are passed over. The result is
that of trying every voxel, to one part in a million. Where the image cuts a sphere, sums run over the part inside and
the second term is divided by the share of the sphere at v that is inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

SPHERE_ML = 1.0
RADIUS_MM = (3.0 * SPHERE_ML * 1000.0 / (4.0 * math.pi)) ** (1.0 / 3.0)  # 6.204 mm
_BLOCK_REACH_MM = 2.0  # from the centre of a block to its last voxel: larger blocks are fewer but bound less
_MAX_REACH = 4  # voxels
_SAMPLES = 24  # points along a radius when the part of a voxel inside the sphere is counted
_ROUNDING = 1e-6
_ROWS = 256  # spheres at once: their voxels stay in the cache

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def sphere_weights(steps_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each voxel in a sphere of 1 ml around the middle one: odd sizes along three axes, sum 1.

    `steps_mm` (3, 3) has the step of one voxel along each array axis as its columns, in mm; any angle between them.
    """
    extent = RADIUS_MM * np.sqrt(np.diag(np.linalg.inv(steps_mm.T @ steps_mm)))  # half-widths of the sphere, in voxels
    reach = np.floor(extent + 0.5).astype(int)
    samples = [max(1, math.ceil(_SAMPLES / e)) for e in extent]
    axes = [(np.arange((2 * r + 1) * n) + 0.5) / n - r - 0.5 for r, n in zip(reach, samples, strict=True)]
    metric = steps_mm.T @ steps_mm
    a, b, c = np.meshgrid(*axes, indexing="ij", sparse=True)
    squared = metric[0, 0] * a * a + metric[1, 1] * b * b + metric[2, 2] * c * c
    squared = squared + 2.0 * (metric[0, 1] * a * b + metric[0, 2] * a * c + metric[1, 2] * b * c)
    inside = (squared <= RADIUS_MM**2).astype(np.float64)
    cells = [size for r, n in zip(reach, samples, strict=True) for size in (2 * r + 1, n)]
    shares: NDArray[np.float64] = inside.reshape(cells).sum(axis=(1, 3, 5))
    shares /= shares.sum()
    return shares


@dataclass(frozen=True)
class Stencil:
    """Weights around a voxel, as runs along the last axis, which lie together in memory.

    `columns` (n, 2) offsets of the runs along the first two axes; each runs from -`reach` to +`reach` along the last.
    `weights` (n * run, k) float32.
    """

    columns: Ints
    reach: int
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, *cubes: Floats) -> Stencil:
        """From arrays of one odd shape around the middle voxel: the runs in which one of them is not zero."""
        shape = np.array(cubes[0].shape)
        where = np.argwhere(np.any([(cube != 0.0).any(axis=2) for cube in cubes], axis=0))
        weights = np.stack([cube[tuple(where.T)].ravel() for cube in cubes], axis=1)
        return cls(where - shape[:2] // 2, int(shape[2]) // 2, weights.astype(np.float32))


@dataclass(frozen=True)
class Bound:
    """How one sphere bounds those around it: `reach` of a block in voxels, `stencil` with w and g, the first factor.

    `moved` is the most of a sphere's weight that changes place within a block.
    """

    reach: tuple[int, int, int]
    stencil: Stencil
    factor: float
    moved: float

    @classmethod
    def of(cls, weights: Floats, steps_mm: NDArray[np.float64]) -> Bound:
        """The bound for spheres of these weights on a grid of these steps."""
        lengths = np.linalg.norm(steps_mm, axis=0)
        a, b, c = (min(_MAX_REACH, round(_BLOCK_REACH_MM / step)) for step in lengths)
        middle = np.pad(weights, [(r, r) for r in (a, b, c)])
        shifts = product(range(-a, a + 1), range(-b, b + 1), range(-c, c + 1))
        changes = [np.roll(middle, shift, (0, 1, 2)) - middle for shift in shifts]
        largest = np.max(np.abs(changes), axis=0)
        used = largest > 0.0
        factor = max((float((d[used] ** 2 / largest[used]).sum()) for d in changes), default=0.0)
        moved = max(float(np.abs(d).sum()) / 2.0 for d in changes)
        return cls((a, b, c), Stencil.of(middle, largest), math.sqrt(factor), moved)


Means = Callable[[NDArray[np.float32], NDArray[np.bool_] | None], NDArray[np.float32]]


@dataclass(frozen=True)
class Field:
    """An uptake image (x, y, z), float32 in C order, and reading around its voxels."""

    suv: NDArray[np.float32]

    def around(self, centres: Ints, stencil: Stencil, compute: Means) -> NDArray[np.float32]:
        """What `compute` gives (n,) for the values (rows, m) in the stencil around flat indices `centres` (n,).

        Its second argument says which values are inside the image (the others are 0); None if all are.
        """
        where = np.unravel_index(centres, self.suv.shape)
        edges = [*np.abs(stencil.columns).max(axis=0), stencil.reach]
        whole = np.ones(len(centres), bool)
        for place, edge, size in zip(where, edges, self.suv.shape, strict=True):
            whole &= (place >= edge) & (place < size - edge)
        out = np.empty(len(centres), np.float32)
        for inner in (True, False):
            chosen = np.flatnonzero(whole == inner)
            read = self._whole if inner else self._cut
            for start in range(0, len(chosen), _ROWS):
                rows = chosen[start : start + _ROWS]
                out[rows] = compute(*read(centres[rows], stencil))
        return out

    def _whole(self, centres: Ints, stencil: Stencil) -> tuple[NDArray[np.float32], None]:
        run = 2 * stencil.reach + 1
        runs = sliding_window_view(self.suv.reshape(-1), run)
        steps = np.array([self.suv.shape[1] * self.suv.shape[2], self.suv.shape[2]])
        first = centres[:, None] + (stencil.columns @ steps - stencil.reach)
        return runs[first].reshape(len(centres), -1), None

    def _cut(self, centres: Ints, stencil: Stencil) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        x, y, z = np.unravel_index(centres, self.suv.shape)
        a, b, c = self.suv.shape
        x, y = x[:, None, None] + stencil.columns[:, :1], y[:, None, None] + stencil.columns[:, 1:]
        z = z[:, None, None] + np.arange(-stencil.reach, stencil.reach + 1)
        inside = (x >= 0) & (x < a) & (y >= 0) & (y < b) & (z >= 0) & (z < c)
        values = np.where(inside, self.suv[x.clip(0, a - 1), y.clip(0, b - 1), z.clip(0, c - 1)], np.float32(0.0))
        return values.reshape(len(centres), -1), inside.reshape(len(centres), -1)

    def means(self, centres: Ints, sphere: Stencil) -> NDArray[np.float32]:
        """Means (n,) of the spheres around flat indices."""
        w = sphere.weights[:, 0]

        def compute(values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> NDArray[np.float32]:
            means: NDArray[np.float32] = values @ w
            return means if inside is None else means / (inside.astype(np.float32) @ w)

        return self.around(centres, sphere, compute)

    def limits(self, anchors: Ints, bound: Bound) -> NDArray[np.float32]:
        """What no sphere around a voxel of the blocks around these flat indices can exceed (n,)."""
        w, g = np.ascontiguousarray(bound.stencil.weights.T)

        def compute(values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> NDArray[np.float32]:
            share = np.float32(1.0) if inside is None else inside.astype(np.float32) @ w
            means = values @ w / share
            values -= means[:, None]
            if inside is not None:
                values[~inside] = 0.0
            spread = np.sqrt(np.square(values, out=values) @ g)
            least = np.maximum(share - bound.moved, 0.0) if inside is not None else share
            with np.errstate(divide="ignore", invalid="ignore"):
                limits = means + bound.factor * spread / least
                limits += np.float32(_ROUNDING / 2.0) * np.abs(limits)  # sums of float32 err by some last bits
            return np.where(np.isnan(limits), np.inf, limits)

        return self.around(anchors, bound.stencil, compute)


def suv_peaks(suv: NDArray[np.float32], steps_mm: NDArray[np.float64], organs: Sequence[Ints]) -> NDArray[np.float64]:
    """SUVpeak of each organ, given as flat indices of its voxels (C order; at least one).

    `suv` (x, y, z) float32 in C order, finite; `steps_mm` (3, 3) as in `sphere_weights`.
    """
    weights = sphere_weights(steps_mm)
    sphere, bound, field = Stencil.of(weights), Bound.of(weights, steps_mm), Field(suv)
    blocks = [_blocks(voxels, suv.shape, bound.reach) for voxels in organs]
    sizes = _block_counts(suv.shape, bound.reach)
    used = np.zeros(math.prod(sizes), bool)
    for numbers in blocks:
        used[numbers] = True
    numbers = np.flatnonzero(used)
    limits = np.zeros(math.prod(sizes), np.float32)
    limits[numbers] = field.limits(_anchors(numbers, suv.shape, bound.reach), bound)
    return np.array(
        [_highest(field, sphere, voxels, limits[mine]) for voxels, mine in zip(organs, blocks, strict=True)]
    )


def _block_counts(shape: Sequence[int], reach: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // (2 * r + 1)) for size, r in zip(shape, reach, strict=True))


def _blocks(voxels: Ints, shape: Sequence[int], reach: Sequence[int]) -> Ints:
    """Number of the block of each voxel."""
    x, y, z = np.unravel_index(voxels, tuple(shape))
    a, b, c = (2 * r + 1 for r in reach)
    _, ny, nz = _block_counts(shape, reach)
    return ((x // a) * ny + y // b) * nz + z // c


def _anchors(numbers: Ints, shape: Sequence[int], reach: Sequence[int]) -> Ints:
    """Flat index of the middle voxel of each block; of the last voxel where the image ends before the middle."""
    corners = np.unravel_index(numbers, _block_counts(shape, reach))
    middles = [
        np.minimum(corner * (2 * r + 1) + r, size - 1) for corner, r, size in zip(corners, reach, shape, strict=True)
    ]
    return np.ravel_multi_index(middles, tuple(shape))


def _highest(field: Field, sphere: Stencil, voxels: Ints, limits: NDArray[np.float32]) -> float:
    """The highest sphere mean over voxels of which the means are at most `limits`: the most promising first."""
    best, batch = -math.inf, 64
    while len(voxels):
        first = np.argpartition(limits, -batch)[-batch:] if len(voxels) > batch else slice(None)
        best = max(best, float(field.means(voxels[first], sphere).max()))
        limits[first] = -np.inf
        left = limits > best + _ROUNDING * abs(best)
        voxels, limits, batch = voxels[left], limits[left], batch * 4
    return best
