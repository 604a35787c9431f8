"""Bootstrap over subjects: a subject is drawn with all its measurements, so that all cells share the draws.

A resampling is how often each subject is drawn, a row of a weight matrix; the resampled sums of x, x² and counts of all
cells are then one matrix product. Columns are standardised first, so that single precision suffices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtrial.validation.inference import Array, moments

Single = NDArray[np.float32]
_BLOCK = 1000  # resamplings at a time: 4 MB of weights for 1,000 subjects
_DEGENERATE = 0.01  # more resamplings than this part without spread: no interval


@dataclass(frozen=True)
class BootstrapIntervals:
    """Intervals of each cell, (cells,): of the ratio of means, the SD ratio and Cohen's d. NaN where there is none."""

    ratio_low: Array
    ratio_high: Array
    sd_ratio_low: Array
    sd_ratio_high: Array
    d_low: Array
    d_high: Array


def bootstrap_intervals(
    a: Array, b: Array, resamplings: int, level: float, rng: np.random.Generator, *, paired: bool = False
) -> BootstrapIntervals:
    """Intervals from values (subjects, cells), NaN where missing; paired cohorts are drawn in pairs.

    Ratio of means: bootstrap-t (Efron & Tibshirani 1993, chapter 12), which follows skewness. SD ratio and d:
    percentiles; a studentised SD ratio covers no better, as 100 values do not give the kurtosis that it needs.
    """
    draws = [_Resampled(values) for values in (a, b)]
    ca = (draws[0].centre, draws[0].scale)
    cb = (draws[1].centre, draws[1].scale)
    ratio_t, log_sd, effect = (np.empty((resamplings, a.shape[1]), dtype=np.float32) for _ in range(3))
    here_a, here_b = moments(a), moments(b)
    with np.errstate(all="ignore"):
        estimate = here_a.mean / here_b.mean
        correlation = _correlation(a, b) if paired else np.zeros(a.shape[1])
        for start in range(0, resamplings, _BLOCK):
            rows = slice(start, min(start + _BLOCK, resamplings))
            weights = _weights(len(a), rows.stop - rows.start, rng)
            n_a, mean_a, var_a = draws[0].moments(weights)
            n_b, mean_b, var_b = draws[1].moments(weights if paired else _weights(len(b), len(weights), rng))
            ma, mb = ca[0] + ca[1] * mean_a, cb[0] + cb[1] * mean_b
            sa, sb = ca[1] * np.sqrt(var_a), cb[1] * np.sqrt(var_b)
            ratio = ma / mb
            ratio_t[rows] = (ratio - estimate) / _ratio_se(ratio, mb, sa**2 / n_a, sb**2 / n_b, correlation)
            log_sd[rows] = np.log(sa / sb)
            effect[rows] = (ma - mb) / np.sqrt((sa**2 + sb**2) / 2.0)
        se = _ratio_se(estimate, here_b.mean, here_a.variance_of_mean, here_b.variance_of_mean, correlation)
        tails = ((1.0 - level) / 2.0, (1.0 + level) / 2.0)
        (t_low, t_high), (s_low, s_high), (d_low, d_high) = (_quantiles(x, tails) for x in (ratio_t, log_sd, effect))
        mean_low, mean_high = estimate - t_high * se, estimate - t_low * se
        return BootstrapIntervals(mean_low, mean_high, np.exp(s_low), np.exp(s_high), d_low, d_high)


def _weights(subjects: int, resamplings: int, rng: np.random.Generator) -> Single:
    """How often each subject is drawn, (resamplings, subjects): multinomial counts, by counting drawn positions."""
    drawn = rng.integers(0, subjects, size=(resamplings, subjects), dtype=np.int32)
    drawn += (np.arange(resamplings, dtype=np.int32) * subjects)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamplings * subjects)
    return counts.reshape(resamplings, subjects).astype(np.float32)


class _Resampled:
    """One cohort's columns made ready: standardised, missing values at zero weight."""

    def __init__(self, values: Array) -> None:
        m = moments(values)
        self.centre = np.where(np.isfinite(m.mean), m.mean, 0.0)
        self.scale = np.where(np.isfinite(m.sd) & (m.sd > 0), m.sd, 1.0)
        there = np.isfinite(values)
        x = np.where(there, (values - self.centre) / self.scale, 0.0).astype(np.float32)
        self.subjects, self.cells = x.shape
        self.whole = bool(there.all())
        self.design = np.hstack([x, x**2] if self.whole else [x, x**2, there.astype(np.float32)])

    def moments(self, weights: Single) -> tuple[Array, Array, Array]:
        """n, mean and variance (n - 1) of every resampling, (resamplings, cells), in standardised units."""
        sums = np.split((weights @ self.design).astype(float), 2 if self.whole else 3, axis=1)
        n = np.full((1, self.cells), float(self.subjects)) if self.whole else sums[2]
        mean = sums[0] / n
        return n, mean, np.maximum(sums[1] - n * mean**2, 0.0) / (n - 1)


def _ratio_se(ratio: Array, mb: Array, va: Array, vb: Array, correlation: Array) -> Array:
    """Standard error of a ratio of means by the delta method."""
    return np.asarray(np.sqrt(va + ratio**2 * vb - 2.0 * ratio * correlation * np.sqrt(va * vb)) / np.abs(mb))


def _correlation(a: Array, b: Array) -> Array:
    za, zb = a - moments(a).mean, b - moments(b).mean
    return np.asarray(np.nansum(za * zb, axis=0) / np.sqrt(np.nansum(za**2, axis=0) * np.nansum(zb**2, axis=0)))


def _quantiles(draws: Single, tails: tuple[float, float]) -> tuple[Array, Array]:
    """Quantiles of each column, NaN where too many draws are degenerate."""
    finite = np.isfinite(draws)
    usable = finite.mean(axis=0) > 1.0 - _DEGENERATE
    ordered = np.sort(np.where(finite, draws, np.inf), axis=0)
    count = finite.sum(axis=0)
    at = [np.clip(np.rint(q * (count - 1)).astype(int), 0, len(draws) - 1) for q in tails]
    low, high = (ordered[k, np.arange(draws.shape[1])].astype(float) for k in at)
    return np.where(usable, low, np.nan), np.where(usable, high, np.nan)
