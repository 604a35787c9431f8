"""Everything that the report of a comparison shows, gathered from the run, its journals and the statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from vtrial.pipeline.copies import search
from vtrial.pipeline.origins import exclusions, provenance
from vtrial.pipeline.parts import Parts, Steps, silent
from vtrial.pipeline.sides import Parties, Side
from vtrial.records import InputError
from vtrial.reporting.content import SEXES, Content, Demographic, Portrait, samples_by_sex
from vtrial.reporting.portraits import portrait
from vtrial.validation import AnalysisSettings, Cohort, Comparison, Reference, anova
from vtrial.validation.conditional import compare_correlations, compare_slopes
from vtrial.validation.diversity import pairwise_likeness, standardised
from vtrial.validation.sides import off_scale_of
from vtrial.validation.statistic import Cell

PORTRAITS = 4  # of each side
LIKENESS_OF = 2000  # subjects at most: all pairs of more would fill the memory, and change nothing
_VARIABLES = {
    "age_years": "age (years)",
    "height_cm": "height (cm)",
    "weight_kg": "weight (kg)",
    "bmi": "BMI (kg/m²)",
}


def gather(
    parties: Parties,
    comparison: Comparison,
    synthetic: Cohort,
    references: Sequence[Reference],
    by: str,
    steps: Steps = silent,
    command: Sequence[str] = (),
) -> Content:
    """The content of the report; parts that cannot be had are `absent`, each with its reason.

    `references` are the one compared with, and those of the analysis of variance, in the order of `parties`.
    """
    settings, reference = comparison.settings, references[0]
    subjects = reference.data if isinstance(reference.data, Cohort) else None
    absent: dict[str, str] = {}
    copies = _copies(parties, reference.name, settings, steps, absent)
    cells = list(dict.fromkeys(zip(comparison.table["organ"], comparison.table["metric"])))
    with steps("report") as report:
        parts = Parts(report, 5)

        def attempt(part: str, compute: Callable[[], Any]) -> Any:
            try:
                return compute()
            except InputError as error:
                absent[part] = "; ".join(error.problems)
                return None
            finally:
                parts.ended(part)

        slopes = attempt("slopes", lambda: compare_slopes(synthetic, reference, settings))
        correlations = attempt("correlations", lambda: compare_correlations(synthetic, reference, settings))
        likeness = attempt("diversity", lambda: _likeness(synthetic, subjects, reference.name, settings))
        variance = attempt("anova", lambda: _anova(synthetic, references, by, cells, settings))
        portraits = attempt("gallery", lambda: _gallery(parties))
    told = comparison.to_dict()
    if copies is not None:
        told["notes"] += copies.attrs.pop("notes")
    return Content(
        comparison=told,
        provenance=provenance(comparison, parties, references, copies, command),
        samples=samples_by_sex(synthetic, subjects, cells),
        demographics=[d for cohort in (synthetic, subjects) if cohort is not None for d in _demographics(cohort)],
        slopes=slopes,
        correlations=correlations,
        anova=variance,
        likeness=likeness or (),
        copies=copies,
        portraits=portraits or (),
        exclusions=[exclusion for side in parties.sides for exclusion in exclusions(side)],
        absent=absent,
    )


def _copies(
    parties: Parties, reference: str, settings: AnalysisSettings, steps: Steps, absent: dict[str, str]
) -> pd.DataFrame | None:
    """The search for copies, where there is a training set; `absent` learns why there is no result."""
    if parties.training is None:
        return None
    real = parties.real if isinstance(parties.real, Side) else None
    try:
        return search(parties.training, parties.twins, real, reference, settings, steps)
    except InputError as error:
        absent["copies"] = "; ".join(error.problems)
        return None


def _anova(
    synthetic: Cohort, references: Sequence[Reference], by: str, cells: Sequence[Cell], settings: AnalysisSettings
) -> pd.DataFrame | None:
    if len(references) < 2:
        return None
    cohorts: dict[str, Cohort | Reference] = {synthetic.name: synthetic, **{r.name: r for r in references}}
    return anova(cohorts, by=by, cells=cells, settings=settings)


def _gallery(parties: Parties) -> list[Portrait]:
    """The first subjects of both sides; InputError where none can be read."""
    sides = [side for side in (parties.twins, parties.real) if isinstance(side, Side)]
    portraits = [picture for side in sides for picture in _portraits(side)]
    if not portraits:
        raise InputError("no scan could be read")
    return portraits


def _likeness(
    synthetic: Cohort, subjects: Cohort | None, reference: str, settings: AnalysisSettings
) -> list[dict[str, Any]]:
    """How alike two subjects are on average, on both sides, in SDs of the reference."""
    if subjects is None:
        raise InputError(f"{reference} has no subjects, only means and SDs")
    wanted = ((organ, metric) for organ in settings.organs for metric in settings.metrics)
    known = [cell for cell in wanted if cell in synthetic.cells and cell in subjects.cells]
    reasons = off_scale_of([synthetic, subjects], known, settings)
    cells = [cell for cell, reason in zip(known, reasons) if not reason]
    vectors = standardised(*(cohort.select(cells)[0][:LIKENESS_OF] for cohort in (synthetic, subjects)))
    rows = []
    for name, values in zip((synthetic.name, subjects.name), vectors):
        like = pairwise_likeness(values, 1.0 - settings.alpha)
        numbers = {key: getattr(like, key) for key in ("n", "mean", "low", "high", "highest")}
        rows.append({"cohort": name, **numbers})
    return rows


def _demographics(cohort: Cohort) -> Iterator[Demographic]:
    for stratum in SEXES:
        people = cohort.people[cohort.people["sex"] == stratum[-1]]
        for column, told in _VARIABLES.items():
            values = people[column].dropna().astype(float) if column in people.columns else pd.Series(dtype=float)
            if len(values):
                spread = float(values.std()) if len(values) > 1 else float("nan")
                yield Demographic(cohort.name, stratum, told, len(values), float(values.mean()), spread)


def _portraits(side: Side) -> Iterator[Portrait]:
    """The first subjects whose scans can be read."""
    people = side.scans.people.set_index("subject_id")
    shown = [case.subject_id for case in side.scans.ct_cases if case.subject_id not in side.failures]
    for subject_id in shown[:PORTRAITS]:
        with suppress(InputError, OSError):
            caption = _caption(people.loc[subject_id])
            yield portrait(f"{side.scans.name}: {subject_id}", caption, side.scans.read(subject_id))


def _caption(person: Any) -> str:
    sex = {"F": "woman", "M": "man"}.get(person["sex"], "sex unknown")
    units = (("age_years", "years"), ("height_cm", "cm"), ("weight_kg", "kg"))
    return ", ".join([sex, *(f"{person[c]:.0f} {u}" for c, u in units if c in person and np.isfinite(person[c]))])
