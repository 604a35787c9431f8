"""Commands that judge cohorts: measure, references."""

from __future__ import annotations

from typing import Annotated

import typer

from vtrial.cli.options import (
    AddressOption,
    ExecutorOption,
    JsonOption,
    ThreadsOption,
    WorkersOption,
    app,
    executor_of,
)
from vtrial.console import FAILED, Console

RunArgument = Annotated[str, typer.Argument(help="Folder or URL of a run.")]


@app.command()
def measure(
    run: RunArgument,
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
            summary = pipeline.measure(run, machines, report)
    lines = [f"{summary.done} of {summary.total} subjects are measured, {summary.new} now in {summary.seconds:.0f} s"]
    lines += [f"  failed: {subject}: {error}" for subject, error in list(summary.failures.items())[:10]]
    if len(summary.failures) > 10:
        lines.append(f"  … and {len(summary.failures) - 10} more; see the column missing of the table")
    console.result(vars(summary), "\n".join([*lines, f"  table    {summary.location}"]))
    if summary.failures:
        raise SystemExit(FAILED)


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
