"""Adjusted p values that know how the cells hang together: step-down maxima over permutations (Westfall & Young 1993).

Holm must assume the worst about dependence, and is stricter than its level where organs are correlated. Here the
cohort labels of whole subjects are shuffled within a stratum (in pairs: swapped), all cells with them, and each
statistic is held against the largest of the shuffled ones. The statistics are studentised, so that unequal variances
do not mislead the test of means (Janssen 1997): Welch's t of values, or of ranks where they are censored, and
Brown–Forsythe's t. Sums over shuffled labels are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vtrial.validation.inference import Array, moments
from vtrial.validation.spread import column_median

Single = NDArray[np.float32]
_BLOCK = 1000  # shufflings at a time


@dataclass(frozen=True)
class NullDraws:
    """Statistics of one stratum on a normal scale: `observed` (2 x cells,), location then spread, and `drawn` under the
    null hypothesis, (shufflings, 2 x cells). NaN where a cell has none.
    """

    observed: Array
    drawn: Single
    columns: NDArray[np.intp] | None = None

    def placed(self, columns: NDArray[np.intp]) -> NullDraws:
        """The same, saying which columns of a stratum's 2 x cells these are."""
        return NullDraws(self.observed, self.drawn, columns)


class Family:
    """All strata of a comparison. Strata of one grouping share no subject, so that their draws are independent.

    Groupings (by sex, then by age) share them: their p values are multiplied by the number of groupings (Bonferroni).
    """

    def __init__(self) -> None:
        self._groupings: dict[tuple[str, ...], list[tuple[int, NullDraws]]] = {}

    def add(self, grouping: tuple[str, ...], stratum: int, draws: NullDraws) -> None:
        """Note the draws of a stratum, by its place in the list of all."""
        self._groupings.setdefault(grouping, []).append((stratum, draws))

    def adjusted(self, strata: int, columns: int) -> Array:
        """Adjusted p, (strata, columns): NaN where nothing was drawn."""
        p = np.full((strata, columns), np.nan)
        for parts in self._groupings.values():
            found = step_down(
                np.concatenate([d.observed for _, d in parts]), np.concatenate([d.drawn for _, d in parts], axis=1)
            )
            ends = np.cumsum([len(d.observed) for _, d in parts])
            for (stratum, d), values in zip(parts, np.split(found, ends[:-1])):
                p[stratum, d.columns] = np.minimum(values * len(self._groupings), 1.0)
        return p


def shuffled(
    a: Array, b: Array, ranked: NDArray[np.bool_], shufflings: int, rng: np.random.Generator, *, paired: bool = False
) -> NullDraws:
    """`NullDraws` of values (subjects, cells), NaN where missing; `ranked` (cells,) are compared by ranks."""
    both = np.vstack([a, b])
    for j in np.flatnonzero(ranked):
        there = np.isfinite(both[:, j])
        both[there, j] = stats.rankdata(both[there, j])
    distance = np.vstack([np.abs(v - column_median(v)) for v in (a, b)])
    if paired:
        n = len(a)
        return _swapped(both[:n] - both[n:], distance[:n] - distance[n:], shufflings, rng)
    there = np.isfinite(both)
    x, z = (_scaled(values, there) for values in (both, distance))
    design = np.hstack([x, x**2, z, z**2, there.astype(np.float32)])
    total = design.sum(axis=0, dtype=float)
    truth = np.zeros((1, len(both)), dtype=np.float32)
    truth[0, : len(a)] = 1.0
    drawn = np.empty((shufflings, 2 * a.shape[1]), dtype=np.float32)
    for start in range(0, shufflings, _BLOCK):
        rows = min(_BLOCK, shufflings - start)
        labels = np.zeros((rows, len(both)), dtype=np.float32)
        order = np.argpartition(rng.random((rows, len(both)), dtype=np.float32), len(a) - 1, axis=1)
        np.put_along_axis(labels, order[:, : len(a)], 1.0, axis=1)
        drawn[start : start + rows] = _statistics(labels, design, total)
    return NullDraws(_statistics(truth, design, total)[0], drawn)


def step_down(observed: Array, drawn: Single) -> Array:
    """Adjusted p of every statistic: how often the largest drawn one among those not more extreme reaches it."""
    p = np.full(observed.shape, np.nan)
    use = np.flatnonzero(np.isfinite(observed))
    order = use[np.argsort(observed[use])]  # the least extreme first: the maxima grow with the set
    largest = np.maximum.accumulate(np.nan_to_num(drawn[:, order], nan=-np.inf), axis=1)
    raw = (1.0 + (largest >= observed[order] * (1.0 - 1e-6)).sum(axis=0)) / (1.0 + len(drawn))
    p[order] = np.maximum.accumulate(raw[::-1])[::-1]
    return p


def _scaled(values: Array, there: NDArray[np.bool_]) -> Single:
    """Standardised over both cohorts, missing ones 0: single precision then suffices for sums of squares."""
    m = moments(values)
    with np.errstate(all="ignore"):
        scaled = (values - m.mean) / np.where(m.sd > 0, m.sd, np.nan)
    return np.where(there & np.isfinite(scaled), scaled, 0.0).astype(np.float32)


def _statistics(labels: Single, design: Single, total: Array) -> Array:
    """|t| of location and of spread on a normal scale, (shufflings, 2 x cells), from who is in the first cohort."""
    first = (labels @ design).astype(float)
    groups = [np.split(sums, 5, axis=1) for sums in (first, total - first)]
    n_a, n_b = groups[0][4], groups[1][4]
    df = n_a + n_b - 2.0
    with np.errstate(all="ignore"):
        out = []
        for k in (0, 2):
            (mean_a, var_a), (mean_b, var_b) = (
                (g[k] / g[4], np.maximum(g[k + 1] - g[k] ** 2 / g[4], 0.0) / (g[4] - 1.0)) for g in groups
            )
            if k == 0:
                se2 = var_a / n_a + var_b / n_b
            else:
                se2 = ((n_a - 1) * var_a + (n_b - 1) * var_b) / df * (1.0 / n_a + 1.0 / n_b)
            out.append(_normal_scale((mean_a - mean_b) / np.sqrt(np.where(se2 > 1e-12, se2, np.nan)), df))
    return np.hstack(out)


def _swapped(x: Array, z: Array, shufflings: int, rng: np.random.Generator) -> NullDraws:
    """Of paired differences (pairs, cells): their signs are drawn, the same for all cells of a pair."""
    d = np.hstack([x, z])
    there = np.isfinite(d)
    n = there.sum(axis=0).astype(float)
    d = np.where(there, d, 0.0)
    square = (d**2).sum(axis=0)

    def statistics(signs: Array) -> Array:
        with np.errstate(all="ignore"):
            mean = signs @ d / n
            variance = (square - n * mean**2) / (n - 1.0)
            t = mean / np.sqrt(np.where(variance > 1e-12 * square / n, variance / n, np.nan))
            return _normal_scale(t, n - 1.0)

    drawn = np.empty((shufflings, d.shape[1]), dtype=np.float32)
    for start in range(0, shufflings, _BLOCK):
        rows = min(_BLOCK, shufflings - start)
        drawn[start : start + rows] = statistics(rng.choice([-1.0, 1.0], size=(rows, len(d))))
    return NullDraws(statistics(np.ones((1, len(d))))[0], drawn)


def _normal_scale(t: Array, df: Array) -> Array:
    """|t| as the normal deviate of the same p (Wallace 1959), so that cells of different n can share a maximum."""
    return np.asarray((8.0 * df + 1.0) / (8.0 * df + 3.0) * np.sqrt(df * np.log1p(t**2 / df)), dtype=float)
