"""Inference on spread: variance ratios, their intervals and tests, for many cells at once.

From moments alone by F, which trusts in normal distributions; from values (subjects, cells) by Brown–Forsythe, with
Bonett's interval. NaN where it cannot be computed.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from vtrial.validation.inference import Array, Moments, moments


def variance_ratio_f(a: Moments, b: Moments, level: float) -> tuple[Array, Array, Array, Array]:
    """Variance ratio, its interval and p by F: all that moments allow. It trusts in normal distributions."""
    with np.errstate(all="ignore"):
        ratio = a.sd**2 / np.where(b.sd > 0, b.sd**2, np.nan)
        da, db = a.n - 1, b.n - 1
        low = ratio / special.fdtri(da, db, 0.5 + level / 2.0)
        high = ratio * special.fdtri(db, da, 0.5 + level / 2.0)
        below = special.fdtr(da, db, ratio)
        p = np.minimum(2.0 * np.minimum(below, special.fdtrc(da, db, ratio)), 1.0)
        return ratio, low, high, p


def log_variance_se(a: Array, b: Array) -> Array:
    """Standard error of ln(variance ratio) of values (subjects, cells), robust to tails (Bonett 2006, eq. for ratios).

    The kurtosis is pooled, and taken about trimmed means, which skewness moves less.
    """
    with np.errstate(all="ignore"):
        fourth, square, total = 0.0, 0.0, 0.0
        counts = []
        for values in (a, b):
            there = np.isfinite(values)
            n = there.sum(axis=0)
            mean = np.where(there, values, 0.0).sum(axis=0) / n
            fourth = fourth + (np.where(there, values - _trimmed_mean(values), 0.0) ** 4).sum(axis=0)
            square = square + (np.where(there, values - mean, 0.0) ** 2).sum(axis=0)
            total = total + n
            counts.append(n)
        kurtosis = total * fourth / square**2
        na, nb = counts
        variance = (kurtosis - (na - 3) / na) / (na - 1) + (kurtosis - (nb - 3) / nb) / (nb - 1)
        return np.asarray(np.sqrt(np.where((na > 4) & (nb > 4), variance, np.nan)), dtype=float)


def _trimmed_mean(values: Array) -> Array:
    """Mean without a part 1 / (2 sqrt(n - 4)) at either end, (cells,)."""
    n = np.isfinite(values).sum(axis=0)
    cut = np.floor(n / (2.0 * np.sqrt(np.maximum(n - 4, 1)))).astype(int)
    cut = np.where(2 * cut < n, cut, 0)
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN last
    rank = np.arange(len(values))[:, None]
    kept = (rank >= cut) & (rank < n - cut)
    return np.asarray(np.where(kept, ordered, 0.0).sum(axis=0) / kept.sum(axis=0), dtype=float)


def variance_ratio_bonett(a: Array, b: Array, level: float) -> tuple[Array, Array, Array]:
    """Variance ratio of values (subjects, cells) and its interval (Bonett 2006)."""
    ma, mb = moments(a), moments(b)
    with np.errstate(all="ignore"):
        z = special.ndtri(0.5 + level / 2.0)
        ratio = ma.sd**2 / np.where(mb.sd > 0, mb.sd**2, np.nan)
        correction = (ma.n / (ma.n - z)) / (mb.n / (mb.n - z))
        half = z * log_variance_se(a, b)
        centre = np.log(np.where(ratio > 0, ratio, np.nan) * correction)
        return ratio, np.exp(centre - half), np.exp(centre + half)


def tost_spread(ratio: Array, se: Array, margin: float) -> Array:
    """p that the SD ratio lies within 1 / `margin` and `margin`, from a variance ratio and the SE of its logarithm."""
    with np.errstate(all="ignore"):
        centre, bound = np.log(np.where(ratio > 0, ratio, np.nan)), 2.0 * np.log(margin)
        return np.asarray(np.maximum(special.ndtr(-(centre + bound) / se), special.ndtr((centre - bound) / se)))


def brown_forsythe(a: Array, b: Array, *, paired: bool = False) -> Array:
    """p of equal spread of values (subjects, cells) (Brown & Forsythe 1974): t on distances from the median.

    Paired: the paired t test of those distances.
    """
    with np.errstate(all="ignore"):
        za, zb = (np.abs(v - column_median(v)) for v in (a, b))
        if paired:
            d = moments(za - zb)
            t = d.mean / np.sqrt(np.where(d.sd > 0, d.variance_of_mean, np.nan))
            return np.asarray(2.0 * special.stdtr(d.n - 1, -np.abs(t)), dtype=float)
        ma, mb = moments(za), moments(zb)
        df = ma.n + mb.n - 2
        pooled = ((ma.n - 1) * ma.sd**2 + (mb.n - 1) * mb.sd**2) / df
        t = (ma.mean - mb.mean) / np.sqrt(np.where(pooled > 0, pooled, np.nan) * (1.0 / ma.n + 1.0 / mb.n))
        return np.asarray(2.0 * special.stdtr(df, -np.abs(t)), dtype=float)


def column_median(values: Array) -> Array:
    """Median of each column, NaN left out; NaN for an empty one."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    n = np.isfinite(values).sum(axis=0)
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)
    columns = np.arange(values.shape[1])
    low, high = ordered[np.maximum((n - 1) // 2, 0), columns], ordered[np.minimum(n // 2, len(values) - 1), columns]
    return np.asarray(np.where(n > 0, (low + high) / 2.0, np.nan), dtype=float)
