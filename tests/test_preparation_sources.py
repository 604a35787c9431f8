"""What PET/CT studies lie under a path, in every form in which collections come."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.dicoms import setting, write_series, write_study
from tests.petcts import SHAPE, in_place, only, refusal, save, write_case, write_fdg, write_pair
from vtrial.preparation.sources import find_studies
from vtrial.records import InputError


def test_fdg_pet_ct_lesions(tmp_path: Path) -> None:
    write_fdg(tmp_path)
    write_fdg(tmp_path, study="11-02-2004-NA-PET-CT Ganzkoerper-00001", shift=1)
    write_fdg(tmp_path, patient="PETCT_01140d52d8", shift=2)
    found = find_studies(tmp_path)
    assert (found.kind, found.left_out, found.notes) == ("pairs", (), ())
    assert [study.subject_id for study in found.studies] == ["s0001", "s0002", "s0003"]
    first, second, other = (study.patient for study in found.studies)
    assert first == second != other
    assert [in_place(*s.load(), shift) for s, shift in zip(found.studies, (0, 1, 2))] == [True] * 3
    ct, suv = found.studies[0].load()
    assert (ct.voxels.dtype, suv.voxels.dtype) == (np.int16, np.float32)


def test_the_same_collection_gives_the_same_studies_elsewhere(tmp_path: Path) -> None:
    for place in ("a", "b"):
        for i in (3, 1, 2) if place == "a" else (1, 2, 3):
            write_fdg(tmp_path / place, patient=f"PETCT_00000000{i:02d}", shift=i)
    a, b = (find_studies(tmp_path / place) for place in ("a", "b"))
    assert [(s.subject_id, s.patient, s.fingerprint) for s in a.studies] == [
        (s.subject_id, s.patient, s.fingerprint) for s in b.studies
    ]
    write_fdg(tmp_path / "b", patient="PETCT_0000000002", shift=9)
    changed = find_studies(tmp_path / "b").studies
    assert [s.fingerprint == t.fingerprint for s, t in zip(a.studies, changed)] == [True, False, True]


def test_people_below_sites(tmp_path: Path) -> None:
    """The folder above a study's is a person's; whether the next ones are sites or people, only a table tells."""
    for i, name in enumerate(("A/p1/x", "A/p2/x", "B/p3/x", "B/p3/y")):
        write_fdg(tmp_path / "src", *name.rsplit("/", 1), shift=i)
    lines = [f"p{i},F,{50 + i},160,60" for i in (1, 2, 3)]
    (tmp_path / "people.csv").write_text("\n".join(["PatientID,sex,age,height,weight", *lines]) + "\n")
    found = find_studies(tmp_path / "src", tmp_path / "people.csv")
    assert [study.person.age_years for study in found.studies] == [51, 52, 53, 53]
    first, second, third, again = (study.patient for study in found.studies)
    assert len({first, second, third}) == 3 and third == again
    (note,) = found.notes
    assert note.startswith("3 folders that hold studies were taken to be a person's each; they lie in 2 folders")
    lines = [f"{name},{name[0]},F,50,160,60" for name in ("A/p1/x", "A/p2/x", "B/p3/x", "B/p3/y")]
    (tmp_path / "unite.csv").write_text("\n".join(["study,PatientID,sex,age,height,weight", *lines]) + "\n")
    found = find_studies(tmp_path / "src", tmp_path / "unite.csv")
    assert [study.patient == found.studies[0].patient for study in found.studies] == [True, True, False, False]
    assert found.notes == ()


def test_folders_of_people_and_studies_are_in_no_doubt(tmp_path: Path) -> None:
    for i, name in enumerate(("all/P001/1", "all/P002/1", "all/P002/2")):
        write_fdg(tmp_path, *name.rsplit("/", 1), shift=i)
    found = find_studies(tmp_path)
    assert [study.origin.patient for study in found.studies] == ["P001", "P002", "P002"] and found.notes == ()
    for i, name in enumerate(("A/PETCT_01", "A/PETCT_02", "B/PETCT_03")):
        write_fdg(tmp_path / "sites", name, "x", shift=i)
    assert find_studies(tmp_path / "sites").notes == ()


def test_nnunet_raw(tmp_path: Path) -> None:
    write_case(tmp_path, "fdg_0011f3deaf_03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445")
    write_case(tmp_path, "fdg_0011f3deaf_01-01-2004-NA-x-1", shift=1)
    write_case(tmp_path, "case_07", shift=2)
    save(tmp_path / "labelsTr" / "case_07.nii.gz", np.zeros(SHAPE, np.uint8))
    found = find_studies(tmp_path)
    assert found.kind == "nnunet" and not found.left_out
    assert [s.patient == found.studies[1].patient for s in found.studies] == [False, True, True]
    assert in_place(*found.studies[0].load(), 2)


@pytest.mark.parametrize(
    ("names", "swapped"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, False),
        ({"channel_names": {"0": "SUV", "1": "CT"}}, True),
        ({"channel_names": {"0": "zscore", "1": "CT"}}, True),
        ({"modality": {"0": "PT", "1": "CT"}}, True),
        ({"channel_names": {"0": "CT", "1": "CT"}}, False),
        ({"channel_names": ["CT"]}, False),
        ({}, False),
    ],
)
def test_dataset_json_says_which_channel_is_the_ct(tmp_path: Path, names: dict[str, object], swapped: bool) -> None:
    channels = [tmp_path / "imagesTr" / f"a_{channel:04d}.nii.gz" for channel in (0, 1)]
    write_pair(*(reversed(channels) if swapped else channels))
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    assert in_place(*only(find_studies(tmp_path)).load())


def test_swapped_channels_are_seen_in_the_voxels(tmp_path: Path) -> None:
    write_pair(tmp_path / "a_0001.nii.gz", tmp_path / "a_0000.nii.gz")
    assert "air is -1000 HU" in refusal(find_studies(tmp_path))


def test_other_tracers_are_left_out(tmp_path: Path) -> None:
    write_case(tmp_path, "psma_ab12_01")
    write_case(tmp_path, "psma_ab12_02", shift=1)
    found = find_studies(tmp_path)
    assert not found.studies and len(found.left_out) == 2 and "PSMA" in found.left_out[0].reasons[0]
    a, b = find_studies(tmp_path, tracer="any").studies
    assert a.patient == b.patient


def test_a_table_of_paths(tmp_path: Path) -> None:
    write_pair(tmp_path / "x" / "ct.nii", tmp_path / "x" / "pet.nii")
    write_pair(tmp_path / "y" / "ct.nii", tmp_path / "y" / "pet.nii", shift=1)
    rows = {"CT": ["x/ct.nii", str(tmp_path / "y" / "ct.nii"), ""], "SUV_path": ["x/pet.nii", "y/pet.nii", "z"]}
    people = {"PatientID": [7, 7, 8], "sex": ["female", "M", "F"], "age": ["060Y", 50, 50], "height_m": [1.6, 1.8, 1.7]}
    pd.DataFrame(rows | people | {"weight": [60, 80, 70]}).to_csv(tmp_path / "list.csv", index=False)
    found = find_studies(tmp_path / "list.csv")
    assert found.kind == "table"
    (note,) = found.notes
    assert note.startswith("2 studies are of 1 people by their names, but of several sexes or heights")
    a, b = found.studies
    assert a.patient == b.patient and in_place(*a.load()) and in_place(*b.load(), 1)
    assert (a.person.sex, a.person.age_years, a.person.height_cm, a.person.weight_kg) == ("F", 60, 160, 60)
    assert a.person.doubts == ()
    assert found.left_out[0].subject_id == "s0003" and found.left_out[0].reasons == ("the row has no path of the CT",)


def test_a_table_without_paths_or_patients(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sex,ct\nF,a.nii\n")
    with pytest.raises(InputError, match="no column with the paths of the SUV files; name it suv_path"):
        find_studies(tmp_path / "a.csv")
    for i, name in enumerate("bc"):
        write_pair(tmp_path / f"{name}0.nii", tmp_path / f"{name}1.nii", shift=i)
    (tmp_path / "a.csv").write_text("ct;suv\na.nii;b.nii\nb0.nii;b1.nii\nc0.nii;c1.nii\n")
    found = find_studies(tmp_path / "a.csv")
    assert found.notes[0].startswith("2 studies do not tell whose they are")
    assert found.studies[0].patient != found.studies[1].patient
    assert found.left_out[0].reasons == ("the CT is missing", "the SUV is missing")


def test_dicom_in_any_nesting(tmp_path: Path) -> None:
    write_study(tmp_path / "p1" / "first")
    write_study(tmp_path / "p1" / "second", study=2)
    write_series(tmp_path / "loose", "CT", study=3, name="I{:d}")
    write_series(tmp_path / "loose", "PT", study=3, name="J{:d}", edit=setting(CorrectedImage=["DECY"]))
    found = find_studies(tmp_path)
    assert found.kind == "dicom"
    assert [(s.subject_id, s.origin.path) for s in found.studies] == [("s0002", "p1/first"), ("s0003", "p1/second")]
    a, b = found.studies
    assert a.patient == b.patient and a.fingerprint != b.fingerprint
    assert (a.person.sex, a.person.height_cm, a.facts["uptake_min"]) == ("F", 165.0, pytest.approx(109.8))
    assert a.load()[0].voxels.shape == (20, 16, 24)
    (left,) = found.left_out
    assert left.subject_id == "s0001" and any("not attenuation corrected" in reason for reason in left.reasons)


def test_two_forms_side_by_side_are_refused(tmp_path: Path) -> None:
    write_fdg(tmp_path)
    write_study(tmp_path / "dicom")
    with pytest.raises(InputError, match="1 studies as CTres and SUV files and 1 studies as DICOM"):
        find_studies(tmp_path)


def test_an_unusable_study_of_another_form_stops_nobody(tmp_path: Path) -> None:
    write_fdg(tmp_path)
    write_series(tmp_path / "stray", "CT")
    found = find_studies(tmp_path)
    assert found.kind == "pairs" and len(found.studies) == 1
    assert [left.reasons for left in found.left_out] == [("the study has no PET series",)]


@pytest.mark.parametrize("source", ["x" * 300, "~nobody-of-this-name/x"])
def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="name a folder of PET/CT studies, or a table of their paths"):
        find_studies(source)
    write_pair(tmp_path / "a.nii", tmp_path / "b.nii")
    (tmp_path / "list.csv").write_text(f"ct,suv\na.nii,b.nii\n{source},b.nii\n")
    found = find_studies("list.csv")
    assert len(found.studies) == 1 and found.left_out[0].reasons[0].startswith("the CT ")
    with pytest.raises(InputError, match="cannot be read"):
        find_studies("list.csv", source)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is there"):
        find_studies(tmp_path / "nowhere")
    (tmp_path / "readme").write_text("x")
    with pytest.raises(
        InputError, match=r"(?s)no PET/CT is there; name a folder of DICOM, of CTres\.nii\.gz.*is there \("
    ):
        find_studies(tmp_path)


def test_a_study_travels_to_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fdg(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    study = pickle.loads(pickle.dumps(only(find_studies(tmp_path.name))))
    monkeypatch.chdir("/")
    assert in_place(*study.load())


def test_the_real_pet_ct(shared_data: Path) -> None:
    study = only(find_studies(shared_data / "acrin-nsclc-fdg-pet-042"))
    assert (study.subject_id, study.person.sex, study.person.height_cm) == ("s0001", "M", pytest.approx(188.0))
