"""The command line: parse, then one call. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vtrial.console import FAILED, Console

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


@app.command()
def generate(
    spec: OptionalSpecArgument = None,
    n: NOption = None,
    out: Annotated[str | None, typer.Option("--out", help="Run folder or URL; default runs/<spec>-seed<seed>.")] = None,
    seed: SeedOption = 0,
    model: Annotated[str, typer.Option("--model", help="A bundled model's name, or a model folder.")] = "phantom-v1",
    match: MatchOption = None,
    sampler: Annotated[
        Literal["heun", "heun-churn", "dpmpp-2m"] | None, typer.Option("--sampler", help="Default: the model's own.")
    ] = None,
    steps_global: Annotated[int | None, typer.Option("--steps-global", help="Steps of the first stage.")] = None,
    steps_sr: Annotated[int | None, typer.Option("--steps-sr", help="Steps of the second stage.")] = None,
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

        machines = _executor(console, executor, workers, threads_per_worker, gpus_per_worker, address)
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
        Literal["scans", "training"], typer.Option("--layout", help="training: arrays as `vtrial train` reads them.")
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

        machines = _executor(console, executor, workers, threads_per_worker, gpus_per_worker, address)
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
    out: Annotated[Path | None, typer.Option("--out", help="CSV or Parquet file to write.")] = None,
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


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the bundled models and what they were trained on.

    Example: vtrial models
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        found = pipeline.models()
        told = ["\n".join(f"{key:<12} {_plain(value)}" for key, value in model.items()) for model in found]
        console.result({"models": found}, "\n\n".join(told) or "no model is bundled; train one with `vtrial train`")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML of one stage, such as configs/bundled-global.toml.")],
    data: Annotated[Path, typer.Option("--data", help="Training folder, or a cohort spec: endless phantoms.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder; `--model` of generate takes it.")],
    start_from: Annotated[str | None, typer.Option("--start-from", help="Begin with the weights of a model.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Stop after this time.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit one stage of a model; the same command again goes on from the last checkpoint.

    Example: vtrial train configs/bundled-global.toml --data data --out models/mine
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        def tell(line: dict[str, object]) -> None:
            console.say("  ".join(f"{key} {value}" for key, value in line.items()))

        card = pipeline.train(config, data, out, tell, start_from, None if max_minutes is None else 60.0 * max_minutes)
        steps = {stage: trained.steps for stage, trained in card.stages.items()}
        console.result({"model": str(out), "steps": steps}, f"model {out}: steps {steps}")


@app.command()
def fidelity(
    model: Annotated[str, typer.Argument(help="A bundled model's name, or a model folder.")] = "phantom-v1",
    level: Annotated[
        Literal["global", "full"], typer.Option("--level", help="Stage 1 alone, or the cascade.")
    ] = "global",
    each_sex: Annotated[int, typer.Option("--each-sex", min=3, help="Women, and men.")] = 200,
    spec: Annotated[str, typer.Option("--spec", help="Cohort of the held-out phantoms.")] = "autopet-test",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the phantoms; training used others.")] = 90_001,
    keep: Annotated[Path | None, typer.Option("--keep", help="Folder of measured rows, to go on from.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the model's card.")] = False,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="PNG of phantoms beside twins to draw.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's twins against held-out phantoms with the same demographics.

    Example: vtrial fidelity phantom-v1 --level global --each-sex 200
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial.fidelity import as_table, assess

        table = assess(model, level, each_sex, spec, seed, keep=keep, write=write, sheet=sheet, say=console.say)
        console.result(table, as_table(table))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: versions, torch, cores, memory, disk, Ray and the bundled model; with remedies.

    Example: vtrial doctor
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial.doctor import examine

        findings = examine()
    console.result({"findings": [vars(f) for f in findings]}, "\n".join(f.line() for f in findings))
    if not all(f.ok for f in findings):
        raise SystemExit(FAILED)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    what: Annotated[Literal["generate", "phantom"], typer.Argument(help="What to measure.")] = "generate",
    spec: Annotated[str, typer.Option("--spec", help="Cohort to draw from.")] = "oncology",
    n: Annotated[int, typer.Option("--n", help="Subjects; the first ones warm up.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Measure whole subjects: seconds each in steady state, and peak memory over all processes.

    Further options go to the command measured. Example: vtrial bench generate --n 4 --workers 2
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial.bench import measure

        result = measure(what, spec, n, context.args)
        console.result(
            vars(result), "\n".join(f"{key.replace('_', ' '):<28} {value}" for key, value in vars(result).items())
        )


def _plain(value: object) -> str:
    """A value of a card for people: `age_years 18 to 95; …`."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, tuple) and all(isinstance(part, float) for part in value):
        return " to ".join(f"{part:g}" for part in value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _executor(
    console: Console,
    name: str,
    workers: int | None,
    threads: int | None,
    gpus_per_worker: float | None,
    address: str | None,
) -> Executor:
    from vtrial.records import InputError

    wrong = [
        f"{option} {value:g}: must be {least:g} or more"
        for option, value, least in (
            ("--workers", workers, 1),
            ("--threads-per-worker", threads, 1),
            ("--gpus-per-worker", gpus_per_worker, 0),
        )
        if value is not None and value < least
    ]
    if gpus_per_worker is not None and gpus_per_worker > 1 and gpus_per_worker % 1:
        wrong.append(f"--gpus-per-worker {gpus_per_worker:g}: above 1 it must be a whole number")
    if name == "local" and (address is not None or (workers or 1) > 1):
        wrong.append("--executor local has one worker in this process; leave out --workers and --address")
    if wrong:
        raise InputError(wrong)
    if name == "local":
        import torch

        from vtrial.execution import LocalExecutor

        gpu = torch.cuda.is_available() and gpus_per_worker != 0
        return LocalExecutor(threads, "cuda" if gpu else "cpu")
    from vtrial.cluster import RayExecutor

    return RayExecutor(workers, threads, gpus_per_worker, address, console.say)


def main() -> None:
    """The `vtrial` command."""
    app()


if __name__ == "__main__":
    main()
