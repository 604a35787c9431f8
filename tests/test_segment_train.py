"""`vtrial train` with the configuration of a segmenter: phantoms, training, card; again goes on; errors are told."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import vtrial_command
from test_segmenter_fit import SPEC, own_places, toy, toy_config  # noqa: F401
from test_training import small_files

from vtrial.cohort.recruit import recruit
from vtrial.cohort.spec import read_spec
from vtrial.phantom import Phantom
from vtrial.segmentation import read_segmenter_card
from vtrial.segmentation.card import CARD
from vtrial.segmentation.fit import finish_segmenter, prepare_phantoms
from vtrial.segmentation.fit.loop import METRICS, read_checkpoint
from vtrial.training import held

# the package has a function of that name
segmenters = importlib.import_module("vtrial.pipeline.segmenters")
Capture = pytest.CaptureFixture[str]
TOY = """
name = "toy"
mode = "fastest"
heads = ["liver", "ribs"]
patch_size = [40, 40, 40]
median_shape = [39, 33, 33]
training_patch = [24, 24, 24]
ema = 0.8
steps = 20
metric_steps = 5
precision = "float32"
optimizer = { lr = 0.02, matrix_lr = 0.02, ramp_steps = 2 }

[intensity]
mean = -1000
std = 300
percentile_00_5 = -1000
percentile_99_5 = 800
min = -1024
max = 1500
median = 30

[network]
features = [8, 16]
strides = [[1, 1, 1], [2, 2, 2]]
convolutions = [1, 1]
decoder_convolutions = [1]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a toy, with toy phantoms and few of them."""

    def held_out(spec: Path, n: int, seed: int) -> Iterator[Phantom]:
        assert spec.name == "autopet-test.csv" and seed not in (segmenters.SEED, 1)
        return (toy(subject) for subject in recruit(read_spec(spec), n, seed))

    monkeypatch.setattr("vtrial.segmentation.fit.finish.held_out", held_out)
    monkeypatch.setattr(segmenters, "PHANTOMS", 2)
    monkeypatch.setattr(segmenters, "prepare_phantoms", functools.partial(prepare_phantoms, make=toy))
    few = functools.partial(finish_segmenter, calibrate_on=1, judge_on=1, rounds=1)
    monkeypatch.setattr(segmenters, "finish_segmenter", few)
    path = tmp_path / "toy.toml"
    path.write_text(TOY)
    return path


def test_a_segmenter_is_trained_judged_and_gone_on_with(config: Path, tmp_path: Path, capfd: Capture) -> None:
    pytest.importorskip("totalsegmentator")
    out = tmp_path / "mine"
    call = ["train", str(config), "--data", "phantom-training", "--out", str(out)]
    code, _, err = vtrial_command(capfd, *call, "--max-minutes", "0")
    assert code == 0, err
    assert "phantoms 2 of 2" in err and "judging 1" in err
    assert read_checkpoint(out / "training")[1].step == 1
    first = read_segmenter_card(out)
    assert first.training_data == f"2 phantoms of phantom-training.csv, seed {segmenters.SEED}; 1 steps of 2"

    code, told, err = vtrial_command(capfd, *call, "--json")
    assert code == 0, err
    found, card = json.loads(told), read_segmenter_card(out)
    assert card.training_data.endswith("; 20 steps of 2") and card.hardware and card.sha256 != first.sha256
    assert found["segmenter"] == str(out) and set(card.dice) == {"liver", "ribs"}
    assert (found["dice"], found["volume_bias"]) == (card.dice, card.volume_bias)
    steps = [json.loads(line)["step"] for line in (out / "training" / METRICS).read_text().splitlines()]
    assert steps == [1, 5, 10, 15, 20]

    before = {path: path.stat().st_mtime_ns for path in (out / CARD, out / "training" / "checkpoint.pt")}
    code, told, err = vtrial_command(capfd, *call)
    assert code == 0, err
    assert "phantoms" not in err and "judging" not in err and "20 steps of 2" in told and "Dice" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_training_in_the_folder_and_a_full_disk_are_told(config: Path, tmp_path: Path, capfd: Capture) -> None:
    pytest.importorskip("totalsegmentator")
    data = prepare_phantoms(toy_config(), SPEC, tmp_path / "set", 2, 1, make=toy)
    out = tmp_path / "mine"
    call = ["train", str(config), "--data", str(data), "--out", str(out), "--max-minutes", "0"]
    with held(out / "training"):
        code, _, err = vtrial_command(capfd, *call)
    assert code == 2 and "another vtrial" in err
    with small_files(4096):
        code, _, err = vtrial_command(capfd, *call)
    assert code == 1 and "the same command goes on" in err and "Traceback" not in err
    assert not list(out.rglob("*.pt")) and not list(out.rglob(".*.part"))


def test_a_set_made_before_serves_several(config: Path, tmp_path: Path, capfd: Capture) -> None:
    pytest.importorskip("totalsegmentator")
    data = prepare_phantoms(toy_config(), SPEC, tmp_path / "set", 2, 1, make=toy)
    code, _, err = vtrial_command(
        capfd, "train", str(config), "--data", str(data), "--out", str(tmp_path / "mine"), "--max-minutes", "0"
    )
    assert code == 0, err
    assert read_segmenter_card(tmp_path / "mine").training_data.startswith(
        "2 phantoms of phantom-training.csv, seed 1;"
    )
    assert not (tmp_path / "mine" / "training" / "phantoms").exists()


def test_what_does_not_fit_is_told_before_anything_is_rendered(
    config: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenters, "prepare_phantoms", lambda *a, **k: pytest.fail("rendered"))
    out = tmp_path / "mine"
    call = ["train", str(config), "--data", str(tmp_path / "set"), "--out", str(out)]
    code, _, err = vtrial_command(capfd, *call, "--start-from", "phantom-v1")
    assert code == 2 and "--start-from" in err

    neither = tmp_path / "neither.toml"
    neither.write_text('name = "x"\n')
    code, _, err = vtrial_command(capfd, "train", str(neither), *call[2:])
    assert code == 2 and "`stage`" in err and "`heads`" in err
    code, _, err = vtrial_command(capfd, "train", str(tmp_path / "none.toml"), *call[2:])
    assert code == 2 and "none.toml: cannot be read" in err

    (tmp_path / "set").mkdir()
    code, _, err = vtrial_command(capfd, *call)
    assert code == 2 and "set.json" in err and "cohort spec" in err

    out.mkdir(exist_ok=True)
    (out / CARD).write_text('{"name": "a model", "stages": {}}')
    code, _, err = vtrial_command(capfd, *call)
    assert code == 2 and "not a segmenter's card" in err

    monkeypatch.setattr("vtrial.segmentation.choice.totalsegmentator_version", lambda: "")
    code, _, err = vtrial_command(capfd, *call)
    assert code == 2 and "pip install totalsegmentator" in err


def test_another_segmenters_folder_is_left_alone(config: Path, tmp_path: Path, capfd: Capture) -> None:
    pytest.importorskip("totalsegmentator")
    out = tmp_path / "mine"
    call = ["--data", "phantom-training", "--out", str(out), "--max-minutes", "0"]
    assert vtrial_command(capfd, "train", str(config), *call)[0] == 0
    before = (out / CARD).read_bytes()
    config.write_text(TOY.replace('"toy"', '"other"'))
    code, _, err = vtrial_command(capfd, "train", str(config), *call)
    assert code == 2 and "holds the segmenter toy" in err and (out / CARD).read_bytes() == before
