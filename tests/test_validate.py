"""`vtrial validate`, `measure` and `report` as a user types them: what is done, what is said, what is left alone."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from judged import LoadHalves, LoadLabelled, Segmenters, here, lesions_folder, segmenters, write_scan  # noqa: F401
from test_cli import vtrial_command

import vtrial.pipeline
from vtrial.imaging.discovery import find_scans, read_upright
from vtrial.imaging.files import nifti_from_bytes
from vtrial.records import InputError
from vtrial.storage import LocalFolder, open_folder

LOCAL = ("--executor", "local")
QUICK = ("--settings", "quick.toml", *LOCAL)
Capture = pytest.CaptureFixture[str]


def twins(capfd: Capture, out: str = "runs/twins", seed: int = 0) -> Path:
    code, _, err = vtrial_command(capfd, "generate", "people.csv", "--seed", str(seed), "--out", out, *LOCAL)
    assert code == 0, err
    return Path(out)


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def run(here: Path, segmenters: Segmenters, capfd: Capture) -> Path:  # noqa: F811
    return twins(capfd)


def test_validate_does_all_that_is_left_and_then_nothing(run: Path, capfd: Capture) -> None:
    code, out, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 0, err
    assert "segment twins [12/12] A11: ok" in err and "measure twins [12/12] A11: ok" in err
    place = run.absolute() / "validation" / "autopet-2025"
    lines = out.splitlines()
    assert lines[0].startswith("twins against autopet-2025: different: of ")
    assert (
        lines[1] == "  verdict  different"
        and "different" in lines[2]
        and lines[-1] == f"  report   {place}/report.html"
    )
    cells = pd.read_parquet(place / "comparisons.parquet")
    assert set(cells["segmenter_synthetic"]) == {"phantom-v1"} and set(cells["stratum"]) == {"sex=F", "sex=M"}
    assert set(cells["segmenter_reference"]) == {"TotalSegmentator, fast (3 mm), on the CT"}
    document = json.loads((place / "report.json").read_text())
    assert len(document["gallery"]) == 4 and "A0" in document["gallery"][0]["title"]
    assert any("not segmented alike" in flag for flag in document["provenance"]["flags"])
    assert {m["role"] for m in document["provenance"]["models"]} == {"generator", "segmenter"}
    assert "halves of cubes" in document["not_patients"] and "diversity" in document["absent"]
    before = stamps(run)
    code, again, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 0 and stamps(run) == before and "ok" not in err
    assert (
        again.splitlines()[0] == lines[0] and "nothing was left to do" in again and again.splitlines()[-1] == lines[-1]
    )
    told = json.loads(vtrial_command(capfd, "validate", "--json", *QUICK)[1])
    assert told["verdict"] == "different" and told["counts"] == {**told["counts"], "different": cells_with(cells)}
    (place / "report.html").unlink()
    assert "nothing was left" not in vtrial_command(capfd, "validate", *QUICK)[1] and (place / "report.html").is_file()


def cells_with(cells: pd.DataFrame, verdict: str = "different") -> int:
    return int((cells["verdict"] == verdict).sum())


def test_other_questions_are_answered_anew(run: Path, capfd: Capture) -> None:
    assert vtrial_command(capfd, "validate", *QUICK)[0] == 0
    code, out, err = vtrial_command(capfd, "report", "--by", "all", "--settings", "quick.toml")
    assert code == 0 and "nothing was left" not in out, err
    cells = pd.read_parquet(run / "validation" / "autopet-2025" / "comparisons.parquet")
    assert set(cells["stratum"]) == {"all"}
    assert "nothing was left" in vtrial_command(capfd, "report", "--by", "all", "--settings", "quick.toml")[1]


def test_the_newest_run_is_taken(run: Path, capfd: Capture) -> None:
    twins(capfd, "runs/later", seed=1)
    (run / "subjects.csv").touch()
    assert "later against" in vtrial_command(capfd, "validate", *QUICK)[1]
    shutil.rmtree("runs")
    code, _, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 2 and "no run under runs/" in err and "vtrial generate" in err


def test_all_problems_are_told_before_any_work(run: Path, capfd: Capture) -> None:
    before = stamps(run)
    Path("bad.toml").write_text("alpha = 3\nbootstrap = 1\n")
    code, _, err = vtrial_command(
        capfd, "validate", "nowhere", "--real", "nobody", "--by", "shoes", "--settings", "bad.toml", *LOCAL
    )
    assert code == 2
    for told in ("nowhere: no run is there", "nobody: no such file", "'shoes'", "alpha", "bootstrap"):
        assert told in err, told
    code, _, err = vtrial_command(capfd, "validate", str(run), "--by", "diagnosis", *LOCAL)
    assert code == 2 and "--by diagnosis: no subject" in err
    code, _, err = vtrial_command(capfd, "validate", str(run), "--match", *LOCAL)
    assert code == 2 and "--match: autopet-2025 has no subjects" in err
    code, _, err = vtrial_command(capfd, "validate", str(run), "--segmenter", "unknown", *LOCAL)
    assert code == 2 and "segmenter unknown" in err
    code, _, err = vtrial_command(capfd, "report", str(run), *QUICK[:2])
    assert code == 2 and "no organ masks; run vtrial segment" in err
    assert stamps(run) == before


def test_a_run_against_a_run_by_one_segmenter(run: Path, capfd: Capture) -> None:
    twins(capfd, "runs/others", seed=5)
    code, out, err = vtrial_command(
        capfd, "validate", str(run), "--real", "runs/others", "--segmenter", "halves", *QUICK
    )
    assert code == 0, err
    assert (Path("runs/others/measurements.parquet")).is_file() and "twins against others" in out
    document = json.loads((run / "validation" / "others" / "report.json").read_text())
    assert [row["cohort"] for row in document["likeness"]] == ["twins", "others"] and len(document["gallery"]) == 8
    assert document["absent"] == {} and document["slopes"] and document["correlations"]
    flags = " ".join(document["provenance"]["flags"])
    assert "others is no cohort of patients" in flags and "not segmented alike" not in flags
    roles = [model["role"] for model in document["provenance"]["models"]]
    assert roles == ["generator", "generator of others", "segmenter"]
    assert document["not_patients"].count("They come from the model") == 1
    assert {"run": "0", "run others": "5"}.items() <= document["provenance"]["seeds"].items()
    before = stamps(Path("runs"))
    assert vtrial_command(capfd, "validate", str(run), "--real", "runs/others", "--segmenter", "halves", *QUICK)[0] == 0
    assert stamps(Path("runs")) == before
    # The masks that are there will do, and pairs are another question.
    code, out, _ = vtrial_command(capfd, "validate", str(run), "--real", "runs/others", "--match", *QUICK)
    assert code == 0 and "nothing was left" not in out


def test_a_hospitals_own_columns_stop_nothing(here: Path, segmenters: Segmenters, capfd: Capture) -> None:  # noqa: F811
    rows = [f"H{i},{'FM'[i % 2]},{40 + i},{160 + i},{60 + 2 * i},11,alive,{'ab'[i // 2 % 2]}" for i in range(12)]
    Path("hospital.csv").write_text("\n".join(["PatientID,Sex,Age,Height,Weight,BMI,Status,Diagnosis", *rows]) + "\n")
    asked = ("generate", "--match", "hospital.csv", "--seed", "0", "--out", "runs/matched", *LOCAL)
    code, _, err = vtrial_command(capfd, *asked)
    assert code == 0, err
    table = pd.read_parquet("runs/matched/subjects.parquet")
    assert not {"BMI", "Status"} & set(table.columns) and table["bmi"].min() > 20 and set(table["status"]) == {"ok"}
    code, _, err = vtrial_command(capfd, "validate", "runs/matched", "--by", "diagnosis", *QUICK)
    assert code == 0, err
    cells = pd.read_parquet("runs/matched/validation/autopet-2025/comparisons.parquet")
    assert set(cells["stratum"]) == {"diagnosis=a", "diagnosis=b"}


def test_a_table_and_its_segmenter(run: Path, capfd: Capture) -> None:
    assert vtrial_command(capfd, "validate", *QUICK)[0] == 0
    people = pd.read_parquet(run / "subjects.parquet")[["subject_id", "sex", "age_years"]]
    table = pd.read_parquet(run / "measurements.parquet").merge(people, on="subject_id")
    table.loc[table["organ"] == "liver", "suv_mean"] *= 2.0
    table.to_csv("hospital.csv", index=False)
    code, out, err = vtrial_command(capfd, "validate", "--real", "hospital.csv", *QUICK)
    assert code == 0 and "twins against hospital: different" in out, err
    document = json.loads((run / "validation" / "hospital" / "report.json").read_text())
    assert document["provenance"]["reference"]["segmenter"] == "phantom-v1"
    (flag,) = document["provenance"]["flags"]  # the twins are by a model of one's own, which may know patients
    assert flag.startswith("twins: phantom-v1 was trained on phantoms alone. Where the model of these scans was train")
    row = next(
        c for c in document["cells"] if (c["organ"], c["metric"], c["stratum"]) == ("liver", "suv_mean", "sex=F")
    )
    assert row["difference_percent"] == pytest.approx(-50.0)


def test_a_subject_that_cannot_be_segmented_is_counted(run: Path, capfd: Capture) -> None:
    (run / "scans/A3/CTres.nii.gz").write_bytes(b"spoilt")
    code, out, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 1 and "failed: twins: A3: scans/A3/CTres.nii.gz: not a readable NIfTI file" in out, err
    document = json.loads((run / "validation/autopet-2025/report.json").read_text())
    assert [(e["step"], e["count"], e["of"]) for e in document["exclusions"]] == [("segment", 1, 12)]
    assert "twins: A4" not in out and "report.html" in out.splitlines()[-1]


def test_an_incomplete_run_is_judged_on_what_is_there(run: Path, capfd: Capture) -> None:
    journal = run / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:8]))
    table = pd.read_parquet(run / "subjects.parquet")
    table.loc[8:, "status"] = "pending"
    table.to_parquet(run / "subjects.parquet")
    assert vtrial_command(capfd, "validate", *QUICK)[0] == 0
    code, out, _ = vtrial_command(capfd, "validate", *QUICK)
    assert code == 0 and "  so far   twins: the run is not complete, 8 of 12 subjects are made" in out.splitlines()
    document = json.loads((run / "validation/autopet-2025/report.json").read_text())
    assert any("the run is not complete, 8 of 12" in flag for flag in document["provenance"]["flags"])
    assert [(e["step"], e["count"], e["reason"]) for e in document["exclusions"]] == [
        ("make", 4, "pending, not made yet")
    ]


def test_a_second_segmenter_has_masks_and_table_of_its_own(run: Path, capfd: Capture) -> None:
    assert vtrial_command(capfd, "validate", *QUICK)[0] == 0
    before = stamps(run)
    assert vtrial_command(capfd, "segment", str(run), "--segmenter", "halves", *LOCAL)[0] == 0
    code, _, err = vtrial_command(capfd, "measure", str(run), *LOCAL)
    assert code == 2 and "masks by phantom-v1, halves; choose one with --segmenter" in err
    code, out, _ = vtrial_command(capfd, "measure", str(run), "--segmenter", "halves", *LOCAL)
    assert code == 0 and out.endswith("measurements-halves.parquet\n")
    assert set(pd.read_parquet(run / "measurements-halves.parquet")["segmenter"]) == {"halves"}
    kept = {p: t for p, t in before.items() if not p.name.endswith(".jsonl")}
    assert {p: t for p, t in stamps(run).items() if p in kept} == kept


def test_phantoms_are_measured_with_their_exact_masks_unless_beside_twins(
    run: Path,
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
    segmenters: Segmenters,  # noqa: F811
) -> None:
    monkeypatch.setattr(vtrial.pipeline.making, "LoadPhantom", LoadLabelled)
    assert vtrial_command(capfd, "phantom", "people.csv", "--seed", "3", "--out", "phantoms", *LOCAL)[0] == 0
    code, out, err = vtrial_command(capfd, "validate", "phantoms", *QUICK)
    assert code == 0 and segmenters.asked == [], err
    exact = pd.read_parquet("phantoms/measurements.parquet")
    assert set(exact["segmenter"]) == {"exact masks"}
    assert exact.set_index(["subject_id", "organ"]).loc[("A0", "liver"), "volume_ml"] == pytest.approx(
        5 * 16 * 16 * 2.0 * 2.0 * 1.6 / 1000
    )
    before = stamps(Path("phantoms"))
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "phantoms", *QUICK)
    assert code == 0 and segmenters.asked == [("phantom-v1", None)], err
    beside = pd.read_parquet("phantoms/measurements-phantom-v1.parquet")
    assert set(beside["segmenter"]) == {"phantom-v1"}
    now = stamps(Path("phantoms"))
    assert {p for p in before if now[p] != before[p]} == {Path("phantoms/measurements.jsonl")}
    code, out, _ = vtrial_command(capfd, "report", str(run), "--real", "phantoms", *QUICK[:2])
    assert code == 0 and "nothing was left" in out


def read_only(self: LocalFolder, *unused: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_finished_work_on_a_read_only_disk_is_told(run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vtrial_command(capfd, "validate", *QUICK)[0] == 0
    for action in ("lock", "write", "append"):
        monkeypatch.setattr(LocalFolder, action, read_only)
    code, out, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 0 and "nothing was left" in out, err
    code, _, err = vtrial_command(capfd, "validate", "--by", "all", *QUICK)
    assert code == 1 and "cannot write" in err


def test_a_run_in_which_nothing_can_be_segmented_says_why(
    run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LoadHalves, ct: bytes) -> bytes:
        raise ArithmeticError("planted failure")

    monkeypatch.setattr(LoadHalves, "segment", fail)
    code, _, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 1 and "no subject could be segmented: ArithmeticError: planted failure" in err
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", str(run), *QUICK)
    assert code == 2 and "that is the run itself" in err


def test_a_run_in_which_nothing_can_be_measured_says_why(
    run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*unused: object) -> None:
        raise InputError("SUV in Bq/ml")

    with monkeypatch.context() as broken:
        broken.setattr(vtrial.measurement.cohort, "measure", refuse)
        code, out, err = vtrial_command(capfd, "validate", *QUICK)
        assert code == 1 and "no subject could be measured: SUV in Bq/ml" in err and not out
    code, out, err = vtrial_command(capfd, "validate", *QUICK)
    assert code == 0 and "twins against autopet-2025" in out, err  # nothing was half done


def test_masks_that_a_user_put_there_are_measured(run: Path, capfd: Capture) -> None:
    (run / "segmentations").mkdir()
    for scan in (run / "scans").iterdir():
        mask = LoadHalves().segment((scan / "CTres.nii.gz").read_bytes())
        (run / "segmentations" / f"{scan.name}.nii.gz").write_bytes(mask)
    code, out, err = vtrial_command(capfd, "measure", str(run), *LOCAL)
    assert code == 0 and "12 of 12 subjects are measured" in out, err
    assert set(pd.read_parquet(run / "measurements.parquet")["segmenter"]) == {"masks of unknown origin"}
    assert vtrial_command(capfd, "report", *QUICK[:2])[0] == 0
    document = json.loads((run / "validation/autopet-2025/report.json").read_text())
    assert [m["role"] for m in document["provenance"]["models"]] == ["generator"]
    assert any("not segmented alike (masks of unknown origin" in flag for flag in document["provenance"]["flags"])


# real scans


def test_a_folder_of_real_scans_is_the_reference(run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lesions_folder(Path("data/autopet"), 12)
    before = stamps(real)
    code, out, err = vtrial_command(capfd, "validate", str(run), "--real", str(real), *QUICK)
    assert code == 0 and "twins against autopet: " in out, err
    assert stamps(real) == before and set(real.rglob("*")) >= set(before)
    work = Path("runs/real-autopet")
    people = pd.read_parquet(work / "subjects.parquet")
    assert people["subject_id"].tolist() == [f"PETCT_{i:010x}" for i in range(12)]
    assert people["sex"].tolist() == ["F", "M"] * 6 and people["age_years"].tolist() == [
        float(40 + i) for i in range(12)
    ]
    assert set(pd.read_parquet(work / "measurements.parquet")["segmenter"]) == {"totalsegmentator"}
    document = json.loads((run / "validation/autopet/report.json").read_text())
    assert any(
        "not segmented alike (phantom-v1; reference: totalsegmentator)" in f for f in document["provenance"]["flags"]
    )
    before = stamps(Path())
    assert "nothing was left" in vtrial_command(capfd, "validate", str(run), "--real", str(real), *QUICK)[1]
    assert stamps(Path()) == before
    assert "nothing was left" in vtrial_command(capfd, "validate", str(run), "--real", str(work), *QUICK)[1]
    for action in ("create", "lock", "write", "append"):
        monkeypatch.setattr(LocalFolder, action, read_only)
    code, out, err = vtrial_command(capfd, "validate", str(run), "--real", str(real), *QUICK)
    assert code == 0 and "nothing was left" in out, err


def test_a_segmenter_for_phantoms_needs_force_on_real_scans_and_is_flagged(run: Path, capfd: Capture) -> None:
    real = lesions_folder(Path("data/autopet"), 12)
    asked = ("validate", str(run), "--real", str(real), "--segmenter", "halves")
    code, _, err = vtrial_command(capfd, *asked, *QUICK)
    assert code == 2 and "halves was trained on phantoms alone" in err and "--force" in err
    assert not (run / "segmentations").exists() and not Path("runs/real-autopet").exists()
    code, _, err = vtrial_command(capfd, *asked, "--force", *QUICK)
    assert code == 0, err
    measured = pd.read_parquet("runs/real-autopet/measurements.parquet")
    assert measured["caution"].str.contains("trained on phantoms alone").all()
    compared = pd.read_parquet(run / "validation/autopet/comparisons.parquet")
    assert compared["caution"].str.contains("trained on phantoms alone").all()
    assert (pd.read_parquet(run / "measurements.parquet")["caution"] == "").all()
    document = json.loads((run / "validation/autopet/report.json").read_text())
    assert any("trained on phantoms alone" in flag for flag in document["provenance"]["flags"])
    assert any("autopet: halves was trained on phantoms alone" in note for note in document["notes"])


def test_nobody_can_be_compared_without_a_sex(run: Path, capfd: Capture) -> None:
    real = lesions_folder(Path("data/autopet"), 3)
    (real / "Clinical Metadata.csv").unlink()
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", str(real), *QUICK)
    assert code == 2 and "nobody's sex is known; put a CSV" in err
    assert not Path("runs/real-autopet").exists()


def test_work_on_real_scans_goes_where_it_is_asked_to(run: Path, capfd: Capture) -> None:
    one, other = lesions_folder(Path("a/scans"), 2), lesions_folder(Path("b/scans"), 2)
    assert vtrial_command(capfd, "segment", str(one), *LOCAL)[0] == 0
    code, _, err = vtrial_command(capfd, "segment", str(other), *LOCAL)
    assert code == 2 and "runs/real-scans: holds the work on" in err and "--out FOLDER, then --real FOLDER" in err
    code, out, err = vtrial_command(capfd, "segment", str(other), "--out", "b/work", *LOCAL)
    assert code == 0 and "b/work/segmentations" in out, err
    code, out, err = vtrial_command(capfd, "measure", str(other), "--out", "b/work", *LOCAL)
    assert code == 0 and "2 of 2 subjects are measured" in out, err
    code, _, err = vtrial_command(capfd, "segment", str(run), "--out", "elsewhere", *LOCAL)
    assert code == 2 and "leave out --out" in err


def test_scans_are_found_by_the_names_of_data_sets(tmp_path: Path) -> None:
    def ids(folder: str) -> list[tuple[str, str]]:
        return [(s.subject_id, s.patient) for s in find_scans(open_folder(tmp_path / folder))]

    for name in (
        "lesions/PETCT_01ab/first",
        "lesions/PETCT_01ab/second study",
        "lesions/PETCT_02cd/only",
        "pairs/x",
        "pairs/y",
    ):
        write_scan(tmp_path / name / "CTres.nii.gz", tmp_path / name / "SUV.nii.gz", 0)
    assert ids("lesions") == [
        *(("PETCT_01ab_first", "PETCT_01ab"), ("PETCT_01ab_second-study", "PETCT_01ab"), ("PETCT_02cd", "PETCT_02cd")),
    ]
    assert ids("pairs") == [("x", "x"), ("y", "y")]
    raw = tmp_path / "Dataset001" / "imagesTr"
    for case in ("fdg_03ef_01-01-2003", "case_7"):
        write_scan(raw / f"{case}_0000.nii.gz", raw / f"{case}_0001.nii.gz", 0)
    found = find_scans(open_folder(raw.parent))
    assert [(s.subject_id, s.patient) for s in found] == [("case_7", "case_7"), ("fdg_03ef_01-01-2003", "PETCT_03ef")]
    assert (found[0].ct, found[0].suv) == ("imagesTr/case_7_0000.nii.gz", "imagesTr/case_7_0001.nii.gz")
    with pytest.raises(InputError, match=r"no run is there, and no PET/CT.*CTres"):
        find_scans(open_folder(tmp_path / "nothing"))


def test_scans_are_shown_upright(tmp_path: Path) -> None:
    import nibabel

    folder = open_folder(tmp_path)
    write_scan(tmp_path / "ct.nii.gz", tmp_path / "suv.nii.gz", 1)
    upright = read_upright(folder, "ct.nii.gz", "suv.nii.gz")
    voxels, affine = nifti_from_bytes((tmp_path / "ct.nii.gz").read_bytes(), "ct")
    np.testing.assert_array_equal(upright.ct_hu, voxels)
    turned = np.array(
        [[0, 0, -2, 15], [-2, 0, 0, 15], [0, 2, 0, -15], [0, 0, 0, 1]], dtype=float
    )  # to the left, back, up
    for name in ("ct", "suv"):
        array, _ = nifti_from_bytes((tmp_path / f"{name}.nii.gz").read_bytes(), name)
        image = nibabel.Nifti1Image(np.ascontiguousarray(array[::-1, ::-1].transpose(1, 2, 0)), turned)
        (tmp_path / f"{name}-turned.nii").write_bytes(io.BytesIO(image.to_bytes()).read())
    again = read_upright(folder, "ct-turned.nii", "suv-turned.nii")
    np.testing.assert_array_equal(again.ct_hu, upright.ct_hu)
    np.testing.assert_allclose(again.suv, upright.suv)
    assert again.spacing_mm == pytest.approx(upright.spacing_mm) and affine is not None
