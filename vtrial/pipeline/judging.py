"""Judging a cohort: its organs segmented and measured, the numbers compared with a reference, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vtrial.execution import CannotGoOn, Executor, Report
from vtrial.measurement import FolderReader, MeasureSummary, measure_cohort
from vtrial.pipeline.copies import grid_problems
from vtrial.pipeline.masks import USUAL, Choice, Masks, masks_of, masks_there, plan_for, settle
from vtrial.pipeline.originals import TrainingSet, open_training
from vtrial.pipeline.parts import Steps, silent
from vtrial.pipeline.scans import SOURCE, Scans, newest_run, open_scans
from vtrial.pipeline.sides import Parties, Side
from vtrial.pipeline.verdicts import Verdict, judge
from vtrial.records import MODEL_SUV, InputError
from vtrial.runs import MANIFEST
from vtrial.segmentation import SegmenterPlan, SegmentSummary, segment_cohort
from vtrial.storage import open_folder
from vtrial.validation import AnalysisSettings, Reference, list_references, read_reference, read_settings
from vtrial.validation.references import bundled_references
from vtrial.validation.strata import parse_by, strata_of
from vtrial.validation.tables import usual_names


@dataclass(frozen=True)
class Question:
    """What a cohort is asked: against whom, in which strata, by which settings (a TOML file), in pairs or not.

    `real` is a published reference, a table of measurements, a run, or a folder of real PET/CT; so are those of `also`,
    which join both in an analysis of variance. `train` is the training set in which to look for copies.
    """

    real: str = "autopet-2025"
    by: str = "sex"
    settings: Path | None = None
    match: bool = False
    also: tuple[str, ...] = ()
    train: str | None = None


@dataclass(frozen=True)
class _Asked:
    """Everything that a question names, opened. `others` are the reference and the further cohorts, in this order."""

    twins: Scans
    others: tuple[Scans | Reference, ...]
    training: TrainingSet | None
    settings: AnalysisSettings


@dataclass(frozen=True)
class Machines:
    """What segments, and what measures: the one may want GPUs, the other has no use for them."""

    segment: Executor
    measure: Executor


def segment(
    location: str, executor: Executor, report: Report, *, choice: Choice = USUAL, out: str | None = None
) -> SegmentSummary:
    """Draw organ masks of a run, or of a folder of real PET/CT; InputError where the segmenter is not there."""
    scans = open_scans(location, out)
    plan = plan_for(scans, choice)
    scans.write(report)
    return _segment(scans, plan, executor, report)


def measure(
    location: str, executor: Executor, report: Report, *, segmenter: str | None = None, out: str | None = None
) -> MeasureSummary:
    """Measure every organ of the finished subjects of a run, or of real PET/CT; InputError where there are no masks."""
    scans = open_scans(location, out)
    masks = masks_there(scans, segmenter)
    scans.write(report)
    return _measure(scans, masks, executor, report)


def report(
    location: str | None,
    question: Question = Question(),
    steps: Steps = silent,
    *,
    segmenter: str | None = None,
    command: Sequence[str] = (),
) -> Verdict:
    """Compare what is measured, and report; InputError where something is not measured yet."""
    asked = _checked(location, question)
    side = Side(asked.twins, masks_there(asked.twins, segmenter))
    others = [
        Side(other, masks_there(other, segmenter, side.masks)) if isinstance(other, Scans) else other
        for other in asked.others
    ]
    sides = [side, *(other for other in others if isinstance(other, Side))]
    lacking = [side for side in sides if side.scans.folder.size(side.masks.table) is None]
    if lacking:
        raise InputError([f"{side.scans.folder.location}: not measured yet; run vtrial measure" for side in lacking])
    return _judged(asked, side, others, question, steps, command)


def validate(
    location: str | None,
    machines: Machines,
    steps: Steps,
    question: Question = Question(),
    *,
    choice: Choice = USUAL,
    command: Sequence[str] = (),
) -> Verdict:
    """Segment, measure, compare and report what is not done yet of a run (default: the newest) and of all it is
    compared with. InputError before any work begins.
    """
    asked = _checked(location, question)
    own = settle(asked.twins, choice)
    planned = [(other, settle(other, choice, own)) if isinstance(other, Scans) else other for other in asked.others]
    for scans in (asked.twins, *(plan[0] for plan in planned if not isinstance(plan, Reference))):
        with steps(f"write {scans.name}") as report:  # before any segmenting, as it may be refused
            scans.write(report)
    side = _work(asked.twins, own, machines, steps)
    others = [plan if isinstance(plan, Reference) else _work(*plan, machines, steps) for plan in planned]
    return _judged(asked, side, others, question, steps, command)


def _judged(
    asked: _Asked,
    twins: Side,
    others: Sequence[Side | Reference],
    question: Question,
    steps: Steps,
    command: Sequence[str],
) -> Verdict:
    parties = Parties(twins, others[0], tuple(others[1:]), asked.training)
    return judge(parties, asked.settings, question.by, steps, paired=question.match, command=command)


def references() -> list[dict[str, Any]]:
    """The cohorts to compare with that come with the package."""
    facts = ("name", "title", "role", "kind", "n", "segmenter", "source", "licence", "note")
    return [{fact: getattr(reference, fact) for fact in facts} for reference in list_references()]


def _segment(scans: Scans, plan: SegmenterPlan, executor: Executor, report: Report) -> SegmentSummary:
    with scans.held():
        return segment_cohort(scans.ct_cases, scans.folder, plan, source=scans.source, executor=executor, report=report)


def _measure(scans: Scans, masks: Masks, executor: Executor, report: Report) -> MeasureSummary:
    cases = scans.cases(masks.folder)
    if all(scans.folder.size(case.labels) is None for case in cases):
        raise InputError(
            f"{scans.folder.location}: the scans have no organ masks ({cases[0].labels} and the others are not there); "
            "run vtrial segment first"
        )
    with scans.held():
        return measure_cohort(
            cases,
            scans.folder,
            FolderReader(scans.source, scans.folder.location),
            organs=masks.organs,
            masks=masks.made_by,
            table=masks.table,
            executor=executor,
            report=report,
        )


def _work(scans: Scans, masks: Masks | SegmenterPlan, machines: Machines, steps: Steps) -> Side:
    """What is left of segmenting and measuring one side."""
    segmented = None
    if isinstance(masks, SegmenterPlan):
        with steps(f"segment {scans.name}") as report:
            segmented = _segment(scans, masks, machines.segment, report)
        if not segmented.done:
            raise _none(scans, "segmented", segmented.failures)
        masks = masks_of(scans, masks)
    with steps(f"measure {scans.name}") as report:
        measured = _measure(scans, masks, machines.measure, report)
    if not measured.done:
        raise _none(scans, "measured", measured.failures)
    return Side(scans, masks, segmented, measured)


def _none(scans: Scans, what: str, failures: dict[str, str]) -> CannotGoOn:
    told = "; ".join(dict.fromkeys(failures.values()))
    return CannotGoOn(f"{scans.name}: no subject could be {what}: {told[:1000]}")


def _checked(location: str | None, question: Question) -> _Asked:
    """Everything that is named, opened; InputError with all that is wrong with it."""
    problems: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except InputError as error:
            problems.extend(error.problems)

    train = question.train
    twins = attempt(lambda: open_scans(location or newest_run()))
    settings = attempt(lambda: read_settings(question.settings)) or AnalysisSettings()
    attempt(lambda: parse_by(question.by))
    training = None if train is None else attempt(lambda: open_training(train))
    others = [attempt(partial(_open_reference, name, settings.suv_ceiling)) for name in (question.real, *question.also)]
    if problems:
        raise InputError(problems)
    asked = _Asked(twins, tuple(others), training, settings)
    problems = _problems(asked, question)
    if problems:
        raise InputError(problems)
    return asked


def _problems(asked: _Asked, question: Question) -> list[str]:
    """What is wrong with cohorts that can be opened."""
    real, scans = asked.others[0], [side for side in (asked.twins, *asked.others) if isinstance(side, Scans)]
    problems = [
        f"{side.source}: nobody's sex is known; put a CSV with subject_id, sex and age beside the scans"
        for side in scans
        if not side.people["sex"].isin(["F", "M"]).any()
    ]
    if (ceiling := asked.settings.suv_ceiling) > MODEL_SUV:
        problems += [
            f"{question.settings}, suv_ceiling: {ceiling:g}: the twins of {side.source} end at SUV "
            f"{MODEL_SUV:g}; set that or less"
            for side in scans
            if side.manifest is not None and side.manifest.kind == "generate"
        ]
    seen = {asked.twins.source: "the run itself"}
    options = [f"--real {question.real}", *(f"--also {name}" for name in question.also)]
    for option, other in zip(options, asked.others, strict=True):
        place = other.source if isinstance(other, Scans) else other.location or f"reference {other.name}"
        if place in seen:
            problems.append(f"{option}: that is {seen[place]}; name another cohort")
        seen.setdefault(place, f"what {option} names")
    if isinstance(real, Reference) and real.kind == "summary" and question.match:
        problems.append(f"--match: {real.name} has no subjects, only means; leave it out")
    people = [usual_names(side.people) for side in scans]
    if not problems and not strata_of(people, question.by, asked.settings.strata):
        problems.append(f"--by {question.by}: no subject has these variables; choose others, or all")
    if not problems and asked.training is not None:
        problems += grid_problems(asked.twins, asked.training)
    return problems


def _open_reference(real: str, suv_ceiling: float) -> Scans | Reference:
    """A published reference by name, a table, or scans: of a run or real."""
    if real in bundled_references() or Path(real).is_file():
        return read_reference(real, suv_ceiling=suv_ceiling)
    folder = open_folder(real)
    measured = any(name in ("measurements.parquet", "measurements.csv") for name in folder.entries())
    if not folder.entries() or (measured and not {MANIFEST, SOURCE} & set(folder.entries())):
        return read_reference(real, suv_ceiling=suv_ceiling)
    return open_scans(real)
