"""Commands that judge cohorts: segment, measure, report, validate, references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtrial.cli.options import (
    AddressOption,
    ExecutorOption,
    GpusOption,
    JsonOption,
    ThreadsOption,
    WorkersOption,
    app,
    executor_of,
)
from vtrial.console import FAILED, Console, failed_lines

if TYPE_CHECKING:
    from vtrial.pipeline import Choice, Verdict

ScansArgument = Annotated[str, typer.Argument(metavar="RUN|DIR", help="Folder or URL of a run, or of real PET/CT.")]
RunArgument = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; default: the newest under runs/.")]
RealOption = Annotated[str, typer.Option("--real", help="A published reference, table, run, real or prepared PET/CT.")]
ByOption = Annotated[str, typer.Option("--by", help="Strata: all, sex, age_group, bmi_group, diagnosis; * crosses.")]
SettingsOption = Annotated[Path | None, typer.Option("--settings", help="TOML such as configs/analysis.toml.")]
PairsOption = Annotated[bool, typer.Option("--match", help="Compare twins and reference subjects as pairs.")]
SegmenterOption = Annotated[
    str | None,
    typer.Option("--segmenter", help="totalsegmentator, a bundled one, or a folder; default: phantom-v1 for runs."),
]
AlsoOption = Annotated[
    list[str] | None, typer.Option("--also", help="A further cohort, as for --real: analysis of variance. Repeatable.")
]
TrainOption = Annotated[
    str | None, typer.Option("--train", help="The model's training set (phantom --layout training): finds copies.")
]
MasksOption = Annotated[str | None, typer.Option("--segmenter", help="Whose masks, where there are several.")]
FastOption = Annotated[bool, typer.Option("--fast", help="TotalSegmentator's 3 mm model.")]
FastestOption = Annotated[bool, typer.Option("--fastest", help="TotalSegmentator's 6 mm step.")]
WeightsOption = Annotated[str | None, typer.Option("--weights", help="Folder of TotalSegmentator's weights.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Allow a segmenter for phantoms on real scans.")]
OutOption = Annotated[
    str | None, typer.Option("--out", help="Where work on real scans goes; default runs/real-<name of the folder>.")
]


@app.command()
def segment(
    scans: ScansArgument,
    segmenter: SegmenterOption = None,
    fast: FastOption = False,
    fastest: FastestOption = False,
    weights: WeightsOption = None,
    force: ForceOption = False,
    out: OutOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    as_json: JsonOption = False,
) -> None:
    """Draw organ masks of a run, or of a folder of real PET/CT. The same command again does what is left.

    Example: vtrial segment runs/oncology-seed0
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline
        from vtrial.storage import place

        choice = choice_of(segmenter, fast, fastest, weights, force)
        machines = executor_of(console, executor, workers, threads_per_worker, gpus_per_worker, address)
        with console.progress() as report:
            summary = pipeline.segment(scans, machines, report, choice=choice, out=out)
    console.steps_ended("segmented", summary, f"  masks    {place(summary.location, summary.masks)}")


@app.command()
def measure(
    scans: ScansArgument,
    segmenter: MasksOption = None,
    out: OutOption = None,
    workers: WorkersOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    as_json: JsonOption = False,
) -> None:
    """Measure the organs of a run: volume, HU and SUV of each. The same command again does what is left.

    Example: vtrial measure runs/phantoms
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        machines = executor_of(console, executor, workers, threads_per_worker, 0.0, address)
        with console.progress() as report:
            summary = pipeline.measure(scans, machines, report, segmenter=segmenter, out=out)
    console.steps_ended("measured", summary, f"  table    {summary.location}")


@app.command()
def report(
    run: RunArgument = None,
    real: RealOption = "autopet-2025",
    by: ByOption = "sex",
    settings: SettingsOption = None,
    match: PairsOption = False,
    also: AlsoOption = None,
    train: TrainOption = None,
    segmenter: MasksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a measured run with a reference: comparisons.parquet, report.html and report.json.

    Example: vtrial report runs/oncology-seed0 --by sex,age_group
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        question = pipeline.Question(real, by, settings, match, tuple(also or ()), train)
        command = ["vtrial", *sys.argv[1:]]
        verdict = pipeline.report(run, question, console.progress, segmenter=segmenter, command=command)
    _told(console, verdict)


@app.command()
def validate(
    run: RunArgument = None,
    real: RealOption = "autopet-2025",
    segmenter: SegmenterOption = None,
    fast: FastOption = False,
    fastest: FastestOption = False,
    weights: WeightsOption = None,
    force: ForceOption = False,
    by: ByOption = "sex",
    settings: SettingsOption = None,
    match: PairsOption = False,
    also: AlsoOption = None,
    train: TrainOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    as_json: JsonOption = False,
) -> None:
    """Say how like a run is to a real cohort: segments, measures, compares and reports what is not done yet.

    Example: vtrial validate runs/oncology-seed0 --by sex,age_group
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        choice = choice_of(segmenter, fast, fastest, weights, force)
        machines = pipeline.Machines(
            segment=executor_of(console, executor, workers, threads_per_worker, gpus_per_worker, address),
            measure=executor_of(console, executor, workers, threads_per_worker, 0.0, address),
        )
        question = pipeline.Question(real, by, settings, match, tuple(also or ()), train)
        command = ["vtrial", *sys.argv[1:]]
        verdict = pipeline.validate(run, machines, console.progress, question, choice=choice, command=command)
    _told(console, verdict)


@app.command()
def references(as_json: JsonOption = False) -> None:
    """List the published cohorts to compare with: source, size, licence.

    Example: vtrial references
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        found = pipeline.references()
        told = ["\n".join(f"{key:<10} {value}" for key, value in row.items() if value) for row in found]
        console.result({"references": found}, "\n\n".join(told))


def choice_of(segmenter: str | None, fast: bool, fastest: bool, weights: str | None, force: bool) -> Choice:
    """The segmenter that the options ask for; InputError where they contradict each other."""
    from vtrial.pipeline import Choice
    from vtrial.records import InputError

    if fast and fastest:
        raise InputError("--fast and --fastest: give one of them")
    return Choice(segmenter, "fast" if fast else "fastest" if fastest else None, weights, force)


def _told(console: Console, verdict: Verdict) -> None:
    """A verdict, its cells in counts and where the report is; code 1 if subjects failed."""
    counts = ", ".join(f"{count} {word}" for word, count in verdict.counts.items() if count)
    lines = [
        *failed_lines(verdict.failures, "see the report"),
        verdict.headline,
        f"  verdict  {verdict.verdict}" + ("" if verdict.new else " (nothing was left to do)"),
        f"  cells    {counts}",
        *([f"  so far   {verdict.so_far}"] if verdict.so_far else []),
        *([f"  copies   {verdict.copies}"] if verdict.copies else []),
        f"  table    {verdict.table}",
        f"  report   {verdict.report}",
    ]
    console.result(vars(verdict), "\n".join(lines))
    if verdict.failures:
        raise SystemExit(FAILED)
