"""p values of a family of tests, adjusted. NaN belongs to no family and stays NaN."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def holm(p: Array) -> Array:
    """Holm 1979: the chance of any false alarm in the family stays below alpha, whatever the dependence."""
    return _stepwise(p, lambda ordered: np.maximum.accumulate(ordered * np.arange(len(ordered), 0, -1)))


def benjamini_hochberg(p: Array) -> Array:
    """Benjamini & Hochberg 1995: the expected part of false alarms among the alarms stays below alpha."""

    def adjust(ordered: Array) -> Array:
        raised = ordered * len(ordered) / np.arange(1, len(ordered) + 1)
        return np.asarray(np.minimum.accumulate(raised[::-1])[::-1], dtype=float)

    return _stepwise(p, adjust)


def _stepwise(p: Array, adjust: object) -> Array:
    adjusted = np.full(p.shape, np.nan)
    there = np.flatnonzero(np.isfinite(p))
    order = there[np.argsort(p[there], kind="stable")]
    adjusted[order] = np.minimum(adjust(p[order]), 1.0)  # type: ignore[operator]
    return adjusted
