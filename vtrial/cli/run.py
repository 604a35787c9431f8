"""Commands that make cohorts: generate, phantom, recruit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vtrial.cli.options import (
    AddressOption,
    ExecutorOption,
    GpusOption,
    JsonOption,
    MatchOption,
    NOption,
    OptionalSpecArgument,
    SeedOption,
    SpecArgument,
    ThreadsOption,
    VerifyOption,
    WorkersOption,
    app,
    executor_of,
    local_path,
)
from vtrial.console import Console


@app.command()
def generate(
    spec: OptionalSpecArgument = None,
    n: NOption = None,
    out: Annotated[str | None, typer.Option("--out", help="Run folder or URL; default runs/<spec>-seed<seed>.")] = None,
    seed: SeedOption = 0,
    model: Annotated[str, typer.Option("--model", help="A bundled model's name, or a model folder.")] = "phantom-v1",
    match: MatchOption = None,
    sampler: Annotated[
        Literal["heun", "heun-churn", "dpmpp-2m", "dpmpp-2m-churn", "flow-heun", "flow-stochastic"] | None,
        typer.Option("--sampler", help="Default: the model's own."),
    ] = None,
    steps_global: Annotated[int | None, typer.Option("--steps-global", help="Steps of the first stage.")] = None,
    steps_sr: Annotated[int | None, typer.Option("--steps-sr", help="Steps of the second stage.")] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            "--tile",
            help="Second stage in tiles of so many of the 384 slices, or none. Default: what memory allows.",
        ),
    ] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow bodies unlike the training set.")] = False,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make PET/CT twins of a cohort. The same command again goes on where it stopped.

    Example: vtrial generate cohorts/oncology.csv --n 4
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        machines = executor_of(console, executor, workers, threads_per_worker, gpus_per_worker, address)
        with console.progress() as report:
            summary = pipeline.generate(
                pipeline.Cohort(spec, n, seed, match),
                machines,
                report,
                out=out,
                model=model,
                sampler=sampler,
                steps_global=steps_global,
                steps_sr=steps_sr,
                tile=tile,
                extrapolate=extrapolate,
                verify=verify,
                command=["vtrial", *sys.argv[1:]],
            )
    console.run_ended(summary)


@app.command()
def phantom(
    spec: SpecArgument,
    out: Annotated[str, typer.Option("--out", help="Folder or URL to write to.")],
    n: NOption = None,
    seed: SeedOption = 0,
    layout: Annotated[
        Literal["scans", "training", "autopet"],
        typer.Option("--layout", help="training: as `vtrial train` reads; autopet: as FDG-PET-CT-Lesions is shipped."),
    ] = "scans",
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    threads_per_worker: ThreadsOption = None,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Render ground-truth PET/CT phantoms with organ masks; no network is involved.

    Example: vtrial phantom cohorts/oncology.csv --n 4 --out runs/phantoms
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        machines = executor_of(console, executor, workers, threads_per_worker, gpus_per_worker, address)
        with console.progress() as report:
            summary = pipeline.phantom(
                pipeline.Cohort(spec, n, seed),
                machines,
                report,
                out=out,
                layout=layout,
                verify=verify,
                command=["vtrial", *sys.argv[1:]],
            )
    console.run_ended(summary)


@app.command()
def recruit(
    spec: OptionalSpecArgument = None,
    n: NOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", parser=local_path, help="CSV or Parquet file to write.")] = None,
    match: MatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the subjects of a cohort alone, and say how near they came to the spec.

    Example: vtrial recruit cohorts/oncology.csv --n 100 --out subjects.csv
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        console.result(*pipeline.recruit(pipeline.Cohort(spec, n, seed, match), out))
