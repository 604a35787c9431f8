"""Cohorts in a stratum: whoever is in it, as values where they are known, else as moments."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vtrial.records import InputError
from vtrial.validation.cells import Side
from vtrial.validation.inference import moments
from vtrial.validation.references import Summary
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.statistic import Cell, Cohort, Mask
from vtrial.validation.strata import ALL, Stratum, members, parse_by, strata_of


def find_strata(people: list[pd.DataFrame], by: str | Sequence[str], settings: AnalysisSettings) -> list[Stratum]:
    """The strata of cohorts with these people; without any, of summaries. InputError where there are none."""
    if people:
        strata = strata_of(people, by, settings.strata)
    else:  # two summaries: sexes, or both pooled
        wanted = {v for grouping in parse_by(by) for v in grouping}
        strata = [Stratum(ALL, ((ALL, ALL),))] if ALL in wanted else []
        strata += [Stratum(f"sex={s}", (("sex", s),)) for s in "FM"] if "sex" in wanted else []
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
    return side_of(a, stratum, cells, settings), side_of(b, stratum, cells, settings)


def side_of(cohort: Cohort | Summary, stratum: Stratum, cells: Sequence[Cell], settings: AnalysisSettings) -> Side:
    """One cohort in a stratum; with n = 0 where it has nobody there."""
    if isinstance(cohort, Summary):
        return _summary_side(cohort, stratum, cells)
    return _cohort_side(cohort, members(cohort.people, stratum, settings.strata), cells)


def _cohort_side(cohort: Cohort, inside: Mask, cells: Sequence[Cell]) -> Side:
    values, ceiling = cohort.select(cells)
    lacking = tuple("" if c in cohort.cells else f"{cohort.name} has no {c[1]} of {c[0]}" for c in cells)
    return Side(cohort.name, moments(values[inside]), values[inside], ceiling[inside], lacking)


def _summary_side(summary: Summary, stratum: Stratum, cells: Sequence[Cell]) -> Side:
    whole = stratum.levels == ((ALL, ALL),)
    sexes = ("F", "M") if whole else ((stratum.sex,) if stratum.sex else ())
    m = summary.moments(sexes, cells)
    why = f"{summary.name} is a summary by sex, it has no {stratum.name.split('=')[0]}"
    lacking = tuple(
        why if not sexes else ("" if c in summary.cells else f"{summary.name} has no {c[1]} of {c[0]}") for c in cells
    )
    return Side(summary.name, m, None, None, lacking)
