"""What is looked at and kept while training: held-out error, pictures, checkpoints, averages of any length."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.blobs import tiny, write_blobs
from vtrial.cli import app
from vtrial.diffusion.ema import PowerEma, Profile, blend, gamma_of, products
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import load_weights
from vtrial.records import InputError
from vtrial.training import Share, StoredVolumes, TrainingConfig, export_model, train
from vtrial.training.checkpoint import read_checkpoint
from vtrial.training.data import data_sha256
from vtrial.training.snapshots import averaged
from vtrial.training.watch import draw, held_out, measure

STAGES = ["global", "global-detail", "super-resolution"]


def config_of(stage: str, watch: dict[str, int] | None = None, **changes: object) -> TrainingConfig:
    patch = (8, 8, 16) if stage == "global-detail" else (16, 16, 32)
    return tiny(stage, **{"data": {"patch_shape": patch, "phases": 2}, "watch": watch or {}, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, of whom training sees three and two are for validation."""
    torch.set_num_threads(1)
    folder = write_blobs(tmp_path_factory.mktemp("data") / "blobs", 6)
    table = pd.read_parquet(folder / "subjects.parquet")
    table["split"] = ["train", "validation", "train", "test", "validation", "train"]
    table.to_parquet(folder / "subjects.parquet")
    return folder


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in (folder / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_the_held_out_error_falls_and_changes_nothing(stage: str, data: Path, tmp_path: Path) -> None:
    watched = train(config_of(stage, {"validate_steps": 20, "sample_steps": 40}, steps=80), data, tmp_path / "a")
    blind = train(config_of(stage, {"validate_steps": 0}, steps=80), data, tmp_path / "b")
    for name, value in blind.denoiser.state_dict().items():
        assert torch.equal(value, watched.denoiser.state_dict()[name]), name
    found = lines(tmp_path / "a")
    assert [line["step"] for line in found] == [20, 40, 60, 80]
    assert found[-1]["validation_error"] < 0.95 * found[0]["validation_error"]  # type: ignore[operator]
    assert len(found[0]["validation_error_by_sigma"]) == 8  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "a/samples").iterdir()) == ["00000040.png", "00000080.png"]
    assert not (tmp_path / "b/validation.jsonl").exists() and not (tmp_path / "b/samples").exists()


def test_it_is_of_people_held_out_and_the_same_each_time(data: Path, tmp_path: Path) -> None:
    config = config_of("global", steps=4)
    state = train(config, data, tmp_path)
    apart = held_out(data, config)
    assert apart is not None and apart.ids == ["S1", "S4"]
    assert StoredVolumes(data).ids == ["S0", "S2", "S5"]
    weights = {name: value.clone() for name, value in state.denoiser.state_dict().items()}
    first = measure(config, apart, state, Share())
    assert first == measure(config, apart, state, Share()) != measure(config, StoredVolumes(data), state, Share())
    assert all(torch.equal(value, weights[name]) for name, value in state.denoiser.state_dict().items())


def test_a_set_without_a_split_has_none_and_says_so_once(tmp_path: Path, repository: Path) -> None:
    plain = write_blobs(tmp_path / "plain", 2, (64, 64, 96))
    config = repository / "configs/smoke-global.toml"
    assert held_out(plain, config_of("global")) is None and held_out(config, config_of("global")) is None
    told = CliRunner().invoke(app, ["train", str(config), "--data", str(plain), "--out", str(tmp_path / "m")])
    assert told.exit_code == 0 and told.output.count("nobody in a split validation") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_show_examples_and_samples(stage: str, data: Path, tmp_path: Path) -> None:
    config = config_of(stage, steps=2)
    state = train(config, data, tmp_path)
    picture = np.asarray(Image.open(io.BytesIO(draw(config, StoredVolumes(data), state))))
    x, z = {"global": (8, 16), "global-detail": (8, 16), "super-resolution": (16, 32)}[stage]
    assert picture.shape == (3 * z, 2 * 2 * x) and picture.dtype == np.uint8
    assert picture[:, : 2 * x].std() > 20 and not np.array_equal(picture[:, : 2 * x], picture[:, 2 * x :])


@pytest.mark.parametrize(
    ("watch", "kept"),
    [
        ({}, []),
        ({"keep_last": 3}, [8, 10, 12]),
        ({"keep_steps": 4}, [4, 8, 12]),
        ({"keep_steps": 6, "keep_last": 2}, [6, 10, 12]),
    ],
)
def test_checkpoints_stay_by_policy(watch: dict[str, int], kept: list[int], data: Path, tmp_path: Path) -> None:
    config = config_of("global", watch, checkpoint_steps=2)
    for last in (5, 12):  # an interruption between checkpoints leaves one that is dropped later
        train(config.model_copy(update={"steps": last}), data, tmp_path)
    found = sorted((tmp_path / "checkpoints").glob("*.pt"))
    assert [int(path.stem) for path in found] == kept
    assert [read_checkpoint(path)["step"] for path in found] == kept


def test_profiles_are_the_averages_own_weights() -> None:
    gamma, steps = gamma_of(0.1), 400
    ema = PowerEma({"w": torch.zeros(steps + 1, dtype=torch.float64)}, (0.1,))
    for step in range(1, steps + 1):
        one = torch.zeros(steps + 1, dtype=torch.float64)
        one[step] = 1.0
        ema.update({"w": one}, step)
    discrete = ema.averages[0.1]["w"].numpy()[1:]
    tau = np.arange(1, steps + 1) - 0.5
    assert discrete == pytest.approx((gamma + 1) * tau**gamma / steps ** (gamma + 1), abs=2e-3 * discrete.max())
    a, b = Profile(gamma, steps), Profile(gamma_of(0.05), 300)
    other = np.where(tau < 300, (b.gamma + 1) * tau**b.gamma / 300 ** (b.gamma + 1), 0.0)
    assert float(products([a], [b])[0, 0]) == pytest.approx(float(discrete @ other), rel=1e-2)


def test_lengths_between_and_beyond_are_made_of_two() -> None:
    stored = [Profile(gamma_of(length), 1000 * i // 16) for i in range(1, 17) for length in (0.05, 0.10)]
    for length, most in ((0.05, 1e-6), (0.08, 0.004), (0.15, 0.01), (0.04, 0.012)):
        factors, error = blend(stored, Profile(gamma_of(length), 1000))
        assert error < most and factors.sum() == pytest.approx(1.0, abs=1e-3)


def test_an_average_made_afterwards_is_the_one_tracked(data: Path, tmp_path: Path) -> None:
    lengths = (0.05, 0.08, 0.10, 0.15)
    tracked = train(config_of("global", steps=64, ema=lengths), data, tmp_path / "tracked").ema.averages
    config = config_of("global", {"snapshot_steps": 4}, steps=64)
    for last in (30, 64):  # interrupted, and gone on with
        train(config.model_copy(update={"steps": last}), data, tmp_path / "stored")
    difference = _distance(tracked[0.05], tracked[0.10])
    for length in (0.08, 0.15):
        made, error = averaged(tmp_path / "stored", length)
        assert error < 0.01
        assert _distance(made, tracked[length]) < 0.01 * difference, length
        assert _distance(made, tracked[length]) < 2e-4 * _norm(made)
    same, error = averaged(tmp_path / "stored", 0.10)
    assert error == 0.0 and all(torch.equal(value, tracked[0.10][name]) for name, value in same.items())


def test_a_model_gets_the_average_asked_for(data: Path, tmp_path: Path) -> None:
    run = {"global": tmp_path / "run"}
    train(config_of("global", {"snapshot_steps": 4}, steps=24), data, run["global"])
    sampler = {"global": SamplerConfig(steps=4)}
    card = export_model(tmp_path / "m", run, sampler, name="m", ema=0.08)  # type: ignore[arg-type]
    stage = card.stages["global"]
    weights, average = load_weights(tmp_path / "m" / stage.file, stage.sha256), averaged(run["global"], 0.08)[0]
    assert stage.ema_length == 0.08 and stage.parameters == sum(v.numel() for v in average.values())
    linear = next(name for name, value in average.items() if value.ndim == 2)
    assert torch.allclose(weights[linear].float(), average[linear], atol=2e-3)
    for path in list((run["global"] / "snapshots").iterdir())[:-1]:
        path.unlink()
    with pytest.raises(InputError, match="snapshot"):
        export_model(tmp_path / "m", run, sampler, name="m", ema=0.2)  # type: ignore[arg-type]


def test_a_length_that_cannot_be_made_is_refused_before_training(tmp_path: Path, repository: Path) -> None:
    plain = write_blobs(tmp_path / "plain", 2, (64, 64, 96))
    config = str(repository / "configs/smoke-global.toml")
    command = ["train", config, "--data", str(plain), "--out", str(tmp_path / "m"), "--ema"]
    refused = CliRunner().invoke(app, [*command, "0.08"])
    assert refused.exit_code == 2 and "0.05, 0.1" in refused.output and not (tmp_path / "m").exists()
    assert CliRunner().invoke(app, [*command, "0.1"]).exit_code == 0
    stage = json.loads((tmp_path / "m/card.json").read_text())["stages"]["global"]
    assert stage["ema_length"] == 0.1 and stage["data_sha256"] == data_sha256(plain)


def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path: Path, repository: Path) -> None:
    plain = write_blobs(tmp_path / "plain", 2, (64, 64, 96))
    config = str(repository / "configs/smoke-global.toml")
    command = [sys.executable, "-m", "vtrial.cli", "train", config, "--data", str(plain), "--out", str(tmp_path / "m")]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))

    full = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    assert full.returncode == 1 and "the same command goes on" in full.stderr and "Traceback" not in full.stderr
    assert not list((tmp_path / "m").rglob("*.pt")) and not list((tmp_path / "m").rglob(".*.part"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_tensorboard_is_used_where_it_is(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch.utils.tensorboard", None)
        train(config_of("global", steps=2), data, tmp_path / "without")
    assert not (tmp_path / "without/events").exists()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config_of("global", {"validate_steps": 2}, steps=4), data, tmp_path / "with")
    events = accumulator.EventAccumulator(str(tmp_path / "with/events")).Reload()
    assert {"loss", "validation_error"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [2, 4]


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def _norm(a: dict[str, torch.Tensor]) -> float:
    return sum(float(value.square().sum()) for value in a.values()) ** 0.5
