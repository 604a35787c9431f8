"""`vtrial prepare` on a hospital's DICOM with every fault at once: who comes through, who is left out, who is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from tests.dicoms import ACCESSION, BIRTH, CT_GRID, DAY, NAME, PATIENT, ROOT_UID, Edit, Grid, setting, write_series
from tests.patients import DICOM_GRID, painted, write_patient
from tests.test_cli import vtrial_command

Capture = pytest.CaptureFixture[str]
UMLAUTS = "Überquorz^Ximénez"


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrial.preparation.volume.SHAPE", (112, 112, 192))
    monkeypatch.setattr("vtrial.preparation.volume.IN_PLANE_MM", 4.0)


def prepare(capfd: Capture, *arguments: str) -> tuple[int, str, str]:
    usual = ["--segmenter", "none", "--allow-partial", "--executor", "local", "--threads-per-worker", "1"]
    return vtrial_command(capfd, "prepare", *arguments, *usual)


def of(person: str, then: Edit | None = None, **values: object) -> Edit:
    """An edit that makes the images another person's."""
    own = setting(PatientID=person, **values)

    def edit(dataset: Dataset, k: int) -> None:
        own(dataset, k)
        if then is not None:
            then(dataset, k)

    return edit


def compressed(dataset: Dataset, k: int) -> None:
    dataset.compress(RLELossless, generate_instance_uid=False)


def write_sound(root: Path) -> None:
    """Three studies with what is no fault, or one that can be mended."""
    umlauts = of(f"{PATIENT}-A", SpecificCharacterSet="ISO_IR 192", PatientName=UMLAUTS)
    store = root.parent / "store" / UMLAUTS
    for kind in ("ct", "pet"):
        series = {"ct": "CT", "pet": "PT"}[kind]
        write_series(store / kind, series, grid=DICOM_GRID, study=21, edit=painted(umlauts), name="IM{:05d}")
    uncorrected = of(f"{PATIENT}-A", CorrectedImage=["DECY"], Units="PROPCNTS")
    write_series(store / "nac", "PT", grid=DICOM_GRID, study=21, series=9, edit=painted(uncorrected), name="{:d}")
    scout = of(f"{PATIENT}-A", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(store / "scout", "CT", study=21, series=7, edit=scout, skip=range(2, 12))
    report = of(f"{PATIENT}-A", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67")
    write_series(store / "dose", "CT", study=21, series=8, edit=report, skip=range(1, 12))
    (root / "Ärzte 断層").mkdir(parents=True)
    (root / "Ärzte 断層" / "linked").symlink_to(store)
    tilted = Grid(60, 40, 84, (8.0, 8.0), (-236.0, -156.0, -415.0), step=(0.0, 0.2, 10.0))
    write_series(root / "tilted" / "ct", "CT", grid=tilted, study=22, edit=painted(of("B")))
    write_series(root / "tilted" / "pet", "PT", grid=DICOM_GRID, study=22, edit=painted(of("B")))
    for file in list((root / "tilted" / "ct").glob("00*.dcm")):
        (file.parent / f"again {file.name}").write_bytes(file.read_bytes())
    write_patient(root / NAME.replace("^", " "), 23, ct=of("C", compressed, PatientName="Grün^Zoë"), pet=of("C"))


FAULTS = {
    "a gap": "slices are missing",
    "mixed": "6 slices are too few",
    "two at a place": "two different images lie at this place",
    "apart": "covers 0% of the PET's length",
    "absurd": "PatientWeight is 9000 kg",
    "nobody": "unknown: height_cm",
    "uncorrected": "not attenuation corrected",
    "torn": "damaged or cannot be decompressed",
    "no ct": "the study has no CT series",
    "a link to nowhere": "1 files: cannot be read",
}


def write_broken(root: Path) -> None:
    """A study for each fault, in the order of `FAULTS`."""

    def pair(name: str, study: int, *, ct: Edit | None = None, pet: Edit | None = None, **options: object) -> Path:
        write_series(root / name / "ct", "CT", study=study, grid=CT_GRID, edit=of(name, ct), **options)  # type: ignore[arg-type]
        write_series(root / name / "pet", "PT", study=study, edit=of(name, pet))
        return root / name

    pair("a gap", 31, skip=[7])
    sagittal = Grid(count=6, columns_along=(0.0, 1.0, 0.0), rows_along=(0.0, 0.0, -1.0), step=(4.0, 0.0, 0.0))
    write_series(root / "mixed" / "pet", "PT", study=32, edit=of("mixed"))
    write_series(root / "mixed" / "ct", "CT", study=32, grid=Grid(count=6), edit=of("mixed"))
    write_series(root / "mixed" / "ct", "CT", study=32, grid=sagittal, edit=of("mixed"), name="b{:d}")
    place = pair("two at a place", 33)
    write_series(place / "ct", "CT", study=33, series=3, grid=CT_GRID, name="b{:d}", skip=range(1, 24),
                 edit=of("two at a place", lambda dataset, k: setattr(dataset, "PixelData", bytes(640))))  # fmt: skip
    write_series(root / "apart" / "ct", "CT", study=34, grid=CT_GRID.moved((0.0, 0.0, 200.0)), edit=of("apart"))
    write_series(root / "apart" / "pet", "PT", study=34, edit=of("apart"))
    pair("absurd", 35, pet=setting(PatientWeight="9000"), ct=setting(PatientAge="999Y"))
    pair("nobody", 36, pet=setting(PatientSize=None), ct=setting(PatientSize=None))
    pair("uncorrected", 37, pet=setting(CorrectedImage=["DECY"]))
    torn = pair("torn", 38) / "pet" / "003.dcm"
    torn.write_bytes(torn.read_bytes()[:-9])
    write_series(root / "no ct", "PT", study=39, edit=of("no ct"))
    (root / "zjunk").mkdir()
    (root / "zjunk" / "file").write_bytes(bytes(128) + b"DICM" + PATIENT.encode() * 20)
    (root / "zjunk" / PATIENT).symlink_to(root / "nowhere")


def told_by(out: Path) -> str:
    """All that is in the files of a training set, tables in words too."""
    found = [path for path in out.rglob("*") if path.is_file()]
    tables = [pd.read_parquet(path).to_csv() for path in found if path.suffix == ".parquet"]
    names = [path.relative_to(out).as_posix() for path in found]
    return "\n".join([*(path.read_bytes().decode("latin-1") for path in found), *tables, *names])


def test_a_hospitals_export(tmp_path: Path, capfd: Capture, caplog: pytest.LogCaptureFixture) -> None:
    root, out = tmp_path / f"{PATIENT} Quorzelda" / "export", tmp_path / "data"
    write_sound(root)
    write_broken(root)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "matplotlib")
    caplog.clear()
    code, answer, errors = prepare(capfd, str(root), "--out", str(out))
    assert code == 0, errors
    table = pd.read_parquet(out / "subjects.parquet")
    assert len(table) == 3 and table["person"].nunique() == 3
    assert table["height_cm"].tolist() == [165.0] * 3 and set(table["flags"]) == {"partial"}
    notes = " ".join(table["notes"])
    for told in (
        "taken of 2 PET series, attenuation corrected",
        "the gantry was tilted by 1.1 degrees",
        "10 images lie",
    ):
        assert told in notes
    left_out = pd.read_csv(out / "left_out.csv")
    assert len(left_out) == len(FAULTS)
    for name, reason in FAULTS.items():
        assert left_out["reasons"].str.contains(reason, regex=False).sum() == 1, name
        assert reason in answer, name
    assert "3 of 13 studies are training volumes" in answer
    assert "1 X-Ray Radiation Dose SR Storage objects: passed over" in answer and "2 localizers: passed over" in answer
    assert "1 objects of unknown kind: passed over" in answer
    told = told_by(out) + answer + errors + caplog.text
    told = told.replace(str(tmp_path), "")
    secrets = (
        *NAME.split("^"),
        *UMLAUTS.split("^"),
        "Grün",
        PATIENT,
        ACCESSION,
        BIRTH,
        DAY,
        ROOT_UID,
        "Ärzte",
        "linked",
    )
    for secret in secrets:
        assert secret.lower() not in told.lower() and secret.encode().decode("latin-1") not in told, secret
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sessions"][0]["command"][:5] == ["vtrial", "prepare", "SRC", "--out", str(out)]
    assert "0 made now" in prepare(capfd, str(root), "--out", str(out))[1]


def test_a_real_scan_that_is_short(shared_data: Path, tmp_path: Path, capfd: Capture) -> None:
    """Kidneys to shoulders: told what is missing, taken when asked to, by the real segmenter's code."""
    data = tmp_path / "data"
    usual = ("--segmenter", "phantom-v1", "--force", "--executor", "local", "--out", str(data))
    command = ("prepare", str(shared_data / "acrin-nsclc-fdg-pet-042"), *usual)
    code, _, err = vtrial_command(capfd, *command)
    assert code == 2 and "none of 1 studies can be trained on" in err
    assert "s0001: the organ mask has no sacrum (--allow-partial takes what is there)" in err
    code, out, err = vtrial_command(capfd, *command, "--allow-partial")
    assert code == 0 and "1 of 1 studies are training volumes" in out, err
    (row,) = pd.read_parquet(data / "subjects.parquet").to_dict("records")
    assert (row["sex"], row["partial"]) == ("M", True) and "the organ mask has no sacrum" in row["notes"]
    assert "not attenuation corrected" in row["notes"] and "no sacrum" not in (data / "left_out.csv").read_text()
