"""The command line: bad input gives one clear message and code 2 and writes nothing; help is quick; JSON is JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from engine import PEOPLE, LoadFake, fake_plan

import vtrial.pipeline
from tests.blobs import write_blobs
from vtrial.cli import app, main
from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.denoiser import Denoiser, StageConfig, StageName
from vtrial.diffusion.network import NetworkConfig
from vtrial.diffusion.sampler import SAMPLERS, SamplerConfig
from vtrial.diffusion.weights import WEIGHT_FILES, ModelCard, StageCard, save_weights, write_card
from vtrial.doctor import _packages, _segmenters
from vtrial.generation import CascadePlan, cascade_plan
from vtrial.records import InputError, Support
from vtrial.training import Job, read_config
from vtrial.training.checkpoint import CHECKPOINT

STRATA = (
    "stratum,share,sex,age_mean,age_sd,age_min,age_max,height_mean,height_sd,height_min,height_max,"
    "weight_mean,weight_sd,weight_min,weight_max,r_age_height,r_age_weight,r_height_weight\n"
)
GOOD = "women,1,F,55,12,20,85,165,6,150,185,70,12,45,110,-0.1,0.1,0.4\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", fake_plan(LoadFake()))
    (tmp_path / "people.csv").write_text(PEOPLE)
    return tmp_path


def vtrial_command(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["vtrial", *arguments])
        main()
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


def strata_with(**cells: object) -> str:
    names = STRATA.strip().split(",")
    row = dict(zip(names, GOOD.strip().split(","))) | {k: str(v) for k, v in cells.items()}
    return STRATA + ",".join(row[name] for name in names) + "\n"


BAD_SPECS = {
    "share below 0": (strata_with(share=-1), "share"),
    "share 0": (strata_with(share=0), "share"),
    "sd below 0": (strata_with(height_sd=-2), "height_sd"),
    "min above max": (strata_with(age_min=90, age_max=20), "age_m"),
    "text for a number": (strata_with(weight_mean="heavy"), "heavy"),
    "nan": (strata_with(weight_mean="nan"), "weight_mean"),
    "correlation above 1": (strata_with(r_age_height=1.2), "r_age_height"),
    "not positive definite": (
        strata_with(r_age_height=0.9, r_age_weight=-0.9, r_height_weight=0.9),
        "positive definite",
    ),
    "no such sex": (strata_with(sex="X"), "sex"),
    "unknown column": (STRATA.strip() + ",agee_mean\n" + GOOD.strip() + ",3\n", "agee_mean"),
    "empty table": (STRATA, "empty|no row"),
    "empty file": ("", "empty"),
    "duplicate subject": (PEOPLE + "A1,F,50,165,70\n", "A1"),
    "path in a subject": (PEOPLE + "../x,F,50,165,70\n", "\\.\\./x"),
    "height in metres": (PEOPLE + "B1,F,50,1.75,70\n", "1.75"),
    "weight in pounds": (PEOPLE + "B1,M,50,178,430\n", "430"),
    "neither kind": ("a,b\n1,2\n", "columns"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_specs(here: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    text, telling = BAD_SPECS[case]
    (here / "spec.csv").write_text(text)
    n = ["--n", "3"] if text.startswith("stratum") else []
    before = sorted(here.rglob("*"))
    code, out, err = vtrial_command(capfd, "generate", "spec.csv", *n)
    assert code == 2, err
    assert "Ray" not in err, "told before machines are taken"
    assert re.search(telling, err, re.IGNORECASE), err
    assert "spec.csv" in err or "subject" in err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["absent.csv", "--n", "2"], "absent.csv"),
        (["."], r"\."),
        (["people.csv", "--n", "0"], "n is 0"),
        (["people.csv", "--seed", "-1"], "seed -1"),
        (["strata.csv"], "--n"),
        ([], "no cohort"),
        (["people.csv", "--workers", "0"], "--workers 0"),
        (["people.csv", "--gpus-per-worker", "-1"], "--gpus-per-worker -1"),
        (["people.csv", "--gpus-per-worker", "1.5"], "--gpus-per-worker 1.5"),
        (["people.csv", "--gpus-per-worker", "nan"], "--gpus-per-worker nan"),
        (["people.csv", "--gpus-per-worker", "inf"], "--gpus-per-worker inf"),
        (["people.csv", "--n", "1000000000000"], "n is 1000000000000, .* at most 100000000 subjects"),
        (["people.csv", "--match", "people.csv"], "leave out one"),
        (["people.csv", "--out", "a" * 300], "too long"),
        (["people.csv", "--executor", "local", "--workers", "2"], "--executor local"),
        (["people.csv", "--out", "people.csv"], "people.csv"),
        (["people.csv", "--out", "nosuch://x/y"], "nosuch"),
        (["people.csv", "--executor", "cloud"], "cloud"),
        (["people.csv", "--sampler", "magic"], "magic"),
        (["people.csv", "--n", "two"], "valid integer"),
    ],
)
def test_bad_arguments(here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], telling: str) -> None:
    (here / "strata.csv").write_text(STRATA + GOOD)
    before = sorted(here.rglob("*"))
    code, out, err = vtrial_command(capfd, "generate", *arguments)
    assert code == 2, err
    assert re.search(telling, err), err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(here.rglob("*")) == before


def test_a_folder_of_another_run_is_refused_and_left_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local = ["--executor", "local", "--out", "run"]
    assert vtrial_command(capfd, "generate", "people.csv", *local)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}
    (here / "other.csv").write_text(PEOPLE.replace("165", "166"))
    for arguments, telling in (
        (["people.csv", "--seed", "1"], "seed is 0 there and 1 here"),
        (["other.csv"], "spec_sha256"),
        (["people.csv", "--n", "2"], "as listed"),
        (["people.csv", "--model", "other"], "model"),
        (["people.csv", "--sampler", "heun"], "sampler"),
    ):
        code, _, err = vtrial_command(capfd, "generate", *arguments, *local)
        assert code == 2
        assert telling in err
        assert "--out" in err
    (here / "other.csv").unlink()
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_generate_names_its_folder_and_tells_in_json(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "strata.csv").write_text(STRATA + GOOD)
    arguments = ["generate", "strata.csv", "--n", "3", "--seed", "5", "--executor", "local", "--json"]
    code, out, err = vtrial_command(capfd, *arguments)
    assert code == 0, err
    told = json.loads(out)
    assert told["run"] == str(here / "runs/strata-seed5")
    assert (told["subjects"], told["done"], told["made_now"], told["failed"]) == (3, 3, 3, {})
    for key in ("scans", "table", "preview"):
        assert Path(told[key]).exists()
    assert json.loads(vtrial_command(capfd, *arguments)[1])["made_now"] == 0
    assert json.loads(vtrial_command(capfd, *arguments[:2], "--n", "4", *arguments[4:])[1])["made_now"] == 1
    told = json.loads(vtrial_command(capfd, *arguments, "--sampler", "heun")[1])
    assert Path(told["run"]).name.startswith("strata-seed5-")


def test_match_follows_a_real_table(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "real.csv").write_text(
        "PatientID,PatientSex,PatientAge,PatientSize,PatientWeight\nQ1,F,060Y,1.64,70\nQ2,M,045Y,1.8,90\n"
    )
    code, out, err = vtrial_command(capfd, "generate", "--match", "real.csv", "--executor", "local", "--json")
    assert code == 0, err
    table = pd.read_parquet(json.loads(out)["table"])
    assert table.subject_id.tolist() == ["Q1", "Q2"]
    assert table.height_cm.tolist() == pytest.approx([164.0, 180.0])
    code, _, err = vtrial_command(capfd, "recruit", "--match", "real.csv", "--out", "same.csv")
    assert code == 0, err
    assert pd.read_csv(here / "same.csv").subject_id.tolist() == ["Q1", "Q2"]


def test_phantoms_are_scans_or_a_training_set(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small scans in the place of phantoms: where the command says that things are, they are."""
    monkeypatch.setattr(vtrial.pipeline.making, "LoadPhantom", LoadFake)
    for layout, files, pictured in (("scans", "scans/*/SUV.nii.gz", True), ("training", "suv/*.npy", False)):
        arguments = ["people.csv", "--out", layout, "--layout", layout, "--executor", "local"]
        code, out, err = vtrial_command(capfd, "phantom", *arguments, "--json")
        assert code == 0, err
        told = json.loads(out)
        assert len(list((here / layout).glob(files))) == 5
        assert Path(told["scans"]).is_dir()
        assert (told["preview"] is not None) == pictured == (here / layout / "preview.png").exists()
    code, _, err = vtrial_command(capfd, "phantom", *arguments[:-4], "--layout", "scans", "--executor", "local")
    assert code == 2
    assert "layout is training there and scans here" in err


def test_failed_subjects_give_code_1(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "faults").mkdir()
    (here / "faults" / "raise-1").write_text("9")
    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", fake_plan(LoadFake(str(here / "faults"))))
    code, out, err = vtrial_command(capfd, "generate", "people.csv", "--executor", "local")
    assert code == 1
    assert "4 of 5 subjects are done" in out
    assert "A1: ArithmeticError: planted failure" in out
    assert "A1: given up after attempt 3" in err
    told = vtrial_command(capfd, "generate", "people.csv", "--executor", "local", "--json")
    assert told[0] == 1
    assert list(json.loads(told[1])["failed"]) == ["A1"]


def test_outside_the_support_is_refused_or_flagged(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "old.csv").write_text(PEOPLE + "OLD,F,99,165,70\n")
    arguments = ["generate", "old.csv", "--executor", "local", "--out", "run"]
    code, _, err = vtrial_command(capfd, *arguments)
    assert code == 2
    assert "OLD" in err
    assert "--extrapolate" in err
    assert not (here / "run").exists()
    assert vtrial_command(capfd, *arguments, "--extrapolate")[0] == 0
    table = pd.read_parquet(here / "run/subjects.parquet")
    assert table.extrapolated.tolist() == [False] * 5 + [True]


def test_recruit_writes_subjects(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "strata.csv").write_text(STRATA + GOOD)
    code, out, err = vtrial_command(capfd, "recruit", "strata.csv", "--n", "20", "--out", "s.csv", "--json")
    assert code == 0, err
    assert json.loads(out)["n"] == 20
    assert len(pd.read_csv(here / "s.csv")) == 20
    code, out, _ = vtrial_command(capfd, "recruit", "strata.csv", "--n", "20")
    assert code == 0
    assert "20 recruited" in out


@pytest.mark.parametrize(
    "command",
    [
        "recruit people.csv --out s3://bucket/subjects.csv",
        "recruit people.csv --out S3:/bucket/subjects.csv",
        "train stage.toml --data data --out gs://bucket/model",
        "prepare data --out set --key s3://bucket/key.csv",
        "fidelity --keep s3://bucket/rows",
        "fidelity --sheet file:///tmp/sheet.png",
    ],
)
def test_what_is_written_here_alone_takes_no_url(here: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    before = sorted(here.rglob("*"))
    *_, option, url = arguments = command.split()
    code, out, err = vtrial_command(capfd, *arguments)
    assert code == 2, err
    assert option in err and f"{url} is a URL" in err and "give a path" in err
    assert out == "" and sorted(here.rglob("*")) == before


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    "option",
    [
        "--workers -2",
        "--workers 0",
        "--gpus-per-worker nan",
        "--gpus-per-worker -1",
        "--max-minutes -3",
        "--max-minutes nan",
        "--max-minutes inf",
        "--executor local --workers 2",
    ],
)
def test_numbers_of_a_training_that_make_no_sense(
    here: Path, capfd: pytest.CaptureFixture[str], repository: Path, option: str, dry: list[str]
) -> None:
    write_blobs(here / "data", 3)
    config = str(repository / "configs/smoke-global.toml")
    command = ["train", config, "--data", "data", "--out", "m", *option.split(), *dry]
    code, out, err = vtrial_command(capfd, *command)
    assert code == 2, err
    assert option.removesuffix(" --workers 2") in err
    assert out == "" and not (here / "m").exists()


def test_a_dry_run_looks_for_the_model_to_start_from(
    here: Path, capfd: pytest.CaptureFixture[str], repository: Path
) -> None:
    write_blobs(here / "data", 3)
    config = str(repository / "configs/smoke-global.toml")
    command = ["train", config, "--data", "data", "--out", "m", "--dry-run", "--start-from"]
    for model, telling in (("nosuchmodel", "nosuchmodel"), (str(tiny_model(here / "tiny")), "has another network")):
        code, out, err = vtrial_command(capfd, *command, model)
        assert code == 2, err
        assert telling in err and out == ""


def test_a_dry_run_checks_the_average_that_is_asked_for(
    here: Path, capfd: pytest.CaptureFixture[str], repository: Path
) -> None:
    write_blobs(here / "data", 3)
    config = str(repository / "configs/smoke-global.toml")
    for more in ([], ["--dry-run"]):
        code, out, err = vtrial_command(capfd, "train", config, "--data", "data", "--out", "m", "--ema", "0.07", *more)
        assert code == 2 and "--ema 0.07" in err and out == "", err


def tiny_model(folder: Path) -> Path:
    """An untrained cascade of the smallest size, as a model folder."""
    folder.mkdir()
    stages: dict[StageName, StageCard] = {}
    for stage, file in WEIGHT_FILES.items():
        network = NetworkConfig(
            patch=4,
            channels=(8, 8),
            blocks=(1, 1),
            attention_head_channels=0,
            low_resolution=stage == "super-resolution",
        )
        config = StageConfig(stage=stage, network=network)
        torch.manual_seed(0)
        digest = save_weights(folder / file, Denoiser(config).state_dict())
        stages[stage] = StageCard(
            config=config, file=file, sha256=digest, parameters=1, steps=0, images=0, seconds=0.0, ema_length=0.1,
            sampler=SamplerConfig(steps=2, name="dpmpp-2m"),
        )  # fmt: skip
    ends = (Demographics("F", 18.0, 140.0, 40.0), Demographics("M", 90.0, 210.0, 180.0))
    write_card(folder, ModelCard(name="tiny", support=Support.of(ends), stages=stages))
    return folder


def test_weights_that_are_not_their_cards(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(here)
    model = tiny_model(here / "model")
    weights = model / WEIGHT_FILES["global"]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (model / WEIGHT_FILES["super-resolution"]).unlink()
    code, _, err = vtrial_command(capfd, "generate", "people.csv", "--model", "model")
    assert code == 2
    assert WEIGHT_FILES["global"] in err
    assert WEIGHT_FILES["super-resolution"] in err
    assert "card" in err
    assert not (here / "runs").exists()
    assert "Traceback" not in err
    code, _, err = vtrial_command(capfd, "generate", "people.csv", "--model", "nosuchmodel")
    assert code == 2
    assert "nosuchmodel" in err


@pytest.mark.slow
def test_a_real_cascade_gives_the_same_bits_locally_and_on_ray(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(here)
    tiny_model(here / "model")
    common = ["generate", "people.csv", "--n", "2", "--model", "model", "--threads-per-worker", "1", "--json"]
    tables = []
    for name, options in (("a", ["--executor", "local"]), ("b", ["--workers", "1"]), ("c", ["--workers", "2"])):
        code, out, err = vtrial_command(capfd, *common, "--out", name, *options)
        assert code == 0, err
        tables.append(pd.read_parquet(json.loads(out)["table"])[["ct_sha256", "suv_sha256"]])
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert tables[0].suv_sha256.nunique() == 2


def test_models_are_told_for_people_and_machines(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(here / "model")
    monkeypatch.setattr(vtrial.pipeline.training, "list_models", lambda: [str(model)])
    code, out, err = vtrial_command(capfd, "models")
    assert code == 0, err
    assert re.search(r"support +sex F, M; age_years \d+ to \d+; height_cm", out), out
    (told,) = json.loads(vtrial_command(capfd, "models", "--json")[1])["models"]
    assert {"name", "data", "support", "samplers", "sha256"} <= set(told)


def test_a_fresh_stage_is_sampled_over_the_noise_it_was_trained_on(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: dict[str, SamplerConfig] = {}

    def trained(job: Job, progress: object) -> None:
        job.out.mkdir(parents=True)
        (job.out / CHECKPOINT).touch()

    monkeypatch.setattr(
        vtrial.pipeline.training, "export_model", lambda out, runs, samplers, **unused: exported.update(samplers)
    )
    for config, highest in (("smoke-global", 200.0), ("bundled-super-resolution", 20.0)):
        path = repository / "configs" / f"{config}.toml"
        vtrial.pipeline.train(path, tmp_path, tmp_path / config, lambda line: None, trainer=trained)
        assert exported[read_config(path).stage].sigma_max == highest
    for config in ("paper-global", "paper-super-resolution", "paper-global-flow", "paper-super-resolution-flow"):
        path = repository / "configs" / f"{config}.toml"  # says itself how it is sampled
        vtrial.pipeline.train(path, tmp_path, tmp_path / config, lambda line: None, trainer=trained)
        solver = "flow-heun" if config.endswith("flow") else "heun"
        steps = 35 if "global" in config else 100
        assert exported[read_config(path).stage] == SamplerConfig(name=solver, steps=steps)  # type: ignore[arg-type]
    for stage in ("global", "global-detail"):  # the expert knows 0.01 to 8, and takes over in the middle
        path = repository / "configs" / f"bundled-{stage}.toml"
        vtrial.pipeline.train(path, tmp_path, tmp_path / "experts", lambda line: None, trainer=trained)
    assert (exported["global"].sigma_max, exported["global"].sigma_min) == (2000.0, 0.01)
    assert exported["global-detail"].sigma_max == 4.0


def test_a_model_trained_where_one_stands_is_called_as_that_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(
        vtrial.pipeline.training, "export_model", lambda *unused, name, **unused_too: names.append(name)
    )
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    config = repository / "configs/smoke-global.toml"
    vtrial.pipeline.train(config, tmp_path, Path(), lambda line: None, trainer=lambda job, progress: None)
    assert names == ["mine"]


def test_samplers_and_tiles_can_be_chosen(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def plan(*arguments: object) -> CascadePlan:
        asked.append(arguments)
        raise InputError("enough seen")

    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", plan)
    command = ["generate", "people.csv", "--executor", "local", "--out", "run"]
    for name in SAMPLERS:
        assert "enough seen" in vtrial_command(capfd, *command, "--sampler", name, "--tile", "128")[2]
        assert asked.pop() == ("phantom-v1", name, None, None, "128")
    code, _, err = vtrial_command(capfd, *command, "--sampler", "euler")
    assert code == 2
    offered = set(re.findall(r"'([a-z0-9-]+)'", err)) - {"euler", "--sampler"}
    assert offered == set(SAMPLERS)
    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", cascade_plan)
    code, _, err = vtrial_command(capfd, *command, "--tile", "100")
    assert code == 2 and "--tile 100: this model takes multiples of 16 from 48 to 384" in err
    assert not (here / "run").exists()


def test_every_command_has_help_with_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {
        "generate",
        "recruit",
        "phantom",
        "train",
        "models",
        "fidelity",
        "doctor",
        "bench",
        "measure",
        "references",
    } <= set(names)
    for name in names:
        code, out, _ = vtrial_command(capfd, name, "--help")
        assert code == 0
        assert f"vtrial {name}" in out.split("Example:")[1]
        assert "--json" in out


def test_the_doctor_names_the_segmenters_and_whose_weights_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR"):
        monkeypatch.setenv(variable, "/nowhere")
    monkeypatch.setenv("HOME", "/nowhere")
    found = _segmenters()
    assert found.ok and found.found.startswith("phantom-v1: hashes right; TotalSegmentator's weights: none here")
    monkeypatch.setattr("vtrial.doctor.NEEDED", ("numpy", "no-such-package"))
    packages = _packages()
    assert not packages.ok and "pip install no-such-package" in packages.line()
