"""Recruiting: subject i of a run depends on (run seed, i) and the spec alone, not on how many there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import qmc

from vtrial.cohort.copula import Copula, fit_copula
from vtrial.cohort.spec import CohortSpec, StrataSpec, Stratum, SubjectsSpec
from vtrial.randomness import Purpose, subject_rng
from vtrial.records import InputError, Subject

MAX_SEED = 2**64  # what a column of a table can hold
MAX_SUBJECTS = 10**8  # 60 GB: all of a cohort are held in memory
MAX_DRAWS = 1000  # of one subject, until the joint limits of its stratum hold
_ROUNDS = 8  # of fitting behind joint limits
_ROUNDING_SLACK = 1e-9

Array = NDArray[np.float64]


def recruit(spec: CohortSpec, n: int | None, seed: int) -> list[Subject]:
    """Recruit `n` subjects.

    Strata: each subject's stratum is drawn by share, then its body; values are rounded to 0.01 (year, cm, kg). Subjects
    without `n` are taken as they are, with `n` resampled with replacement under ids `<id>_r<index>` (the column
    `resampled_from` keeps the original). A matched table is followed row by row, its first `n` rows if `n` is given.
    Raises InputError for an `n` or `seed` that cannot be.
    """
    if not 0 <= seed < MAX_SEED:
        raise InputError(f"seed {seed} is not from 0 to {MAX_SEED - 1}; give a whole number in between")
    if n is not None and n < 1:
        raise InputError(f"n is {n}, and nobody would be recruited; give 1 or more")
    if n is not None and n > MAX_SUBJECTS:
        raise InputError(f"n is {n}, and memory holds at most {MAX_SUBJECTS} subjects; give fewer")
    if isinstance(spec, StrataSpec):
        if n is None:
            raise InputError(f"{spec.path}: a spec of strata does not say how many subjects; give n (--n 100)")
        return _from_strata(spec, n, seed)
    return _matched(spec, n, seed) if spec.matched else _from_subjects(spec, n, seed)


@dataclass(frozen=True)
class FittedStratum:
    """A stratum's distribution of (age in years, height in cm, size in kg or kg/m²), and what it meets of the spec.

    `refused` is the part of its draws that the joint limits of weight and BMI refuse, and that are drawn again.
    """

    copula: Copula
    means: tuple[float, ...]
    sds: tuple[float, ...]
    correlations: tuple[float, ...]
    refused: float = 0.0


@lru_cache(maxsize=256)
def fit_stratum(stratum: Stratum) -> FittedStratum:
    """Fit a stratum so that the people left by its joint limits have the stated means, SDs and correlations.

    The limits take away tails that no marginal knows of. So the copula's targets are moved by what is missed on one
    fixed set of quasi-random draws, some times over, and the nearest of the fits is kept.
    """
    marginals = (stratum.age, stratum.height, stratum.size)
    copula = fit_copula(marginals, stratum.correlations)
    if stratum.weight_limits is None and stratum.bmi_limits is None:
        means, sds = (tuple(getattr(m, part) for m in copula.marginals) for part in ("mean", "sd"))
        return FittedStratum(copula, means, sds, copula.correlations)
    stated = np.array([*(m.mean for m in marginals), *(m.sd for m in marginals), *stratum.correlations])
    scale = np.array([max(m.sd, 1e-9) for m in marginals] * 2 + [1.0] * 3)
    lowest, highest = (np.array([getattr(m, end) for m in marginals]) for end in ("min", "max"))
    target, best, least = stated.copy(), None, np.inf
    for _ in range(_ROUNDS):
        fitted = _met(stratum, copula)
        met = np.array([*fitted.means, *fitted.sds, *fitted.correlations])
        missed = float(np.abs((stated - met) / scale).sum()) if np.isfinite(met).all() else np.inf
        if best is None or missed < least:
            best, least = fitted, missed
        if not np.isfinite(missed) or missed < 2e-3:
            break
        target += stated - met
        inner = 1e-3 * (highest - lowest)
        target[:3] = np.where(stated[3:6] > 0, np.clip(target[:3], lowest + inner, highest - inner), stated[:3])
        target[3:6] = np.clip(target[3:6], 0.2 * stated[3:6], 5.0 * stated[3:6])
        target[6:] = np.clip(target[6:], -0.99, 0.99)
        moved = [replace(m, mean=target[k], sd=target[3 + k]) for k, m in enumerate(marginals)]
        copula = fit_copula((moved[0], moved[1], moved[2]), (target[6], target[7], target[8]))
    assert best is not None
    return best


def _met(stratum: Stratum, copula: Copula) -> FittedStratum:
    """What a copula gives behind the joint limits; NaN where they leave nearly nobody."""
    bodies, inside = _bodies(stratum, copula.from_scores(_fixed_scores()))
    people = bodies[inside]
    if len(people) < 100:
        nothing = (float("nan"),) * 3
        return FittedStratum(copula, nothing, nothing, nothing, float(1.0 - inside.mean()))
    if stratum.size_is == "bmi":
        people[:, 2] /= (people[:, 1] / 100.0) ** 2
    sds = people.std(axis=0)
    unit = (people - people.mean(axis=0)) / np.where(sds > 0.0, sds, np.inf)
    pairs = [float((unit[:, i] * unit[:, j]).mean()) for i, j in ((0, 1), (0, 2), (1, 2))]
    refused = float(1.0 - inside.mean())
    return FittedStratum(copula, tuple(people.mean(axis=0).tolist()), tuple(sds.tolist()), tuple(pairs), refused)


@lru_cache(maxsize=1)
def _fixed_scores() -> Array:
    """2¹⁴ Sobol points as normal scores, the same always."""
    points = qmc.Sobol(3, scramble=False).random_base2(14)
    scores: Array = ndtri(points + 0.5 / len(points))  # to the middle of their cells: the first point is 0
    return scores


def _from_strata(spec: StrataSpec, n: int, seed: int) -> list[Subject]:
    bounds = np.cumsum([s.share for s in spec.strata])
    uniform, scores = np.empty(n), np.empty((n, 3))
    for i in range(n):
        rng = subject_rng(seed, i, Purpose.DEMOGRAPHICS)
        uniform[i] = rng.random()
        scores[i] = rng.standard_normal(3)
    chosen = np.minimum(np.searchsorted(bounds / bounds[-1], uniform, side="right"), len(bounds) - 1)
    subjects: dict[int, Subject] = {}
    for k, stratum in enumerate(spec.strata):
        members = np.flatnonzero(chosen == k)
        copula = fit_stratum(stratum).copula
        bodies, inside = _bodies(stratum, copula.from_scores(scores[members]))
        for row in np.flatnonzero(~inside):
            bodies[row] = _redrawn(spec, stratum, copula, seed, int(members[row]))
        for i, (age, height, weight) in zip(members.tolist(), bodies.tolist()):
            extra = {"diagnosis": stratum.diagnosis} if stratum.diagnosis else {}
            subjects[i] = Subject(f"VT{i:06d}", i, seed, stratum.sex, age, height, weight, stratum.name, extra)
    return [subjects[i] for i in range(n)]


def _bodies(stratum: Stratum, values: Array) -> tuple[Array, NDArray[np.bool_]]:
    """(age, height, weight) rows, rounded, and whether the joint limits hold, from (age, height, size) rows."""
    rounded = np.round(values, 2)
    age, height = (np.clip(rounded[:, k], m.min, m.max) for k, m in enumerate((stratum.age, stratum.height)))
    square = (height / 100.0) ** 2
    if stratum.size_is == "weight":
        weight = np.clip(rounded[:, 2], stratum.size.min, stratum.size.max)
    else:  # rounded inwards where rounding would carry the BMI over its limits
        low, high = (np.ceil(stratum.size.min * square * 100), np.floor(stratum.size.max * square * 100))
        weight = np.clip(np.round(values[:, 2] * square, 2), low / 100, high / 100)
    inside = np.ones(len(values), dtype=bool)
    for limits, value in ((stratum.weight_limits, weight), (stratum.bmi_limits, weight / square)):
        if limits is not None:
            inside &= (value >= limits[0] - _ROUNDING_SLACK) & (value <= limits[1] + _ROUNDING_SLACK)
    return np.stack([age, height, weight], axis=1), inside


def _redrawn(spec: StrataSpec, stratum: Stratum, copula: Copula, seed: int, index: int) -> Array:
    """The subject's first later draw that its stratum's joint limits allow."""
    rng = subject_rng(seed, index, Purpose.DEMOGRAPHICS)
    rng.random()
    scores = rng.standard_normal((MAX_DRAWS, 3))  # continues the subject's own stream; its first row failed
    bodies, inside = _bodies(stratum, copula.from_scores(scores))
    if not inside.any():
        raise InputError(
            f"{spec.path}, stratum {stratum.name}: none of {MAX_DRAWS} draws keeps the joint limits of weight and BMI; "
            "widen weight_min, weight_max, bmi_min or bmi_max"
        )
    return np.asarray(bodies[int(np.argmax(inside))])


def _from_subjects(spec: SubjectsSpec, n: int | None, seed: int) -> list[Subject]:
    if n is None:
        return [replace(subject, seed=seed) for subject in spec.subjects]
    recruited = []
    for i in range(n):
        chosen = spec.subjects[int(subject_rng(seed, i, Purpose.RESAMPLE).integers(len(spec.subjects)))]
        extra = {**chosen.extra, "resampled_from": chosen.subject_id}
        recruited.append(replace(chosen, subject_id=f"{chosen.subject_id}_r{i}", index=i, seed=seed, extra=extra))
    return recruited


def _matched(spec: SubjectsSpec, n: int | None, seed: int) -> list[Subject]:
    if n is not None and n > len(spec.subjects):
        raise InputError(
            f"{spec.path}: n is {n}, and the table to match has {len(spec.subjects)} rows; leave n out to match "
            "them all, or give the table as the spec to resample it"
        )
    return [replace(subject, seed=seed) for subject in spec.subjects[:n]]
