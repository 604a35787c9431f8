"""Judging a cohort: its organs segmented and measured, the numbers compared with a reference, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtrial.execution import CannotGoOn, Executor, Report
from vtrial.measurement import FolderReader, MeasureSummary, measure_cohort
from vtrial.pipeline.masks import USUAL, Choice, Masks, masks_of, masks_there, plan_for, settle
from vtrial.pipeline.scans import SOURCE, Scans, newest_run, open_scans
from vtrial.pipeline.sides import Side
from vtrial.pipeline.verdicts import Verdict, judge
from vtrial.records import InputError
from vtrial.runs import MANIFEST
from vtrial.segmentation import SegmenterPlan, SegmentSummary, segment_cohort
from vtrial.storage import open_folder
from vtrial.validation import AnalysisSettings, Reference, list_references, read_reference, read_settings
from vtrial.validation.references import bundled_references
from vtrial.validation.strata import parse_by, strata_of

Steps = Callable[[str], AbstractContextManager[Report]]  # a progress bar for each step, by its name


@dataclass(frozen=True)
class Question:
    """What a cohort is asked: against whom, in which strata, by which settings (a TOML file), in pairs or not.

    `real` is a published reference, a table of measurements, a run, or a folder of real PET/CT.
    """

    real: str = "autopet-2025"
    by: str = "sex"
    settings: Path | None = None
    match: bool = False


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
    return _segment(scans, plan_for(scans, choice), executor, report)


def measure(
    location: str, executor: Executor, report: Report, *, segmenter: str | None = None, out: str | None = None
) -> MeasureSummary:
    """Measure every organ of the finished subjects of a run, or of real PET/CT; InputError where there are no masks."""
    scans = open_scans(location, out)
    return _measure(scans, masks_there(scans, segmenter), executor, report)


def report(
    location: str | None,
    question: Question = Question(),
    *,
    segmenter: str | None = None,
    command: Sequence[str] = (),
) -> Verdict:
    """Compare what is measured, and report; InputError where something is not measured yet."""
    twins, real, settings = _checked(location, question)
    sides = [Side(twins, masks_there(twins, segmenter))]
    if isinstance(real, Scans):
        sides.append(Side(real, masks_there(real, segmenter, sides[0].masks)))
    lacking = [side for side in sides if side.scans.folder.size(side.masks.table) is None]
    if lacking:
        raise InputError([f"{side.scans.folder.location}: not measured yet; run vtrial measure" for side in lacking])
    reference = real if isinstance(real, Reference) else sides[1]
    return judge(sides[0], reference, settings, question.by, paired=question.match, command=command)


def validate(
    location: str | None,
    machines: Machines,
    steps: Steps,
    question: Question = Question(),
    *,
    choice: Choice = USUAL,
    command: Sequence[str] = (),
) -> Verdict:
    """Segment, measure, compare and report what is not done yet of a run (default: the newest) and of its reference.

    InputError before any work begins.
    """
    twins, real, settings = _checked(location, question)
    own = settle(twins, choice)
    if isinstance(real, Reference):
        side = _work(twins, own, machines, steps)
        return judge(side, real, settings, question.by, paired=question.match, command=command)
    theirs = settle(real, choice, own)
    side, other = (_work(scans, masks, machines, steps) for scans, masks in ((twins, own), (real, theirs)))
    return judge(side, other, settings, question.by, paired=question.match, command=command)


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
            told = "; ".join(dict.fromkeys(segmented.failures.values()))
            raise CannotGoOn(f"{scans.name}: no subject could be segmented: {told[:1000]}")
        masks = masks_of(scans, masks)
    with steps(f"measure {scans.name}") as report:
        measured = _measure(scans, masks, machines.measure, report)
    return Side(scans, masks, segmented, measured)


def _checked(location: str | None, question: Question) -> tuple[Scans, Scans | Reference, AnalysisSettings]:
    """Everything that is named, opened; InputError with all that is wrong with it."""
    opened: list[Any] = []
    problems: list[str] = []
    steps: tuple[Callable[[], Any], ...] = (
        lambda: open_scans(location or newest_run()),
        lambda: _open_reference(question.real),
        lambda: read_settings(question.settings),
        lambda: parse_by(question.by),
    )
    for step in steps:
        try:
            opened.append(step())
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    twins, real, settings, _ = opened
    people = [side.people for side in (twins, real) if isinstance(side, Scans)]
    for side in (twins, real):
        if isinstance(side, Scans) and not side.people["sex"].isin(["F", "M"]).any():
            problems.append(
                f"{side.source}: nobody's sex is known; put a CSV with subject_id, sex and age beside the scans"
            )
    if isinstance(real, Scans) and real.source == twins.source:
        problems.append(f"--real {question.real}: that is the run itself; name another cohort")
    if isinstance(real, Reference) and real.kind == "summary" and question.match:
        problems.append(f"--match: {real.name} has no subjects, only means; leave it out")
    if not problems and not strata_of(people, question.by, settings.strata):
        problems.append(f"--by {question.by}: no subject has these variables; choose others, or all")
    if problems:
        raise InputError(problems)
    return twins, real, settings


def _open_reference(real: str) -> Scans | Reference:
    """A published reference by name, a table, or scans: of a run or real."""
    if real in bundled_references() or Path(real).is_file():
        return read_reference(real)
    folder = open_folder(real)
    measured = any(name in ("measurements.parquet", "measurements.csv") for name in folder.entries())
    if not folder.entries() or (measured and not {MANIFEST, SOURCE} & set(folder.entries())):
        return read_reference(real)
    return open_scans(real)
