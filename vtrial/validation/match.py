"""Twins and the people whose demographics they were made from, as pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from vtrial.records import InputError
from vtrial.validation.statistic import Cohort
from vtrial.validation.tables import MAX_PROBLEMS

TOLERANCE = {"age_years": 1.0, "height_cm": 1.0, "weight_kg": 1.0}  # years, cm, kg: tables are rounded


def pair(synthetic: Cohort, reference: Cohort) -> tuple[Cohort, Cohort]:
    """Both cohorts with row i of one the pair of row i of the other, those without a partner left out and counted.

    By subject_id where most of the smaller cohort share theirs; else by `index`, the twins' row of the table that they
    were made from; else by order. InputError, pair by pair, where sex or body (beyond `TOLERANCE`) of a pair differ,
    and where nobody can be paired.
    """
    ours, theirs = synthetic.people, reference.people
    shared, fewer = ours.index.intersection(theirs.index), min(len(ours), len(theirs))
    if 2 * len(shared) > fewer:
        left, right, how = ours.index.get_indexer(shared), theirs.index.get_indexer(shared), "subject_id"
    elif "index" in ours.columns and "index" in theirs.columns:
        first = np.flatnonzero(~theirs["index"].duplicated())
        found = pd.Index(theirs["index"].iloc[first]).get_indexer(pd.Index(ours["index"]))
        left = np.flatnonzero(found >= 0)
        right, how = first[found[left]], "index"
    elif len(ours) == len(theirs):
        left = right = np.arange(len(ours))
        how = "order"
    else:
        raise InputError(
            f"{synthetic.name} ({len(ours)} subjects) and {reference.name} ({len(theirs)}) cannot be paired: they "
            f"share {len(shared)} subject_id and differ in length; give both the same ids, or compare without pairs"
        )
    if not len(left):
        raise InputError(f"{synthetic.name} and {reference.name}: no pairs by {how}; compare without pairs")
    a, b = synthetic.rows(left), reference.rows(right)
    problems = _unlike(a, b)
    if problems:
        if how != "subject_id" and len(shared):
            few = f"{synthetic.name} and {reference.name} share {len(shared)} subject_id of {fewer}, too few to pair by"
            problems.insert(0, f"{few}, and by {how} pairs are unlike; give both the same ids")
        more = [f"… and {len(problems) - MAX_PROBLEMS} more pairs"] if len(problems) > MAX_PROBLEMS else []
        raise InputError([*problems[:MAX_PROBLEMS], *more])
    return _noted(a, synthetic, how), _noted(b, reference, how)


def _unlike(a: Cohort, b: Cohort) -> list[str]:
    """Pairs that are none: of another sex or body."""
    problems = []
    remedy = "pair the right rows, or compare without pairs"
    for column in ("sex", *TOLERANCE):
        if column not in a.people.columns or column not in b.people.columns:
            continue
        x, y = a.people[column].to_numpy(), b.people[column].to_numpy()
        wrong = x != y if column == "sex" else np.abs(x.astype(float) - y.astype(float)) > TOLERANCE[column]
        problems += [
            f"{a.name}, subject {a.people.index[i]}, column {column}: {_told(x[i])}, but its pair "
            f"{b.people.index[i]} of {b.name} has {_told(y[i])}; {remedy}"
            for i in map(int, np.flatnonzero(wrong))
        ]
    return problems


def _told(value: object) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _noted(paired: Cohort, whole: Cohort, how: str) -> Cohort:
    left_out = len(whole) - len(paired)
    note = f"{whole.name}: {left_out} subjects have no pair (by {how}): left out"
    return replace(paired, notes=(*paired.notes, note) if left_out else paired.notes)
