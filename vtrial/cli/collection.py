"""The command that takes real PET/CT in: prepare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    local_path,
)
from vtrial.cli.trial import FastestOption, FastOption, ForceOption, WeightsOption, choice_of
from vtrial.console import FAILED, Console, failed_lines

if TYPE_CHECKING:
    from vtrial.pipeline import PrepareSummary

SHOWN = 30  # left-out studies on a terminal


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(metavar="SRC", help="DICOM, FDG-PET-CT-Lesions or nnU-Net raw, or a table.")],
    out: Annotated[str, typer.Option("--out", help="Folder or URL for the training set.")],
    demographics: Annotated[
        Path | None, typer.Option("--demographics", help="Table of sex, age, height, weight; by study or patient.")
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option("--segmenter", help="totalsegmentator (default), a folder, or none.")
    ] = None,
    fast: FastOption = False,
    fastest: FastestOption = False,
    weights: WeightsOption = None,
    force: ForceOption = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Take studies that lack clavicles or sacrum, as long as they are.")
    ] = False,
    tracer: Annotated[
        Literal["fdg", "any"], typer.Option("--tracer", help="any: also other tracers than FDG.")
    ] = "fdg",
    seed: Annotated[int, typer.Option("--seed", help="Of the split into training, validation and test.")] = 0,
    key: Annotated[
        Path | None,
        typer.Option("--key", parser=local_path, help="CSV of which subject is which study. It identifies people."),
    ] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    as_json: JsonOption = False,
) -> None:
    """Make a training set of real PET/CT; the same command again does what is left, also of a collection that grew.

    Example: vtrial prepare /data/FDG-PET-CT-Lesions --demographics patients.csv --out data
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        choice = choice_of(segmenter, fast, fastest, weights, force)
        wanted = pipeline.Wanted(source, demographics, tracer, choice, allow_partial, seed, key)
        machines = executor_of(console, executor, workers, threads_per_worker, gpus_per_worker, address)
        with console.progress() as report:
            summary = pipeline.prepare(wanted, out, machines, report, command=["vtrial", *sys.argv[1:]])
    console.result(vars(summary), _told(summary, key))
    if summary.failures:
        raise SystemExit(FAILED)


def _told(summary: PrepareSummary, key: Path | None) -> str:
    from vtrial.storage import place

    splits = ", ".join(f"{count} {name}" for name, count in summary.splits.items())
    flags = ", ".join(f"{name} {count}" for name, count in summary.flags.items())
    lines = [
        f"{summary.done} of {summary.total} studies are training volumes ({splits}), {summary.new} made now in "
        f"{summary.seconds:.0f} s",
        *([f"  doubtful {flags} (columns flags and notes of subjects.csv)"] if flags else []),
        *failed_lines(summary.failures, "the same command tries them again"),
        *(f"  note     {note}" for note in summary.notes),
        f"  data     {summary.location}",
        f"  look at  {place(summary.location, 'sheet.png')}",
        *_table(summary.left_out, key),
    ]
    return "\n".join(lines)


def _table(left_out: dict[str, str], key: Path | None) -> list[str]:
    """What was left out and why, and where it says which study that is."""
    if not left_out:
        return []
    width = max(map(len, left_out))
    shown = [f"  {name:<{width}}  {why}" for name, why in list(left_out.items())[:SHOWN]]
    rest = [f"  … and {len(left_out) - SHOWN} more"] if len(left_out) > SHOWN else []
    where = f"in {key}" if key else "told by --key FILE"
    return [f"left out {len(left_out)}, all in left_out.csv; which studies they are is {where}", *shown, *rest]
