"""Making a cohort: twins from a model, or phantoms, into a run folder, resuming whatever is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vtrial.cohort.recruit import recruit as draw
from vtrial.cohort.spec import CohortSpec, SubjectsSpec
from vtrial.cohort.support import check_support, support_of
from vtrial.diffusion.sampler import SamplerName
from vtrial.execution import CannotGoOn, Executor, Report
from vtrial.generation import LoadPhantom, cascade_plan
from vtrial.imaging.autopet import DEMOGRAPHICS, METADATA, write_tables
from vtrial.imaging.scans import Layout
from vtrial.pipeline.cohorts import Cohort, read_cohort
from vtrial.production import Plan, RunSummary, carry_out, read_scan
from vtrial.records import InputError, Subject
from vtrial.reporting.preview import preview_png
from vtrial.runs import Identity, check_identity, identity_hash
from vtrial.storage import open_folder, place, printable

PREVIEWED = 4  # subjects in the preview picture
PREVIEW = "preview.png"


def generate(
    cohort: Cohort,
    executor: Executor,
    report: Report,
    *,
    out: str | None = None,
    model: str,
    sampler: SamplerName | None = None,
    steps_global: int | None = None,
    steps_sr: int | None = None,
    tile: str | None = None,
    extrapolate: bool = False,
    verify: bool = False,
    command: Sequence[str] = (),
) -> RunSummary:
    """Make a twin for every subject of a cohort; resumes the run in `out`, by default named after spec and seed."""
    spec = read_cohort(cohort)
    plan = cascade_plan(model, sampler, steps_global, steps_sr, tile)
    identity = _identity(cohort, spec) | plan.identity
    location = out or _default_location(cohort, spec, identity, standard=plan.standard)
    subjects, n = _recruit(cohort, spec, location, "generate", identity)
    flagged = {f.subject_id for f in check_support(subjects, plan.support, extrapolate)}
    summary = carry_out(
        Plan(
            kind="generate",
            location=location,
            identity=identity,
            facts={"spec": printable(str(spec.path)), **plan.facts},
            subjects=subjects,
            n=n,
            load=plan.load,
            command=command,
            flags={s.index: s.subject_id in flagged for s in subjects},
            verify=verify,
            extent=plan.extent,
        ),
        executor,
        report,
    )
    return write_preview(summary)


def phantom(
    cohort: Cohort,
    executor: Executor,
    report: Report,
    *,
    out: str,
    layout: Layout = "scans",
    verify: bool = False,
    command: Sequence[str] = (),
) -> RunSummary:
    """Render a phantom for every subject of a cohort, with the truth behind it.

    `layout` "scans" keeps its organ masks too; "training" is what `vtrial train` reads, and "autopet" a collection as
    FDG-PET-CT-Lesions is shipped, with the run's own files beside it.
    """
    spec = read_cohort(cohort)
    identity = _identity(cohort, spec) | {"layout": layout}
    subjects, n = _recruit(cohort, spec, out, "phantom", identity)
    summary = carry_out(
        Plan(
            kind="phantom",
            location=out,
            identity=identity,
            facts={"spec": printable(str(spec.path)), "support": asdict(support_of(spec))},
            subjects=subjects,
            n=n,
            load=LoadPhantom(),
            command=command,
            layout=layout,
            verify=verify,
        ),
        executor,
        report,
    )
    if layout == "autopet":
        _write_tables(summary, subjects)
    return summary if layout == "training" else write_preview(summary)


def _write_tables(summary: RunSummary, subjects: Sequence[Subject]) -> None:
    """The data set's tables of all subjects, if they are not there or subjects have come."""
    folder = open_folder(summary.location)
    try:
        if summary.new or any(folder.size(name) is None for name in (METADATA, DEMOGRAPHICS)):
            write_tables(folder, subjects)
    except OSError as error:
        raise CannotGoOn(f"{summary.location}: cannot write {METADATA} ({error}); all subjects are safe") from None


def _identity(cohort: Cohort, spec: CohortSpec) -> Identity:
    as_listed = isinstance(spec, SubjectsSpec) and (spec.matched or cohort.n is None)
    return {"spec_sha256": spec.sha256, "subjects": "as listed" if as_listed else "drawn", "seed": cohort.seed}


def _default_location(cohort: Cohort, spec: CohortSpec, identity: Identity, *, standard: bool) -> str:
    """The same command names the same folder, so that it resumes; other settings get another folder."""
    match = "match-" if cohort.match is not None else ""
    unusual = "" if standard else f"-{identity_hash(identity)}"
    return str(Path("runs") / f"{match}{Path(spec.path).stem}-seed{cohort.seed}{unusual}")


def _recruit(
    cohort: Cohort, spec: CohortSpec, location: str, kind: str, identity: Identity
) -> tuple[list[Subject], int]:
    """All subjects that the run in `location` is to have, and how many of them this call asks for."""
    known = check_identity(open_folder(location), kind, identity)
    asked = draw(spec, cohort.n, cohort.seed)
    if known is None or cohort.n is None or known.n <= len(asked):
        return asked, len(asked)
    return draw(spec, known.n, cohort.seed), len(asked)


def write_preview(summary: RunSummary) -> RunSummary:
    """Picture a run's first subjects, if no picture is there or subjects have come; CannotGoOn if that cannot be.

    Gives the summary with the place of the picture.
    """
    if not summary.finished:
        return summary
    folder = open_folder(summary.location)
    try:
        if summary.new or folder.size(PREVIEW) is None:
            first = summary.finished[:PREVIEWED]
            folder.write(PREVIEW, preview_png([(_caption(s), read_scan(folder, entry)) for s, entry in first]))
    except InputError as error:
        raise CannotGoOn(f"{summary.location}: no preview: {error}; --verify finds and mends spoilt files") from None
    except OSError as error:
        raise CannotGoOn(f"{summary.location}: cannot write {PREVIEW} ({error}); all subjects are safe") from None
    return replace(summary, preview=place(summary.location, PREVIEW))


def _caption(s: Subject) -> str:
    return f"{s.subject_id}: {s.sex}, {s.age_years:.0f} y, {s.height_cm:.0f} cm, {s.weight_kg:.0f} kg"
