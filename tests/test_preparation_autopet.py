"""`vtrial phantom --layout autopet`: a collection as FDG-PET-CT-Lesions is shipped, and read as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.petcts import facts
from vtrial import pipeline
from vtrial.execution import LocalExecutor, Resources
from vtrial.imaging.autopet import DEMOGRAPHICS, METADATA, study_name
from vtrial.imaging.scans import Scan
from vtrial.pipeline.scans import open_scans
from vtrial.preparation.sources import find_studies
from vtrial.production import RunSummary
from vtrial.records import PetCt, Sex, Subject

BODIES: list[tuple[Sex, float, float, float, dict[str, str]]] = [
    ("F", 61.37, 163.2, 60.41, {"diagnosis": "lung cancer"}),
    ("M", 44.0, 181.0, 90.0, {}),
    ("F", 30.9, 170.0, 55.5, {}),
]
SUBJECTS = [Subject(f"A{i}", i, 0, *body, extra=extra) for i, (*body, extra) in enumerate(BODIES)]


def body_of(index: int) -> PetCt:
    """A small body, different for each subject."""
    ct = np.full((12, 14, 16), -1000, np.int16)
    ct[3:9, 4:10, 2:14] = 30 + index
    return PetCt(ct, (np.abs(ct) / 100.0).astype(np.float32), (2.0, 2.0, 1.9))


@dataclass(frozen=True)
class LoadSmall:
    """In the place of phantoms."""

    def __call__(self, resources: Resources) -> Callable[[Subject], Scan]:
        return lambda subject: Scan(body_of(subject.index), np.ones((12, 14, 16), np.uint8), {"liver_suv": 2.0})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrial.pipeline.making.LoadPhantom", LoadSmall)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    rows = [
        {"subject_id": s.subject_id, "sex": s.sex, "age_years": s.age_years, "height_cm": s.height_cm}
        | {"weight_kg": s.weight_kg, "diagnosis": s.extra.get("diagnosis")}
        for s in SUBJECTS
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "people.csv", index=False)
    return tmp_path / "people.csv"


def make(people: Path, out: Path, n: int | None = None) -> RunSummary:
    cohort = pipeline.Cohort(None, n, match=str(people))
    return pipeline.phantom(cohort, LocalExecutor(threads=1), lambda progress: None, out=str(out), layout="autopet")


def test_our_collection_is_read_as_it_was_written(people: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(people, out).new == 3
    found = find_studies(out)
    assert (found.kind, found.left_out, found.notes) == ("pairs", (), ())
    by_path = {study_name(s).folder: s for s in SUBJECTS}
    assert len({s.patient for s in found.studies}) == len(by_path) == 3
    for study in found.studies:
        subject, (ct, suv) = by_path[study.origin.path], study.load()
        assert facts(study) == (subject.sex, subject.age_years, subject.height_cm, subject.weight_kg)
        assert study.person.doubts == ()
        written = body_of(subject.index)
        assert np.array_equal(ct.voxels, written.ct_hu) and np.array_equal(suv.voxels, written.suv)
        assert suv.spacing_mm == pytest.approx((2.0, 2.0, 1.9))
    assert sorted(str(s.facts["diagnosis"]) for s in found.studies) == ["LUNG_CANCER", "NEGATIVE", "NEGATIVE"]


def test_our_collection_has_the_form_of_the_data_set(people: Path, tmp_path: Path) -> None:
    """As public code for FDG-PET-CT-Lesions takes it apart."""
    out = tmp_path / "out"
    make(people, out)
    folder = out / study_name(SUBJECTS[0]).folder
    assert sorted(path.name for path in folder.iterdir()) == ["CTres.nii.gz", "SEG.nii.gz", "SUV.nii.gz"]
    table = pd.read_csv(out / METADATA)
    assert list(table.columns[-3:]) == ["diagnosis", "age", "sex"] and len(table.columns) == 20
    assert table.groupby("File Location").ngroups == len(table) == 9
    pet = table[table["Modality"] == "PT"].iloc[0]
    _, collection, patient, study, _ = pet["File Location"].split("/")
    assert (collection, f"{patient}/{study}") == ("FDG-PET-CT-Lesions", study_name(SUBJECTS[0]).folder)
    assert patient == pet["Subject ID"] and len(patient.removeprefix("PETCT_")) == 10
    assert (pet["age"], pet["sex"], pet["diagnosis"]) == ("061Y", "F", "LUNG_CANCER")
    month, day, year, other, *_ = study.split("-")
    assert f"{int(month)}/{int(day)}/{year}" == pet["Study Date"] and other == "NA" and study[-6] == "-"
    for name in (DEMOGRAPHICS, "subjects.csv", "subjects.parquet"):
        (out / name).unlink()
    assert [facts(s)[2:] for s in find_studies(out).studies] == [(None, None)] * 3


def test_our_collection_goes_on_where_it_was_stopped(people: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(people, out, 2).new == 2 and len(pd.read_csv(out / DEMOGRAPHICS)) == 2
    first = out / study_name(SUBJECTS[0]).folder
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    (out / study_name(SUBJECTS[1]).folder / "SUV.nii.gz").unlink()
    assert make(people, out).new == 2
    assert len(pd.read_csv(out / DEMOGRAPHICS)) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    everything = {path: path.stat().st_mtime_ns for path in out.rglob("[!.]*") if path.is_file()}
    assert make(people, out).new == 0 and make(people, out, 2).new == 0
    assert {path: path.stat().st_mtime_ns for path in everything} == everything
    make(people, tmp_path / "again")
    for path in (path for path in out.rglob("*") if path.suffix in (".gz", ".csv") and path.name != "subjects.csv"):
        again = tmp_path / "again" / path.relative_to(out)
        assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_our_collection_is_a_run_too(people: Path, tmp_path: Path) -> None:
    """To be segmented and measured, where its lesion mask is not taken for one of organs."""
    make(people, tmp_path / "out")
    scans = open_scans(str(tmp_path / "out"))
    assert (scans.real, scans.exact, len(scans.ct_cases)) == (False, False, 3)
    assert np.array_equal(scans.read("A1").suv, body_of(1).suv)
