"""Commands about models and machines: models, train, fidelity, doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vtrial.cli.options import JsonOption, app
from vtrial.console import FAILED, Console

if TYPE_CHECKING:
    from vtrial.diffusion.weights import ModelCard
    from vtrial.segmentation import SegmenterCard


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
    config: Annotated[Path, typer.Argument(help="TOML of one stage or of a segmenter; see configs/.")],
    data: Annotated[Path, typer.Option("--data", help="Training folder, or a cohort spec to render phantoms of.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for `--model` or `--segmenter`.")],
    start_from: Annotated[str | None, typer.Option("--start-from", help="Begin with the weights of a model.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Train for this long.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit one stage of a model, or a segmenter; the same command again goes on from the last checkpoint.

    A segmenter's phantoms are rendered once and stored; it is judged on others when its training ends.

    Example: vtrial train configs/bundled-global.toml --data data --out models/mine
    """
    console = Console(as_json=as_json)
    with console.guard():
        from vtrial import pipeline

        def tell(line: dict[str, object]) -> None:
            console.say("  ".join(f"{key} {value}" for key, value in line.items()))

        card = pipeline.train(config, data, out, tell, start_from, None if max_minutes is None else 60.0 * max_minutes)
        console.result(*_trained(out, card))


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


def _plain(value: object) -> str:
    """A value of a card for people: `age_years 18 to 95; …`."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, tuple) and all(isinstance(part, float) for part in value):
        return " to ".join(f"{part:.4g}" for part in value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
