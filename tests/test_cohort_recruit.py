"""Recruits follow their spec after truncation, and subject i depends on the seed and i alone."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vtrial.cohort.copula import fit_copula, fit_marginal, outside, pearson, score_correlation
from vtrial.cohort.recruit import fit_stratum, recruit
from vtrial.cohort.spec import Marginal, StrataSpec, Stratum, SubjectsSpec, match_table, read_spec
from vtrial.records import InputError, Subject
from vtrial.runs import subjects_table

WOMEN = Stratum(
    name="women", share=3.0, sex="F",
    age=Marginal(60, 15, 18, 95), height=Marginal(165, 7, 146, 190), size=Marginal(76, 19, 42, 148), size_is="weight",
    correlations=(-0.24, -0.03, 0.33), diagnosis="NONE",
)  # fmt: skip
MEN = replace(WOMEN, name="men", share=1.0, sex="M", diagnosis="")
SPEC = StrataSpec(Path("spec.csv"), "0", (WOMEN, MEN))


def table(subjects: list[Subject]) -> np.ndarray:
    return np.array([(s.age_years, s.height_cm, s.weight_kg) for s in subjects])


@pytest.mark.parametrize(
    "stated",
    [
        Marginal(76, 19, 40, 150),  # cut on one side
        Marginal(47.7, 18.1, 18, 85),  # nearly flat
        Marginal(27.6, 6.2, 18, 40),  # near the truncated exponential
        Marginal(50, 1, 0, 100),  # not cut at all
        Marginal(50, 0.001, -1e6, 1e6),  # limits absurdly far
    ],
)
def test_mean_and_sd_are_met_after_truncation(stated: Marginal) -> None:
    fitted = fit_marginal(stated)
    values = fitted.from_scores(stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000))
    assert values.min() >= stated.min and values.max() <= stated.max
    assert np.mean(values) == pytest.approx(stated.mean, abs=1e-3 * stated.sd)
    assert np.std(values) == pytest.approx(stated.sd, rel=1e-3)


def test_the_marginal_is_a_truncated_normal() -> None:
    parent = stats.truncnorm((40 - 60) / 25, (120 - 60) / 25, loc=60, scale=25)
    fitted = fit_marginal(Marginal(float(parent.mean()), float(parent.std()), 40, 120))
    levels = np.linspace(0.001, 0.999, 99)
    np.testing.assert_allclose(fitted.from_scores(stats.norm.ppf(levels)), parent.ppf(levels), atol=0.01)


def test_an_sd_beyond_truncation_becomes_the_largest_there_is() -> None:
    fitted = fit_marginal(Marginal(50, 30, 40, 60))
    assert fitted.sd == pytest.approx(20 / np.sqrt(12), rel=1e-6)  # the flat density
    assert fitted.mean == 50
    assert outside(fitted.stated) == pytest.approx(2 * stats.norm.cdf(-1 / 3), rel=1e-9)


def test_a_constant_stays_constant() -> None:
    assert set(fit_marginal(Marginal(50, 0, 50, 50)).from_scores(np.array([-9.0, 0.0, 9.0]))) == {50.0}
    steady = replace(WOMEN, height=Marginal(165, 0, 160, 170))
    assert {s.height_cm for s in recruit(replace(SPEC, strata=(steady,)), 20, 0)} == {165.0}


def test_score_correlation_of_uncut_normals_is_the_correlation_itself() -> None:
    wide = fit_marginal(Marginal(0, 1, -100, 100))
    assert score_correlation(wide, wide, 0.6) == pytest.approx(0.6, abs=1e-3)


def test_score_correlation_of_uniforms_is_pearsons() -> None:
    """Two flat marginals: r = (6/π) asin(ρ/2) (Pearson 1907)."""
    flat = fit_marginal(Marginal(0.5, 9.0, 0.0, 1.0))
    assert score_correlation(flat, flat, 0.5) == pytest.approx(2 * np.sin(np.pi * 0.5 / 6), abs=1e-3)
    assert pearson(flat, flat, 0.8) == pytest.approx(6 / np.pi * np.arcsin(0.4), abs=1e-3)


def test_a_correlation_beyond_reach_is_reported_as_met_not_as_stated() -> None:
    skewed = Marginal(1.0, 0.99, 0.0, 100.0)  # nearly exponential
    copula = fit_copula((skewed, Marginal(50, 10, 0, 100), skewed), (0.0, -0.9, 0.0))
    assert -0.7 < copula.correlations[1] < -0.6  # two exponentials reach 1 - π²/6 = -0.645


def test_twenty_thousand_follow_the_spec() -> None:
    people = table(recruit(replace(SPEC, strata=(WOMEN,)), 20_000, 3))
    for column, stated in zip(people.T, (WOMEN.age, WOMEN.height, WOMEN.size)):
        assert column.mean() == pytest.approx(stated.mean, rel=0.02)
        assert column.std() == pytest.approx(stated.sd, rel=0.02)
    realised = np.corrcoef(people.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(realised, WOMEN.correlations, atol=0.03)


def test_twenty_thousand_follow_a_bmi_spec() -> None:
    stratum = replace(WOMEN, size=Marginal(27, 5, 17, 45), size_is="bmi", correlations=(-0.2, 0.1, -0.15))
    people = recruit(replace(SPEC, strata=(stratum,)), 20_000, 3)
    values = np.array([(s.age_years, s.height_cm, s.bmi) for s in people])
    assert values[:, 2].min() >= 17 and values[:, 2].max() <= 45
    for column, stated in zip(values.T, (stratum.age, stratum.height, stratum.size)):
        assert column.mean() == pytest.approx(stated.mean, rel=0.02)
        assert column.std() == pytest.approx(stated.sd, rel=0.02)
    np.testing.assert_allclose(np.corrcoef(values.T)[np.triu_indices(3, 1)], stratum.correlations, atol=0.03)


def test_strata_come_by_share() -> None:
    women = sum(s.sex == "F" for s in recruit(SPEC, 20_000, 1))
    assert stats.binomtest(women, 20_000, 0.75).pvalue > 0.001


def test_a_subject_depends_on_seed_and_index_alone() -> None:
    many = recruit(SPEC, 500, 7)
    assert recruit(SPEC, 20, 7) == many[:20]
    other = recruit(SPEC, 20, 8)
    assert all(a.age_years != b.age_years for a, b in zip(many, other))
    assert [s.subject_id for s in many[:2]] == ["VT000000", "VT000001"]
    assert [(s.index, s.seed) for s in many] == [(i, 7) for i in range(500)]


def test_ages_are_uncorrelated_between_neighbours_and_seeds() -> None:
    first, second = table(recruit(SPEC, 4000, 0))[:, 0], table(recruit(SPEC, 4000, 1))[:, 0]
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_what_joint_limits_take_away_is_made_up_for() -> None:
    limited = replace(WOMEN, bmi_limits=(17.0, 42.0))
    unaware = fit_copula((WOMEN.age, WOMEN.height, WOMEN.size), WOMEN.correlations).from_scores(
        np.random.default_rng(0).standard_normal((20_000, 3))
    )
    bmi = unaware[:, 2] / (unaware[:, 1] / 100) ** 2
    assert unaware[(bmi >= 17) & (bmi <= 42), 2].std() < 0.93 * WOMEN.size.sd  # what would be had without
    people = recruit(replace(SPEC, strata=(limited,)), 20_000, 5)
    assert all(17 <= s.bmi <= 42 for s in people)
    for column, stated in zip(table(people).T, (limited.age, limited.height, limited.size)):
        assert column.mean() == pytest.approx(stated.mean, rel=0.02)
        assert column.std() == pytest.approx(stated.sd, rel=0.02)
    np.testing.assert_allclose(np.corrcoef(table(people).T)[np.triu_indices(3, 1)], limited.correlations, atol=0.03)
    assert recruit(replace(SPEC, strata=(limited,)), 300, 5) == people[:300]


def test_joint_limits_too_narrow_to_make_up_for_are_told() -> None:
    fitted = fit_stratum(replace(WOMEN, bmi_limits=(26.0, 30.0)))
    assert fitted.sds[2] < 0.9 * WOMEN.size.sd
    assert fitted.refused > 0.3
    people = recruit(replace(SPEC, strata=(replace(WOMEN, bmi_limits=(26.0, 30.0)),)), 2000, 0)
    assert np.std([s.weight_kg for s in people]) == pytest.approx(fitted.sds[2], rel=0.1)


def test_joint_limits_that_nobody_meets_are_refused() -> None:
    with pytest.raises(InputError, match="stratum women: none of 1000 draws"):
        recruit(replace(SPEC, strata=(replace(WOMEN, bmi_limits=(90.0, 99.0)),)), 3, 0)


def test_rounding_keeps_the_limits() -> None:
    narrow = replace(WOMEN, age=Marginal(40.0049, 0.001, 40.0041, 40.0058))
    assert all(40.0041 <= s.age_years <= 40.0058 for s in recruit(replace(SPEC, strata=(narrow,)), 50, 0))


@pytest.mark.parametrize("n", [0, -1])
def test_nobody_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"n is {n}, and nobody"):
        recruit(SPEC, n, 0)


def test_strata_need_n_and_seeds_fit_into_a_table() -> None:
    with pytest.raises(InputError, match="give n"):
        recruit(SPEC, None, 0)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=f"seed {seed} is not from 0 to"):
            recruit(SPEC, 1, seed)
    subjects_table(recruit(SPEC, 1, 2**64 - 1), {}, {}).to_parquet(io.BytesIO())


def listed() -> SubjectsSpec:
    spec = read_spec(Path(__file__).resolve().parents[1] / "cohorts" / "example-subjects.csv")
    assert isinstance(spec, SubjectsSpec)
    return spec


def test_subjects_are_taken_as_they_are() -> None:
    spec = listed()
    people = recruit(spec, None, 9)
    assert people == [replace(s, seed=9) for s in spec.subjects]
    assert [s.index for s in people] == list(range(8))


def test_subjects_are_resampled_with_new_ids() -> None:
    people = recruit(listed(), 200, 9)
    assert len({s.subject_id for s in people}) == 200
    assert len({s.extra["resampled_from"] for s in people}) == 8
    originals = {s.subject_id: s for s in listed().subjects}
    for i, person in enumerate(people):
        original = originals[person.extra["resampled_from"]]
        assert person.subject_id == f"{original.subject_id}_r{i}"
        assert (person.height_cm, person.extra["note"]) == (original.height_cm, original.extra["note"])
    assert recruit(listed(), 50, 9) == people[:50]


def test_a_real_cohort_is_matched_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "real.csv"
    path.write_text("sex,age,height,weight\nF,60,165,70\nM,50,180,90\nF,40,170,65\n")
    spec = match_table(path)
    assert [(s.subject_id, s.age_years) for s in recruit(spec, None, 4)] == [
        ("VT000000", 60),
        ("VT000001", 50),
        ("VT000002", 40),
    ]
    assert recruit(spec, 2, 4) == recruit(spec, None, 4)[:2]
    with pytest.raises(InputError, match="n is 4, and the table to match has 3 rows"):
        recruit(spec, 4, 4)
