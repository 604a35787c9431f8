"""Whose a study is: tables joined by what they call studies and people, doubts told, nothing guessed."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.dicoms import FACTOR, PATIENT, ROOT_UID, Edit, setting, write_series, write_study
from tests.petcts import FDG, facts, write_case, write_fdg
from vtrial.imaging.dicom.people import Person
from vtrial.preparation.sources import Study, find_studies
from vtrial.preparation.sources.dicoms import DicomPair
from vtrial.preparation.sources.people import person_of, together
from vtrial.records import InputError

TCIA = "Subject ID,Study UID,Study Date,Modality,File Location,diagnosis,age,sex"


def metadata(root: Path, *rows: tuple[str, str, str, str, str]) -> None:
    """FDG-PET-CT-Lesions' own table: a row for each series, and a last column without a name."""
    lines = [f"{TCIA},"]
    for patient, study, diagnosis, age, sex in rows:
        place = f"./FDG-PET-CT-Lesions/{patient}/{study}"
        lines += [
            f"{patient},2.25.1,1/2/2003,{m},{place}/{m}-1,{diagnosis},{age},{sex},{patient}" for m in ("CT", "PT")
        ]
    (root / "fdg_metadata.csv").write_text("\n".join(lines))


def test_the_table_of_fdg_pet_ct_lesions(tmp_path: Path) -> None:
    """Two studies of one patient, years apart, each with its own rows; rows about studies that are not there."""
    later = "07-17-2005-NA-PET-CT Ganzkoerper nativ u. mit KM-95034"
    write_fdg(tmp_path)
    write_fdg(tmp_path, study=later, shift=1)
    write_fdg(tmp_path, patient="PETCT_01140d52d8", study="x", shift=2)
    metadata(
        tmp_path,
        (*FDG, "LYMPHOMA", "060Y", "M"),
        (FDG[0], later, "NEGATIVE", "062Y", "M"),
        (FDG[0], "a third one that is not there", "LYMPHOMA", "070Y", "M"),
        ("PETCT_ffffffffff", "y", "MELANOMA", "044Y", "F"),
    )
    found = find_studies(tmp_path)
    assert [facts(s)[:2] for s in found.studies] == [("M", 60.0), ("M", 62.0), (None, None)]
    assert [s.facts.get("diagnosis") for s in found.studies] == ["LYMPHOMA", "NEGATIVE", None]
    assert found.studies[0].person.doubts == ("height_cm is missing", "weight_kg is missing")
    assert found.studies[2].person.doubts == ("no row of demographics is about this study",)
    assert found.notes == ("2 rows of demographics are about no study here",)


def test_the_table_is_found_beside_the_collection_and_by_cases(tmp_path: Path) -> None:
    write_fdg(tmp_path / "FDG-PET-CT-Lesions")
    metadata(tmp_path, (*FDG, "LYMPHOMA", "060Y", "M"))
    assert facts(find_studies(tmp_path / "FDG-PET-CT-Lesions").studies[0])[:2] == ("M", 60.0)
    write_case(tmp_path / "nn", f"fdg_{FDG[0].removeprefix('PETCT_')}_{FDG[1]}", shift=1)
    metadata(tmp_path / "nn", (*FDG, "LYMPHOMA", "061Y", "F"))
    for place in (tmp_path / "nn", tmp_path / "nn" / "imagesTr"):
        assert facts(find_studies(place).studies[0])[:2] == ("F", 61.0)


def test_a_table_asked_for_goes_before_the_one_beside(tmp_path: Path) -> None:
    """The data set's own has no heights and weights."""
    write_fdg(tmp_path / "src")
    write_fdg(tmp_path / "src", patient="PETCT_01140d52d8", study="x", shift=1)
    metadata(tmp_path / "src", (*FDG, "LYMPHOMA", "060Y", "M"), ("PETCT_01140d52d8", "x", "NEGATIVE", "044Y", "F"))
    row: dict[str, object] = {"PatientID": FDG[0], "age": 60.4, "PatientSize": 1.8, "PatientWeight": 80}
    one, two = find_studies(tmp_path / "src", people(tmp_path / "p.csv", [row])).studies
    assert facts(one) == ("M", 60.4, 180.0, 80.0) and one.person.doubts == ()
    assert facts(two) == ("F", 44.0, None, None)
    assert [s.facts["diagnosis"] for s in (one, two)] == ["LYMPHOMA", "NEGATIVE"]


def people(path: Path, rows: list[dict[str, object]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


BODY: dict[str, object] = {"sex": "F", "age": 40, "height": 170, "weight": 60}
KEYS: list[Mapping[str, object]] = [
    {"Study Folder": "VISIT one"},
    {"study": "Müller/visit one"},
    {"PatientID": unicodedata.normalize("NFD", "MÜLLER")},
    {"path": "C:\\data\\src\\Müller\\visit one\\SUV.nii.gz"},
    {"file": "./Müller/visit one/CTres.nii.gz", "patient": "somebody else's number"},
]


@pytest.mark.parametrize("key", KEYS)
def test_keys(tmp_path: Path, key: Mapping[str, object]) -> None:
    write_fdg(tmp_path / "src", patient="Müller", study="visit one")
    write_fdg(tmp_path / "src", patient="Maier", study="visit two", shift=1)
    table = people(tmp_path / "p.csv", [{**key, **BODY}])
    maier, mueller = find_studies(tmp_path / "src", table).studies
    assert facts(mueller) == ("F", 40.0, 170.0, 60.0)
    assert facts(maier) == (None,) * 4


def test_cases_by_number(tmp_path: Path) -> None:
    """A key column with gaps, which pandas makes floating point."""
    for i, name in enumerate(("7", "12")):
        write_case(tmp_path / "src", name, shift=i)
    pd.DataFrame({"case": [12.0, np.nan, 7.0], "sex": ["M", "F", "F"]}).to_parquet(tmp_path / "p.parquet")
    found = find_studies(tmp_path / "src", tmp_path / "p.parquet")
    assert {s.origin.path: s.person.sex for s in found.studies} == {"imagesTr/12": "M", "imagesTr/7": "F"}


def test_a_folder_that_could_be_two_is_no_key(tmp_path: Path) -> None:
    """Patients 1 and 2 with studies 1 and 2: a row about patient 2 is not about the second study of patient 1."""
    for i, (patient, study) in enumerate((("1", "1"), ("1", "2"), ("2", "1"))):
        write_fdg(tmp_path / "src", patient=patient, study=study, shift=i)
    table = people(tmp_path / "p.csv", [{"subject_id": 2, "sex": "F"}, {"subject_id": "1/2", "sex": "M"}])
    found = {s.origin.path: s.person.sex for s in find_studies(tmp_path / "src", table).studies}
    assert found == {"1/1": None, "1/2": "M", "2/1": "F"}
    table = people(tmp_path / "p.csv", [{"study": "1", "sex": "F"}])
    with pytest.raises(InputError, match="none of its 1 rows is about a study"):
        find_studies(tmp_path / "src", table)


@pytest.mark.parametrize("dicom", [False, True], ids=["NIfTI", "DICOM, by folders"])
def test_a_visits_number_joins_no_other_patient(tmp_path: Path, dicom: bool) -> None:
    """Row P001/2 is about a visit that is not here, and not about P002's, though nobody else has a second one."""
    for i, (patient, visit) in enumerate((("P001", "1"), ("P002", "1"), ("P002", "2"))):
        if dicom:  # headers call people otherwise than folders and table do
            other = setting(PatientID=f"ZQX-{patient[-1]}", PatientSex="O")
            write_study(tmp_path / "src" / patient / visit, study=i + 1, pet=other, ct=other)
        else:
            write_fdg(tmp_path / "src", patient=patient, study=visit, shift=i)
    rows: list[dict[str, object]] = [
        {"PatientID": "P001", "study": 2, "sex": "F"},
        {"PatientID": "P001", "study": 1, "sex": "F"},
        {"PatientID": "P002", "study": 1, "sex": "M"},
    ]
    found = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows))
    assert {s.origin.path: s.person.sex for s in found.studies} == {"P001/1": "F", "P002/1": "M", "P002/2": None}
    rows.append({"PatientID": "P002", "study": 2, "sex": "M"})
    found = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows))
    assert [s.person.sex for s in found.studies] == ["F", "M", "M"]


def test_rows_about_one_patient_that_differ(tmp_path: Path) -> None:
    write_fdg(tmp_path / "src")
    rows = [{"patient": FDG[0], "sex": "F", "age": age, "height": 170, "weight": 60} for age in (40, 42)]
    (study,) = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows)).studies
    assert facts(study) == ("F", None, 170.0, 60.0)
    assert study.person.doubts == ("age_years differs between the rows of the table: unknown",)


def test_a_tables_person_joins_studies(tmp_path: Path) -> None:
    """Cases whose names hide that they are of one person."""
    for i, case in enumerate(("a", "b", "c")):
        write_case(tmp_path / "src", case, shift=i)
    rows = [{"case": case, "PatientID": who, "sex": "F"} for case, who in (("a", "P1"), ("b", "P2"), ("c", "P1"))]
    a, b, c = (s.patient for s in find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows)).studies)
    assert a == c != b


NOBODIES = [
    {"PatientID": "ANON", "PatientName": "Anonymous^Patient", "PatientBirthDate": "19000101"},
    {"PatientID": "anonymized", "PatientName": ""},
    {"PatientID": "", "PatientName": "REMOVED", "PatientBirthDate": ""},
]


@pytest.mark.parametrize("nobody", NOBODIES)
def test_what_anonymisers_call_everybody_makes_nobody_one(tmp_path: Path, nobody: dict[str, object]) -> None:
    for i in (1, 2):
        write_study(tmp_path / "src" / str(i), study=i, pet=setting(**nobody), ct=setting(**nobody))
    found = find_studies(tmp_path / "src")
    one, two = found.studies
    assert one.patient != two.patient
    assert found.notes[0].startswith("2 studies do not tell whose they are")
    rows = [{"StudyInstanceUID": f"{ROOT_UID}.{i}", "PatientID": "P1", **BODY, "weight": 70} for i in (1, 2)]
    found = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows))
    assert found.studies[0].patient == found.studies[1].patient and not found.notes


def test_names_and_births_tell_people_apart_where_ids_do_not(tmp_path: Path) -> None:
    for i, name in enumerate(("Quorz^A", "Quorz^A", "Quorz^B"), start=1):
        edit = setting(PatientID="ANONYMOUS", PatientName=name)
        write_study(tmp_path / str(i), study=i, pet=edit, ct=edit)
    a, again, b = (study.patient for study in find_studies(tmp_path).studies)
    assert a == again != b


def test_a_tables_nobody_joins_no_studies(tmp_path: Path) -> None:
    for i, case in enumerate("ab"):
        write_case(tmp_path / "src", case, shift=i)
    rows = [{"case": case, "PatientID": "Anonymous", "sex": "F"} for case in "ab"]
    a, b = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows)).studies
    assert a.patient != b.patient


@pytest.mark.parametrize(
    ("edit", "doubted"),
    [(setting(PatientSex="M"), True), (setting(PatientSize="1.85"), True), (setting(PatientSize="1.6"), False),
     (setting(PatientSize="1.2", PatientWeight="30", PatientAge="010Y", PatientBirthDate=""), False)],
)  # fmt: skip
def test_one_id_for_many_is_told(tmp_path: Path, edit: Edit, doubted: bool) -> None:
    write_study(tmp_path / "1")
    write_study(tmp_path / "2", study=2, pet=edit, ct=edit)
    found = find_studies(tmp_path)
    assert found.studies[0].patient == found.studies[1].patient
    assert [note.split(", ")[0] for note in found.notes] == ["2 studies are of 1 people by their names"] * doubted


def test_a_tracer_in_the_table(tmp_path: Path) -> None:
    write_case(tmp_path / "src", "a")
    write_case(tmp_path / "src", "b", shift=1)
    rows = [{"case": "a", "sex": "F", "tracer": "[18F]FDG"}, {"case": "b", "sex": "M", "tracer": "18F-PSMA"}]
    table = people(tmp_path / "p.csv", rows)
    found = find_studies(tmp_path / "src", table)
    assert [s.origin.path for s in found.studies] == ["imagesTr/a"]
    assert "not FDG" in found.left_out[0].reasons[0]
    assert len(find_studies(tmp_path / "src", table, tracer="any").studies) == 2


ABSURD: list[tuple[dict[str, object], str]] = [
    ({"age": 400}, "age_years is outside 0 to 120 years: unknown"),
    ({"age": "19510203"}, "age_years is outside 0 to 120 years: unknown"),
    ({"age": "Quorzelda"}, "age_years is not a number: unknown"),
    ({"age": "inf"}, "age_years is not a number: unknown"),
    ({"height": 1.7}, "height_cm is outside 40 to 250 cm; it looks like metres: name the column height_m: unknown"),
    ({"weight": -60}, "weight_kg is outside 2 to 350 kg: unknown"),
    ({"weight": ""}, "weight_kg is missing"),
    ({"sex": "diverse"}, "sex is not F or M: unknown"),
    ({"height": 60, "weight": 170}, "height and weight give a body mass index outside 8 to 100: both unknown"),
]


@pytest.mark.parametrize(("cells", "doubt"), ABSURD)
def test_absurd_values_are_missing_with_the_reason(tmp_path: Path, cells: dict[str, object], doubt: str) -> None:
    write_fdg(tmp_path / "src")
    (study,) = find_studies(tmp_path / "src", people(tmp_path / "p.csv", [{"patient": FDG[0]} | BODY | cells])).studies
    assert study.person.doubts == (doubt,)
    names = {"sex": 0, "age": 1, "height": 2, "weight": 3}
    gone = {names[name] for name in cells}
    assert [value is None for value in facts(study)] == [i in gone for i in range(4)]


@pytest.mark.parametrize(
    ("told", "kept"),
    [("Lymphoma", True), ("C34.1", True), ("seen 20190704", False), ("Mr. X. " * 9, False), ("", False)],
)
def test_a_diagnosis_is_a_code_or_a_word(tmp_path: Path, told: str, kept: bool) -> None:
    write_fdg(tmp_path / "src")
    row = {"patient": FDG[0], "sex": "F", "Diagnosis": told}
    (study,) = find_studies(tmp_path / "src", people(tmp_path / "p.csv", [row])).studies
    assert study.facts == ({"diagnosis": told} if kept else {})


def test_a_german_table(tmp_path: Path) -> None:
    write_fdg(tmp_path / "src", patient="Müller", study="x")
    text = "# Export\nPatientID;PatientSex;PatientAge;PatientSize;PatientWeight;\nMüller;F;031Y;1.65;70\n\n"
    (tmp_path / "p.csv").write_bytes(text.encode("latin-1"))
    assert facts(find_studies(tmp_path / "src", tmp_path / "p.csv").studies[0]) == ("F", 31.0, 165.0, 70.0)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas(tmp_path: Path, separator: str) -> None:
    """Where a comma separates nothing. In names of people and studies it stays what it is."""
    write_fdg(tmp_path / "src", patient="1,5", study="2,5")
    text = "PatientID;PatientSex;age;height_m;PatientWeight\n1,5;F;60,25;1,655;60,5\n"
    (tmp_path / "p.csv").write_text(text.replace(";", separator))
    assert facts(find_studies(tmp_path / "src", tmp_path / "p.csv").studies[0]) == ("F", 60.25, 165.5, 60.5)


def test_a_cell_that_a_header_stands_in_for_is_told(tmp_path: Path) -> None:
    write_study(tmp_path / "src")
    table = people(tmp_path / "p.csv", [{"PatientID": PATIENT, "sex": "F", "age": "?", "height": 1.6, "weight": None}])
    person = find_studies(tmp_path / "src", table).studies[0].person
    assert (person.age_years, person.height_cm, person.weight_kg) == (68.0, 165.0, 70.0)
    assert person.doubts == (
        "age_years is not a number: that of the other source was taken",
        "height_cm is outside 40 to 250 cm; it looks like metres: name the column height_m: that of the other source "
        "was taken",
    )


def test_a_table_without_a_header_is_not_quoted(tmp_path: Path) -> None:
    """Its first line is somebody."""
    write_fdg(tmp_path / "src")
    (tmp_path / "p.csv").write_text("MUELLER^HANS;19500312;M;175;80\nMEIER^EVA;19600412;F;165;60\n")
    for source, table in ((tmp_path / "src", tmp_path / "p.csv"), (tmp_path / "p.csv", None)):
        with pytest.raises(InputError, match="its first line has 5 columns, of which are known: none") as caught:
            find_studies(source, table)
        assert not any(name in str(caught.value) for name in ("MUELLER", "MEIER", "1950", "175"))
    (tmp_path / "p.csv").write_text("Patient ID;Quorzelda;Sex\n1;2;\n")
    with pytest.raises(InputError, match=r"3 columns, of which are known: Patient ID, Sex$"):
        find_studies(tmp_path / "src", tmp_path / "p.csv")


@pytest.mark.parametrize(("remark", "coding"), [("wait…", "cp1252"), ("wait\u2028on", "utf-8")])
def test_a_letter_breaks_no_row(tmp_path: Path, remark: str, coding: str) -> None:
    """Byte 0x85 is three dots in Windows, and a line's end in Latin-1; Unicode has line separators within cells."""
    write_fdg(tmp_path / "src", patient="Škoda", study="x")
    text = f"PatientID;remark;PatientSex;PatientAge\r\nŠkoda;{remark};F;031Y\r\n"
    (tmp_path / "p.csv").write_bytes(text.encode(coding))
    assert facts(find_studies(tmp_path / "src", tmp_path / "p.csv").studies[0])[:2] == ("F", 31.0)


TABLES = [
    (b"a,b\n1,2\n", "no table of demographics: it needs a column that says whom"),
    (b"sex,age\nF,40\n", "no table of demographics"),
    (b"patient,sex\nnobody,F\n", "none of its 1 rows is about a study"),
    (b"patient,sex\n", "the table is empty"),
    (b"\x89PNG\0\0", "not a text file"),
    (None, "cannot be read"),
]


@pytest.mark.parametrize(("data", "told"), TABLES)
def test_tables_that_cannot_be_joined(tmp_path: Path, data: bytes | None, told: str) -> None:
    write_fdg(tmp_path / "src")
    if data is not None:
        (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(InputError, match=told):
        find_studies(tmp_path / "src", tmp_path / "p.csv")


def test_a_table_fills_and_mends_what_headers_tell(tmp_path: Path) -> None:
    bare = setting(PatientSize=None, PatientAge=None, PatientBirthDate="")
    write_study(tmp_path / "src" / "1", pet=bare, ct=bare)
    write_study(tmp_path / "src" / "2", study=2)
    rows = [
        {"StudyInstanceUID": f"{ROOT_UID}.1", "sex": "F", "age": 61, "height_cm": 171, "weight": 71},
        {"StudyInstanceUID": f"{ROOT_UID}.2", "sex": "M", "age": 61, "height_cm": None, "weight": None},
    ]
    one, two = find_studies(tmp_path / "src", people(tmp_path / "p.csv", rows)).studies
    assert facts(one) == ("F", 61.0, 171.0, 71.0) and one.person.doubts == ()
    assert facts(two) == (None, 61.0, 165.0, 70.0)
    assert two.person.doubts == (
        "sex differs between the sources of demographics: unknown",
        "age_years differs by more than 2 between the sources of demographics: the first was taken",
    )
    table = people(tmp_path / "p.csv", [{"PatientID": PATIENT, "diagnosis": "LYMPHOMA", "sex": "F"}])
    assert [s.facts["diagnosis"] for s in find_studies(tmp_path / "src", table).studies] == ["LYMPHOMA"] * 2


def test_two_sources_that_cannot_both_be() -> None:
    table, header = Person(None, None, 70.0, None, ("weight_kg is missing",)), Person("F", 50.0, None, 165.0, ())
    merged = together(table, header)
    assert (merged.sex, merged.age_years, merged.height_cm, merged.weight_kg) == ("F", 50.0, None, None)
    assert merged.doubts == ("height and weight give a body mass index outside 8 to 100: both unknown",)
    assert person_of([]).doubts == (
        "sex is missing",
        "age_years is missing",
        "height_cm is missing",
        "weight_kg is missing",
    )


def factor(study: Study) -> float:
    """What Bq/ml become SUV by."""
    assert isinstance(study.load, DicomPair)
    return study.load.study.conversion.factors[0]


def test_a_tables_weight_is_that_of_suv_where_the_header_has_none(tmp_path: Path) -> None:
    bare = setting(PatientWeight=None)
    write_study(tmp_path / "src", pet=bare, ct=bare)
    (left,) = find_studies(tmp_path / "src").left_out
    assert left.reasons == (
        "PatientWeight is missing; body-weight SUV needs it in kg: give it in a table of demographics",
    )
    table = people(tmp_path / "p.csv", [{"PatientID": PATIENT, "weight": 63}])
    (study,) = find_studies(tmp_path / "src", table).studies
    assert facts(study) == ("F", 68.0, 165.0, 63.0)
    assert factor(study) == pytest.approx(FACTOR * 63.0 / 70.0)
    assert study.facts["suv_weight_kg"] == 63.0
    assert "PatientWeight is missing: SUV goes by the weight of the table" in study.notes
    own = setting(PatientWeight=None, Units="GML", RescaleSlope="1", RescaleIntercept="0")
    write_series(tmp_path / "src" / "own", "PT", series=9, edit=own)
    (study,) = find_studies(tmp_path / "src", table).studies
    assert factor(study) == 1.0 and "suv_weight_kg" not in study.facts, "SUV of the scanner's own needs no weight"


@pytest.mark.parametrize(
    ("weight", "units", "taken"), [(110, "BQML", False), (72, "BQML", True), (None, "BQML", True), (110, "GML", True)]
)
def test_two_weights_are_no_weight_of_suv(tmp_path: Path, weight: int | None, units: str, taken: bool) -> None:
    write_study(tmp_path / "src", pet=setting(Units=units))
    table = people(tmp_path / "p.csv", [{"PatientID": PATIENT, "sex": "F", "weight": weight}])
    found = find_studies(tmp_path / "src", table)
    assert len(found.studies) == taken
    if taken:
        assert factor(found.studies[0]) == pytest.approx(FACTOR if units == "BQML" else 1.0)
    else:
        told = "SUV goes by PatientWeight 70 kg, and the table of demographics says 110 kg: more than 5% apart; correct"
        assert found.left_out[0].reasons[0].startswith(told)
