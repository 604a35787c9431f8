"""From a CT and its exact labels to the grid on which TotalSegmentator's fast modes segment.

TotalSegmentator resamples with `scipy.ndimage.zoom` (order 1, first and last voxel kept in place) and cuts the
decimals; nnU-Net then finds its own spacing and resamples nothing. So the phantoms go the same way here. Masks come
back to the fine grid organ by organ: linear interpolation, and inside is what reaches one half.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Spacing = tuple[float, float, float]
FULL = 255  # `share` of a voxel that has one label only


@dataclass(frozen=True)
class GridCase:
    """A CT on the coarse grid, all arrays (z, y, x) as nnU-Net orders them.

    `ct` int16 HU. `label` uint8 is the label with the largest part of a voxel, `other` the next one, and `share` uint8
    the part of `label` in 255ths: the weights that linear interpolation gives to the fine voxels around.
    """

    ct: NDArray[np.int16]
    label: NDArray[np.uint8]
    other: NDArray[np.uint8]
    share: NDArray[np.uint8]


def to_grid(ct: NDArray[np.int16], labels: NDArray[np.uint8], spacing_mm: Spacing, grid_mm: float) -> GridCase:
    """Resample a CT (x, y, z) and its labels to voxels of `grid_mm`."""
    coarse: NDArray[Any] = resample_ct(ct, spacing_mm, grid_mm)
    label, other, share = resample_labels(labels, coarse.shape)
    return GridCase(*(np.ascontiguousarray(a.transpose(2, 1, 0)) for a in (coarse, label, other, share)))


def resample_ct(ct: NDArray[np.int16], spacing_mm: Spacing, grid_mm: float) -> NDArray[np.int16]:
    """A CT (x, y, z) in voxels of `grid_mm`, value by value what TotalSegmentator makes of it."""
    zoom = np.asarray(spacing_mm, dtype=np.float32) / np.float64(grid_mm)  # sizes come from a header's float32
    resampled: NDArray[np.float64] = ndimage.zoom(ct.astype(np.float64), zoom, mode="nearest", order=1)
    return np.trunc(resampled).astype(np.int16)


def resample_labels(
    labels: NDArray[np.uint8], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """The two labels with the largest linear weights at the points of a coarse grid, and the first one's share."""
    low, weight = zip(*(_neighbours(n, m) for n, m in zip(labels.shape, shape, strict=True)), strict=True)
    corners = list(product((0, 1), repeat=3))
    first = labels[np.ix_(*low)]
    mixed = np.zeros(shape, dtype=bool)
    for corner in corners[1:]:
        mixed |= labels[np.ix_(*(i + step for i, step in zip(low, corner, strict=True)))] != first
    points = mixed.nonzero()
    around = np.stack(
        [labels[tuple(i[p] + step for i, p, step in zip(low, points, corner, strict=True))] for corner in corners]
    )
    weights = np.stack(
        [
            np.prod([w[p] if step else 1.0 - w[p] for w, p, step in zip(weight, points, corner, strict=True)], axis=0)
            for corner in corners
        ]
    )
    total = np.stack([(weights * (around == candidate)).sum(axis=0) for candidate in around])
    column = np.arange(len(points[0]))
    best = around[total.argmax(axis=0), column]
    rest = np.where(around == best, 0.0, total)
    most, next_most = total.max(axis=0), rest.max(axis=0)
    label, other, share = first.copy(), first.copy(), np.full(shape, FULL, dtype=np.uint8)
    label[points], other[points] = best, around[rest.argmax(axis=0), column]
    share[points] = np.rint(FULL * most / (most + next_most))
    return label, other, share


def _neighbours(fine: int, coarse: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The fine voxel before each coarse point, such that there is one after it, and the linear weight of that one."""
    points = np.arange(coarse) * ((fine - 1) / max(coarse - 1, 1))
    low = np.clip(np.floor(points), 0, max(fine - 2, 0)).astype(np.intp)
    return low, (points - low).astype(np.float32)
