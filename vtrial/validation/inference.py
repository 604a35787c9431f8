"""Closed-form inference on two groups, for many cells at once: arrays of one value a cell in and out.

From `Moments` alone (so that printed means and SDs will do): Welch's t, the ratio of means with Fieller's interval,
equivalence by two one-sided tests, Cohen's d, analyses of variance. What cannot be computed is NaN; `compare`
says why. Throughout, a is the synthetic cohort and b the reference, and `covariance` that of their pairs, if they are
paired. Spread is in `spread`, ranks in `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]
_STEPS = 40  # at each the error of an interval's end shrinks to a tenth or so
_NO_SPREAD = 1e-9  # SD below this part of the mean: rounding, not spread


@dataclass(frozen=True)
class Moments:
    """n, mean and SD (n - 1) of each cell, (cells,)."""

    n: Array
    mean: Array
    sd: Array

    @property
    def variance_of_mean(self) -> Array:
        """Squared standard error of the mean."""
        with np.errstate(all="ignore"):
            return self.sd**2 / self.n


def moments(values: Array) -> Moments:
    """Moments of (subjects, cells), NaN left out; an SD needs two values, and rounding does not count as spread."""
    there = np.isfinite(values)
    n = there.sum(axis=0).astype(float)
    with np.errstate(all="ignore"):
        mean = np.where(there, values, 0.0).sum(axis=0) / n
        sd = np.sqrt((np.where(there, values - mean, 0.0) ** 2).sum(axis=0) / np.where(n > 1, n - 1, np.nan))
    return Moments(n, mean, np.where(sd <= _NO_SPREAD * np.abs(mean), 0.0, sd))


def welch(a: Moments, b: Moments) -> tuple[Array, Array, Array]:
    """Welch 1947: t, degrees of freedom (Satterthwaite), two-sided p of equal means."""
    with np.errstate(all="ignore"):
        va, vb = a.variance_of_mean, b.variance_of_mean
        t = (a.mean - b.mean) / np.sqrt(va + vb)
        t = np.where(va + vb > 0, t, np.nan)
        df = satterthwaite(va, a.n, vb, b.n)
        return t, df, 2.0 * special.stdtr(df, -np.abs(t))


def satterthwaite(va: Array, na: Array, vb: Array, nb: Array) -> Array:
    """Degrees of freedom of the sum of two squared standard errors."""
    with np.errstate(all="ignore"):
        df = (va + vb) ** 2 / (va**2 / (na - 1) + vb**2 / (nb - 1))
    return np.asarray(df, dtype=float)


def ratio_interval(
    a: Moments, b: Moments, level: float, covariance: Array | None = None, at: Array | None = None
) -> tuple[Array, Array]:
    """Fieller 1954: interval of mean(a) / mean(b) at a confidence level.

    It solves (ma - r mb)^2 = t^2 var(ma - r mb), so that the uncertainty of the reference counts. `covariance` (of the
    pairs, not of their means) makes it that of paired cohorts, with n - 1 degrees of freedom; others have those of
    Satterthwaite for r = `at`, by default the ratio of the means. NaN where the reference mean cannot be told from
    zero, as the interval then has no end.
    """
    with np.errstate(all="ignore"):
        va, vb = a.variance_of_mean, b.variance_of_mean
        c = np.zeros_like(va) if covariance is None else covariance / a.n
        r = a.mean / b.mean if at is None else at
        df = a.n - 1 if covariance is not None else satterthwaite(va, a.n, r**2 * vb, b.n)
        t2 = special.stdtrit(df, 0.5 + level / 2.0) ** 2
        x = b.mean**2 - t2 * vb
        y = a.mean * b.mean - t2 * c
        root = np.sqrt(y**2 - x * (a.mean**2 - t2 * va))
        sure = (x > 0) & (va + vb > 0)
        return np.where(sure, (y - root) / x, np.nan), np.where(sure, (y + root) / x, np.nan)


def equivalence_interval(a: Moments, b: Moments, level: float, covariance: Array | None = None) -> tuple[Array, Array]:
    """Fieller's interval, each end with the degrees of freedom of that very ratio, as `tost_ratio` takes them.

    So it holds the ratios that two tests at (1 - level) / 2 do not reject, and lies inside a margin exactly where
    `tost_ratio` says so at that level. The ends are found by iteration.
    """
    low, high = ratio_interval(a, b, level, covariance)
    if covariance is None:
        for _ in range(_STEPS):
            low, high = (ratio_interval(a, b, level, at=end)[i] for i, end in enumerate((low, high)))
    return low, high


def difference_interval(a: Moments, b: Moments, level: float, covariance: Array | None = None) -> tuple[Array, Array]:
    """Interval of mean(a) - mean(b): Welch's, or that of paired differences where their covariance is given."""
    with np.errstate(all="ignore"):
        va, vb = a.variance_of_mean, b.variance_of_mean
        paired = covariance is not None
        variance = va + vb - (2.0 * covariance / a.n if covariance is not None else 0.0)
        df = a.n - 1 if paired else satterthwaite(va, a.n, vb, b.n)
        half = special.stdtrit(df, 0.5 + level / 2.0) * np.sqrt(variance)
        half = np.where(variance > 0, half, np.nan)
        return a.mean - b.mean - half, a.mean - b.mean + half


def tost_ratio(a: Moments, b: Moments, margin: Array, covariance: Array | None = None) -> Array:
    """p of equivalence of means within ± `margin` (a part of the reference mean): the larger of two one-sided tests.

    H0: mean(a) <= (1 - margin) mean(b) or >= (1 + margin) mean(b), tested by ma - r mb with its own variance
    (Sasabuchi 1980; Hauschke et al. 1999), so that the margin moves with the estimated reference mean.
    """
    with np.errstate(all="ignore"):
        worst = np.zeros_like(a.mean)
        sign = np.sign(b.mean)
        for r, side in ((1.0 - margin, 1.0), (1.0 + margin, -1.0)):
            va, vb = a.variance_of_mean, r**2 * b.variance_of_mean
            c = np.zeros_like(va) if covariance is None else r * covariance / a.n
            df = a.n - 1 if covariance is not None else satterthwaite(va, a.n, vb, b.n)
            variance = va + vb - 2.0 * c
            t = side * sign * (a.mean - r * b.mean) / np.sqrt(np.where(variance > 0, variance, np.nan))
            worst = np.maximum(worst, special.stdtr(df, -t))
        return np.asarray(worst, dtype=float)


def tost_difference(a: Moments, b: Moments, margin: Array, covariance: Array | None = None) -> Array:
    """p of equivalence of means within ± `margin` in the metric's own unit (Schuirmann 1987, with Welch's variance)."""
    with np.errstate(all="ignore"):
        va, vb = a.variance_of_mean, b.variance_of_mean
        variance = va + vb - (2.0 * covariance / a.n if covariance is not None else 0.0)
        df = a.n - 1 if covariance is not None else satterthwaite(va, a.n, vb, b.n)
        se = np.sqrt(np.where(variance > 0, variance, np.nan))
        d = a.mean - b.mean
        p = np.maximum(special.stdtr(df, -(d + margin) / se), special.stdtr(df, (d - margin) / se))
        return np.asarray(p, dtype=float)


def cohens_d(a: Moments, b: Moments, level: float, covariance: Array | None = None) -> tuple[Array, Array, Array]:
    """Cohen's d with the root mean square of both SDs, and its large-sample interval (Bonett 2008).

    `covariance` (of the pairs) makes the interval that of paired cohorts; d is the same.
    """
    with np.errstate(all="ignore"):
        va, vb = a.sd**2, b.sd**2
        mean_variance = np.where(va + vb > 0, (va + vb) / 2.0, np.nan)
        d = (a.mean - b.mean) / np.sqrt(mean_variance)
        c = np.zeros_like(va) if covariance is None else covariance
        of_mean = va / (a.n - 1) + vb / (b.n - 1) - 2.0 * c / (a.n - 1)
        of_sd = va**2 / (a.n - 1) + vb**2 / (b.n - 1) + 2.0 * c**2 / (a.n - 1)
        se = np.sqrt(of_mean / mean_variance + d**2 * of_sd / (8.0 * mean_variance**2))
        half = special.ndtri(0.5 + level / 2.0) * se
        return d, d - half, d + half


def welch_anova(groups: Sequence[Moments]) -> tuple[Array, Array, Array, Array]:
    """Welch 1951: F, both degrees of freedom and p of equal means in k groups of unequal variances."""
    k = len(groups)
    with np.errstate(all="ignore"):
        weight = np.stack([1.0 / np.where(g.sd > 0, g.variance_of_mean, np.nan) for g in groups])
        mean, n = np.stack([g.mean for g in groups]), np.stack([g.n for g in groups])
        total = weight.sum(axis=0)
        grand = (weight * mean).sum(axis=0) / total
        between = (weight * (mean - grand) ** 2).sum(axis=0) / (k - 1)
        lack = ((1.0 - weight / total) ** 2 / (n - 1)).sum(axis=0)
        f = between / (1.0 + 2.0 * (k - 2) / (k**2 - 1) * lack)
        df2 = (k**2 - 1) / (3.0 * lack)
        return f, np.full_like(f, k - 1), df2, np.asarray(stats.f.sf(f, k - 1, df2), dtype=float)


def classical_anova(groups: Sequence[Moments]) -> tuple[Array, Array, Array, Array]:
    """Fisher 1925: F, both degrees of freedom and p of equal means in k groups of one variance.

    From n, mean and SD alone: between the groups sum n (mean - grand mean)^2, within them sum (n - 1) SD^2.
    """
    k = len(groups)
    with np.errstate(all="ignore"):
        n, mean, sd = (np.stack([getattr(g, name) for g in groups]) for name in ("n", "mean", "sd"))
        df2 = n.sum(axis=0) - k
        grand = (n * mean).sum(axis=0) / n.sum(axis=0)
        within = ((n - 1) * sd**2).sum(axis=0) / df2
        f = (n * (mean - grand) ** 2).sum(axis=0) / (k - 1) / np.where(within > 0, within, np.nan)
        return f, np.full_like(f, k - 1), df2, np.asarray(stats.f.sf(f, k - 1, df2), dtype=float)
