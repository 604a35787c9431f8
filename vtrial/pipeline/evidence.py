"""Everything that the report of a comparison shows, gathered from the run, its journals and the statistics."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from vtrial import __version__
from vtrial.pipeline.sides import Side
from vtrial.records import InputError
from vtrial.reporting.content import (
    SEXES,
    Content,
    Demographic,
    Exclusion,
    ModelNote,
    Portrait,
    Provenance,
    samples_by_sex,
)
from vtrial.reporting.portraits import portrait
from vtrial.runs import now
from vtrial.segmentation import SegmentJournal
from vtrial.validation import AnalysisSettings, Cohort, Comparison, Reference
from vtrial.validation.compare import same_segmenter
from vtrial.validation.conditional import compare_correlations, compare_slopes
from vtrial.validation.diversity import pairwise_likeness, standardised

PORTRAITS = 4  # of each side
LIKENESS_OF = 2000  # subjects at most: all pairs of more would fill the memory, and change nothing
_REASONS = 8  # of one step that are listed
_VARIABLES = {
    "age_years": "age (years)",
    "height_cm": "height (cm)",
    "weight_kg": "weight (kg)",
    "bmi": "BMI (kg/m²)",
}


def gather(
    comparison: Comparison,
    synthetic: Cohort,
    twins: Side,
    reference: Reference,
    real: Side | Reference,
    command: Sequence[str] = (),
) -> Content:
    """The content of the report; parts that cannot be had are `absent`, each with its reason."""
    settings = comparison.settings
    subjects = reference.data if isinstance(reference.data, Cohort) else None
    sides = [side for side in (twins, real) if isinstance(side, Side)]
    absent: dict[str, str] = {}

    def attempt(part: str, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except InputError as error:
            absent[part] = "; ".join(error.problems)
            return None

    portraits = [picture for side in sides for picture in _portraits(side)]
    if not portraits:
        absent["gallery"] = "no scan could be read"
    cells = dict.fromkeys(zip(comparison.table["organ"], comparison.table["metric"]))
    return Content(
        comparison=comparison.to_dict(),
        provenance=_provenance(comparison, twins, reference, sides, command),
        samples=samples_by_sex(synthetic, subjects, cells),
        demographics=[d for cohort in (synthetic, subjects) if cohort is not None for d in _demographics(cohort)],
        slopes=attempt("slopes", lambda: compare_slopes(synthetic, reference, settings)),
        correlations=attempt("correlations", lambda: compare_correlations(synthetic, reference, settings)),
        likeness=attempt("diversity", lambda: _likeness(synthetic, subjects, reference.name, settings)) or (),
        portraits=portraits,
        exclusions=[exclusion for side in sides for exclusion in _exclusions(side)],
        absent=absent,
    )


def _likeness(
    synthetic: Cohort, subjects: Cohort | None, reference: str, settings: AnalysisSettings
) -> list[dict[str, Any]]:
    """How alike two subjects are on average, on both sides, in SDs of the reference."""
    if subjects is None:
        raise InputError(f"{reference} has no subjects, only means and SDs")
    wanted = ((organ, metric) for organ in settings.organs for metric in settings.metrics)
    cells = [cell for cell in wanted if cell in synthetic.cells and cell in subjects.cells]
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


def _exclusions(side: Side) -> Iterator[Exclusion]:
    """Who is not in the comparison, step by step, from the journals: reasons do not depend on the call."""
    scans, people = side.scans, side.scans.people
    lost = people[people["status"] != "ok"]
    errors = lost["error"].fillna("").astype(str) if "error" in lost.columns else pd.Series("", index=lost.index)
    reasons = (error or f"{status}, not made yet" for error, status in zip(errors, lost["status"]))
    yield from _counted(scans.name, "find" if scans.real else "make", zip(lost["subject_id"], reasons), len(people))
    journal, undrawn = SegmentJournal(scans.folder), {}
    for case in scans.ct_cases:
        end = None if side.masks.folder is None else journal.latest(case.subject_id, side.masks.folder)
        if end is not None and end.status == "failed":
            undrawn[case.subject_id] = end.error
    yield from _counted(scans.name, "segment", undrawn.items(), len(scans.ct_cases))
    unmeasured = side.unmeasured()
    rest = ((subject, reason) for subject, reason in unmeasured.items() if subject not in undrawn)
    yield from _counted(scans.name, "measure", rest, len(scans.ct_cases))


def _counted(cohort: str, step: str, reasons: Iterable[tuple[str, str]], of: int) -> Iterator[Exclusion]:
    """Reasons that differ in the subject's name alone are one."""
    counts = Counter(reason.replace(str(subject), "…") for subject, reason in reasons)
    for reason, count in counts.most_common(_REASONS):
        yield Exclusion(cohort, step, reason, count, of)
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(_REASONS))
    if rest:
        yield Exclusion(cohort, step, "other reasons", rest, of)


def _provenance(
    comparison: Comparison, twins: Side, reference: Reference, sides: Sequence[Side], command: Sequence[str]
) -> Provenance:
    manifest = twins.scans.manifest
    made = manifest.sessions[-1].versions if manifest is not None and manifest.sessions else {}
    versions = {f"{name} (making)": number for name, number in made.items()}
    versions |= {"vtrial": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("numpy", "scipy", "totalsegmentator")}
    seeds: dict[str, int | str] = {"analysis": comparison.settings.seed}
    if manifest is not None:
        seeds = {"run": str(manifest.identity.get("seed", "")), **seeds}
    facts = ("title", "role", "source", "licence", "note")
    origin = {fact: getattr(reference, fact) for fact in facts}
    return Provenance(
        command=" ".join(command),
        models=tuple(_models(twins, sides)),
        versions=versions,
        seeds=seeds,
        reference=origin | {"segmenter": reference.data.segmenter, "n": str(reference.n)},
        flags=tuple(_flags(twins, reference, sides)),
        created=now(),
    )


def _models(twins: Side, sides: Sequence[Side]) -> Iterator[ModelNote]:
    """What made the twins, and every segmenter once."""
    manifest = twins.scans.manifest
    if manifest is not None and manifest.kind == "phantom":
        yield ModelNote("generator", "vtrial phantom", "no scans at all: it draws bodies after published anatomy")
    elif manifest is not None:
        known: Mapping[str, Any] = manifest.identity
        trained_on = str(manifest.facts.get("model_data") or "data that its card does not name")
        digest = str(known.get("model_sha256", ""))
        yield ModelNote("generator", str(known.get("model", "unknown")), trained_on, digest)
    for masks in {side.masks.segmenter: side.masks for side in sides if side.masks.facts}.values():
        trained_on = str(masks.facts.get("training_data", "CT of patients (TotalSegmentator's own training set)"))
        note = "For phantoms and twins of models trained on them, not for patients" if masks.phantoms_only else ""
        yield ModelNote("segmenter", masks.segmenter, trained_on, str(masks.facts.get("weights_sha256", "")), note)


def _flags(twins: Side, reference: Reference, sides: Sequence[Side]) -> Iterator[str]:
    """What limits trust in the comparison."""
    yield from dict.fromkeys(side.masks.caution for side in sides if side.masks.caution)
    ours, theirs = twins.masks.segmenter, reference.data.segmenter
    if not same_segmenter(ours, theirs):
        yield (
            f"The two sides were not segmented alike ({ours}; reference: {theirs or 'not known'}): a part of every "
            "difference may be the segmenters'."
        )
    for side in sides:
        people, name = side.scans.people, side.scans.name
        if "extrapolated" in people.columns and (outside := int(people["extrapolated"].sum())):
            yield f"{name}: {outside} of {len(people)} subjects lie outside what the model was trained on."
        manifest = side.scans.manifest
        if manifest is not None and len(side.scans.ct_cases) < manifest.n:
            yield f"{name}: the run is not complete, {len(side.scans.ct_cases)} of {manifest.n} subjects are made."
    if reference.role == "stand-in":
        yield f"{reference.name} is no cohort of patients but {reference.title}."
    elif reference.role == "synthetic":
        yield f"{reference.name} is itself synthetic."
