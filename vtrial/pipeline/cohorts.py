"""Who is asked for: a cohort by spec or by a real table, and its subjects alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from vtrial.cohort.recruit import recruit as draw
from vtrial.cohort.registry import find_spec
from vtrial.cohort.report import render, summarize, write_subjects
from vtrial.cohort.spec import CohortSpec, match_table, read_spec
from vtrial.records import InputError


@dataclass(frozen=True)
class Cohort:
    """What is asked for: a spec or a real table to match, how many, from which seed."""

    spec: str | None
    n: int | None = None
    seed: int = 0
    match: str | None = None


def read_cohort(cohort: Cohort) -> CohortSpec:
    """The spec, or the table to match where there is one; InputError with all that is wrong with it."""
    if cohort.match is not None and cohort.spec is not None:
        raise InputError(f"both a spec ({cohort.spec}) and --match {cohort.match} are given; leave out one of them")
    if cohort.match is not None:
        return match_table(cohort.match)
    if cohort.spec is None:
        raise InputError("no cohort given; name a spec such as cohorts/oncology.csv, or a table with --match")
    return read_spec(find_spec(cohort.spec))


def recruit(cohort: Cohort, out: Path | None = None) -> tuple[dict[str, Any], RenderableType]:
    """Draw the subjects alone, into `out` if given: the report for machines and for people."""
    spec = read_cohort(cohort)
    subjects = draw(spec, cohort.n, cohort.seed)
    report = summarize(subjects, spec)
    if out is not None:
        write_subjects(subjects, out)
    return report.to_dict() | {"out": None if out is None else str(out)}, render(report)
