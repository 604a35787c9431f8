"""Cohorts in a stratum: whoever is in it, as values where they are known, else as moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vtrial.organs import GAS_OR_BONE
from vtrial.records import MODEL_HU, MODEL_SUV, InputError
from vtrial.validation.cells import Side
from vtrial.validation.inference import Moments, moments
from vtrial.validation.references import Summary
from vtrial.validation.scale import AVERAGES, CUT_SHARE, Mask
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.statistic import Cell, Cohort
from vtrial.validation.strata import ALL, EVERYBODY, Stratum, members, parse_by, strata_of

SEXES = ("F", "M")
_WHO = {"F": "women", "M": "men"}


def find_strata(people: list[pd.DataFrame], by: str | Sequence[str], settings: AnalysisSettings) -> list[Stratum]:
    """The strata of cohorts with these people; without any, of summaries. InputError where there are none."""
    if people:
        strata = strata_of(people, by, settings.strata)
    else:  # two summaries: sexes, or both pooled
        wanted = {v for grouping in parse_by(by) for v in grouping}
        strata = [EVERYBODY] if ALL in wanted else []
        strata += [Stratum(f"sex={s}", (("sex", s),)) for s in SEXES] if "sex" in wanted else []
    if not strata:
        raise InputError(f"--by {by}: no subject has these variables; choose others, or all")
    return strata


def pick(
    a: Cohort | Summary,
    b: Cohort | Summary,
    stratum: Stratum,
    cells: Sequence[Cell],
    settings: AnalysisSettings,
    *,
    paired: bool = False,
) -> tuple[Side, Side]:
    """Both sides in a stratum. Pairs go by the reference subject's stratum, so that a pair is never torn."""
    if paired and isinstance(a, Cohort) and isinstance(b, Cohort):
        inside = members(b.people, stratum, settings.strata)
        return _cohort_side(a, inside, cells), _cohort_side(b, inside, cells)
    first, second = sides_of([a, b], stratum, cells, settings)
    return first, second


def sides_of(
    cohorts: Sequence[Cohort | Summary], stratum: Stratum, cells: Sequence[Cell], settings: AnalysisSettings
) -> list[Side]:
    """Cohorts that are compared, in a stratum; with n = 0 where one has nobody there."""
    sexes = np.any([_sexes(cohort, cells) for cohort in cohorts], axis=0)
    return [
        _summary_side(cohort, stratum, cells, sexes)
        if isinstance(cohort, Summary)
        else _cohort_side(cohort, members(cohort.people, stratum, settings.strata), cells)
        for cohort in cohorts
    ]


def off_scale(sides: Sequence[Side], cells: Sequence[Cell]) -> list[str]:
    """Why a cell tells of a model's scale and not of the people, "" where it does not.

    HU of organs with gas or bone, where the CT of some sides ends at -500 and 500 HU and that of others does not; and
    averages of an organ that a PET which may end at SUV 25 does not hold in `CUT_SHARE` of a side's subjects or more.
    """
    ct = [side.name for side in sides if side.ends.ct]
    pet = [side.name for side in sides if side.ends.pet]
    with np.errstate(all="ignore"):
        cut = [
            np.zeros(len(cells)) if side.ceiling is None else side.ceiling.sum(axis=0) / side.moments.n
            for side in sides
        ]
    reasons = []
    for j, (organ, metric) in enumerate(cells):
        reason = ""
        if metric == "hu_mean" and organ in GAS_OR_BONE and 0 < len(ct) < len(sides):
            low, high = MODEL_HU
            reason = f"the CT of {' and '.join(ct)} ends at {low:g} and {high:g} HU, {organ} reach beyond: not judged"
        elif metric in AVERAGES and pet and any(share[j] >= CUT_SHARE for share in cut):
            shares = [f"{100.0 * c[j]:.3g} % of {s.name}" for s, c in zip(sides, cut) if c[j] > 0]
            reason = (
                f"uptake of {organ} reaches {MODEL_SUV:g} in {' and '.join(shares)}, where the PET of "
                f"{' and '.join(pet)} may end: not judged"
            )
        reasons.append(reason)
    return reasons


def off_scale_of(cohorts: Sequence[Cohort | Summary], cells: Sequence[Cell], settings: AnalysisSettings) -> list[str]:
    """The same of whole cohorts."""
    return off_scale(sides_of(cohorts, EVERYBODY, cells, settings), cells)


def _cohort_side(cohort: Cohort, inside: Mask, cells: Sequence[Cell]) -> Side:
    values, ceiling = cohort.select(cells)
    lacking = tuple("" if c in cohort.cells else f"{cohort.name} has no {c[1]} of {c[0]}" for c in cells)
    return Side(cohort.name, moments(values[inside]), values[inside], ceiling[inside], lacking, cohort.ends)


def _sexes(cohort: Cohort | Summary, cells: Sequence[Cell]) -> Mask:
    """In which sexes each cell was measured, (F and M, cells)."""
    if isinstance(cohort, Summary):
        return np.stack([cohort.moments([sex], cells).n > 0 for sex in SEXES])
    there = np.isfinite(cohort.select(cells)[0])
    return np.stack([there[(cohort.people["sex"] == sex).to_numpy(dtype=bool)].any(axis=0) for sex in SEXES])


def _summary_side(summary: Summary, stratum: Stratum, cells: Sequence[Cell], compared: Mask) -> Side:
    """Sexes are pooled only where the summary has all that are `compared` (F and M, cells)."""
    whole = stratum == EVERYBODY
    sexes = SEXES if whole else ((stratum.sex,) if stratum.sex else ())
    m = summary.moments(sexes, cells)
    lacking, missing = [], compared & ~_sexes(summary, cells)
    for j, (organ, metric) in enumerate(cells):
        absent = [sex for sex, is_absent in zip(SEXES, missing[:, j]) if is_absent]
        why = ""
        if not sexes:
            unknown = " and ".join(variable for variable, _ in stratum.levels if variable != "sex")
            why = f"{summary.name} is a summary by sex, it has no {unknown}"
        elif (organ, metric) not in summary.cells:
            why = f"{summary.name} has no {metric} of {organ}"
        elif whole and absent:
            why = f"{summary.name} has {metric} of {organ} for one sex alone, without {_WHO[absent[0]]}: compare by sex"
        lacking.append(why)
    there = np.array([not why for why in lacking])
    known = Moments(np.where(there, m.n, 0.0), np.where(there, m.mean, np.nan), np.where(there, m.sd, np.nan))
    return Side(summary.name, known, None, None, tuple(lacking), summary.ends)
