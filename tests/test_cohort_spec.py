"""Bad tables are refused with file, row, column, value and remedy, all at once; good ones are read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from vtrial.cohort.spec import StrataSpec, SubjectsSpec, match_table, read_spec
from vtrial.records import InputError
from vtrial.runs import subjects_table

STRATUM = {
    "stratum": "a", "share": "1", "sex": "F", "diagnosis": "NONE",
    "age_mean": "50", "age_sd": "10", "age_min": "18", "age_max": "90",
    "height_mean": "165", "height_sd": "7", "height_min": "145", "height_max": "190",
    "weight_mean": "70", "weight_sd": "12", "weight_min": "40", "weight_max": "140",
    "r_age_height": "-0.2", "r_age_weight": "0", "r_height_weight": "0.4",
}  # fmt: skip
SUBJECT = {"subject_id": "p1", "sex": "M", "age_years": "60", "height_cm": "175", "weight_kg": "80"}


def write(path: Path, *rows: dict[str, str]) -> Path:
    """A CSV whose first line is a comment and second the header: the rows begin in line 3."""
    lines = ["# Source: invented, for a test", ",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read_spec(path)
    return caught.value.problems


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("share", "0", ("'0'", "above 0")),
        ("share", "-3", ("'-3'", "above 0")),
        ("age_sd", "-1", ("'-1'", "below 0")),
        ("age_max", "10", ("'10'", "below age_min (18)", "swap")),
        ("age_max", "40", ("age_mean 50 lies outside 18 to 40",)),
        ("height_max", "165", ("lies on a limit",)),
        ("weight_mean", "heavy", ("'heavy'", "not a number")),
        ("weight_mean", "72,5", ("not a number", "decimal point")),
        ("weight_mean", "NaN", ("'NaN'", "not a finite number")),
        ("weight_sd", "inf", ("not a finite number",)),
        ("weight_mean", "", ("empty cell", "fill it in")),
        ("height_mean", "1.65", ("looks like metres", "write 165")),
        ("weight_max", "1400", ("outside 0.5 to 650 kg",)),
        ("r_height_weight", "1.2", ("outside [-1, 1]",)),
        ("sex", "female", ("'female'", "F or M")),
        ("stratum", "", ("needs a name",)),
    ],
)
def test_a_bad_cell_of_a_stratum_is_named(tmp_path: Path, column: str, value: str, words: tuple[str, ...]) -> None:
    cell = '"72,5"' if value == "72,5" else value
    path = write(tmp_path / "bad.csv", STRATUM, {**STRATUM, "stratum": "b", column: cell})
    (problem,) = problems(path)
    assert problem.startswith(f"{path}, row 4, column {column}: ")
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("sex", "X", "F or M"),
        ("height_cm", "1.75", "looks like metres"),
        ("weight_kg", "1800", "outside 0.5 to 650 kg"),
        ("age_years", "sixty", "not a number"),
        ("age_years", "nan", "not a finite number"),
        ("subject_id", "../x", "no path"),
        ("subject_id", "a/b", "no path"),
        ("subject_id", "a\\b", "no path"),
        ("subject_id", "..", "the first a letter or digit"),
        ("subject_id", ".hidden", "the first a letter or digit"),
        ("subject_id", "", "needs an id"),
        ("subject_id", "x" * 65, "1 to 64"),
        ("subject_id", "p1", "already in row 3"),
        ("subject_id", "P1", "already in row 3"),
    ],
)
def test_a_bad_cell_of_a_subject_is_named(tmp_path: Path, column: str, value: str, words: str) -> None:
    path = write(tmp_path / "bad.csv", SUBJECT, {**SUBJECT, "subject_id": "p2", column: value})
    (problem,) = problems(path)
    assert problem.startswith(f"{path}, row 4, column {column}: ")
    assert words in problem


def test_all_problems_come_at_once_even_within_a_row(tmp_path: Path) -> None:
    bad = {**STRATUM, "share": "0", "age_mean": "old", "height_max": "100", "r_age_weight": "7", "sex": "?"}
    found = problems(write(tmp_path / "bad.csv", bad, {**STRATUM, "weight_sd": "-2"}))
    named = {(p.split("row ")[1].split(",")[0], p.split("column ")[1].split(":")[0]) for p in found}
    assert named == {("3", c) for c in ("share", "sex", "age_mean", "height_max", "r_age_weight")} | {
        ("4", "weight_sd"),
        ("4", "stratum"),
    }


def test_a_thousand_bad_rows_are_counted_not_listed(tmp_path: Path) -> None:
    rows = [{**SUBJECT, "subject_id": f"p{i}", "sex": "?"} for i in range(1000)]
    found = problems(write(tmp_path / "bad.csv", *rows))
    assert len(found) == 51
    assert "950 more" in found[-1]


def test_correlations_that_nobody_can_have_name_the_stratum(tmp_path: Path) -> None:
    impossible = {**STRATUM, "stratum": "odd", "r_age_height": "0.9", "r_age_weight": "0.9", "r_height_weight": "-0.9"}
    (problem,) = problems(write(tmp_path / "bad.csv", impossible))
    assert "stratum odd" in problem
    assert "not positive definite" in problem
    assert "row 3" in problem


def test_stratum_names_are_unique(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "bad.csv", STRATUM, STRATUM))
    assert "row 4, column stratum: 'a': already in row 3" in problem


def test_unknown_and_missing_columns_come_with_the_right_name(tmp_path: Path) -> None:
    renamed = {("age_men" if k == "age_mean" else k): v for k, v in STRATUM.items() if k != "r_age_height"}
    found = problems(write(tmp_path / "bad.csv", renamed))
    assert any("unknown column age_men; did you mean age_mean?" in p for p in found)
    assert any("column age_mean is missing; rename age_men" in p for p in found)
    assert any("column r_age_height is missing; add it" in p for p in found)
    found = problems(write(tmp_path / "bad.csv", {("age" if k == "age_years" else k): v for k, v in SUBJECT.items()}))
    assert any("column age_years is missing; rename age" in p for p in found)


def test_weight_and_bmi_together_are_refused(tmp_path: Path) -> None:
    both = {**STRATUM, "bmi_mean": "25", "bmi_sd": "4", "bmi_min": "16", "bmi_max": "40"}
    assert any("both weight_mean and bmi_mean" in p for p in problems(write(tmp_path / "bad.csv", both)))


@pytest.mark.parametrize(("low", "high", "words"), [("16", "", "give both"), ("40", "16", "swap them")])
def test_joint_limits_are_a_pair_in_order(tmp_path: Path, low: str, high: str, words: str) -> None:
    assert words in problems(write(tmp_path / "bad.csv", {**STRATUM, "bmi_min": low, "bmi_max": high}))[0]


def test_one_joint_limit_without_the_other_column_is_refused(tmp_path: Path) -> None:
    assert "give both" in problems(write(tmp_path / "bad.csv", {**STRATUM, "bmi_min": "16"}))[0]


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.csv") == (f"{tmp_path / 'none.csv'}: no such file; check the path",)
    assert "cannot be read" in problems(tmp_path)[0]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("subject_id,sex\nMüller,F\n".encode("latin-1"))
    assert "row 2: not UTF-8 text" in problems(latin)[0]
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    assert "not a readable Parquet file" in problems(broken)[0]
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"a,b\n\0,1\n")
    assert "not a text file" in problems(binary)[0]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "subject_id,sex,age_years,height_cm,weight_kg\n", "\n\n"])
def test_an_empty_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(text)
    assert "the table is empty" in problems(path)[0]


def test_the_shape_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "shape.csv"
    path.write_text("subject_id;sex;age_years\np1;F;50\n")
    assert "separated by ';'" in problems(path)[0]
    path.write_text("subject_id,sex,sex,\np1,F,F,1\n")
    assert problems(path) == (
        f"{path}, row 1: column 4 has no name; name it or remove it",
        f"{path}, row 1: column sex appears 2 times; keep one",
    )
    path.write_text("subject_id,sex,age_years,height_cm,weight_kg\np1,F,50,165\n")
    assert "row 2: 4 cells under 5 columns" in problems(path)[0]
    path.write_text("colour,taste\nred,sweet\n")
    assert "neither strata" in problems(path)[0]


def test_rows_are_numbered_as_the_editor_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "spaced.csv"
    header = "subject_id,sex,age_years,height_cm,weight_kg,note"
    path.write_text(f'# one\n{header}\n\n# two\np1,F,50,165,60,"first\nsecond"\np2,F,old,165,60,\n')
    assert "row 7, column age_years: 'old'" in problems(path)[0]


def test_good_strata_carry_what_they_say(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path / "good.csv", {**STRATUM, "bmi_min": "16", "bmi_max": "45", "source": "me"}))
    assert isinstance(spec, StrataSpec)
    (stratum,) = spec.strata
    assert (stratum.age.mean, stratum.height.max, stratum.size.sd) == (50, 190, 12)
    assert (stratum.size_is, stratum.correlations, stratum.bmi_limits) == ("weight", (-0.2, 0.0, 0.4), (16, 45))
    assert (stratum.weight_limits, stratum.diagnosis, stratum.source) == (None, "NONE", "me")
    assert spec.sources == ("Source: invented, for a test",)


def test_the_same_table_as_parquet(tmp_path: Path) -> None:
    written = write(tmp_path / "good.csv", STRATUM)
    pd.read_csv(written, comment="#").to_parquet(tmp_path / "good.parquet")
    csv, parquet = read_spec(written), read_spec(tmp_path / "good.parquet")
    assert isinstance(csv, StrataSpec) and isinstance(parquet, StrataSpec)
    assert csv.strata == parquet.strata
    assert csv.sha256 != parquet.sha256
    pd.DataFrame({"subject_id": ["p1", "p2"], "sex": ["F", "M"], "age_years": [50.0, None], "height_cm": [1.6, 180.0],
                  "weight_kg": [60, 80]}).to_parquet(tmp_path / "bad.parquet")  # fmt: skip
    found = problems(tmp_path / "bad.parquet")
    assert "row 1, column height_cm: 1.6: looks like metres" in found[0]
    assert "row 2, column age_years: empty cell" in found[1]


def test_a_parquet_table_may_be_indexed_by_its_subjects(tmp_path: Path) -> None:
    path = tmp_path / "indexed.parquet"
    table = pd.DataFrame({"subject_id": ["H7", "H3"], "sex": ["F", "M"], "age_years": [60, 61],
                          "height_cm": [165, 175], "weight_kg": [70, 80]})  # fmt: skip
    for indexed in (table.set_index("subject_id"), table.set_index(["sex", "subject_id"])):
        indexed.to_parquet(path)
        for spec in (read_spec(path), match_table(path)):
            assert isinstance(spec, SubjectsSpec)
            assert [(s.subject_id, s.sex, s.extra) for s in spec.subjects] == [("H7", "F", {}), ("H3", "M", {})]


def test_long_codes_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    header = "subject_id,sex,age_years,height_cm,weight_kg,accession,visit\n"
    path.write_text(header + "a,F,60,165,70,123456789012345678,123456789012345\nb,F,60,165,70,,2\n")
    spec = read_spec(path)
    assert isinstance(spec, SubjectsSpec)
    table = subjects_table(spec.subjects, {}, {})
    assert table["accession"].tolist()[0] == "123456789012345678" and table["visit"].tolist() == [123456789012345, 2]


def test_further_columns_of_subjects_are_carried_with_their_type(tmp_path: Path) -> None:
    path = tmp_path / "subjects.csv"
    path.write_text(
        "subject_id,sex,age_years,height_cm,weight_kg,stratum,dose_mbq,site,code,bmi,status\n"
        "001,F,50,165,60,x,250.5,A,007,22,ok\np2,M,51,175,80,,300,,012,26,ok\n"
    )
    spec = read_spec(path)
    assert isinstance(spec, SubjectsSpec)
    first, second = spec.subjects
    assert (first.subject_id, first.stratum, second.stratum) == ("001", "x", "")
    assert first.extra == {"dose_mbq": 250.5, "site": "A", "code": "007"}
    assert second.extra == {"dose_mbq": 300.0, "site": None, "code": "012"}
    assert spec.ignored == ("bmi", "status")


def test_a_real_cohort_by_its_usual_column_names(tmp_path: Path) -> None:
    path = tmp_path / "real.csv"
    path.write_text("PatientID,Sex,age,Height,weight,tracer\nA1,female,060Y,165,60,FDG\nA2,M,018M,170.5,75.25,FDG\n")
    spec = match_table(path)
    first, second = spec.subjects
    assert spec.matched
    assert (first.subject_id, first.sex, first.age_years, first.height_cm) == ("A1", "F", 60.0, 165.0)
    assert (second.age_years, second.weight_kg, second.extra) == (1.5, 75.25, {"tracer": "FDG"})


def test_dicom_heights_are_metres_and_ids_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "dicom.csv"
    path.write_text("PatientSex,PatientAge,PatientSize,PatientWeight\nM,069Y,1.88,91\n")
    (subject,) = match_table(path).subjects
    assert (subject.subject_id, subject.height_cm, subject.weight_kg, subject.extra) == ("VT000000", 188.0, 91.0, {})


def test_of_two_columns_for_one_thing_ours_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("Sex,sex,age,height,weight,height_m\nFemale,M,60,165,70,1.99\n")
    (subject,) = match_table(path).subjects
    assert (subject.sex, subject.height_cm) == ("M", 165.0)


def test_a_bad_real_cohort_is_told_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "real.csv"
    path.write_text("sex,age,height,weight\nO,060Y,1.65,60\nF,sixty,165,\n")
    with pytest.raises(InputError) as caught:
        match_table(path)
    told = "\n".join(caught.value.problems)
    assert "row 2, column sex: 'O'" in told
    assert "row 2, column height: '1.65': looks like metres" in told
    assert "row 3, column age: 'sixty'" in told
    assert "row 3, column weight: empty cell" in told
    path.write_text("PatientID,PatientSex,PatientAge,PatientSize,PatientWeight\n1,F,131Y,165,70\n1,female,060Y,x,70\n")
    with pytest.raises(InputError) as caught:
        match_table(path)
    told = "\n".join(caught.value.problems)
    assert "row 2, column PatientAge: '131Y': outside 0 to 130 years" in told
    assert "row 2, column PatientSize (taken as metres): '165': outside 30 to 260 cm" in told
    assert "row 3, column PatientSize (taken as metres): 'x': not a number" in told
    assert "row 3, column PatientID: '1': already in row 2" in told
    path.write_text("sex,age,height\nF,60,165\n")
    with pytest.raises(InputError, match="column weight_kg is missing"):
        match_table(path)
