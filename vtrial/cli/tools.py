"""Commands about models and machines: models, train, fidelity, doctor, bench."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vtrial.cli.options import (
    AddressOption,
    GpusOption,
    JsonOption,
    WorkersOption,
    app,
    check_machines,
    executor_of,
    local_path,
)
from vtrial.console import FAILED, Console

if TYPE_CHECKING:
    from vtrial.diffusion.weights import ModelCard
    from vtrial.pipeline.training import Trainer
    from vtrial.segmentation import SegmenterCard
    from vtrial.training import TrainingConfig
    from vtrial.training.estimate import Estimate


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the bundled models and segmenters, and what they were trained on.

    Example: vtrial models
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        found = {"models": pipeline.models(), "segmenters": pipeline.segmenters()}
        told = [_paragraph(kind.removesuffix("s"), each) for kind, some in found.items() for each in some]
        console.result(found, "\n\n".join(told) or "no model is bundled; train one with `vtrial train`")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML of one stage or of a segmenter; see configs/.")],
    data: Annotated[Path, typer.Option("--data", help="Training folder, or a cohort spec to render phantoms of.")],
    out: Annotated[Path, typer.Option("--out", parser=local_path, help="Folder for `--model` or `--segmenter`.")],
    start_from: Annotated[str | None, typer.Option("--start-from", help="Begin with the weights of a model.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Train for this long.")] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", min=0.005, max=0.28, help="Relative length of the weights' average.")
    ] = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    executor: Annotated[
        Literal["ray", "local"] | None,
        typer.Option("--executor", help="Default: ray for several workers or a cluster, else this process."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it will take: memory, time.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fit one stage of a model, or a segmenter; the same command again goes on from the last checkpoint.

    Several workers share each batch and train as one would; those that die are replaced. A segmenter's phantoms are
    rendered once and stored; it is judged on others when its training ends.

    Example: vtrial train configs/bundled-global.toml --data data --out models/mine
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline
        from vtrial.records import InputError

        check_machines(executor, workers, None, gpus_per_worker, address)
        if max_minutes is not None and not 0.0 <= max_minutes < math.inf:
            raise InputError(f"--max-minutes {max_minutes:g}: must be 0 or more; leave it out to train to the end")
        if dry_run:
            import torch

            from vtrial.pipeline.training import check_average, foresee
            from vtrial.training.checkpoint import stage_to_start_from

            device = torch.device("cpu") if gpus_per_worker == 0 else None
            settings, found = foresee(config, data, out, workers or 1, device)
            check_average(config, settings, ema)
            if start_from is not None:
                stage_to_start_from(settings, start_from)
            console.result(*_foreseen(settings, found, workers or 1))
            return

        def tell(line: dict[str, object]) -> None:
            console.say("  ".join(f"{key} {_plain(value)}" for key, value in line.items()))

        seconds = None if max_minutes is None else 60.0 * max_minutes
        trainer = _trainer(console, executor, workers, gpus_per_worker, address)
        card = pipeline.train(config, data, out, tell, start_from, seconds, trainer, ema)
        console.result(*_trained(out, card))


def _trainer(
    console: Console, executor: str | None, workers: int | None, gpus_per_worker: float | None, address: str | None
) -> Trainer | None:
    """What trains: Ray for several workers, GPUs or machines, or where it is asked for; None: this process, as usual.

    Ray takes seconds to start, and longer to train a first step: one worker does not need it.
    """
    import os
    from functools import partial

    import torch

    shares = torch.cuda.device_count() if gpus_per_worker != 0 else 1
    several = (workers or shares) > 1 or bool(address or os.environ.get("RAY_ADDRESS"))
    name = executor or ("ray" if several else "local")
    machines = executor_of(console, name, workers, None, gpus_per_worker, address)
    if name == "ray":
        from vtrial.cluster import RayExecutor
        from vtrial.cluster.training import train_on_ray

        assert isinstance(machines, RayExecutor)
        return partial(train_on_ray, machines)
    if executor is None and workers is None and gpus_per_worker is None:
        return None
    from vtrial.pipeline.training import train_here

    return partial(train_here, device=torch.device(machines.start().device))


@app.command()
def fidelity(
    model: Annotated[str, typer.Argument(help="A bundled model's name, or a model folder.")] = "phantom-v1",
    level: Annotated[
        Literal["global", "full"], typer.Option("--level", help="Stage 1 alone, or the cascade.")
    ] = "global",
    each_sex: Annotated[int, typer.Option("--each-sex", min=3, help="Women, and men.")] = 200,
    spec: Annotated[str, typer.Option("--spec", help="Cohort of the held-out phantoms.")] = "autopet-test",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the phantoms; training used others.")] = 90_001,
    keep: Annotated[
        Path | None, typer.Option("--keep", parser=local_path, help="Folder of measured rows, to go on from.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the model's card.")] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", parser=local_path, help="PNG of phantoms beside twins to draw.")
    ] = None,
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
    what: Annotated[Literal["generate", "phantom", "segment"], typer.Argument(help="What to measure.")] = "generate",
    spec: Annotated[str, typer.Option("--spec", help="Cohort to draw from.")] = "oncology",
    n: Annotated[int, typer.Option("--n", help="Subjects; the first ones warm up.")] = 4,
    segmenter: Annotated[str, typer.Option("--segmenter", help="Which is measured by `segment`.")] = "phantom-v1",
    as_json: JsonOption = False,
) -> None:
    """Measure whole subjects: seconds each in steady state, and peak memory over all processes.

    `segment` takes phantoms' CTs in turn through the resident segmenter and the stock API. Further options go to the
    command measured. Example: vtrial bench generate --n 4 --workers 2
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial.bench import BenchResult, SegmentBench, measure, measure_segmenter

        result: BenchResult | SegmentBench
        if what == "segment":
            result = measure_segmenter(segmenter, spec, n)
        else:
            result = measure(what, spec, n, context.args)
        console.result(
            vars(result), "\n".join(f"{key.replace('_', ' '):<28} {value}" for key, value in vars(result).items())
        )


def _trained(out: Path, card: ModelCard | SegmenterCard) -> tuple[dict[str, object], str]:
    """What was trained, for machines and for people."""
    from vtrial.segmentation import SegmenterCard

    if not isinstance(card, SegmenterCard):
        steps = {stage: trained.steps for stage, trained in card.stages.items()}
        return {"model": str(out), "steps": steps}, f"model {out}: steps {steps}"
    lines = [f"segmenter {out}: {card.training_data}"]
    for name, dice in card.dice.items():
        bias = f"{card.volume_bias[name]:+.1f} %" if name in card.volume_bias else "in nobody"
        lines.append(f"{name:<24} Dice {dice:.3f}  volume {bias}")
    found: dict[str, object] = {"training": card.training_data, "dice": card.dice, "volume_bias": card.volume_bias}
    return {"segmenter": str(out), **found}, "\n".join(lines)


def _foreseen(config: TrainingConfig, found: Estimate, workers: int) -> tuple[dict[str, object], str]:
    """What a training will take, for machines and for people."""
    seconds, memory = found.seconds, {**vars(found.memory), "total": found.memory.total}
    document = {
        "config": config.model_dump(mode="json"),
        "workers": workers,
        "parameters": found.parameters,
        "flops_per_step": found.flops,
        "memory_bytes": memory,
        "measured_on": found.device,
        "measured_examples": found.timed_examples,
        "seconds_per_step": None if seconds is None else seconds.step,
        "seconds_of": None if seconds is None else vars(seconds),
        "steps_left": found.steps_left,
        "seconds_left": found.seconds_left,
    }
    told = {
        "parameters": f"{found.parameters / 1e6:.3g} M",
        "a step": f"{found.flops / 1e12:.3g} TFLOP, forwards and backwards, over {workers} worker(s)",
        "memory": f"{found.memory.total / 2**30:.2f} GiB a worker: "
        + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in vars(found.memory).items() if size),
        "speed": "not measured: this machine's memory is too small"
        if seconds is None
        else f"{seconds.step:.3g} s a step (gradients {seconds.learning:.3g}, update {seconds.update:.3g}, meanwhile "
        f"the batch {seconds.batch:.3g}), from {found.timed_examples} example(s) on {found.device}",
        "steps left": str(found.steps_left),
        "time left": "unknown" if found.seconds_left is None else _duration(found.seconds_left),
    }
    lines = [f"{key} = {value}" for key, value in _flat(document["config"])]
    return document, "\n".join([*lines, "", *(f"{key:<11} {value}" for key, value in told.items())])


def _duration(seconds: float) -> str:
    unit, name = next((u for u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{seconds / unit:.3g} {name}"


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """A nested document as (dotted name, JSON) pairs."""
    if not isinstance(value, dict):
        return [(name, json.dumps(value))]
    return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else key)]


def _paragraph(kind: str, card: dict[str, Any]) -> str:
    """A model or segmenter for people, a line for each of its facts."""
    return "\n".join([kind, *(f"  {key:<12} {_plain(value)}" for key, value in card.items())])


def _plain(value: object) -> str:
    """A value for people: `age_years 18 to 95; …`."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, tuple) and all(isinstance(part, float) for part in value):
        return " to ".join(map(_plain, value))
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
