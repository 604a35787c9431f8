"""The command line's application, and the options that commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vtrial.console import Console

if TYPE_CHECKING:
    from vtrial.execution import Executor

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Whole-body FDG PET/CT digital twins from demographics.",
)

SpecArgument = Annotated[
    str, typer.Argument(help="Cohort of strata or of subjects, CSV or Parquet, or a shipped name.")
]
OptionalSpecArgument = Annotated[
    str | None, typer.Argument(help="Cohort of strata or of subjects, CSV or Parquet, or a shipped name; or --match.")
]
NOption = Annotated[int | None, typer.Option("--n", help="How many subjects; not needed for a table of subjects.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="Workers; default: one a GPU, or one.")]
GpusOption = Annotated[float | None, typer.Option("--gpus-per-worker", help="GPUs a worker; 0.5 lets two share one.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads-per-worker", help="CPU threads; default: shared evenly.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; default: start one here.")]
ExecutorOption = Annotated[Literal["ray", "local"], typer.Option("--executor", help="local: without Ray, one worker.")]
MatchOption = Annotated[str | None, typer.Option("--match", help="Real cohort to match row by row, in place of SPEC.")]
VerifyOption = Annotated[bool, typer.Option("--verify", help="Check the hashes of finished files before going on.")]


def local_path(text: str) -> Path:
    """The path in options that write on this machine alone; `Path` would take a URL for a folder `s3:`."""
    if re.match(r"[a-zA-Z][\w+.-]+:/", text):
        raise typer.BadParameter(
            f"{text} is a URL, and this is written on this machine; give a path, and copy it there afterwards"
        )
    return Path(text)


def executor_of(
    console: Console,
    name: str,
    workers: int | None,
    threads: int | None,
    gpus_per_worker: float | None,
    address: str | None,
) -> Executor:
    """The executor that the options ask for; InputError names every option that makes no sense."""
    check_machines(name, workers, threads, gpus_per_worker, address)
    if name == "local":
        import torch

        from vtrial.execution import LocalExecutor

        gpu = torch.cuda.is_available() and gpus_per_worker != 0
        return LocalExecutor(threads, "cuda" if gpu else "cpu")
    from vtrial.cluster import RayExecutor

    return RayExecutor(workers, threads, gpus_per_worker, address, console.say)


def check_machines(
    name: str | None, workers: int | None, threads: int | None, gpus_per_worker: float | None, address: str | None
) -> None:
    """InputError that names every option of machines that makes no sense; without a `name` any executor will do."""
    from vtrial.records import InputError

    wrong = [
        f"{option} {value:g}: must be {least:g} or more"
        for option, value, least in (
            ("--workers", workers, 1),
            ("--threads-per-worker", threads, 1),
            ("--gpus-per-worker", gpus_per_worker, 0),
        )
        if value is not None and not value >= least
    ]
    if gpus_per_worker is not None and gpus_per_worker > 1 and gpus_per_worker % 1:
        wrong.append(f"--gpus-per-worker {gpus_per_worker:g}: above 1 it must be a whole number")
    if name == "local" and (address is not None or (workers or 1) > 1):
        wrong.append("--executor local has one worker in this process; leave out --workers and --address")
    if wrong:
        raise InputError(wrong)
