"""Training on Ray Train: the model that one process would make, and workers that are killed and replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from engine import ray_cluster  # noqa: F401
from typer.testing import CliRunner

from tests.blobs import tiny, write_blobs
from tests.test_training_workers import side_by_side
from vtrial.cli import app
from vtrial.course import Line
from vtrial.execution import CannotGoOn
from vtrial.records import InputError
from vtrial.training import Job, Share, TrainingConfig, held, train
from vtrial.training.checkpoint import CHECKPOINT, read_checkpoint

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = write_blobs(tmp_path_factory.mktemp("data") / "blobs", 4)
    table = pd.read_parquet(folder / "subjects.parquet")
    table["split"] = ["train", "validation", "train", "train"]
    table.to_parquet(folder / "subjects.parquet")
    return folder


def config_of(**changes: object) -> TrainingConfig:
    return tiny("global", **{"watch": {"validate_steps": 10}, "steps": 20, "checkpoint_steps": 5, **changes})


def on_ray(
    config: TrainingConfig, data: Path, out: Path, workers: int, hear: object = None
) -> tuple[list[Line], list[str]]:
    from vtrial.cluster import RayExecutor
    from vtrial.cluster.training import train_on_ray

    lines: list[Line] = []
    said: list[str] = []

    def progress(line: Line) -> None:
        lines.append(line)
        if hear is not None:
            hear(line)  # type: ignore[operator]

    train_on_ray(RayExecutor(workers, 1, 0.0, say=said.append), Job(config, data, out), progress)
    return lines, said


def assert_equal_runs(one: Path, other: Path, within: float) -> None:
    a, b = (read_checkpoint(folder / CHECKPOINT) for folder in (one, other))
    assert a["step"] == b["step"]
    pairs = [(a["denoiser"], b["denoiser"]), *((average, b["ema"][length]) for length, average in a["ema"].items())]
    for mine, theirs in pairs:
        for name, value in mine.items():
            assert torch.allclose(value, theirs[name], atol=within, rtol=0.0), name


def test_two_workers_on_ray_train_as_one_process(data: Path, tmp_path: Path) -> None:
    config = config_of()
    alone: list[Line] = []
    train(config, data, tmp_path / "alone", progress=alone.append)
    lines, said = on_ray(config, data, tmp_path / "ray", 2)
    assert_equal_runs(tmp_path / "alone", tmp_path / "ray", 1e-3)
    assert [line["step"] for line in lines if "loss" in line] == list(range(2, 21, 2))
    for name in ("loss", "validation_error"):
        mine, theirs = ([line[name] for line in told if name in line] for told in (alone, lines))
        assert mine and theirs == pytest.approx(mine, abs=1e-4)
    assert {line["workers"] for line in lines if "loss" in line} == {2}
    assert said == []  # this Ray was there before
    assert not (tmp_path / "ray/.ray").exists()


def undisturbed(rank: int, world: int, config: TrainingConfig, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}-group", rank=rank, world_size=world)
    train(config, data, out, share=Share(rank, world))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(data: Path, tmp_path: Path) -> None:
    config = config_of(steps=200, checkpoint_steps=20, watch={"validate_steps": 100})
    killed: list[int] = []

    def kill_one(line: Line) -> None:
        if "loss" in line and int(str(line["step"])) >= 50 and not killed:
            killed.extend(_workers())
            os.kill(killed[0], signal.SIGKILL)

    lines, said = on_ray(config, data, tmp_path / "killed", 2, kill_one)
    assert len(killed) == 2 and len([text for text in said if "replaced" in text]) == 1, said
    side_by_side(undisturbed, 2, config, data, tmp_path / "whole")
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed", 0.0)
    steps = [json.loads(text)["step"] for text in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 201, 2))
    begun = {line["begun"] for line in lines if "loss" in line}
    assert len(begun) == 2 and max(begun) % 20 == 0  # type: ignore[type-var, operator]


def _workers() -> list[int]:
    """Process ids of Ray Train's workers that belong to this test."""
    import psutil

    own = psutil.Process().children(recursive=True)
    return [p.pid for p in own if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_workers_that_fail_each_time_end_the_training(data: Path, tmp_path: Path) -> None:
    config = config_of(steps=40)
    train(config.model_copy(update={"steps": 5}), data, tmp_path / "run")
    # sound for the driver, which reads the beginnings of files, but nothing can be learned from it
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/suv").iterdir():
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(CannotGoOn, match=r"before they reach the next checkpoint.*20 steps were skipped"):
        on_ray(config, tmp_path / "data", tmp_path / "run", 1)
    assert read_checkpoint(tmp_path / "run" / CHECKPOINT)["step"] == 5


def test_what_is_finished_needs_no_workers(data: Path, tmp_path: Path) -> None:
    train(config_of(steps=2), data, tmp_path)
    assert on_ray(config_of(steps=2), data, tmp_path, 2) == ([], [])


def test_what_is_not_sound_is_found_before_ray_starts(data: Path, tmp_path: Path) -> None:
    config = config_of()
    with pytest.raises(InputError, match="elsewhere"):
        on_ray(config, tmp_path / "elsewhere", tmp_path / "run", 2)
    train(config.model_copy(update={"steps": 1}), data, tmp_path / "run")
    with pytest.raises(InputError, match="seed"):
        on_ray(config.model_copy(update={"seed": 9}), data, tmp_path / "run", 2)
    with held(tmp_path / "run"), pytest.raises(InputError, match="another vtrial"):
        on_ray(config, data, tmp_path / "run", 2)
    other = write_blobs(tmp_path / "other", 2)
    with pytest.raises(InputError, match="other data"):
        on_ray(config, other, tmp_path / "run", 2)
    assert not (tmp_path / "run/.ray").exists()


def test_the_command_trains_on_ray(data: Path, tmp_path: Path, repository: Path) -> None:
    config = tmp_path / "config.toml"
    text = (repository / "configs/smoke-global.toml").read_text()
    config.write_text(text.replace("patch = 4", "patch = 2").replace("steps = 20", "steps = 6", 1))
    command = ["train", str(config), "--data", str(data), "--out", str(tmp_path / "m"), "--json"]
    result = CliRunner().invoke(app, [*command, "--executor", "ray", "--workers", "1", "--gpus-per-worker", "0"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == {"global": 6}
