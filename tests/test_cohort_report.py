"""The recruit report, the support check, and subjects as a table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from vtrial.cohort.recruit import recruit
from vtrial.cohort.registry import find_spec
from vtrial.cohort.report import render, subjects_frame, summarize, truncation_notes, write_subjects
from vtrial.cohort.spec import Marginal, StrataSpec, SubjectsSpec, read_spec
from vtrial.cohort.support import check_support
from vtrial.records import InputError, Subject, Support

SUPPORT = Support(age_years=(18, 95), height_cm=(145, 205), weight_kg=(40, 150), bmi=(15, 50))


def oncology() -> StrataSpec:
    spec = read_spec(find_spec("oncology"))
    assert isinstance(spec, StrataSpec)
    return spec


def shown(report: object) -> str:
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(report)
    return console.export_text()


def test_the_report_measures_what_was_recruited() -> None:
    spec = oncology()
    people = recruit(spec, 3000, 0)
    report = summarize(people, spec)
    frame = subjects_frame(people)
    women = report.by_sex[0]
    assert (women.name, women.n) == ("F", int((frame["sex"] == "F").sum()))
    real = frame[frame["sex"] == "F"]
    assert women.values["weight_kg"].sd == pytest.approx(real["weight_kg"].std())
    assert women.correlations[2] == pytest.approx(np.corrcoef(real["height_cm"], real["weight_kg"])[0, 1])
    assert sum(g.n for g in report.by_stratum) == report.n == 3000
    assert sum(report.shares.values()) == pytest.approx(1.0)
    json.dumps(report.to_dict())


def test_the_report_fits_one_screen_and_names_every_stratum() -> None:
    spec = oncology()
    text = shown(render(summarize(recruit(spec, 500, 0), spec)))
    assert len(text.splitlines()) <= 24
    assert max(len(line) for line in text.splitlines()) <= 80
    for stratum in spec.strata:
        assert stratum.name in text


def test_what_truncation_prevents_is_said() -> None:
    spec = oncology()
    assert not any("cannot be had" in note for note in truncation_notes(summarize(recruit(spec, 5, 0), spec)))
    flat = replace(spec.strata[0], name="flat", age=Marginal(50, 30, 40, 60))
    narrow = replace(spec, strata=(flat,))
    report = summarize(recruit(narrow, 5, 0), narrow)
    assert "flat, age_years: 50±30 cannot be had within the limits; it is 50.00±5.77" in "\n".join(
        truncation_notes(report)
    )
    age = report.truncation[0]
    assert (age.variable, age.sd, round(age.sd_met, 2), round(age.outside, 2)) == ("age_years", 30, 5.77, 0.74)


def test_groups_too_small_to_measure_are_left_open() -> None:
    spec = oncology()
    report = summarize(recruit(spec, 1, 0), spec)
    (one,) = report.by_sex
    assert one.values["age_years"].sd is None
    assert one.correlations == (None, None, None)
    assert "–" in shown(render(report))
    with pytest.raises(InputError, match="nobody"):
        summarize([], spec)


def body(**changes: object) -> Subject:
    return replace(Subject("p1", 0, 0, "F", 60.0, 165.0, 70.0), **changes)  # type: ignore[arg-type]


def test_bodies_outside_the_support_are_refused_with_all_reasons() -> None:
    people = [body(), body(subject_id="p2", age_years=12.0, weight_kg=30.0), body(subject_id="p3", weight_kg=176.0)]
    with pytest.raises(InputError) as caught:
        check_support(people, SUPPORT)
    second, third = caught.value.problems
    assert "subject p2: age_years 12 is outside 18 to 95 years" in second
    assert "weight_kg 30 is outside 40 to 150 kg" in second
    assert "bmi" in second
    assert "if these are pounds, write 79.8" in third
    assert "--extrapolate" in third


def test_extrapolated_bodies_are_flagged() -> None:
    flagged = check_support([body(), body(subject_id="p2", height_cm=210.0)], SUPPORT, extrapolate=True)
    assert [(f.subject_id, len(f.reasons)) for f in flagged] == [("p2", 1)]
    assert check_support([body(age_years=18.0, height_cm=145.0)], SUPPORT) == []  # limits belong to it
    women = replace(SUPPORT, sex=("F",))
    assert "sex M" in check_support([body(sex="M")], women, extrapolate=True)[0].reasons[0]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_written_subjects_are_a_spec_again(tmp_path: Path, ending: str) -> None:
    people = recruit(oncology(), 30, 2)
    path = tmp_path / "new" / f"people{ending}"
    write_subjects(people, path)
    spec = read_spec(path)
    assert isinstance(spec, SubjectsSpec)
    assert recruit(spec, None, 2) == people
    assert spec.ignored == ("index", "seed", "bmi")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_writing_fails_clearly_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        write_subjects([body()], tmp_path / "people.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_subjects([body()], tmp_path / "file" / "people.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_frame_has_the_run_folders_columns() -> None:
    frame = subjects_frame([body(extra={"site": "A"})])
    assert list(frame.columns) == [
        "subject_id", "index", "seed", "stratum", "sex", "age_years", "height_cm", "weight_kg", "bmi", "site",
    ]  # fmt: skip
    pd.testing.assert_series_equal(frame["bmi"], pd.Series([70 / 1.65**2], name="bmi"))
