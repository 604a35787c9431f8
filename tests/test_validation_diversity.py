"""Slopes and correlations against truth known by construction; lost spread and likeness."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vtrial.records import InputError
from vtrial.validation import AnalysisSettings, Cohort, cohort_of, read_reference
from vtrial.validation.conditional import SlopeQuestion, compare_correlations, compare_slopes, correlations, fit_slope
from vtrial.validation.diversity import (
    pairwise_likeness,
    spread_of_moments,
    spread_of_values,
    standardised,
)
from vtrial.validation.inference import moments

SETTINGS = AnalysisSettings(organs=("liver", "spleen"))


def bodies(n: int, seed: int, *, per_kg: float = 8.0, per_cm: float = 7.0, likeness: float = 0.8) -> Cohort:
    """People whose liver follows weight and height by known slopes, and whose liver and spleen SUV are correlated."""
    rng = np.random.default_rng(seed)
    people = pd.DataFrame({"subject_id": [str(i) for i in range(n)], "sex": rng.choice(["F", "M"], n)})
    male = people["sex"] == "M"
    people["height_cm"] = rng.normal(165, 7, n) + 12 * male
    people["weight_kg"] = rng.normal(70, 12, n) + 12 * male
    shared = rng.normal(0, 1, n)
    sizes = per_kg * (people["weight_kg"] - 78) + per_cm * (people["height_cm"] - 171)
    liver = 1600 + sizes + 76 * male + rng.normal(0, 200, n)
    bmi = people["weight_kg"] / (people["height_cm"] / 100) ** 2
    suv = {o: np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * rng.normal(0, 1, n) for o in ("liver", "spleen")}
    rows = [
        people[["subject_id"]].assign(
            organ="liver", volume_ml=liver, suv_mean=2.3 + 0.066 * (bmi - 25) + 0.2 * suv["liver"]
        ),
        people[["subject_id"]].assign(
            organ="spleen", volume_ml=rng.normal(210, 40, n), suv_mean=1.8 + 0.2 * suv["spleen"]
        ),
    ]
    return cohort_of(f"cohort {seed}", pd.concat(rows), people)


def test_a_slope_is_least_squares_adjusted_for_the_others() -> None:
    c = bodies(150, 1)
    slope = fit_slope(c, SlopeQuestion("liver", "volume_ml", "weight_kg", ("height_cm", "sex")))
    male = (c.people["sex"] == "M").to_numpy(dtype=float)
    x = np.column_stack([c.people["weight_kg"], c.people["height_cm"], male, np.ones(150)])
    expected = np.linalg.lstsq(x, c.column(("liver", "volume_ml")))[0][0]
    assert slope.slope == pytest.approx(expected) and slope.df == 146
    assert abs(slope.slope - 8.0) < 4 * slope.se and 1.0 < slope.se < 2.5


def test_slope_intervals_cover_the_truth() -> None:
    question = SlopeQuestion("liver", "volume_ml", "weight_kg", ("height_cm", "sex"))
    inside = 0
    for seed in range(80):
        s = fit_slope(bodies(60, seed), question)
        inside += abs(s.slope - 8.0) < 2.0 * s.se
    assert 0.90 <= inside / 80 <= 0.99


def test_slopes_that_agree_and_one_that_is_lost() -> None:
    real = bodies(400, 1)
    same = compare_slopes(bodies(400, 2), real, SETTINGS)
    assert len(same) == 8 and not (same["verdict"] == "different").any()
    flat = compare_slopes(bodies(400, 2, per_kg=0.0, per_cm=0.0), real, SETTINGS)
    liver = flat.set_index(["organ", "on"]).loc["liver"]
    assert (liver.loc[["bsa_m2", "weight_kg"], "verdict"] == "different").all()
    assert liver.loc["weight_kg", "inside_reference"] is False or not liver.loc["weight_kg", "inside_reference"]
    assert liver.loc["weight_kg", "ratio"] < 0.3


def test_published_slopes_with_and_without_standard_errors() -> None:
    table = compare_slopes(bodies(300, 1), read_reference("healthy-fdg"), SETTINGS)
    row = table[(table["organ"] == "liver") & (table["on"] == "weight_kg")].iloc[0]
    assert row["slope_reference"] == pytest.approx(7.8835, abs=0.001) and row["se_reference"] == pytest.approx(
        1.89, abs=0.02
    )
    assert row["verdict"] != "different" and row["inside_reference"]
    heinemann = table[table["source"].str.startswith("Heinemann")].iloc[0]
    assert "taken as exact" in heinemann["message"] and heinemann["inside_reference"] is None
    absent = table[table["organ"] == "pancreas"].iloc[0]
    assert absent["verdict"] == "not compared" and "has no volume_ml of pancreas" in absent["message"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_slopes_of_a_few_people_are_not_made_up(n: int) -> None:
    table = compare_slopes(bodies(n, 1), bodies(100, 2), SETTINGS)
    assert (table["verdict"] == "not compared").all() and table["message"].str.contains("only").all()
    assert table["inside_reference"].isna().all()


def test_slopes_on_what_does_not_vary_or_is_unknown() -> None:
    c = bodies(50, 1)
    c.people["height_cm"] = 170.0
    assert "does not vary" in fit_slope(c, SlopeQuestion("liver", "volume_ml", "height_cm")).message
    men = bodies(60, 2)
    men = men.rows(np.flatnonzero(men.people["sex"] == "M"))
    assert np.isfinite(fit_slope(men, SlopeQuestion("liver", "volume_ml", "weight_kg")).slope)
    del men.people["weight_kg"]
    assert "has no weight_kg" in fit_slope(men, SlopeQuestion("liver", "volume_ml", "weight_kg")).message


def test_correlations_between_organs() -> None:
    real, same, apart = bodies(300, 1), bodies(300, 2), bodies(300, 3, likeness=0.0)
    r = correlations(real, ["liver", "spleen"])
    values = [real.column((o, "suv_mean")) for o in ("liver", "spleen")]
    assert r.loc["liver", "spleen"] == pytest.approx(np.corrcoef(values)[0, 1])
    agreeing, differing = (compare_correlations(c, real, SETTINGS) for c in (same, apart))
    assert agreeing.pairs["p_holm"][0] > 0.01 and agreeing.rms < 3 * agreeing.rms_expected
    assert differing.pairs["p_holm"][0] < 1e-6 and differing.rms > 0.3
    published = compare_correlations(real, read_reference("healthy-fdg"), SETTINGS)
    assert published.reference.loc["liver", "aorta"] == 0.87 and np.isnan(published.synthetic.loc["liver", "aorta"])
    with pytest.raises(InputError, match="no published correlations"):
        compare_correlations(real, read_reference("autopet-2025"), SETTINGS)


def test_a_pair_without_a_published_correlation_is_unknown() -> None:
    known = read_reference("healthy-fdg")
    some = known.correlations
    use = (some["organ_a"] == "liver") & some["organ_b"].isin(["spleen", "heart"])
    found = compare_correlations(bodies(300, 1), replace(known, correlations=some[use]), SETTINGS)
    assert found.reference.loc["liver", "spleen"] == 0.8 and np.isnan(found.reference.loc["spleen", "heart"])
    of_liver = found.pairs[found.pairs["organ_a"] == "liver"].set_index("organ_b")
    assert found.rms == pytest.approx(abs(of_liver.loc["spleen", "difference"]))  # these people have no heart


def test_spread_knows_that_cells_share_subjects() -> None:
    rng = np.random.default_rng(1)
    ones, many = [], []
    for _ in range(300):
        a, b = rng.normal(0, 1, (60, 1)), rng.normal(0, 1, (60, 1))
        noise = [0.05 * rng.normal(0, 1, (60, 20)) for _ in range(2)]
        # Twenty cells that all say the same must not make the interval narrower.
        ones.append(spread_of_values(a, b, level=0.95, alarm_below=0.9))
        many.append(spread_of_values(a + noise[0], b + noise[1], level=0.95, alarm_below=0.9))
    for found in (ones, many):
        covered = np.mean([s.low < 1 < s.high for s in found])
        assert 0.91 <= covered <= 0.985
        assert np.mean([s.alarm for s in found]) < 0.05


def test_spread_from_moments_is_the_wider() -> None:
    rng = np.random.default_rng(2)
    a, b = 0.6 * rng.normal(0, 1, (100, 9)), rng.normal(0, 1, (100, 9))
    fine = spread_of_values(a, b, level=0.95, alarm_below=0.9)
    coarse = spread_of_moments(moments(a), moments(b), level=0.95, alarm_below=0.9)
    assert (
        coarse.spread_ratio == pytest.approx(fine.spread_ratio, rel=0.05)
        and coarse.low < fine.low < fine.high < coarse.high
    )
    assert fine.alarm and coarse.alarm


def test_likeness_rises_where_twins_resemble_each_other() -> None:
    rng = np.random.default_rng(3)
    real = rng.normal(0, 1, (40, 6, 6, 8)).astype(np.float32)
    collapsed = real[:1] + 0.5 * rng.normal(0, 1, real.shape).astype(np.float32)
    a, b = pairwise_likeness(collapsed), pairwise_likeness(real)
    assert b.low < 0 < b.high and a.low > b.high and a.mean == pytest.approx(1 / 1.25, abs=0.05)
    r = np.corrcoef(real.reshape(40, -1))
    assert b.mean == pytest.approx(r[np.triu_indices(40, 1)].mean(), abs=1e-6)
    assert b.nearest[0] == pytest.approx(np.sort(r[0])[-2], abs=1e-5)
    with pytest.raises(InputError, match="at least 3"):
        pairwise_likeness(real[:2])


def test_standardised_vectors_leave_out_what_is_missing() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(5, 2, (10, 4)), rng.normal(5, 2, (12, 4))
    a[0, 0], b[:, 1] = np.nan, 3.0
    za, zb = standardised(a, b)
    assert za.shape == (10, 2) and zb.shape == (12, 2)
    assert zb.mean(axis=0) == pytest.approx(0) and zb.std(axis=0, ddof=1) == pytest.approx(1)


def test_a_few_gaps_cost_their_subjects_and_not_the_measurement() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(5, 2, (40, 4)), rng.normal(5, 2, (60, 4))
    a[0], a[1, 2], b[2:5, 1] = np.nan, np.nan, np.nan  # 5 % of every measurement at most
    za, zb = standardised(a, b)
    assert za.shape == (38, 4) and zb.shape == (57, 4)
    assert zb.mean(axis=0) == pytest.approx(0) and zb.std(axis=0, ddof=1) == pytest.approx(1)
    a[2:5, 3] = np.nan
    assert standardised(a, b)[0].shape == (38, 3)
    with pytest.raises(InputError, match="fewer than two measurements that most subjects have"):
        standardised(a[:, 2:], b[:, 2:])
