"""A collection of ours in the form of FDG-PET-CT-Lesions: as that data set has it, and read as it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.petcts import facts, in_place, write_pair
from vtrial.preparation.autopet import DEMOGRAPHICS, METADATA, study_name, write_autopet
from vtrial.preparation.sources import find_studies
from vtrial.records import PetCt, Sex, Subject

BODIES: list[tuple[Sex, float, float, float, dict[str, str]]] = [
    ("F", 61.37, 163.2, 60.41, {"diagnosis": "lung cancer"}),
    ("M", 44.0, 181.0, 90.0, {}),
    ("F", 30.9, 170.0, 55.5, {}),
]
SUBJECTS = [Subject(f"VT{i:06d}", i, 7, *body, extra=extra) for i, (*body, extra) in enumerate(BODIES)]


def read(subject: Subject) -> PetCt:
    """A small body, different for each subject."""
    ct = np.full((12, 14, 16), -500, np.int16)
    ct[3:9, 4:10, 2:14] = 30 + subject.index
    return PetCt(ct, (np.abs(ct) / 100.0).astype(np.float32), (2.0, 2.0, 1.9))


def test_our_collection_is_read_as_it_was_written(tmp_path: Path) -> None:
    folders = write_autopet(tmp_path, SUBJECTS, read)
    found = find_studies(tmp_path)
    assert (found.kind, found.left_out, found.notes) == ("pairs", (), ())
    by_path = {str(folder.relative_to(tmp_path)): subject for folder, subject in zip(folders, SUBJECTS)}
    assert len({s.patient for s in found.studies}) == len(by_path) == 3
    for study in found.studies:
        subject, (ct, suv) = by_path[study.origin.path], study.load()
        assert facts(study) == (subject.sex, subject.age_years, subject.height_cm, subject.weight_kg)
        assert study.person.doubts == ()
        assert np.array_equal(ct.voxels, read(subject).ct_hu) and np.array_equal(suv.voxels, read(subject).suv)
        assert suv.spacing_mm == pytest.approx((2.0, 2.0, 1.9))
    assert sorted(str(s.facts["diagnosis"]) for s in found.studies) == ["LUNG_CANCER", "NEGATIVE", "NEGATIVE"]


def test_our_collection_has_the_form_of_the_data_set(tmp_path: Path) -> None:
    """As public code for FDG-PET-CT-Lesions takes it apart."""
    (folder, *_) = write_autopet(tmp_path, SUBJECTS, read)
    assert sorted(path.name for path in folder.iterdir()) == ["CTres.nii.gz", "SEG.nii.gz", "SUV.nii.gz"]
    table = pd.read_csv(tmp_path / METADATA)
    assert list(table.columns[-3:]) == ["diagnosis", "age", "sex"] and len(table.columns) == 20
    assert table.groupby("File Location").ngroups == len(table) == 9
    pet = table[table["Modality"] == "PT"].iloc[0]
    _, collection, patient, study, _ = pet["File Location"].split("/")
    assert (collection, f"{patient}/{study}") == ("FDG-PET-CT-Lesions", study_name(SUBJECTS[0]).folder)
    assert patient == pet["Subject ID"] and len(patient.removeprefix("PETCT_")) == 10
    assert (pet["age"], pet["sex"], pet["diagnosis"]) == ("061Y", "F", "LUNG_CANCER")
    month, day, year, other, *_ = study.split("-")
    assert f"{int(month)}/{int(day)}/{year}" == pet["Study Date"] and other == "NA" and study[-6] == "-"
    (tmp_path / DEMOGRAPHICS).unlink()
    assert [facts(s)[2:] for s in find_studies(tmp_path).studies] == [(None, None)] * 3


def test_our_collection_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made: list[int] = []

    def counted(subject: Subject) -> PetCt:
        made.append(subject.index)
        return read(subject)

    write_autopet(tmp_path, SUBJECTS[:2], counted)
    (tmp_path / study_name(SUBJECTS[1]).folder / "SUV.nii.gz").unlink()
    before = {p: p.read_bytes() for p in write_autopet(tmp_path, SUBJECTS, counted)[0].iterdir()}
    assert made == [0, 1, 1, 2]
    write_autopet(tmp_path / "again", SUBJECTS, read)
    assert all((tmp_path / "again" / p.relative_to(tmp_path)).read_bytes() == data for p, data in before.items())


def test_a_run_folder_is_a_collection(tmp_path: Path) -> None:
    """Ours has its demographics in subjects.csv, by folder and by the paths in it."""
    run = tmp_path / "run"
    write_pair(run / "scans/VT000000/CTres.nii.gz", run / "scans/VT000000/SUV.nii.gz")
    write_pair(run / "scans/VT000001/CTres.nii.gz", run / "scans/VT000001/SUV.nii.gz", shift=1)
    rows = [
        {"subject_id": f"VT00000{i}", "status": "ok", "ct_path": f"scans/VT00000{i}/CTres.nii.gz"}
        | {"suv_path": f"scans/VT00000{i}/SUV.nii.gz", "sex": sex, "age_years": 40, "height_cm": 170, "weight_kg": 70}
        for i, sex in enumerate("FM")
    ]
    table = run / "subjects.csv"
    pd.DataFrame([*rows, {"subject_id": "VT000002", "status": "failed", "sex": "F"}]).to_csv(table, index=False)
    for found in (find_studies(run), find_studies(table)):
        assert [facts(s) for s in found.studies] == [("F", 40.0, 170.0, 70.0), ("M", 40.0, 170.0, 70.0)]
        assert in_place(*found.studies[1].load(), 1)
