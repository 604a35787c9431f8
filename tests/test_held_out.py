"""`--real DATA` of a training set that `vtrial prepare` made: its split "test" becomes scans, and is judged as such."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from engine import LoadFake, fake_plan
from judged import Segmenters, here, segmenters  # noqa: F401
from test_cli import vtrial_command
from test_validate import LOCAL, QUICK, Capture, stamps, twins

import vtrial.pipeline
from vtrial.imaging.dicom.people import Person
from vtrial.pipeline.scans import open_scans
from vtrial.preparation import held_out
from vtrial.preparation.dataset import Prepared, finish_training_set
from vtrial.preparation.sources.study import Origin, Study
from vtrial.preparation.split import Split
from vtrial.preparation.volume import TrainingVolume, save_volume
from vtrial.records import InputError, PetCt
from vtrial.runs import Manifest, Session, now
from vtrial.storage import LocalFolder, open_folder

SIDE, IN_PLANE_MM = 40, 448.0 / 40  # the field of view of the method on a coarse grid
HALF: dict[Split, float] = {"train": 0.5, "test": 0.5}
REAL = ("--real", "data", "--segmenter", "halves", "--force", *QUICK)
SEGMENT = ("segment", "data", "--segmenter", "halves", "--force", *LOCAL)
WORK = Path("runs/real-data")


def extent_mm(i: int) -> float:
    return 600.0 + 5.0 * i


def volume(i: int) -> TrainingVolume:
    """A volume in which no axis is like another, of a length of its own."""
    rng = np.random.default_rng(i)
    ct = rng.integers(-500, 490, (SIDE, SIDE, SIDE), dtype=np.int16)
    suv = (1.0 + rng.random(ct.shape, dtype=np.float32)) * np.linspace(0.5, 2.0, SIDE, dtype=np.float32)
    spacing = (IN_PLANE_MM, IN_PLANE_MM, extent_mm(i) / SIDE)
    return TrainingVolume(PetCt(ct, suv, spacing), (), {"extent_mm": extent_mm(i)})


def prepared(n: int, shares: dict[Split, float] = HALF, name: str = "data") -> pd.DataFrame:
    """A training set as `vtrial prepare` leaves it, of `n` studies; gives its table. Again with more, it grows."""
    folder, studies = open_folder(name), []
    manifest = Manifest(kind="prepare", identity={"segmenter": None}, geometry={}, n=n, sharded=False)
    machines = {"executor": "local", "workers": 1, "threads_per_subject": 1, "gpus_per_worker": 0.0, "device": "cpu"}
    manifest.sessions = [Session.model_validate({"command": [], "started": now(), "n": n, "versions": {}, **machines})]
    for i in range(n):
        person = Person("FM"[i % 2], 40.0 + i, 160.0 + i, 60.0 + i)  # type: ignore[arg-type]
        facts = {"diagnosis": "ab"[i // 2 % 2]}
        study = Study(f"s{i + 1:04d}", person, facts, (), f"print {i}", f"person {i}", NotImplemented, Origin(""))
        studies.append(Prepared(study, save_volume(folder, study.subject_id, volume(i)).row))
    done = finish_training_set(folder, studies, [], seed=0, shares=shares)
    folder.write("manifest.json", manifest.model_dump_json().encode())
    return done.table


def of_test(table: pd.DataFrame) -> list[str]:
    return table.loc[table["split"] == "test", "subject_id"].tolist()


@pytest.fixture
def run(here: Path, segmenters: Segmenters, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", fake_plan(LoadFake(side=SIDE)))
    return twins(capfd)


def test_twins_are_judged_by_the_people_that_training_never_saw(run: Path, capfd: Capture) -> None:
    table = prepared(24)
    ours, before = of_test(table), stamps(Path("data"))
    asked = ("validate", str(run), *REAL, "--train", "data")
    code, out, err = vtrial_command(capfd, *asked)
    assert code == 0 and out.startswith("twins against data (test): "), err
    assert stamps(Path("data")) == before and not Path("data/.lock").exists()
    measured = pd.read_parquet(WORK / "measurements.parquet")
    assert len(ours) == 12 and measured["subject_id"].drop_duplicates().tolist() == ours
    assert measured["caution"].str.contains("trained on phantoms alone").all()
    liver = measured[measured["organ"] == "liver"].set_index("subject_id")["volume_ml"]
    voxels = (SIDE // 2 - 2) * (SIDE - 2) * (SIDE - 2)
    for i, name in enumerate(table["subject_id"]):
        if name in ours:
            assert liver[name] == pytest.approx(voxels * IN_PLANE_MM**2 * extent_mm(i) / SIDE / 1000.0, rel=1e-5)
    document = json.loads((run / "validation/data-test/report.json").read_text())
    assert document["copies"]["held_out"] == "12 volumes of data (test)" and document["copies"]["n_training"] == 12
    assert document["provenance"]["reference"]["title"] == 'PET/CT of the split "test" of a training set'
    assert len(document["gallery"]) == 8 and "diversity" not in document["absent"]
    done = stamps(Path())
    assert "nothing was left" in vtrial_command(capfd, *asked)[1] and stamps(Path()) == done
    asked = ("validate", str(run), "--real", str(WORK), *QUICK, "--train", "data")
    assert "nothing was left" in vtrial_command(capfd, *asked)[1] and stamps(Path()) == done


def test_scans_are_the_volumes_that_were_prepared(run: Path, capfd: Capture) -> None:
    """HU and SUV voxel by voxel, upright, and as large as the field of view was; nobody is called synthetic."""
    table = prepared(6)
    assert vtrial_command(capfd, "segment", "data", *LOCAL)[0] == 0
    for i, row in table.iterrows():
        scan = WORK / "scans" / row["subject_id"]
        assert scan.exists() == (row["split"] == "test")
        for name, kind, dtype in (("CTres", "ct", "int16"), ("SUV", "suv", "float32")) if scan.exists() else ():
            image = nibabel.load(scan / f"{name}.nii.gz")
            assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S") and image.get_data_dtype() == dtype
            assert image.header.get_zooms() == pytest.approx((IN_PLANE_MM, IN_PLANE_MM, extent_mm(int(str(i))) / SIDE))
            np.testing.assert_allclose(image.affine @ np.array([*3 * [(SIDE - 1) / 2], 1.0]), [0, 0, 0, 1], atol=1e-3)
            np.testing.assert_array_equal(np.asanyarray(image.dataobj), np.load(f"data/{kind}/{row['subject_id']}.npy"))
            assert b"synthetic" not in bytes(image.header["descrip"])
    alone = open_scans(str(WORK / "scans"))  # a folder of real PET/CT like any other
    with_the_set = open_scans("data")
    columns = ["subject_id", "sex", "diagnosis", "age_years", "height_cm", "weight_kg", "bmi", "index", "status"]
    pd.testing.assert_frame_equal(alone.people[columns], with_the_set.people[columns])
    assert with_the_set.people["subject_id"].tolist() == of_test(table)


def test_pairs_of_a_person_and_their_twin(run: Path, capfd: Capture) -> None:
    table = prepared(24)
    table[table["split"] == "test"].to_csv("test.csv", index=False)
    asked = ("generate", "--match", "test.csv", "--out", "runs/matched", *LOCAL)
    assert vtrial_command(capfd, *asked)[0] == 0
    code, _, err = vtrial_command(capfd, "validate", "runs/matched", *REAL, "--match")
    assert code == 0, err
    cells = pd.read_parquet("runs/matched/validation/data-test/comparisons.parquet")
    assert cells["n_synthetic"].max() == 6


def test_the_segmenter_is_that_of_real_scans(run: Path, capfd: Capture, segmenters: Segmenters) -> None:  # noqa: F811
    prepared(12)
    before = stamps(Path())
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "data", "--segmenter", "halves", *QUICK)
    assert code == 2 and "halves was trained on phantoms alone" in err and "--force" in err
    assert stamps(Path()) == before
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "data", *QUICK)
    assert code == 0 and segmenters.asked[-2:] == [("phantom-v1", None), ("totalsegmentator", None)], err


def test_without_a_test_split_it_says_what_there_is(run: Path, capfd: Capture) -> None:
    prepared(6, {"train": 0.7, "validation": 0.3})
    before = stamps(Path())
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "data", *QUICK)
    assert code == 2 and 'nobody in the split "test" (4 in train, 2 in validation)' in err
    assert "Name scans that it never saw" in err and stamps(Path()) == before
    table = pd.read_parquet("data/subjects.parquet")
    table.drop(columns=["split", "spacing_z_mm"]).to_parquet("data/subjects.parquet")
    with pytest.raises(InputError, match="columns missing: split, spacing_z_mm; run vtrial prepare again"):
        open_scans("data")
    Path("data/subjects.parquet").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"subjects\.parquet: cannot be read"):
        open_scans("data")


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "_WRITERS", 1)
    ours = of_test(prepared(12))
    write = LocalFolder.write

    def refuse(self: LocalFolder, name: str, data: bytes) -> None:
        if name == f"scans/{ours[2]}/SUV.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)

    monkeypatch.setattr(LocalFolder, "write", refuse)
    code, _, err = vtrial_command(capfd, "validate", str(run), *REAL)
    assert code == 1 and "cannot write" in err and "No space left" in err and "what is written is safe" in err
    assert not (run / "segmentations").exists(), "before other work"
    whole = {path: stamp for path, stamp in stamps(WORK).items() if path.parts[-2] in ours[:2]}
    assert len(whole) == 6
    monkeypatch.setattr(LocalFolder, "write", write)
    code, _, err = vtrial_command(capfd, *SEGMENT)
    assert code == 0 and len(list(WORK.glob("scans/*/SUV.nii.gz"))) == 6, err
    assert whole.items() <= stamps(WORK).items()


def test_a_set_that_has_grown_brings_new_people_alone(run: Path, capfd: Capture) -> None:
    first = of_test(prepared(12))
    assert vtrial_command(capfd, *SEGMENT)[0] == 0
    before = {path: stamp for path, stamp in stamps(WORK).items() if path.suffix == ".gz"}
    more = of_test(prepared(20))  # arrays of the first are written anew: the same ones
    assert set(first) < set(more)
    code, _, err = vtrial_command(capfd, *SEGMENT)
    assert code == 0 and before.items() <= stamps(WORK).items(), err
    assert {path.name.split(".")[0] for path in (WORK / "segmentations").iterdir()} == set(more)
    assert pd.read_csv(WORK / "scans/people.csv")["subject_id"].tolist() == more


@pytest.mark.parametrize("what", ["voxels", "length"])
def test_a_set_that_is_another_by_now_is_refused(run: Path, capfd: Capture, what: str) -> None:
    """Its masks and measurements are of the old one."""
    ours = of_test(prepared(12))
    assert vtrial_command(capfd, *SEGMENT)[0] == 0
    if what == "voxels":
        np.save(f"data/suv/{ours[1]}.npy", np.load(f"data/suv/{ours[1]}.npy") * np.float16(2.0))
    else:
        table = pd.read_parquet("data/subjects.parquet")
        table.loc[table["subject_id"] == ours[1], "spacing_z_mm"] *= 1.1
        table.to_parquet("data/subjects.parquet")
    before = stamps(Path())
    code, _, err = vtrial_command(capfd, "validate", str(run), *REAL)
    assert code == 2 and f"as it was before: {ours[1]} is another volume now; remove that folder" in err
    assert stamps(Path()) == before and not (run / "segmentations").exists()
    shutil.rmtree(WORK)
    assert vtrial_command(capfd, *SEGMENT)[0] == 0


def test_arrays_that_cannot_be_read_stop_no_other(run: Path, capfd: Capture) -> None:
    ours = of_test(prepared(16))
    Path(f"data/ct/{ours[0]}.npy").unlink()
    torn = Path(f"data/suv/{ours[1]}.npy")
    torn.write_bytes(torn.read_bytes()[:3000])
    code, out, err = vtrial_command(capfd, "validate", str(run), *REAL)
    assert code == 1 and f"failed: data (test): {ours[0]}: " in out and f"failed: data (test): {ours[1]}: " in out, err
    assert f"{ours[0]}: given up after attempt 1: ct/{ours[0]}.npy or suv/{ours[0]}.npy: cannot be read" in err
    assert f"ct/{ours[1]}.npy or suv/{ours[1]}.npy: not a readable volume" in err
    measured = pd.read_parquet(WORK / "measurements.parquet").dropna(subset="volume_ml")
    assert set(measured["subject_id"]) == set(ours[2:])


def test_work_goes_where_it_is_asked_to_and_a_set_is_no_run(run: Path, capfd: Capture) -> None:
    prepared(6)
    assert vtrial_command(capfd, "segment", "data", "--out", "work", *LOCAL)[0] == 0
    code, out, err = vtrial_command(capfd, "measure", "data", "--out", "work", *LOCAL)
    assert code == 0 and "2 of 2 subjects are measured" in out and not WORK.exists(), err
    (Path("elsewhere") / "data").parent.mkdir()
    shutil.copytree("data", "elsewhere/data")
    assert vtrial_command(capfd, "segment", "data", *LOCAL)[0] == 0
    code, _, err = vtrial_command(capfd, "segment", "elsewhere/data", *LOCAL)
    assert code == 2 and "holds the work on" in err and "--out" in err
    prepared(6, name="runs/later")
    assert "twins against autopet-2025" in vtrial_command(capfd, "validate", *QUICK)[1]
