"""`--train` and `--also` of `vtrial report` and `validate`, and progress of steps that have no subjects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from engine import LoadFake, fake_plan
from judged import SETTINGS, Segmenters, here, people, segmenters  # noqa: F401
from test_cli import vtrial_command
from test_validate import QUICK, Capture, stamps, twins

import vtrial.pipeline
from vtrial.execution import Progress
from vtrial.pipeline import copies, originals, parts
from vtrial.pipeline.originals import open_training
from vtrial.records import InputError, Subject
from vtrial.segmentation import home as homes
from vtrial.validation.nearest import NEARER, NO_SIGN

REPORT = ("report", "runs/twins", "--settings", "quick.toml")
SILENT: Any = SimpleNamespace(readouterr=lambda: ("", ""))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two measured runs, `twins` and `others`."""
    work = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setattr(homes, "sessions_folder", lambda: work)
        patch.setattr(vtrial.pipeline.making, "cascade_plan", fake_plan(LoadFake()))
        patch.setattr(vtrial.pipeline.masks, "segmenter_plan", Segmenters())
        patch.setattr(vtrial.pipeline.masks, "list_segmenters", lambda: ["phantom-v1"])
        (work / "people.csv").write_text(people(12))
        (work / "quick.toml").write_text(SETTINGS)
        for name, seed in (("twins", 0), ("others", 5)):
            twins(SILENT, f"runs/{name}", seed)
        assert vtrial_command(SILENT, "validate", "runs/twins", "--real", "runs/others", *QUICK)[0] == 0
    return work / "runs"


@pytest.fixture
def run(here: Path, segmenters: Segmenters, made: Path) -> Path:  # noqa: F811
    """A measured run, `runs/others` beside it."""
    shutil.copytree(made, "runs")
    return Path("runs/twins")


def training_set(name: str, seed: int, n: int = 12, noise: float = 0.0) -> Path:
    """Volumes as `vtrial generate` makes them from that seed, as a training set; with noise added to each voxel."""
    folder, rng = Path(name), np.random.default_rng(1)
    for kind in ("ct", "suv"):
        (folder / kind).mkdir(parents=True)
    ids = [f"T{i}" for i in range(n)]
    for i, subject_id in enumerate(ids):
        scan = LoadFake().render(Subject(subject_id, i, seed, "all", "F", 50.0, 165.0, 70.0)).pet_ct
        shape = scan.suv.shape
        np.save(folder / "ct" / f"{subject_id}.npy", (scan.ct_hu + 1000 * noise * rng.normal(size=shape)).astype("i2"))
        np.save(folder / "suv" / f"{subject_id}.npy", (scan.suv + noise * rng.normal(size=shape)).astype(np.float16))
    pd.DataFrame({"subject_id": ids, "seed": seed}).to_parquet(folder / "subjects.parquet")
    return folder


def document(run: Path, reference: str = "autopet-2025") -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((run / "validation" / reference / "report.json").read_text())
    return tree


def test_twins_that_are_training_volumes_with_noise_are_caught(run: Path, capfd: Capture) -> None:
    training_set("data", seed=0, noise=0.01)
    code, out, err = vtrial_command(capfd, *REPORT, "--train", "data")
    assert code == 0 and f"  copies   {NEARER}: look at A" in out and "and 7 more" in out, err
    found = document(run)
    copied = found["copies"]
    assert [r["nearest_training"] for r in copied["twins"]] == [f"T{i}" for i in range(12)]
    assert all(r["suspected_copy"] for r in copied["twins"]) and copied["ratio"] < 0.3 and copied["suspected"] == 12
    assert copied["held_out"] == (
        "each training volume against the others (p: either half against the other), as autopet-2025 has no volumes"
    )
    assert copied["training_set"] == "data" and copied["n_training"] == copied["n_held_out"] == 12
    distances = [r["distance"] for r in found["closest_pairs"]]
    assert len(distances) == 10 and distances == sorted(distances)
    assert any(flag.startswith("Copies: twins are nearer") for flag in found["provenance"]["flags"])
    page = (run / "validation/autopet-2025/report.html").read_text()
    assert "The closest pairs" in page and "look at it" in page and "T11" in page


def test_fresh_twins_are_no_copies_and_the_training_set_is_part_of_the_question(run: Path, capfd: Capture) -> None:
    fresh = training_set("data", seed=77)
    asked = (*REPORT, "--train", "data")
    code, out, err = vtrial_command(capfd, *asked)
    assert code == 0 and f"  copies   {NO_SIGN}" in out and "nothing was left" not in out, err
    assert 0.8 < document(run)["copies"]["ratio"] < 1.2 and "Copies" not in str(document(run)["provenance"]["flags"])
    before = stamps(run)
    code, out, _ = vtrial_command(capfd, *asked)
    assert code == 0 and "nothing was left" in out and f"copies   {NO_SIGN}" in out and stamps(run) == before
    volume = np.load(fresh / "suv/T3.npy")
    np.save(fresh / "suv/T3.npy", volume * np.float16(0.5))
    assert "nothing was left" not in vtrial_command(capfd, *asked)[1]
    code, out, _ = vtrial_command(capfd, *REPORT)  # without it, another question again
    assert "  copies " not in out and "nothing was left" not in out and document(run)["copies"] is None
    told = json.loads(vtrial_command(capfd, *REPORT, "--json")[1])
    assert told["copies"] == ""


def test_held_out_scans_are_the_yardstick_unless_they_are_training_subjects(run: Path, capfd: Capture) -> None:
    training_set("data", seed=77)
    asked = (*REPORT, "--real", "runs/others", "--train")
    code, out, err = vtrial_command(capfd, *asked, "data")
    assert code == 0 and NO_SIGN in out, err
    assert document(run, "others")["copies"]["held_out"] == "12 volumes of others"
    training_set("seen", seed=5)  # the very people that are to be held out
    assert vtrial_command(capfd, *asked, "seen")[0] == 0
    told = document(run, "others")["copies"]["held_out"]
    assert told == (
        "each training volume against the others (p: either half against the other), as others has 0 held-out volumes "
        "on this grid; 12 more are in the training set themselves"
    )


def test_what_cannot_be_read_is_left_out_and_counted(run: Path, capfd: Capture) -> None:
    folder = training_set("data", seed=77, n=14)
    (folder / "ct/T1.npy").write_bytes((folder / "ct/T1.npy").read_bytes()[:3000])
    spoilt = np.load(folder / "suv/T2.npy")
    spoilt[1, 1, 1] = np.nan
    np.save(folder / "suv/T2.npy", spoilt)
    np.save(folder / "ct/T4.npy", np.zeros((8, 16, 16), np.int16))
    (folder / "suv/T5.npy").unlink()
    (run / "scans/A2/SUV.nii.gz").write_bytes(b"spoilt")
    code, _, err = vtrial_command(capfd, *REPORT, "--train", "data")
    assert code == 0, err
    for told in ("T1: ", "T2: given up after attempt 1: voxels are not finite", "T4: ", "A2: "):
        assert told in err
    found = document(run)
    assert found["copies"]["n_training"] == 10 and len(found["copies"]["twins"]) == 11
    assert [note for note in found["notes"] if note.startswith("copies: ")] == [
        "copies: 3 of 13 volumes of training set data could not be used",
        "copies: the training set has volumes of 13 of its 14 subjects",
        "copies: 1 of 12 volumes of twins could not be used",
    ]


def test_stored_subvolumes_will_do(here: Path) -> None:  # noqa: F811
    """DATA/low alone, as stage 1 takes it: the subvolume that lies nearest to that of whole volumes."""
    folder = training_set("data", seed=3)
    whole = open_training("data").low("T0")
    phases = np.array([(3, 3, 3), (1, 1, 1), (0, 2, 1)], dtype=np.int8)
    for kind in ("ct", "suv"):
        shutil.rmtree(folder / kind)
    (folder / "low").mkdir()
    for i in range(12):
        stored = np.stack([np.zeros_like(whole), whole.numpy(), np.ones_like(whole)]).astype(np.float16)
        np.savez(folder / "low" / f"T{i}.npz", volumes=stored, phases=phases)
    low = open_training("data").low("T0")
    assert tuple(low.shape) == (2, 4, 4, 4) and np.allclose(low, whole, atol=1e-3)


def test_only_what_training_sees_can_be_copied(here: Path) -> None:  # noqa: F811
    folder = training_set("data", seed=3)
    table = pd.read_parquet(folder / "subjects.parquet")
    table.assign(split=["test", "validation"] + 10 * ["train"]).to_parquet(folder / "subjects.parquet")
    found = open_training("data")
    assert found.ids == tuple(f"T{i}" for i in range(2, 12)) and found.of == 10


def test_model_space_at_low_resolution_is_every_fourth_voxel(here: Path) -> None:  # noqa: F811
    folder = training_set("data", seed=3)
    low = originals.open_training("data").low("T7").numpy()
    ct, suv = (np.load(folder / kind / "T7.npy")[1::4, 1::4, 1::4].astype(float) for kind in ("ct", "suv"))
    assert np.allclose(low[0], (ct + 500) / 1000, atol=1e-6) and np.allclose(low[1], np.log1p(suv) / np.log(26))


def test_blocks_grow_where_memory_would_not_do() -> None:
    assert copies._block((56, 56, 96), 600) == 2
    assert copies._block((56, 56, 96), 10_000) == 4 and copies._block((56, 56, 96), 10_000_000) == 8
    assert copies._block((4, 4, 4), 10) == 2 and copies._block((1, 2, 2), 10) == 1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "subjects.parquet").unlink(), "no subjects.parquet there"),
        (lambda f: (f / "subjects.parquet").write_bytes(b"no"), "not a readable Parquet file"),
        (lambda f: pd.DataFrame({"id": [1]}).to_parquet(f / "subjects.parquet"), "no column subject_id"),
        (lambda f: shutil.rmtree(f / "suv"), "volumes of 0 subjects"),
        (lambda f: [p.write_bytes(b"no") for p in (f / "ct").iterdir()], "the volume of T0 cannot be read"),
    ],
)
def test_what_is_no_training_set_is_refused(here: Path, spoil: Any, told: str) -> None:  # noqa: F811
    spoil(training_set("data", seed=3))
    with pytest.raises(InputError, match=told):
        open_training("data")


def test_another_grid_is_refused_before_any_work(run: Path, capfd: Capture) -> None:
    folder = training_set("data", seed=3)
    for path in [*folder.glob("ct/*"), *folder.glob("suv/*")]:
        np.save(path, np.load(path)[:, :, :8])
    before = stamps(run)
    code, _, err = vtrial_command(capfd, *REPORT, "--train", "data", "--by", "all")
    assert code == 2 and "about 16×16×8 voxels, but 16×16×16 in twins" in err and stamps(run) == before


def test_further_cohorts_join_in_an_analysis_of_variance(run: Path, capfd: Capture) -> None:
    sexes = pd.read_parquet(run / "subjects.parquet")[["subject_id", "sex"]]
    table = pd.read_parquet(run / "measurements.parquet").merge(sexes, on="subject_id")
    table.loc[table["organ"] == "liver", "volume_ml"] *= 3.0
    table.to_csv("hospital.csv", index=False)
    also = ("--also", "hospital.csv", "--also", "runs/third")
    twins(capfd, "runs/third", seed=6)
    code, _, err = vtrial_command(capfd, *REPORT, *also)
    assert code == 2 and "runs/third: the scans have no organ masks" in err
    code, out, err = vtrial_command(capfd, "validate", str(run), *also, *QUICK)
    assert code == 0 and "nothing was left" not in out, err
    found = document(run)
    assert found["anova_cohorts"] == ["twins", "autopet-2025", "hospital", "third"]
    rows = {(r["stratum"], r["organ"], r["metric"]): r for r in found["anova"]}
    liver = rows[("sex=F", "liver", "volume_ml")]
    assert liver["groups"] == 4 and liver["p_holm"] < 0.01 and liver["mean_3"] == pytest.approx(3 * liver["mean_1"])
    assert liver["mean_2"] == next(c["mean_reference"] for c in found["cells"] if c["organ"] == "liver")
    asked = {(c["stratum"], c["organ"], c["metric"]) for c in found["cells"]}
    assert set(rows) == {cell for cell in asked if cell[1] != "kidneys"}  # which the reference alone has
    page = (run / "validation/autopet-2025/report.html").read_text()
    assert "Analysis of variance over 4 cohorts" in page and found["absent"].get("anova") is None
    assert any("third is no cohort of patients" in flag for flag in found["provenance"]["flags"])
    code, out, _ = vtrial_command(capfd, *REPORT, *also)
    assert code == 0 and "nothing was left" in out
    assert "nothing was left" not in vtrial_command(capfd, *REPORT, *also[:2])[1]
    assert document(run)["anova_cohorts"] == ["twins", "autopet-2025", "hospital"]
    vtrial_command(capfd, *REPORT)
    assert (
        document(run)["anova"] is None
        and "Analysis of variance" not in (run / "validation/autopet-2025/report.html").read_text()
    )


def hospital(run: Path, more: bool) -> None:
    """hospital.csv: the people of the run as they were measured, and if asked for twelve others of half the weight."""
    people = pd.read_parquet(run / "subjects.parquet")[["subject_id", "sex", "age_years", "height_cm", "weight_kg"]]
    table = pd.read_parquet(run / "measurements.parquet").merge(people, on="subject_id")
    others = table.assign(subject_id="B" + table["subject_id"], weight_kg=table["weight_kg"] / 2)
    pd.concat([table, others] if more else [table]).to_csv("hospital.csv", index=False)


def test_all_of_a_paired_report_is_about_the_pairs(run: Path, capfd: Capture) -> None:
    asked = (*REPORT, "--real", "hospital.csv", "--match", "--also", "runs/others")
    found = []
    for more in (False, True):
        hospital(run, more)
        code, out, err = vtrial_command(capfd, *asked)
        assert code == 0 and "nothing was left" not in out, err
        found.append(document(run, "hospital"))
    assert any("hospital: 12 subjects have no pair (by subject_id)" in note for note in found[1]["notes"])
    for part in ("cells", "demographics", "distributions", "slopes", "correlations", "anova", "likeness", "spread"):
        assert found[0][part] == found[1][part] and found[0][part], part
    assert "nothing was left" in vtrial_command(capfd, *asked)[1]


def test_the_ceiling_of_the_settings_is_that_of_all(run: Path, capfd: Capture) -> None:
    hospital(run, more=False)
    Path("low.toml").write_text(SETTINGS + "suv_ceiling = 2.5\n")
    code, _, err = vtrial_command(capfd, *REPORT[:2], "--settings", "low.toml", "--real", "hospital.csv")
    assert code == 0, err
    hottest = [c for c in document(run, "hospital")["cells"] if c["metric"] == "suv_max"]
    assert all(c["ceiling_synthetic"] == c["ceiling_reference"] > 0 and c["basis"] == "censored" for c in hottest)
    Path("high.toml").write_text(SETTINGS + "suv_ceiling = 40\n")
    code, _, err = vtrial_command(capfd, *REPORT[:2], "--settings", "high.toml", "--real", "hospital.csv")
    assert (
        code == 2
        and f"high.toml, suv_ceiling: 40: the twins of {run.absolute()} end at SUV 25; set that or less" in err
    )


def test_cohorts_named_twice_or_not_there_are_told_all_at_once(run: Path, capfd: Capture) -> None:
    code, _, err = vtrial_command(capfd, *REPORT, "--also", "nobody", "--also", "nowhere", "--train", "none")
    assert code == 2 and "nobody: no such file" in err and "nowhere: no such file" in err and "--train none" in err
    again = ("--also", "autopet-2025", "--also", str(run))
    code, _, err = vtrial_command(capfd, *REPORT, *again)
    assert code == 2 and "--also autopet-2025: that is what --real autopet-2025 names" in err
    assert f"--also {run}: that is the run itself" in err


def test_two_cohorts_of_one_name_are_kept_apart(run: Path, capfd: Capture) -> None:
    shutil.copytree(run, "elsewhere/twins")
    shutil.copytree(run, "afar/twins")
    code, _, err = vtrial_command(capfd, *REPORT, "--also", "elsewhere/twins", "--also", "afar/twins")
    assert code == 0, err
    assert document(run)["anova_cohorts"] == ["twins", "autopet-2025", "twins-reference", "twins-2"]
    row = document(run)["anova"][0]
    assert row["mean_1"] == row["mean_3"] == row["mean_4"]


def test_comparing_and_reporting_tell_how_far_they_are(
    run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_set("data", seed=77)
    monkeypatch.setattr(parts, "EVERY_S", 0.0)
    asked = (*REPORT, "--train", "data", "--by", "sex,age_group")
    err = vtrial_command(capfd, *asked)[2]
    for line in (
        "compare twins with autopet-2025 [1/",
        "compare twins with autopet-2025 [2/",
        "read training set data [12/12] T11: ok",
        "read twins [12/12] A11: ok",
        "report [5/5] gallery: ok",
    ):
        assert line in err, line
    assert "[" not in vtrial_command(capfd, *asked)[2]  # nothing is done, nothing is told
    err = vtrial_command(capfd, *asked[:-1], "sex", "--json")[2]
    assert "[" not in err


def test_quick_parts_move_the_bar_and_tell_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    clock = iter([0.0, 1.0, 3.5, 3.5, 4.0, 4.0])
    monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    step = parts.Parts(seen.append, 3)
    for name, error in (("a", ""), ("b", ""), ("c", "spoilt")):
        step.ended(name, error)
    assert [(p.done, p.failed, p.total) for p in seen] == [(1, 0, 3), (2, 0, 3), (2, 1, 3)]
    told = [p.latest for p in seen]
    assert told[0] is None and told[1] is not None and told[1].item.subject_id == "b" and told[1].seconds == 3.5
    assert told[2] is not None and told[2].error == "spoilt" and told[2].saved is None


def test_a_report_from_python_is_silent(run: Path, capfd: Capture) -> None:
    capfd.readouterr()
    question = vtrial.pipeline.Question(by="all", settings=Path("quick.toml"), also=("healthy-fdg",))
    assert vtrial.pipeline.report(str(run), question).new
    assert capfd.readouterr().err == "" and document(run)["anova_cohorts"][2] == "healthy-fdg"
