"""Analysis of variance over several cohorts: against worked examples and scipy, from subjects and from summaries."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vtrial.records import InputError
from vtrial.validation import AnalysisSettings, Cohort, anova, cohort_of, read_reference
from vtrial.validation.inference import Moments, classical_anova, moments, welch_anova
from vtrial.validation.references import Summary

CELL = ("liver", "volume_ml")


def column(values: list[float] | np.ndarray) -> Moments:
    return moments(np.asarray(values, dtype=float)[:, None])


def cohort(name: str, values: np.ndarray) -> Cohort:
    """Women in the first half, men in the second, of one measurement."""
    ids = [f"{name}{i}" for i in range(len(values))]
    people = pd.DataFrame({"subject_id": ids, "sex": ["F" if 2 * i < len(ids) else "M" for i in range(len(ids))]})
    return cohort_of(name, pd.DataFrame({"subject_id": ids, "organ": "liver", "volume_ml": values}), people)


def test_a_worked_example_by_hand() -> None:
    """Three groups of six: means 5, 9, 10, sums of squares 84 between (2 df) and 68 within (15 df)."""
    groups = [column(v) for v in ([6, 8, 4, 5, 3, 4], [8, 12, 9, 11, 6, 8], [13, 9, 11, 8, 7, 12])]
    f, df1, df2, p = (float(v[0]) for v in classical_anova(groups))
    assert (f, df1, df2) == (pytest.approx((84 / 2) / (68 / 15)), 2, 15) and p == pytest.approx(0.0024, abs=5e-5)


def test_both_are_scipys() -> None:
    rng = np.random.default_rng(1)
    for k in (2, 3, 5):
        groups = [rng.normal(rng.normal(10, 1), rng.uniform(0.5, 4), int(rng.integers(5, 60))) for _ in range(k)]
        f, _, _, p = classical_anova([column(g) for g in groups])
        expected = stats.f_oneway(*groups)
        assert (f[0], p[0]) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
        f, _, _, p = welch_anova([column(g) for g in groups])
        if k == 2:
            t = stats.ttest_ind(*groups, equal_var=False)
            assert (f[0], p[0]) == (pytest.approx(t.statistic**2), pytest.approx(t.pvalue))
        if "equal_var" in inspect.signature(stats.f_oneway).parameters:
            expected = stats.f_oneway(*groups, equal_var=False)
            assert (f[0], p[0]) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))


def test_summaries_give_what_their_subjects_give() -> None:
    rng = np.random.default_rng(2)
    cohorts = {name: cohort(name, rng.normal(1500, sd, 40)) for name, sd in (("a", 100), ("b", 300), ("c", 200))}
    rows = []
    for sex, part in (("F", slice(0, 20)), ("M", slice(20, 40))):
        m = moments(cohorts["c"].values[part])
        rows.append(("liver", "volume_ml", sex, m.n[0], m.mean[0], m.sd[0], ""))
    summary = Summary("c", pd.DataFrame(rows, columns=["organ", "metric", "sex", "n", "mean", "sd", "note"]))
    for by in ("sex", "all"):
        whole, half = anova(cohorts, by=by), anova({**cohorts, "c": summary}, by=by)
        pd.testing.assert_frame_equal(whole, half)
        assert (whole["groups"] == 3).all() and (whole["p"] != whole["p_equal"]).all()
    printed = anova({**cohorts, "c": summary}, by="sex").iloc[0]
    assert printed["mean_3"] == pytest.approx(cohorts["c"].values[:20].mean()) and printed["n_3"] == 20


def test_welch_holds_its_level_where_the_classical_one_does_not() -> None:
    rng = np.random.default_rng(3)
    small, large = (rng.normal(0, sd, (n, 2000)) for sd, n in ((4.0, 12), (1.0, 60)))
    groups = [moments(small), moments(large), moments(rng.normal(0, 1.0, (60, 2000)))]
    wrong = {f.__name__: float((f(groups)[3] < 0.05).mean()) for f in (welch_anova, classical_anova)}
    assert 0.035 < wrong["welch_anova"] < 0.07 and wrong["classical_anova"] > 0.2


def test_the_family_is_all_rows_and_a_shifted_cohort_is_found() -> None:
    rng = np.random.default_rng(4)
    same = {name: cohort(name, rng.normal(1500, 200, 60)) for name in ("a", "b")}
    table = anova({**same, "c": cohort("c", rng.normal(1900, 200, 60))}, by="sex")
    assert (table["p_holm"] < 0.001).all() and list(table["p_holm"]) == pytest.approx(
        [min(1, 2 * p) if p == table["p"].min() else max(2 * table["p"].min(), p) for p in table["p"]]
    )
    assert (anova({**same, "c": cohort("c", rng.normal(1500, 200, 60))}, by="sex")["p_holm"] > 0.01).all()


def test_who_is_left_out_is_said() -> None:
    rng = np.random.default_rng(5)
    few, flat = cohort("few", rng.normal(1500, 200, 6)), cohort("flat", np.full(40, 1500.0))
    cohorts = {name: cohort(name, rng.normal(1500, 200, 40)) for name in ("a", "b")}
    row = anova({**cohorts, "few": few, "flat": flat}, by="sex").iloc[0]
    assert row["groups"] == 2 and row["message"] == "few: only 3 measured, left out; flat: no spread, left out"
    published = anova({**cohorts, "autopet-2025": read_reference("autopet-2025")}, cells=[CELL, ("moon", "suv_mean")])
    assert set(zip(published["organ"], published["metric"])) == {CELL}
    by_age = anova({**cohorts, "autopet-2025": read_reference("autopet-2025")}, by="all", cells=[CELL])
    assert by_age["groups"].item() == 3
    alone = anova({"few": few, "flat": flat}, by="all").iloc[0]
    assert alone["groups"] == 1 and np.isnan(alone["p"]) and np.isnan(alone["p_holm"])
    with pytest.raises(InputError, match="1 cohorts given"):
        anova({"a": cohorts["a"]})


def test_nothing_shared_is_an_empty_table() -> None:
    a = cohort("a", np.arange(20.0))
    table = anova({"a": a, "b": a}, cells=[("moon", "suv_mean")], settings=AnalysisSettings())
    assert table.empty and table.attrs["cohorts"] == ["a", "b"]
