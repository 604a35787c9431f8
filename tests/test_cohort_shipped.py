"""The shipped cohorts are what their sources say, and 20,000 recruits of each follow them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vtrial.cohort.recruit import recruit
from vtrial.cohort.registry import find_spec, shipped_cohorts
from vtrial.cohort.spec import StrataSpec, SubjectsSpec, read_spec
from vtrial.cohort.support import check_support
from vtrial.records import InputError, Support

BUNDLED = Support(age_years=(18, 95), height_cm=(145, 205), weight_kg=(40, 150), bmi=(15, 50))
STRATA = ("oncology", "autopet-test", "us-adults")  # phantom-training is what the model knows, not a cohort of people


def strata(name: str) -> StrataSpec:
    spec = read_spec(find_spec(name))
    assert isinstance(spec, StrataSpec)
    return spec


def test_they_are_found_by_name_and_by_path(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(shipped_cohorts()) == {*STRATA, "example-subjects", "phantom-training"}
    monkeypatch.chdir(tmp_path)
    for name in ("oncology", "cohorts/oncology.csv"):
        assert find_spec(name).resolve() == repository / "cohorts" / "oncology.csv"
    (tmp_path / "oncology").write_text("mine")
    assert find_spec("oncology") == Path("oncology")
    for name in ("oncolgy", "elsewhere/oncology.csv", "oncology.parquet"):
        with pytest.raises(InputError, match=r"no such file; .* oncology"):
            find_spec(name)


@pytest.mark.parametrize("name", sorted(shipped_cohorts()))
def test_each_names_its_source(name: str) -> None:
    assert any(word in line for line in read_spec(find_spec(name)).sources for word in ("Source", "Yoon et al. 2025"))


@pytest.mark.parametrize("name", STRATA)
def test_every_stratum_is_met_by_20_000(name: str) -> None:
    for stratum in strata(name).strata:
        people = recruit(replace(strata(name), strata=(stratum,)), 20_000, 11)
        values = np.array([(s.age_years, s.height_cm, s.weight_kg) for s in people])
        for column, stated in zip(values.T, (stratum.age, stratum.height, stratum.size)):
            assert column.mean() == pytest.approx(stated.mean, rel=0.02), stratum.name
            assert column.std() == pytest.approx(stated.sd, rel=0.02), stratum.name
        np.testing.assert_allclose(np.corrcoef(values.T)[np.triu_indices(3, 1)], stratum.correlations, atol=0.03)


@pytest.mark.parametrize("name", STRATA)
def test_the_whole_cohort_is_met_by_20_000_of_each_sex(name: str) -> None:
    """By sex: mean and SD of the mixture of strata, and everyone inside what the bundled model knows."""
    spec = strata(name)
    people = recruit(spec, 40_000, 0)  # about 20,000 of each sex
    assert check_support(people, BUNDLED) == []
    total = sum(s.share for s in spec.strata)
    for sex in ("F", "M"):
        mine = [s for s in spec.strata if s.sex == sex]
        members = [s for s in people if s.sex == sex]
        weights = np.array([s.share for s in mine]) / sum(s.share for s in mine)
        assert len(members) / len(people) == pytest.approx(sum(s.share for s in mine) / total, abs=0.01)
        for variable, marginal in (("age_years", "age"), ("height_cm", "height"), ("weight_kg", "size")):
            means = np.array([getattr(s, marginal).mean for s in mine])
            squares = np.array([getattr(s, marginal).sd ** 2 for s in mine]) + means**2
            values = np.array([getattr(s, variable) for s in members])
            assert values.mean() == pytest.approx(weights @ means, rel=0.02)
            assert values.std() == pytest.approx(np.sqrt(weights @ squares - (weights @ means) ** 2), rel=0.02)


def test_the_examples_are_diverse_and_inside_the_support() -> None:
    spec = read_spec(find_spec("example-subjects"))
    assert isinstance(spec, SubjectsSpec)
    assert check_support(recruit(spec, None, 0), BUNDLED) == []
    assert len(spec.subjects) == 8
    assert {s.sex for s in spec.subjects} == {"F", "M"}


def test_oncology_has_the_real_mix(shared_data: Path) -> None:
    real = pd.read_csv(shared_data / "demographics" / "autopet_fdg_age_by_diagnosis_and_sex.csv")
    spec = strata("oncology")
    for row in real.to_dict("records"):
        mine = [s for s in spec.strata if (s.diagnosis, s.sex) == (row["diagnosis"], row["sex"])]
        assert sum(s.share for s in mine) == row["n"]
        weights = np.array([s.share for s in mine]) / row["n"]
        mean = weights @ [s.age.mean for s in mine]
        sd = np.sqrt(weights @ [s.age.sd**2 + s.age.mean**2 for s in mine] - mean**2)
        assert mean == pytest.approx(row["mean"], rel=0.01)
        assert sd == pytest.approx(row["sd"], rel=0.03)
        assert min(s.age.min for s in mine) == max(row["min"], 18)
        assert max(s.age.max for s in mine) == row["max"]


def test_the_papers_test_cohort_is_the_papers(shared_data: Path) -> None:
    real = pd.read_csv(shared_data / "published-references" / "yoon2025_test_cohort_demographics.csv").set_index("sex")
    for stratum in strata("autopet-test").strata:
        row = real.loc[stratum.sex]
        assert stratum.share == row["n"]
        for name, marginal in (("age_years", stratum.age), ("height_cm", stratum.height), ("weight_kg", stratum.size)):
            assert (marginal.mean, marginal.sd) == (row[f"{name}_mean"], row[f"{name}_sd"])


def test_dependence_is_that_of_nhanes(shared_data: Path) -> None:
    real = pd.read_csv(shared_data / "demographics" / "nhanes_2017_2018_adults.csv")
    for sex in ("F", "M"):
        measured = real[real["sex"] == sex][["age_years", "height_cm", "weight_kg"]].corr().to_numpy()
        for name in ("oncology", "autopet-test"):
            for stratum in (s for s in strata(name).strata if s.sex == sex):
                np.testing.assert_allclose(stratum.correlations, measured[np.triu_indices(3, 1)], atol=0.006)


def test_us_adults_are_those_of_nhanes(shared_data: Path) -> None:
    real = pd.read_csv(shared_data / "demographics" / "nhanes_2017_2018_adults.csv")
    bmi = real["weight_kg"] / (real["height_cm"] / 100) ** 2
    real = real[real["height_cm"].between(145, 205) & real["weight_kg"].between(40, 150) & bmi.between(15, 50)]
    assert sum(s.share for s in strata("us-adults").strata) == len(real)
    for s in strata("us-adults").strata:
        people = real[(real["sex"] == s.sex) & (real["age_years"] >= s.age.min) & (real["age_years"] < s.age.max)]
        assert len(people) == s.share
        assert people["age_years"].mean() + 0.5 == pytest.approx(s.age.mean, abs=0.06)
        for variable, marginal in (("height_cm", s.height), ("weight_kg", s.size)):
            assert people[variable].mean() == pytest.approx(marginal.mean, abs=0.06)
            assert people[variable].std() == pytest.approx(marginal.sd, abs=0.06)
