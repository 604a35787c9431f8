"""What a training will take: counted, measured, and told without writing anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.blobs import tiny, write_blobs
from vtrial.cli import app
from vtrial.diffusion.denoiser import Denoiser, Scaling
from vtrial.diffusion.weights import read_card
from vtrial.training import Share, StoredVolumes, TrainingConfig
from vtrial.training.batches import make_batch
from vtrial.training.checkpoint import new_state
from vtrial.training.config import WatchConfig
from vtrial.training.estimate import estimate
from vtrial.training.loop import learn

CPU = torch.device("cpu")
SMOKE = {"global": "smoke-global", "super-resolution": "smoke-super-resolution"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs", 3, (64, 64, 96))


def small(stage: str, **changes: object) -> TrainingConfig:
    return tiny(stage, **{"data": {"patch_shape": (16, 16, 32), "phases": 2}, **changes})


@pytest.mark.parametrize("stage", SMOKE)
def test_counts_are_those_of_the_network(stage: str, data: Path) -> None:
    config, source = small(stage, microbatch=2), StoredVolumes(data)
    found = estimate(config, source, 0, 1, CPU)
    denoiser = Denoiser(config.stage_config(Scaling(), Scaling()))
    assert found.parameters == sum(p.numel() for p in denoiser.parameters())
    # a kernel of a full-size level is used once a voxel forwards and, but for the input's, twice backwards
    voxels = make_batch(config, source, 1, range(1)).target[0, 0].numel() // config.network.patch**3
    kernels = [p.numel() for n, p in denoiser.named_parameters() if n.endswith("conv0.weight") and p.shape[0] == 8]
    assert found.flops > 4 * 3 * 2 * voxels * sum(kernels)
    twice = estimate(config.model_copy(update={"batch": 8}), source, 0, 1, CPU)
    assert twice.flops == 2 * found.flops and twice.memory.activations == found.memory.activations
    assert twice.memory.batches == 2 * found.memory.batches


@pytest.mark.parametrize("stage", SMOKE)
def test_activations_are_what_a_step_allocates(stage: str, data: Path) -> None:
    config, source = small(stage), StoredVolumes(data)
    state = new_state(config, config.stage_config(Scaling(), Scaling()), source.support, CPU)
    state.step = 1
    batch = make_batch(config, source, 1)
    learn(config, state, batch, Share())  # caches of kernels
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        learn(config, state, batch, Share())
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    memory = estimate(config, source, 0, 1, CPU).memory
    assert memory.activations == pytest.approx(live.max() - memory.gradients, rel=0.25)


def test_workers_share_the_batch_and_nothing_else(data: Path) -> None:
    config, source = small("global"), StoredVolumes(data)
    one, two = (estimate(config, source, 0, workers, CPU) for workers in (1, 2))
    assert two.flops == one.flops and two.memory.batches == one.memory.batches // 2
    assert two.memory.exchange == two.memory.weights and one.memory.exchange == 0
    assert two.memory.volumes == one.memory.volumes == 3 * 2 * 2 * 2 * 16 * 16 * 24
    assert two.memory.activations < one.memory.activations
    few = StoredVolumes(data, memory=1000)
    assert estimate(config, few, 0, 1, CPU).memory.volumes == 1000, "no more than are kept"


def test_muon_and_averages_are_counted(data: Path) -> None:
    source = StoredVolumes(data)
    adam = estimate(small("global"), source, 0, 1, CPU).memory
    muon = estimate(small("global", optimizer={"matrix_lr": 0.02}, ema=(0.1,)), source, 0, 1, CPU).memory
    assert adam.optimizer == 2 * adam.weights and adam.averages == 2 * adam.weights
    assert adam.weights < muon.optimizer < adam.optimizer and muon.averages == muon.weights


def test_an_expert_ends_on_whole_volumes(data: Path) -> None:
    patches = small("global-detail", data={"patch_shape": (8, 8, 8), "phases": 2}, steps=10)
    ending = patches.model_copy(update={"data": patches.data.model_copy(update={"whole_after": 6})})
    one, other = (estimate(config, StoredVolumes(data), 0, 1, CPU) for config in (patches, ending))
    assert one.flops == other.flops
    assert other.memory.activations > one.memory.activations, "one whole volume is more than four patches here"
    assert other.seconds_left != pytest.approx(10 * other.seconds.step, rel=1e-6)  # type: ignore[union-attr]
    past = estimate(ending, StoredVolumes(data), 7, 1, CPU)
    assert past.steps_left == 3 and past.flops != one.flops


def test_what_has_no_room_is_not_tried(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrial.training.estimate.total_memory_bytes", lambda: 1000)
    found = estimate(small("global"), StoredVolumes(data), 0, 1, CPU)
    assert found.seconds is None and found.seconds_left is None and found.memory.total > 1000


@pytest.mark.parametrize("stage", SMOKE)
def test_time_is_that_of_a_part_scaled_to_the_step(stage: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[[], object]] = []

    def half_a_second(device: torch.device, action: Callable[[], object]) -> float:
        calls.append(action)
        action()
        return 0.5

    config, source = small(stage, steps=30, batch=12), StoredVolumes(data)
    example = estimate(config, source, 0, 1, CPU).flops / 12
    monkeypatch.setattr("vtrial.training.estimate._clocked", half_a_second)
    monkeypatch.setattr("vtrial.training.estimate.TIMED_FLOPS", 4.5 * example)
    for done, workers, scale in ((0, 1, 3.0), (10, 2, 1.5)):
        found = estimate(config, source, done, workers, CPU)
        assert found.timed_examples == 4 and found.seconds is not None
        assert vars(found.seconds) == {"learning": scale * 0.5, "update": 0.5, "batch": scale * 0.5}
        assert found.seconds_left == pytest.approx((30 - done) * (scale * 0.5 + 0.5))
    monkeypatch.setattr("vtrial.training.estimate.PATIENCE_S", 0.1)
    before = len(calls)
    estimate(config, source, 0, 1, CPU)
    assert len(calls) - before == 4, "a first pass that takes long is the measurement"


def test_the_command_tells_and_writes_nothing(data: Path, tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "model"
    command = ["train", str(repository / "configs/smoke-global.toml"), "--data", str(data), "--out", str(out)]
    people = CliRunner().invoke(app, [*command, "--dry-run", "--workers", "2"])
    assert people.exit_code == 0, people.output
    for words in ("noise.p_mean = 1.0", "parameters", "TFLOP", "activations", "2 worker(s)", "time left"):
        assert words in people.output
    machine = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    told = json.loads(machine.stdout)
    assert told["config"]["stage"] == "global" and told["steps_left"] == 20 and told["seconds_left"] > 0.0
    assert told["memory_bytes"]["total"] == sum(v for k, v in told["memory_bytes"].items() if k != "total")
    assert list(tmp_path.iterdir()) == []


def test_what_is_trained_already_is_not_told_again(data: Path, tmp_path: Path, repository: Path) -> None:
    config = repository / "configs/smoke-global.toml"
    command = ["train", str(config), "--data", str(data), "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    told = json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)
    assert told["steps_left"] == 0 and told["seconds_left"] == 0.0
    otherwise_sampled = tmp_path / "sampled.toml"  # what a card begins with has no part in training
    otherwise_sampled.write_text('sampler = { name = "heun", steps = 50 }\n' + config.read_text())
    went_on = CliRunner().invoke(app, ["train", str(otherwise_sampled), *command[2:]])
    assert went_on.exit_code == 0, went_on.output
    assert read_card(tmp_path).stages["global"].sampler.steps == 32, "a card that is there keeps its own"
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("seed = 1", "seed = 7"))
    refused = CliRunner().invoke(app, ["train", str(other), *command[2:], "--dry-run"])
    assert refused.exit_code == 2 and "seed" in refused.output


def test_the_guide_tells_how_often_the_error_is_measured(repository: Path) -> None:
    guide = (repository / "docs/train-your-own.md").read_text(encoding="utf-8")
    usual = WatchConfig()
    assert f"each {usual.validate_steps} steps" in guide and usual.sample_steps == 0
    assert "pictures with `watch.sample_steps`" in guide


def test_options_that_make_no_sense_are_refused(data: Path, tmp_path: Path, repository: Path) -> None:
    command = [
        "train",
        str(repository / "configs/smoke-global.toml"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "m"),
    ]
    wrong = CliRunner().invoke(app, [*command, "--executor", "local", "--workers", "2"])
    assert wrong.exit_code == 2 and "--executor local" in wrong.output
    segmenter = str(repository / "configs/segmenter-phantom-v1.toml")
    wrong = CliRunner().invoke(app, ["train", segmenter, *command[2:], "--executor", "local", "--workers", "1"])
    assert wrong.exit_code == 2 and "one process" in wrong.output
    assert not (tmp_path / "m").exists()
