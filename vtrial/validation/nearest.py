"""Whether twins are copies of training subjects: how near the nearest training volume is, against held-out ones.

A generator that has learned by heart gives volumes that lie on its training volumes. Any new person lies near to some
of them, so the yardstick is how near people lie that the model has not seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vtrial.records import InputError
from vtrial.validation.diversity import finite_rows
from vtrial.validation.inference import Array

Volumes = NDArray[np.floating[Any]]

NO_SIGN = "no sign of copies"
NEARER = "nearer to training volumes than held-out people are"
LOWEST = 0.01  # part of the held-out that lies nearest: who is nearer still is counted
_NAMED = 5  # twins that the verdict names
_CHUNK = 256  # volumes at a time


def nearest_distances(volumes: Volumes, training: Volumes, *, itself: bool = False) -> tuple[Array, NDArray[np.intp]]:
    """Root mean square distance of each volume to the nearest of `training`, and which one that is.

    Both (subjects, …) on one low-resolution grid and scale. `itself`: both are one set, and each is compared with the
    others. InputError where the shapes differ, hold NaN, or where there are no others.
    """
    a = finite_rows(volumes, "volumes", at_least=1)
    b = a if itself else finite_rows(training, "training volumes", at_least=1)
    if itself and len(a) < 2:
        raise InputError("copies: one training volume has no others to be near to; give a larger training set")
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"copies: volumes of {volumes.shape[1:]} and training volumes of {training.shape[1:]} differ in shape; "
            "bring both to one grid"
        )
    square_b = np.einsum("ij,ij->i", b, b, dtype=float)
    best, which = np.empty(len(a)), np.empty(len(a), dtype=np.intp)
    for start in range(0, len(a), _CHUNK):
        part = a[start : start + _CHUNK]
        square = square_b - 2.0 * (part @ b.T)
        if itself:
            square[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        near = square.argmin(axis=1)
        which[start : start + len(part)] = near
        # The distance itself by differences: near zero the expanded square is all rounding.
        best[start : start + len(part)] = np.sqrt(((part - b[near]) ** 2).mean(axis=1, dtype=float))
    return best, which


def copies(
    twins: Volumes,
    training: Volumes,
    held_out: Volumes | None = None,
    *,
    copy_ratio: float = 0.6,
    alpha: float = 0.05,
    seed: int = 0,
    twin_ids: Sequence[str] = (),
    training_ids: Sequence[str] = (),
) -> pd.DataFrame:
    """One row a twin: nearest training subject, distance, that over the held-out median, suspected copy.

    `twins` (twins, …), `training` and `held_out` are low-resolution volumes of one grid and scale. Without `held_out`
    each training volume's distance to the others is the yardstick. These depend on each other, so the p values then
    come from random halves (of `seed`): twins against one half, with the other held out, and the other way round, the
    smaller p doubled. Columns: twin and nearest_training (names where they
    are given, else numbers), distance, ratio, held_out_nearer (part of the held-out that lies nearer), suspected_copy.
    `attrs`: n_training, n_held_out, median, median_held_out, ratio of these; limit, the distance of the held-out
    subject at the lowest hundredth (of fewer, the nearest one's); nearer, the twins below it, and share_nearer; p_share
    that there are so many; p_binomial, the same as if the limit were exact; p_nearer (Mann–Whitney, one-sided);
    suspected, and verdict in words.

    p_share: if twins are like held-out people, each of m held-out is as likely as each twin to be among the nearest,
    so that the number of twins below the k-th held-out one is beta-binomial with k and m + 1 - k. That is the binomial
    test with the chance that the limit has been estimated from m people, which the plain one takes as known.
    Suspected is who lies nearer than every held-out subject, and than `copy_ratio` of their median.
    InputError for volumes that cannot be compared.
    """
    distance, nearest = nearest_distances(twins, training)
    control, _ = nearest_distances(training if held_out is None else held_out, training, itself=held_out is None)
    ordered, median = np.sort(control), float(np.median(control))
    limit = ordered[_rank(len(control)) - 1]
    count = int((distance < limit).sum())
    table = pd.DataFrame(
        {
            "twin": list(twin_ids) or np.arange(len(distance)),
            "nearest_training": [training_ids[i] for i in nearest] if len(training_ids) else nearest,
            "distance": distance,
            "ratio": distance / median if median > 0 else np.nan,
            "held_out_nearer": np.searchsorted(ordered, distance) / len(control),
            "suspected_copy": distance < min(float(ordered[0]), copy_ratio * median),
        }
    )
    if held_out is None:
        tests = _by_halves(twins, training, seed)
    else:
        tests = _tests(distance, control)
    facts: dict[Hashable, Any] = {
        "n_training": len(training),
        "n_held_out": len(control),
        "median": float(np.median(distance)),
        "median_held_out": median,
        "ratio": float(np.median(distance)) / median if median > 0 else float("nan"),
        "limit": float(limit),
        "nearer": count,
        "share_nearer": count / len(distance),
        "suspected": int(table["suspected_copy"].sum()),
        "verdict": _verdict(table, float(limit), tests["p_share"] < alpha),
    }
    table.attrs = facts | dict(tests)
    return table


def _rank(m: int) -> int:
    """Which of m held-out subjects in order is the limit."""
    return max(int(LOWEST * (m + 1)), 1)


def _tests(distance: Array, control: Array) -> dict[str, float]:
    """p values of twins that lie nearer than held-out people, from the distances of both to the same volumes."""
    n, m = len(distance), len(control)
    k = _rank(m)
    count = int((distance < np.sort(control)[k - 1]).sum())
    return {
        "p_share": float(stats.betabinom.sf(count - 1, n, k, m + 1 - k)),
        "p_binomial": float(stats.binom.sf(count - 1, n, k / (m + 1))),
        "p_nearer": float(stats.mannwhitneyu(distance, control, alternative="less").pvalue),
    }


def _by_halves(twins: Volumes, training: Volumes, seed: int) -> dict[str, float]:
    """The same without held-out people: either half of the training set is held out from the other."""
    order = np.random.default_rng(seed).permutation(len(training))
    halves = training[order[::2]], training[order[1::2]]
    found = [
        _tests(*(nearest_distances(volumes, half)[0] for volumes in (twins, other)))
        for half, other in (halves, halves[::-1])
    ]
    return {name: min(2.0 * min(tests[name] for tests in found), 1.0) for name in found[0]}


def _verdict(table: pd.DataFrame, limit: float, many: bool) -> str:
    """In words, with the names of those to look at: all suspected, and all below the limit where these are too many."""
    odd = table[table["suspected_copy"] | (many & (table["distance"] < limit))].sort_values("distance", kind="stable")
    if odd.empty:
        return NO_SIGN
    named = ", ".join(f"{row.twin} (training subject {row.nearest_training})" for row in odd[:_NAMED].itertuples())
    return f"{NEARER}: look at {named}" + (f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else "")
