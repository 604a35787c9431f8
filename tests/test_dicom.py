"""PET/CT studies in folders of DICOM: found, paired, read; what cannot be used is left out with its reasons."""

from __future__ import annotations

import logging
import pickle
import shutil
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from tests.dicoms import (
    ACCESSION,
    BIRTH,
    CT_GRID,
    DAY,
    FACTOR,
    PATIENT,
    ROOT_UID,
    Edit,
    Grid,
    ramp,
    setting,
    write_series,
    write_study,
)
from vtrial.imaging.dicom.series import Series
from vtrial.imaging.dicom.studies import DicomCollection, DicomStudy, find_studies, read_study, read_suv
from vtrial.preparation import sources
from vtrial.records import InputError


def one(root: Path, **options: Any) -> DicomStudy:
    found = find_studies(root, **options)
    assert not found.left_out, found.left_out
    (study,) = found.studies
    return study


def folder_of(series: Series) -> str:
    return series.images[0].path.parent.name


def reasons(root: Path, **options: Any) -> str:
    """Why the only study of a folder is left out."""
    found = find_studies(root, **options)
    assert not found.studies
    return "\n".join(reason for left in found.left_out for reason in left.reasons)


def test_a_study_from_its_folder_to_its_voxels(tmp_path: Path) -> None:
    study = one(write_study(tmp_path))
    assert (study.patient, study.where, study.coverage, study.notes) == (1, ".", pytest.approx(1.0), ())
    assert (study.person.sex, study.person.age_years) == ("F", 68.0)
    assert (study.person.height_cm, study.person.weight_kg) == (165.0, 70.0)
    ct, suv = read_study(study)
    assert (ct.voxels.shape, suv.voxels.shape) == ((20, 16, 24), (10, 8, 12))
    assert suv.spacing_mm == pytest.approx((6.0, 5.0, 4.0))
    for volume, scale, tolerance in ((ct, 1.0, 0.51), (suv, FACTOR, 0.31 * FACTOR)):
        index = np.stack(np.meshgrid(*map(np.arange, volume.voxels.shape), indexing="ij"), axis=-1)
        expected = scale * ramp(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])
        assert np.abs(volume.voxels - expected).max() <= tolerance


def test_a_study_travels_to_a_worker(tmp_path: Path) -> None:
    study = one(write_study(tmp_path))
    there = pickle.loads(pickle.dumps(study))
    assert np.array_equal(read_suv(there).voxels, read_suv(study).voxels)


def test_a_relative_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    study = one(Path("here"))
    monkeypatch.chdir("/")
    assert read_suv(study).voxels.shape == (10, 8, 12)


def test_all_files_in_one_folder(tmp_path: Path) -> None:
    write_series(tmp_path, "CT", grid=CT_GRID, name="a{:d}")
    write_series(tmp_path, "PT", name="b{:d}")
    assert read_suv(one(tmp_path)).voxels.shape == (10, 8, 12)


def test_of_two_pets_the_corrected_one(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_series(tmp_path / "a-nac", "PT", series=7, edit=setting(CorrectedImage=["DECY"]))
    study = one(tmp_path)
    assert folder_of(study.pet) == "pet"
    assert study.notes == (
        "the PET series 2 of 12 images: taken of 2 PET series, attenuation corrected",
        "the PET series 1 of 12 images: passed over, not attenuation corrected",
    )


@pytest.mark.parametrize(
    ("other", "better"),
    [
        (setting(ImageType=["DERIVED", "SECONDARY"], SeriesNumber=0), False),
        (setting(AcquisitionTime="103500"), False),
        (setting(SeriesNumber=1), True),
        (setting(PatientWeight="7000"), False),
    ],
)
def test_of_two_corrected_pets_by_the_rules(tmp_path: Path, other: Edit, better: bool) -> None:
    write_study(tmp_path)
    write_series(tmp_path / "a", "PT", series=7, edit=other)
    study = one(tmp_path)
    assert folder_of(study.pet) == ("a" if better else "pet")
    assert any("passed over" in note for note in study.notes)


def test_the_longer_pet_is_taken(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_series(tmp_path / "long", "PT", series=9, grid=Grid(count=16, origin=(-27.0, -17.0, -28.0)))
    assert folder_of(one(tmp_path).pet) == "long"


def test_the_ct_that_covers_then_the_wide_one(tmp_path: Path) -> None:
    write_study(tmp_path)
    narrow = replace(CT_GRID, columns=14, origin=(-16.0, -19.0, -21.0))
    write_series(tmp_path / "a-narrow", "CT", series=8, grid=narrow)
    write_series(tmp_path / "b-short", "CT", series=9, grid=replace(CT_GRID, count=14))
    study = one(tmp_path)
    assert folder_of(study.ct) == "ct"
    assert "the CT series 1 of 24 images: passed over, another CT" in study.notes


@pytest.mark.parametrize("reformatted", ["DERIVED", "coronal"])
def test_reformatted_cts_are_passed_over(tmp_path: Path, reformatted: str) -> None:
    write_study(tmp_path)
    wide = replace(CT_GRID, columns=24)
    coronal = replace(wide, rows_along=(0.0, 0.0, 1.0), rows=20, step=(0.0, 2.0, 0.0))
    is_coronal = reformatted == "coronal"
    edit = setting(ImageType=["ORIGINAL" if is_coronal else "DERIVED", "PRIMARY"])
    write_series(tmp_path / "a", "CT", series=8, grid=coronal if is_coronal else wide, edit=edit)
    assert folder_of(one(tmp_path).ct) == "ct"


def test_a_broken_ct_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_series(tmp_path / "a-gap", "CT", series=8, grid=replace(CT_GRID, columns=24), skip=[7])
    study = one(tmp_path)
    assert folder_of(study.ct) == "ct"
    assert any("slices are missing" in note for note in study.notes)


def test_no_uncorrected_pet_is_taken(tmp_path: Path) -> None:
    told = reasons(write_study(tmp_path, pet=setting(Units="PROPCNTS", CorrectedImage=["DECY"])))
    assert "Units is PROPCNTS" in told and "not attenuation corrected" in told


def test_frames_of_reference_must_be_one(tmp_path: Path) -> None:
    assert "FrameOfReferenceUID is not that" in reasons(
        write_study(tmp_path / "a", ct=setting(FrameOfReferenceUID="1.2.3"))
    )
    bare = setting(FrameOfReferenceUID=None)
    assert "FrameOfReferenceUID is not that" in reasons(write_study(tmp_path / "b", pet=bare, ct=bare))


@pytest.mark.parametrize(
    ("moved", "told"),
    [((0.0, 0.0, 200.0), "covers 0%"), ((300.0, 0.0, 0.0), "covers 0%"), ((0.0, 0.0, 32.0), "covers 33%")],
)
def test_fields_of_view_must_overlap(tmp_path: Path, moved: tuple[float, float, float], told: str) -> None:
    write_series(tmp_path / "ct", "CT", grid=CT_GRID.moved(moved))
    write_series(tmp_path / "pet", "PT")
    assert told in reasons(tmp_path)


def test_partial_coverage_is_told(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", "CT", grid=CT_GRID.moved((0.0, 0.0, 12.0)))
    write_series(tmp_path / "pet", "PT")
    study = one(tmp_path)
    assert study.coverage == pytest.approx(0.75)
    assert "the CT covers 75% of the PET's length" in study.notes
    assert "75%" in reasons(tmp_path, least_coverage=0.9)


def test_halves_of_a_study_are_left_out(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "CT", study=1)
    write_series(tmp_path / "b", "PT", study=2)
    found = find_studies(tmp_path)
    assert [(left.where, left.reasons) for left in found.left_out] == [
        ("a", ("the study has no PET series",)),
        ("b", ("the study has no CT series",)),
    ]


def test_a_bad_study_does_not_stop_the_others(tmp_path: Path) -> None:
    write_study(tmp_path / "good", study=1)
    write_study(tmp_path / "bad", study=2, pet=setting(PatientWeight="9000"))
    (tmp_path / "bad" / "junk.dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))
    found = find_studies(tmp_path)
    assert [study.where for study in found.studies] == ["good"]
    assert {left.where for left in found.left_out} == {"bad"}
    assert any("9000 kg" in reason for left in found.left_out for reason in left.reasons)


def test_a_header_that_nobody_foresaw_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "good")
    with pydicom.config.disable_value_validation():
        write_study(tmp_path / "absurd", study=2, pet=setting(ActualFrameDuration="-99999999999", DecayFactor="1.2"))
    assert len(find_studies(tmp_path).studies) == 2  # a duration that cannot be is missing

    def judged(*unused: object) -> None:
        raise OverflowError(f"{PATIENT} is too large")

    monkeypatch.setattr("vtrial.imaging.dicom.pairing._judged", judged)
    found = find_studies(tmp_path)
    assert [left.where for left in found.left_out] == ["absurd", "good"]
    for left in found.left_out:
        assert left.reasons == ("its headers hold what was not foreseen (OverflowError): export the study again",)
        assert left.place == tmp_path / left.where and left.identity.patient == PATIENT
        assert PATIENT not in repr(left) and str(tmp_path) not in repr(left)


def test_studies_of_one_person_carry_one_number(tmp_path: Path) -> None:
    other = setting(PatientID="SOMEBODY-ELSE")
    write_study(tmp_path / "1", study=1)
    write_study(tmp_path / "2", study=2, pet=other, ct=other)
    write_study(tmp_path / "3", study=3)
    assert [(study.where, study.patient) for study in find_studies(tmp_path).studies] == [("1", 1), ("2", 2), ("3", 1)]
    nameless = setting(PatientID="", PatientName="", PatientBirthDate="")
    write_study(tmp_path / "n" / "1", study=4, pet=nameless, ct=nameless)
    write_study(tmp_path / "n" / "2", study=5, pet=nameless, ct=nameless)
    assert [study.patient for study in find_studies(tmp_path / "n").studies] == [1, 2]


def test_two_patients_in_one_study_are_refused(tmp_path: Path) -> None:
    assert "several PatientIDs" in reasons(write_study(tmp_path, ct=setting(PatientID="SOMEBODY-ELSE")))


def test_only_the_asked_tracer(tmp_path: Path) -> None:
    write_study(tmp_path, pet=setting(Radiopharmaceutical="F-18 PSMA-1007"))
    assert "another than FDG" in reasons(tmp_path)
    assert one(tmp_path, tracer="any").conversion.factors[0] == pytest.approx(FACTOR)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("nothing")
    with pytest.raises(InputError, match=r"no CT or PET image is there \(1 files that are no DICOM\)"):
        find_studies(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    write_series(tmp_path / "ct", "CT", edit=setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"), skip=range(1, 12))
    with pytest.raises(InputError, match=r"(?s)1 multi-frame .* 1 files: ") as error:
        find_studies(tmp_path)
    with pytest.raises(InputError) as prepared:
        sources.find_studies(tmp_path)
    assert len(error.value.problems) == 2 and prepared.value.problems[1:] == error.value.problems


PEOPLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"PatientSize": "165"}, {"height_cm": None, "weight_kg": 70.0}, "PatientSize is 16500 cm"),
    ({"PatientSize": None}, {"height_cm": None}, "PatientSize is missing"),
    ({"PatientSex": "O"}, {"sex": None}, "PatientSex is not F or M"),
    ({"PatientAge": "999Y"}, {"age_years": None}, "PatientAge is 999 years"),
    ({"PatientAge": "030Y"}, {"age_years": 30.0}, "another age"),
    ({"PatientAge": None}, {"age_years": 68.0}, ""),  # to the day it would tell the day of birth
    ({"PatientSize": "5102.03"}, {"height_cm": None}, "PatientSize is 510200 cm"),  # nobody's number is quoted
    ({"PatientAge": None, "PatientBirthDate": ""}, {"age_years": None}, "PatientAge is missing"),
    ({"PatientAge": "018M", "PatientBirthDate": ""}, {"age_years": 1.5}, ""),
]


@pytest.mark.parametrize(("values", "expected", "doubt"), PEOPLE)
def test_people(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any], doubt: str) -> None:
    study = one(write_study(tmp_path, pet=setting(**values), ct=setting(**values)))
    for field, value in expected.items():
        assert getattr(study.person, field) == value
    assert any(doubt in note for note in study.notes) if doubt else study.notes == ()


def test_people_of_whom_ct_and_pet_tell_differently(tmp_path: Path) -> None:
    study = one(write_study(tmp_path / "a", ct=setting(PatientSize=None)))
    assert (study.person.height_cm, study.person.doubts) == (165.0, ())
    study = one(write_study(tmp_path / "b", ct=setting(PatientSex="M", PatientWeight="90")))
    assert (study.person.sex, study.person.weight_kg) == (None, None)
    assert len(study.person.doubts) == 2


def test_a_height_and_a_weight_that_cannot_both_be(tmp_path: Path) -> None:
    """SUV that the scanner computed needs no weight; the person's is still not believed."""
    swapped = {"PatientSize": "0.70", "PatientWeight": "165"}
    study = one(write_study(tmp_path, pet=setting(Units="GML", **swapped), ct=setting(**swapped)))
    assert (study.person.height_cm, study.person.weight_kg) == (None, None)
    assert study.person.doubts == ("height 70 cm and weight 165 kg cannot both be: both unknown",)


def everything_told(found: DicomCollection) -> str:
    """All that a caller could print of a collection, or of reading it."""
    told = [repr(found), str(found)]
    for study in found.studies:
        told += [repr(study), repr(study.pet), repr(study.ct), repr(study.identity), *map(repr, study.pet.images[:1])]
        told += [repr(study.pet.images[0].pet), study.pet.where, study.ct.where]
        try:
            read_study(study)
        except InputError as error:
            told += [str(error), repr(error), traceback.format_exc()]
    return "\n".join(told)


def _write_named(root: Path, odd: Edit) -> None:
    named = root / f"{PATIENT}_Ximenes" / f"2019-07-04 {ROOT_UID}.1"
    write_study(named)
    write_study(root / "quorzelda" / "04.07.2019", study=2, pet=odd)
    write_study(root / ACCESSION, study=3, ct=setting(FrameOfReferenceUID=f"{ROOT_UID}.5"))
    write_study(root / "torn", study=4)
    for odd_file in (root / "quorzelda").rglob("*.dcm"):
        odd_file.write_bytes(odd_file.read_bytes().replace(b"ISO_IR 100", PATIENT.encode()))
    torn = root / "torn" / "pet" / "000.dcm"
    torn.write_bytes(torn.read_bytes()[:-9])
    gap = write_study(root / "gap" / BIRTH, study=5)
    (gap / "pet" / "005.dcm").unlink()
    (gap / "pet" / f"{PATIENT}.dcm").write_bytes(bytes(128) + b"DICM" + PATIENT.encode() * 9)
    (gap / "ct" / f"{ROOT_UID}.9").symlink_to(root / PATIENT)


def test_nobody_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Identifiers planted in headers, in folder and file names, and in fields that cannot hold them."""
    caplog.set_level(logging.DEBUG)

    def odd(dataset: Dataset, _: int) -> None:
        dataset[0x00101030] = RawDataElement(Tag(0x00101030), "DS", 10, PATIENT.encode(), 0, False, True)
        dataset[0x00200037] = RawDataElement(Tag(0x00200037), "DS", 10, PATIENT.encode(), 0, False, True)
        dataset.Units, dataset.DecayCorrection, dataset.SpecificCharacterSet = PATIENT, BIRTH, "ISO_IR 100"
        dataset.RadiopharmaceuticalInformationSequence[0].Radiopharmaceutical = PATIENT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write_named(tmp_path, odd)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        caplog.clear()  # what writing the files said
        found = find_studies(tmp_path)
        told = everything_told(found)
    assert len(found.studies) == 2 and len({left.where for left in found.left_out}) >= 3
    out, err = capfd.readouterr()
    told = "\n".join([told, caplog.text, out, err, *(str(warning.message) for warning in warned)])
    told = told.replace(str(tmp_path), "")
    digits = "".join(letter for letter in told if letter.isdigit() or letter in " \n")
    for planted in (PATIENT, "Quorzelda", "Ximenes", ACCESSION, BIRTH, DAY, "2019-07-04", ROOT_UID):
        assert planted.lower() not in told.lower(), planted
    assert DAY not in digits and "04072019" not in digits
    assert any(study.where.startswith("#") for study in found.studies)


def test_a_real_pet_ct(tmp_path: Path, shared_data: Path) -> None:
    """ACRIN-NSCLC-FDG-PET-042: one scan whose SUV factor its own real-world-value object tells."""
    source = shared_data / "acrin-nsclc-fdg-pet-042"
    found = find_studies(source)
    assert not found.left_out
    (study,) = found.studies
    assert study.conversion.factors == pytest.approx([0.00042111007] * 135, rel=1e-7)
    assert len({image.slope for image in study.pet.images}) == 135
    assert folder_of(study.pet) == "PET_AC"
    assert "the PET series 2 of 135 images: passed over, not attenuation corrected" in study.notes
    assert study.conversion.uptake_s == pytest.approx(158.783 * 60.0, rel=1e-4)
    assert (study.person.sex, study.person.age_years, study.person.weight_kg) == ("M", 69.0, 91.0)
    assert study.person.height_cm == pytest.approx(188.0)
    assert study.coverage > 0.99
    ct, suv = read_study(study)
    assert suv.voxels.max() == pytest.approx(51.09, abs=0.005)
    assert (ct.voxels.shape, suv.voxels.shape) == ((512, 512, 135), (128, 128, 135))
    assert suv.spacing_mm == pytest.approx((4.6875, 4.6875, 3.2703), abs=1e-4)
    _agrees_with_its_files(study, ct.voxels, source / "CT")
    assert "042" not in repr(found) and "1960" not in repr(found)


def _agrees_with_its_files(study: DicomStudy, hu: np.ndarray, folder: Path) -> None:
    """Voxels against single files, by their own positions: RAS is LPS with x and y turned round."""
    lowest = study.ct.affine[2, 3]
    for path in sorted(folder.iterdir())[::40]:
        image = pydicom.dcmread(path)
        k = round((image.ImagePositionPatient[2] - lowest) / 3.27)
        expected = np.clip(image.pixel_array.astype(int), -1024, None)
        assert np.array_equal(hu[:, :, k], expected.T[::-1, ::-1])


def test_the_real_uncorrected_pet_is_refused(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "acrin-nsclc-fdg-pet-042"
    (tmp_path / "CT").symlink_to(source / "CT")
    shutil.copytree(source / "PET_NAC", tmp_path / "PET", ignore=lambda _, names: sorted(names)[12:])
    assert "PROPCNTS" in reasons(tmp_path)
