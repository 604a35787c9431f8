"""What the order of values tells: Mann–Whitney, Kolmogorov–Smirnov, Wasserstein-1, medians of censored values."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]
_EXACT = 50  # Kolmogorov–Smirnov: exact up to here, where the asymptotic p is off; above it is slow


@dataclass(frozen=True)
class RankResult:
    """Of one cell: p of Mann–Whitney (paired: Wilcoxon), distance and p of Kolmogorov–Smirnov, Wasserstein-1 distance.

    The Wasserstein distance has the unit of the metric. Kolmogorov–Smirnov has no p in paired cohorts.
    """

    p_rank: float
    ks: float
    p_ks: float
    wasserstein: float


def rank_result(a: Array, b: Array, *, paired: bool = False) -> RankResult:
    """Rank tests and distances of two samples without NaN, (n,) and (m,), ties allowed. NaN where one is empty."""
    if not len(a) or not len(b):
        return RankResult(*(float("nan"),) * 4)
    a_sorted, b_sorted = np.sort(a), np.sort(b)
    both = np.sort(np.concatenate([a_sorted, b_sorted]))
    fa = np.searchsorted(a_sorted, both, side="right") / len(a)
    fb = np.searchsorted(b_sorted, both, side="right") / len(b)
    gap = np.abs(fa - fb)
    wasserstein = float(gap[:-1] @ np.diff(both))
    return RankResult(_p_rank(a, b, both, paired), float(gap.max()), _p_ks(a, b, gap.max(), paired), wasserstein)


def _p_rank(a: Array, b: Array, both: Array, paired: bool) -> float:
    if both[0] == both[-1]:  # all the same: no order to speak of
        return 1.0
    if paired:
        return 1.0 if np.all(a == b) else float(stats.wilcoxon(a, b, zero_method="pratt").pvalue)
    if max(len(a), len(b)) <= _EXACT:
        return float(stats.mannwhitneyu(a, b).pvalue)
    # Normal approximation with corrections for ties and continuity.
    n, m = len(a), len(b)
    first, last = np.searchsorted(both, a, "left"), np.searchsorted(both, a, "right")
    u = float(((first + last + 1) / 2.0).sum()) - n * (n + 1) / 2.0
    _, ties = np.unique(both, return_counts=True)
    variance = n * m / 12.0 * (n + m + 1 - (ties.astype(float) ** 3 - ties).sum() / ((n + m) * (n + m - 1.0)))
    z = max(abs(u - n * m / 2.0) - 0.5, 0.0) / np.sqrt(variance)
    return float(2.0 * special.ndtr(-z))


def _p_ks(a: Array, b: Array, gap: float, paired: bool) -> float:
    if paired:
        return float("nan")
    if max(len(a), len(b)) <= _EXACT:
        with warnings.catch_warnings():  # where the exact sum fails scipy takes the asymptotic p, and says so
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(stats.ks_2samp(a, b, method="exact").pvalue)
    return float(stats.kstwobign.sf(gap * np.sqrt(len(a) * len(b) / (len(a) + len(b)))))


@dataclass(frozen=True)
class MedianRatio:
    """Of one cell: both medians, their ratio with an interval, and p of equivalence within a margin."""

    median_a: float
    median_b: float
    ratio: float
    low: float
    high: float
    p_tost: float


def median_ratio(a: Array, b: Array, ceiling: float, margin: float, level: float) -> MedianRatio:
    """Ratio of medians of positive values censored at `ceiling` (Price & Bonett 2002, of logarithms).

    Order statistics about the median do not feel what happens beyond the ceiling, as long as they lie below it:
    where they do not, the ratio is NaN. `margin` is a part of b's median.
    """
    (ma, va), (mb, vb) = _log_median(a, ceiling), _log_median(b, ceiling)
    with np.errstate(all="ignore"):
        ratio, se = ma - mb, np.sqrt(va + vb)
        z = special.ndtri(0.5 + level / 2.0)
        low_test = special.ndtr(-(ratio - np.log(1.0 - margin)) / se) if se > 0 else np.nan
        high_test = special.ndtr((ratio - np.log(1.0 + margin)) / se) if se > 0 else np.nan
        p_tost = float(np.maximum(low_test, high_test))
        low, high = np.exp(ratio - z * se), np.exp(ratio + z * se)
        medians = float(np.exp(ma)), float(np.exp(mb))
        return MedianRatio(*medians, float(np.exp(ratio)), float(low), float(high), p_tost)


def _log_median(values: Array, ceiling: float) -> tuple[float, float]:
    """Median of the logarithms and its squared standard error, from two order statistics."""
    n = len(values)
    if n < 5 or values.min() <= 0:
        return float("nan"), float("nan")
    ordered = np.sort(values)
    c = max(round((n + 1) / 2.0 - np.sqrt(n)), 1)
    if ordered[n - c] >= ceiling:
        return float("nan"), float("nan")
    z = special.ndtri(1.0 - stats.binom.cdf(c - 1, n, 0.5))
    se = (np.log(ordered[n - c]) - np.log(ordered[c - 1])) / (2.0 * z)
    return float(np.log(np.median(ordered))), float(se**2)
