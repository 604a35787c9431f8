"""The trial as a story: recruit, then generate (or render phantoms) into a run folder, resuming whatever is there.

Nothing is written before all input has been checked. Progress goes to the caller's `report`, machines come from the
caller's `Executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from vtrial.cohort.recruit import recruit as draw
from vtrial.cohort.registry import find_spec
from vtrial.cohort.report import render, summarize, write_subjects
from vtrial.cohort.spec import CohortSpec, SubjectsSpec, match_table, read_spec
from vtrial.cohort.support import check_support, support_of
from vtrial.diffusion.denoiser import StageName
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import CARD, WEIGHT_FILES, ModelCard, list_models, read_card
from vtrial.execution import CannotGoOn, Executor, Report
from vtrial.generation import LoadPhantom, SamplerName, cascade_plan, describe_models
from vtrial.imaging.scans import Layout
from vtrial.measurement import FolderReader, MeasureSummary, measure_cohort, run_cases
from vtrial.production import Plan, RunSummary, carry_out, read_scan
from vtrial.records import InputError, Subject
from vtrial.reporting.preview import preview_png
from vtrial.runs import Identity, check_identity, identity_hash
from vtrial.storage import open_folder
from vtrial.training import TrainingConfig, export_model, hardware, read_config
from vtrial.training import train as fit
from vtrial.training.checkpoint import CHECKPOINT
from vtrial.validation import list_references

PREVIEWED = 4  # subjects in the preview picture
PREVIEW = "preview.png"
# What a freshly trained stage is sampled with until its card says otherwise; noise levels of decision 011.
FRESH_SAMPLERS: dict[StageName, SamplerConfig] = {
    "global": SamplerConfig(steps=24, sigma_max=200.0),
    "global-detail": SamplerConfig(sigma_max=0.8),  # where it takes over; how it is sampled, "global" says
    "super-resolution": SamplerConfig(name="dpmpp-2m", steps=12, sigma_max=20.0),
}


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


def models() -> list[dict[str, Any]]:
    """The bundled models."""
    return describe_models(list_models())


def train(
    config: Path,
    data: Path,
    out: Path,
    progress: Callable[[dict[str, object]], None],
    start_from: str | None = None,
    max_seconds: float | None = None,
) -> ModelCard:
    """Fit one stage, going on from its last checkpoint, and export the stages that `out` holds.

    Checkpoints lie in `out`/training/<stage>; the samplers of a card that is there already are kept, and a new stage is
    sampled over the noise levels that it was trained on.
    """
    settings = read_config(config)
    fit(
        settings,
        data,
        out / "training" / settings.stage,
        start_from=start_from,
        max_seconds=max_seconds,
        progress=progress,
    )
    runs: dict[StageName, Path] = {stage: out / "training" / stage for stage in WEIGHT_FILES}
    runs = {stage: folder for stage, folder in runs.items() if (folder / CHECKPOINT).is_file()}
    known = read_card(out) if (out / CARD).is_file() else None
    return export_model(
        out,
        runs,
        _samplers(settings, known, list(runs)),
        name=out.name,
        description=known.description if known else "",
        data=str(data),
        hardware=hardware(),
    )


def _samplers(
    settings: TrainingConfig, known: ModelCard | None, stages: Sequence[StageName]
) -> dict[StageName, SamplerConfig]:
    """Those of the card that is there; a new stage is sampled over the noise levels that it was trained on."""
    levels = {"sigma_min": settings.noise.sigma_min, "sigma_max": settings.noise.sigma_max}
    if settings.stage == "global-detail":
        levels["sigma_max"] /= 2.0  # the expert takes over in the middle of what it knows
    fresh = FRESH_SAMPLERS | {settings.stage: FRESH_SAMPLERS[settings.stage].model_copy(update=levels)}
    samplers = {
        stage: known.stages[stage].sampler if known and stage in known.stages else fresh[stage] for stage in stages
    }
    if {"global", "global-detail"} <= samplers.keys():  # with the expert, stage 1 goes on to its least noise
        least = {"sigma_min": samplers["global-detail"].sigma_min}
        samplers["global"] = samplers["global"].model_copy(update=least)
    return samplers


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
    extrapolate: bool = False,
    verify: bool = False,
    command: Sequence[str] = (),
) -> RunSummary:
    """Make a twin for every subject of a cohort; resumes the run in `out`, by default named after spec and seed."""
    spec = read_cohort(cohort)
    plan = cascade_plan(model, sampler, steps_global, steps_sr)
    identity = _identity(cohort, spec) | plan.identity
    location = out or _default_location(cohort, spec, identity, standard=plan.standard)
    subjects, n = _recruit(cohort, spec, location, "generate", identity)
    flagged = {f.subject_id for f in check_support(subjects, plan.support, extrapolate)}
    summary = carry_out(
        Plan(
            kind="generate",
            location=location,
            identity=identity,
            facts={"spec": str(spec.path), **plan.facts},
            subjects=subjects,
            n=n,
            load=plan.load,
            command=command,
            flags={s.index: s.subject_id in flagged for s in subjects},
            verify=verify,
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
    """Render a phantom for every subject of a cohort, with its organ masks and the truth behind it."""
    spec = read_cohort(cohort)
    identity = _identity(cohort, spec) | {"layout": layout}
    subjects, n = _recruit(cohort, spec, out, "phantom", identity)
    summary = carry_out(
        Plan(
            kind="phantom",
            location=out,
            identity=identity,
            facts={"spec": str(spec.path), "support": asdict(support_of(spec))},
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
    return summary if layout == "training" else write_preview(summary)


def measure(location: str, executor: Executor, report: Report) -> MeasureSummary:
    """Measure every organ of the finished subjects of a run into measurements.parquet.

    InputError where there is no run, or one without masks.
    """
    folder = open_folder(location)
    cases = run_cases(folder)
    if cases and all(folder.size(case.labels) is None for case in cases):
        raise InputError(f"{location}: the run has no organ masks ({cases[0].labels} and the others are not there)")
    with folder.lock():
        return measure_cohort(cases, folder, FolderReader(folder.location), executor=executor, report=report)


def references() -> list[dict[str, Any]]:
    """The cohorts to compare with that come with the package."""
    facts = ("name", "title", "role", "kind", "n", "segmenter", "source", "licence", "note")
    return [{fact: getattr(reference, fact) for fact in facts} for reference in list_references()]


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
    return replace(summary, preview=f"{summary.location}/{PREVIEW}")


def _caption(s: Subject) -> str:
    return f"{s.subject_id}: {s.sex}, {s.age_years:.0f} y, {s.height_cm:.0f} cm, {s.weight_kg:.0f} kg"
