"""Whether twins are as diverse as real people.

Spread: the geometric mean of spread ratios over all cells, with an error that knows that the cells share subjects.
Likeness: correlation between every two subjects' vectors, of measurements or of volumes at low resolution, which are
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vtrial.records import InputError
from vtrial.validation.inference import Array, Moments, moments
from vtrial.validation.scale import Mask
from vtrial.validation.spread import column_median

RARE = 0.05  # part of a cohort that may lack a measurement by which all are held against each other


@dataclass(frozen=True)
class SpreadRatio:
    """Spread over the reference's, geometric mean over `cells` cells, with interval.

    `identical` are the places of further cells, in which all twins have one value.
    """

    cells: int
    spread_ratio: float
    low: float
    high: float
    identical: tuple[int, ...]
    alarm: bool


def spread_of_values(a: Array, b: Array, *, level: float, alarm_below: float) -> SpreadRatio:
    """`SpreadRatio` from values (subjects, cells) of twins and reference, by mean distances from the median.

    Those feel the tails of SUVmax less than SDs do, so that the interval holds its level. Its standard error is that of
    the mean logarithm through each subject's influence, distance / mean distance - 1 averaged over the cells: cells
    that all say the same do not count as many.
    """
    ma, mb = moments(a), moments(b)
    known = (ma.n > 2) & (mb.n > 2) & (mb.sd > 0)
    used, identical = known & (ma.sd > 0), known & (ma.sd == 0)
    if not used.any():
        return _spread(np.empty(0), np.nan, np.inf, identical, level, alarm_below)
    log, variance, parts = np.zeros(int(used.sum())), 0.0, []
    for values, side in ((a[:, used], 1.0), (b[:, used], -1.0)):
        distance = np.abs(values - column_median(values))
        there = np.isfinite(values)
        n = there.sum(axis=0)
        mean = np.where(there, distance, 0.0).sum(axis=0) / n
        log = log + side * np.log(mean * np.sqrt(n / (n - 1.0)))  # a median takes a part of few values' spread
        influence = (np.where(there, distance / mean - 1.0, 0.0) * len(values) / n).mean(axis=1)
        part = float(influence.var(ddof=1)) / (len(values) - 1)
        variance += part
        parts.append(part**2 / (len(values) - 1))
    # No variance at all: all subjects are as far from the median, as where values are two and as frequent.
    df = variance**2 / sum(parts) if variance > 0 else np.inf
    return _spread(log, np.sqrt(variance), df, identical, level, alarm_below)


def spread_of_moments(a: Moments, b: Moments, *, level: float, alarm_below: float) -> SpreadRatio:
    """`SpreadRatio` from n and SD alone: normal values, and cells that might all say the same (the widest interval)."""
    known = (a.n > 2) & (b.n > 2) & (b.sd > 0)
    used, identical = known & (a.sd > 0), known & (a.sd == 0)
    se = np.sqrt(0.5 / (a.n[used] - 1) + 0.5 / (b.n[used] - 1))
    log = np.log(a.sd[used] / b.sd[used])
    return _spread(log, float(se.mean()) if used.any() else np.nan, np.inf, identical, level, alarm_below)


def _spread(log: Array, se: float, df: float, identical: Mask, level: float, alarm_below: float) -> SpreadRatio:
    centre = float(log.mean()) if len(log) else float("nan")
    half = float(stats.t.ppf(0.5 + level / 2.0, df)) * se
    ratio, low, high = (float(np.exp(v)) for v in (centre, centre - half, centre + half))
    # Certain (1 is outside the interval) and large enough to matter; a cell of identical values needs no test.
    alarm = bool((high < 1 and ratio < alarm_below) or identical.any())
    return SpreadRatio(len(log), ratio, low, high, tuple(np.flatnonzero(identical).tolist()), alarm)


@dataclass(frozen=True)
class Likeness:
    """Correlations between all pairs of subjects: mean, its interval, the highest, and for each subject its nearest."""

    n: int
    mean: float
    low: float
    high: float
    highest: float
    nearest: Array


def pairwise_likeness(vectors: Array, level: float = 0.95) -> Likeness:
    """Pearson correlation between every two rows of (subjects, …), arrays of any shape a subject, without NaN.

    The interval is that of a U-statistic, by the jackknife over subjects. InputError under three subjects or with NaN.
    """
    rows = finite_rows(vectors, "subjects", at_least=3)
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    rows = rows / np.where(length > 0, length, 1.0)
    similar = rows @ rows.T
    np.fill_diagonal(similar, np.nan)
    n = len(rows)
    each = np.nansum(similar, axis=1).astype(float)
    mean = each.sum() / (n * (n - 1))
    without = (each.sum() - 2.0 * each) / ((n - 1) * (n - 2))
    se = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.5 + level / 2.0, n - 1)) * se
    nearest = np.nanmax(similar, axis=1).astype(float)
    return Likeness(n, float(mean), float(mean - half), float(mean + half), float(nearest.max()), nearest)


def standardised(a: Array, b: Array) -> tuple[Array, Array]:
    """Measurement vectors (subjects, cells) of both, in SDs about the reference b's mean, for `pairwise_likeness`.

    Left out are cells that more than a `RARE` part of either lacks, subjects who lack one of the others, and cells
    without spread in b. InputError where fewer than two cells remain.
    """
    usual = np.isfinite(a).mean(axis=0), np.isfinite(b).mean(axis=0)
    common = np.minimum(*usual) >= 1.0 - RARE
    a, b = (v[np.isfinite(v).all(axis=1)] for v in (a[:, common], b[:, common]))
    m = moments(b)
    use = m.sd > 0
    if use.sum() < 2:
        raise InputError("likeness of subjects: fewer than two measurements that most subjects have; leave out organs")
    return (a[:, use] - m.mean[use]) / m.sd[use], (b[:, use] - m.mean[use]) / m.sd[use]


def finite_rows(vectors: NDArray[np.floating[Any]], what: str, at_least: int) -> NDArray[np.floating[Any]]:
    """Arrays of any shape, one a subject, as rows (subjects, values); InputError for too few, or NaN."""
    if len(vectors) < at_least:
        raise InputError(f"{what}: {len(vectors)} given; at least {at_least} are needed")
    rows = np.asarray(vectors).reshape(len(vectors), -1)
    if not np.isfinite(rows).all():
        raise InputError(f"{what}: NaN or infinite values; leave these subjects or measurements out")
    return rows if rows.dtype == np.float32 else rows.astype(float)
