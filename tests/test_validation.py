"""Comparing cohorts: published tables, verdicts, strata, multiplicity, and everything that may be missing."""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vtrial.records import HIGHEST_SUV, InputError
from vtrial.reporting.content import Content, Provenance, samples_by_sex
from vtrial.reporting.report import build_report
from vtrial.validation import AnalysisSettings, Cohort, anova, cohort_of, compare, read_reference
from vtrial.validation.match import pair
from vtrial.validation.multiplicity import benjamini_hochberg, holm
from vtrial.validation.strata import strata_of
from vtrial.validation.tables import usual_names
from vtrial.validation.verdict import DIFFERENT, EQUIVALENT, NOT_COMPARED, TOO_FEW

QUICK = AnalysisSettings(bootstraps=500, shufflings=500, organs=("liver", "spleen"))
# Table 1 of Yoon et al. 2025: which cells of the twins carry a star (p < 0.05 against AutoPET).
STARS = {
    "yoon2025-flow": {
        *(
            ("liver", "volume_ml", "F"),
            ("liver", "suv_mean", "M"),
            ("liver", "suv_mean", "F"),
            ("liver", "suv_max", "M"),
        ),
        *(
            ("liver", "suv_max", "F"),
            ("heart", "volume_ml", "M"),
            ("heart", "volume_ml", "F"),
            ("heart", "suv_max", "M"),
        ),
        *(("heart", "suv_max", "F"), ("kidneys", "volume_ml", "M"), ("kidneys", "suv_mean", "M")),
        *(("kidneys", "suv_mean", "F"), ("kidneys", "suv_max", "M")),
    },
    "yoon2025-diffusion": {("heart", "volume_ml", "F"), ("heart", "suv_max", "M")},
}


def tables(n: int, seed: int, *, shift: float = 1.0, spread: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Subjects and measurements of a made-up cohort: normal volumes and HU, lognormal SUV, all independent."""
    rng = np.random.default_rng(seed)
    subjects = pd.DataFrame({"subject_id": [f"s{i}" for i in range(n)], "index": range(n), "status": "ok"})
    subjects["sex"] = ["F", "M"] * (n // 2) + ["F"] * (n % 2)
    subjects["age_years"], subjects["height_cm"] = rng.uniform(20, 90, n), rng.normal(171, 9, n)
    subjects["weight_kg"] = rng.normal(78, 14, n)
    rows = []
    for organ in ("liver", "spleen"):
        rows.append(
            pd.DataFrame(
                {
                    "subject_id": subjects["subject_id"],
                    "organ": organ,
                    "volume_ml": shift * (1500 + spread * rng.normal(0, 300, n)),
                    "hu_mean": 55 + spread * rng.normal(0, 8, n),
                    "suv_mean": shift * np.exp(0.8 + spread * rng.normal(0, 0.15, n)),
                    "suv_max": shift * np.exp(2.0 + spread * rng.normal(0, 0.3, n)),
                    "touches_border": False,
                    "missing": "",
                }
            )
        )
    return subjects, pd.concat(rows, ignore_index=True)


def cohort(name: str, n: int, seed: int, *, shift: float = 1.0, spread: float = 1.0) -> Cohort:
    subjects, measurements = tables(n, seed, shift=shift, spread=spread)
    return cohort_of(name, measurements, subjects)


def cell(table: pd.DataFrame, stratum: str, organ: str, metric: str) -> pd.Series:
    found = table[(table["stratum"] == stratum) & (table["organ"] == organ) & (table["metric"] == metric)]
    assert len(found) == 1
    return found.iloc[0]


def test_published_stars_are_reproduced_but_for_the_one_that_is_none() -> None:
    agree, wrong = 0, []
    for name, stars in STARS.items():
        table = compare(read_reference(name), read_reference("autopet-2025")).table
        table = table[table["n_synthetic"] > 0]
        assert len(table) == 18
        for row in table.to_dict("records"):
            key = (row["organ"], row["metric"], row["stratum"][-1])
            same = (row["p_welch"] < 0.05) == (key in stars)
            agree += same
            wrong += [] if same else [(name, *key, round(row["p_welch"], 3))]
    assert agree == 35
    assert wrong == [("yoon2025-diffusion", "heart", "suv_mean", "M", 0.014)]


def test_the_flow_cohorts_lost_variance_is_flagged_and_the_diffusion_cohorts_is_not() -> None:
    real = read_reference("autopet-2025")
    flow, diffusion = (compare(read_reference(f"yoon2025-{kind}"), real) for kind in ("flow", "diffusion"))
    assert flow.spread["alarm"].all() and not diffusion.spread["alarm"].any()
    assert "SPREAD LOST in sex=M" in flow.headline and "SPREAD LOST" not in diffusion.headline
    liver = cell(flow.table, "sex=M", "liver", "volume_ml")
    assert (liver["mean_verdict"], liver["spread_verdict"], liver["verdict"]) == (EQUIVALENT, DIFFERENT, DIFFERENT)
    assert "means and SDs alone" in liver["message"] and liver["spread_test"].startswith("F")


def test_numbers_from_values_equal_scipys() -> None:
    a, b = cohort("twins", 81, 1), cohort("real", 120, 2, shift=1.05)
    table = compare(a, b, by="all", settings=QUICK).table
    for metric in ("volume_ml", "hu_mean", "suv_mean"):
        row = cell(table, "all", "liver", metric)
        x, y = a.column(("liver", metric)), b.column(("liver", metric))
        assert row["p_welch"] == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)
        assert row["p_rank"] == pytest.approx(stats.mannwhitneyu(x, y).pvalue, rel=1e-9)
        assert row["ks"] == pytest.approx(stats.ks_2samp(x, y).statistic)
        assert row["p_ks"] == pytest.approx(stats.ks_2samp(x, y, method="asymp").pvalue, abs=0.03)
        assert row["wasserstein"] == pytest.approx(stats.wasserstein_distance(x, y))
        assert row["p_spread"] == pytest.approx(stats.levene(x, y, center="median").pvalue)
        assert row["variance_ratio"] == pytest.approx(x.var(ddof=1) / y.var(ddof=1))
        assert row["cohens_d"] == pytest.approx((x.mean() - y.mean()) / np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
        assert row["difference_low"] == pytest.approx(
            stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95).low
        )
    assert np.isnan(cell(table, "all", "liver", "hu_mean")["difference_percent"])  # HU: zero is no origin


def test_equivalence_holds_exactly_where_its_interval_lies_inside_the_margin() -> None:
    for seed in range(6):
        a, b = cohort("a", 60, seed, shift=1 + 0.02 * seed), cohort("b", 60, seed + 50)
        for row in compare(a, b, settings=QUICK).table.to_dict("records"):
            margin = row["margin_percent"] if row["margin_percent"] > 0 else row["margin_absolute"]
            inside = -margin < row["equivalence_low"] and row["equivalence_high"] < margin
            near = min(abs(row["equivalence_low"] + margin), abs(row["equivalence_high"] - margin)) < 0.02 * margin
            assert inside == (row["p_tost"] < 0.05) or near


def test_verdicts_in_words() -> None:
    real = cohort("real", 400, 1)
    same = compare(cohort("twins", 400, 2), real, by="all", settings=QUICK)
    assert set(same.table["verdict"]) == {EQUIVALENT} and same.verdict == EQUIVALENT
    moved = compare(cohort("twins", 400, 2, shift=1.3), real, by="all", settings=QUICK)
    row = cell(moved.table, "all", "liver", "volume_ml")
    assert row["verdict"] == DIFFERENT and row["difference_percent_low"] < 30 < row["difference_percent_high"]
    assert moved.verdict == DIFFERENT and "largest difference of means +3" in moved.headline
    few = compare(cohort("twins", 12, 2), real, by="all", settings=QUICK)
    assert cell(few.table, "all", "liver", "suv_max")["verdict"] == TOO_FEW and few.verdict == TOO_FEW
    json.dumps(few.to_dict(), allow_nan=False)


def test_half_the_variance_is_told_by_cell_and_alarmed_as_a_whole() -> None:
    real = cohort("real", 300, 1)
    narrow = compare(cohort("twins", 300, 2, spread=np.sqrt(0.5)), real, by="all", settings=QUICK)
    row = cell(narrow.table, "all", "liver", "volume_ml")
    assert row["mean_verdict"] == EQUIVALENT and row["spread_verdict"] == DIFFERENT and row["verdict"] == DIFFERENT
    assert bool(narrow.spread["alarm"][0]) and narrow.spread["spread_ratio"][0] == pytest.approx(0.7, abs=0.08)


def test_censored_suvmax_goes_by_ranks_and_medians() -> None:
    subjects, m = tables(200, 1)
    other_subjects, other = tables(200, 2)
    m["suv_max"], other["suv_max"] = m["suv_max"] * 2, other["suv_max"] * 2.4  # 4 % and 13 % beyond 25
    a, b = cohort_of("twins", m, subjects), cohort_of("real", other, other_subjects)
    assert np.nanmax(a.column(("liver", "suv_max"))) == 25.0
    row = cell(compare(a, b, by="all", settings=QUICK).table, "all", "liver", "suv_max")
    assert row["location_test"] == "Mann–Whitney" and row["p_location"] == row["p_rank"]
    assert 0.01 < row["ceiling_synthetic"] < 0.08 < row["ceiling_reference"] < 0.2
    assert "reach 25" in row["message"]
    truth = 100 * (1 / 1.2 - 1)
    assert row["median_difference_percent_low"] < truth < row["median_difference_percent_high"]
    other["suv_max"] *= 3  # now most reach it: no median to speak of
    heavy = cell(
        compare(a, cohort_of("real", other, other_subjects), by="all", settings=QUICK).table, "all", "liver", "suv_max"
    )
    assert (
        np.isnan(heavy["p_tost"])
        and "those about the median below" in heavy["message"]
        and heavy["verdict"] == DIFFERENT
    )


def test_another_ceiling_moves_nothing_but_what_reaches_it() -> None:
    subjects, m = tables(4, 1)
    liver = m["organ"] == "liver"
    m.loc[liver, "suv_max"], m.loc[liver, "censored"] = [10.0, 24.999, 31.0, 60.0], [False, True, True, True]
    m["censored"] = m["censored"].fillna(False)
    expected = {
        20.0: ([10, 20, 20, 20], [0, 1, 1, 1]),
        25.0: ([10, 25, 25, 25], [0, 1, 1, 1]),
        40.0: ([10, 24.999, 31, 40], [0, 0, 0, 1]),
    }
    for suv_ceiling, (values, reached) in expected.items():
        found = cohort_of("real", m, subjects, suv_ceiling=suv_ceiling).select([("liver", "suv_max")])
        assert found[0][:, 0].tolist() == values and found[1][:, 0].tolist() == [bool(r) for r in reached]
    m.loc[liver, "suv_max"] = [10.0, 24.999, 25.0, 25.0]  # as twins: what lies beyond is not known
    with pytest.raises(InputError, match=r"all SUVmax end at 25.*suv_ceiling of 40; set that to 25 or less"):
        cohort_of("twins", m, subjects, suv_ceiling=40.0)
    assert cohort_of("twins", m, subjects).column(("liver", "suv_max")).tolist() == [10, 25, 25, 25]


def test_what_measuring_takes_is_compared_and_becquerel_is_not() -> None:
    subjects, m = tables(10, 1)
    m.loc[0, "suv_max"] = 1500.0  # one hot voxel of the liver, as `vtrial measure` takes up to 10,000
    assert cohort_of("t", m, subjects).column(("liver", "suv_max")).max() == 25.0
    m.loc[0, "suv_max"] = HIGHEST_SUV * 1.01
    with pytest.raises(InputError, match=r"s0, organ liver, column suv_max: 10100\.0: beyond any SUV"):
        cohort_of("t", m, subjects)
    subjects, m = tables(10, 1)
    m.loc[m["subject_id"] == "s3", "suv_mean"] = [5200.0, 4100.0]  # Bq/ml: no organ has less than a thousand
    with pytest.raises(InputError) as caught:
        cohort_of("t", m, subjects)
    assert len(caught.value.problems) == 2 and "perhaps Bq/ml" in caught.value.problems[0]


def bladders(name: str, seed: int, hottest: float) -> Cohort:
    """Cohorts of 80 whose spleens all reach the ceiling but one, whose SUVmax is `hottest`."""
    subjects, m = tables(80, seed)
    m.loc[m["organ"] == "spleen", "suv_max"] = 40.0
    m.loc[(m["organ"] == "spleen") & (m["subject_id"] == "s3"), "suv_max"] = hottest
    return cohort_of(name, m, subjects)


def test_the_ceiling_is_no_lost_spread() -> None:
    result = compare(bladders("twins", 1, 30.0), bladders("real", 2, 24.0), by="all", settings=QUICK)
    row = cell(result.table, "all", "spleen", "suv_max")
    assert row["sd_synthetic"] == 0 < row["sd_reference"]
    assert "100 % of twins and 98.8 % of real reach 25" in row["message"]
    spread = result.spread.iloc[0]
    assert (spread["cells"], spread["identical"], bool(spread["alarm"])) == (7, 0, False)
    assert "SPREAD LOST" not in result.headline


def test_adjusted_p_values_are_those_of_the_textbook() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, np.nan, 0.04, 0.02], nan_ok=True)
    assert benjamini_hochberg(p)[[0, 1, 3, 4]] == pytest.approx(stats.false_discovery_control(p[[0, 1, 3, 4]]))


def test_strata_by_every_variable_and_crossed() -> None:
    a, b = cohort("a", 200, 1), cohort("b", 200, 2)
    edges = QUICK.strata
    names = [s.name for s in strata_of([a.people, b.people], "sex,age_group", edges)]
    assert names == ["sex=F", "sex=M", "age_group=<45", "age_group=45-60", "age_group=60-75", "age_group=>=75"]
    crossed = [s.name for s in strata_of([a.people], "sex*age_group", edges)]
    assert crossed[0] == "sex=F, age_group=<45" and len(crossed) == 8
    table = compare(a, b, by="sex,age_group", settings=QUICK).table
    per_age = table[table["stratum"].str.startswith("age") & (table["organ"] == "liver")]
    assert per_age.groupby("metric")["n_synthetic"].sum().eq(200).all()
    with pytest.raises(InputError, match="unknown variable 'hospital'"):
        compare(a, b, by="sex,hospital", settings=QUICK)
    with pytest.raises(InputError, match="no subject has these variables"):
        compare(a, b, by="diagnosis", settings=QUICK)


def test_a_summary_cannot_be_stratified_by_age_and_says_so() -> None:
    table = compare(cohort("twins", 60, 1), read_reference("autopet-2025"), by="age_group", settings=QUICK).table
    assert (table["verdict"] == NOT_COMPARED).all()
    assert table["message"].str.contains("is a summary by sex, it has no age_group").all()
    assert table["mean_synthetic"].notna().any() and table["mean_reference"].isna().all()
    crossed = compare(cohort("twins", 60, 1), read_reference("autopet-2025"), by="sex*age_group", settings=QUICK).table
    assert crossed["message"].str.contains("it has no age_group").all()


def test_what_is_missing_is_said_in_its_cell() -> None:
    subjects, m = tables(40, 1)
    m = m[~((m["organ"] == "spleen") & m["subject_id"].isin(subjects.loc[subjects["sex"] == "F", "subject_id"]))]
    m.loc[m["organ"] == "liver", "hu_mean"] = np.nan
    a = cohort_of("twins", m, subjects)
    subjects_b, mb = tables(40, 2)
    b = cohort_of("real", mb.drop(columns="suv_max"), subjects_b)
    table = compare(a, b, settings=QUICK).table
    spleen = cell(table, "sex=F", "spleen", "volume_ml")
    assert spleen["verdict"] == NOT_COMPARED and spleen["n_synthetic"] == 0 and np.isnan(spleen["mean_synthetic"])
    assert "spleen was measured in nobody of this stratum" in spleen["why"]
    assert cell(table, "sex=M", "spleen", "volume_ml")["verdict"] != NOT_COMPARED
    assert "real has no suv_max of liver" in cell(table, "sex=F", "liver", "suv_max")["message"]
    assert cell(table, "sex=M", "liver", "hu_mean")["verdict"] == NOT_COMPARED


@pytest.mark.parametrize("n", [1, 2, 3])
def test_strata_of_one_or_two_are_described_and_not_judged(n: int) -> None:
    table = compare(cohort("twins", n, 1), cohort("real", 100, 2), by="all", settings=QUICK).table
    assert (table["verdict"] == TOO_FEW).all() and not table["judged"].any()
    assert table["message"].str.contains(f"only {n} measured").all()
    assert table["p_location_holm"].isna().all() and table["mean_synthetic"].notna().all()


def test_identical_values_are_told_and_alarm() -> None:
    subjects, m = tables(50, 1)
    m["volume_ml"], m["suv_mean"] = 1500.0, 2.2
    twins, real = cohort_of("twins", m, subjects), cohort("real", 50, 2)
    result = compare(twins, real, by="all", settings=QUICK)
    row = cell(result.table, "all", "liver", "volume_ml")
    assert "all 50 values are identical" in row["message"] and row["spread_verdict"] == DIFFERENT
    assert row["sd_ratio"] == 0 and bool(result.spread["alarm"][0]) and result.spread["identical"][0] == 4
    named = "all values are identical in liver volume_ml, liver suv_mean, spleen volume_ml and 1 more"
    assert f"SPREAD LOST in all: {named}" in result.headline  # and no ratio, as over the others it is not below 1
    both = cell(compare(twins, twins, by="all", settings=QUICK).table, "all", "liver", "volume_ml")
    assert both["verdict"] == TOO_FEW and np.isnan(both["p_welch"])
    assert both["message"].count("identical") == 2


def test_unfinished_subjects_and_cut_organs_are_counted() -> None:
    subjects, m = tables(30, 1)
    subjects.loc[:3, "status"] = "failed"
    m = m[~m["subject_id"].isin(["s10", "s11"])]
    m.loc[(m["organ"] == "liver") & (m["subject_id"] == "s20"), "touches_border"] = True
    lost = (m["organ"] == "spleen") & m["subject_id"].isin(["s21", "s22", "s0"])
    m.loc[lost, ["volume_ml", "hu_mean", "suv_mean", "suv_max"]] = np.nan
    m.loc[lost, "missing"] = "not in the mask"
    c = cohort_of("run", m, subjects)
    assert "run: 2 organs not measured (not in the mask): spleen 2" in c.notes  # s0 failed and is not counted again
    assert len(c) == 24 and np.isnan(c.column(("liver", "volume_ml"))).sum() == 1
    assert any("4 of 30 subjects are not finished" in note for note in c.notes)
    assert any("2 of 26 subjects have no measurements yet" in note for note in c.notes)
    assert any("1 volumes of organs cut by the field of view" in note for note in c.notes)


def test_subjects_without_a_single_number_are_left_out_and_counted() -> None:
    subjects, m = tables(30, 1)
    metrics = ["volume_ml", "hu_mean", "suv_mean", "suv_max"]
    lost = m["subject_id"] == "s7"
    m.loc[lost, metrics], m.loc[lost, "missing"] = np.nan, "not measured: spoilt"
    m.loc[(m["subject_id"] == "s8") & (m["organ"] == "liver"), metrics] = np.nan
    c = cohort_of("run", m, subjects)
    assert len(c) == 29 and "s7" not in c.people.index and "s8" in c.people.index
    assert c.notes[-1] == "run: nothing could be measured in 1 of 30 subjects: left out"
    m[metrics] = np.nan
    with pytest.raises(InputError, match="no subject has a single measurement"):
        cohort_of("run", m, subjects)


@pytest.mark.parametrize(
    ("column", "value"),
    [("BMI", 11.0), ("Status", "alive"), ("Age", 3), (" age", 3), ("Weight", 1), ("ID", "x"), ("Subject", "y")],
)
def test_a_column_of_its_own_name_wins(column: str, value: object) -> None:
    subjects, m = tables(10, 1)
    subjects["bmi"] = 24.0
    for place in (0, 3):
        more = subjects.copy()
        more.insert(place, column, value)
        c = cohort_of("run", m, more)
        assert c.people["bmi"].tolist() == [24.0] * 10 and c.people.index.tolist() == [f"s{i}" for i in range(10)]
        assert c.people["age_years"].tolist() == subjects["age_years"].tolist()
    named = usual_names(pd.DataFrame({"Age": [1], "AGE_YEARS": [2], "age": [3], "Id": [4]}))
    assert named.to_dict("list") == {"age_years": [2], "subject_id": [4]}


def test_uptake_may_lie_below_zero_and_volumes_may_not() -> None:
    subjects, m = tables(20, 1)
    m["suv_sd"] = 0.1
    m.loc[3, ["suv_mean", "suv_max"]] = -0.003, -0.001
    assert cohort_of("real", m, subjects).column(("liver", "suv_mean"))[3] == -0.003
    m.loc[4, "suv_mean"], m.loc[5, "suv_sd"], m.loc[6, "volume_ml"] = -51.0, -0.1, -1.0
    with pytest.raises(InputError) as caught:
        cohort_of("real", m, subjects)
    told = "\n".join(caught.value.problems)
    assert "column suv_mean: -51.0: below -50" in told and "column suv_sd: -0.1: below 0" in told
    assert "column volume_ml: -1.0: below 0" in told and len(caught.value.problems) == 3


def test_a_numeric_diagnosis_is_one_level_with_gaps_or_without() -> None:
    subjects, m = tables(20, 1)
    gaps = cohort_of("gaps", m, subjects.assign(diagnosis=[1.0, 2.0, np.nan, 1.0] * 5))
    whole = cohort_of("whole", m, subjects.assign(diagnosis=[1, 2, 1, 1] * 5))
    texts = cohort_of("texts", m, subjects.assign(diagnosis=["1", " 2", "", "1.0"] * 5))
    found = strata_of([gaps.people, whole.people, texts.people], "diagnosis", QUICK.strata)
    assert [s.name for s in found] == ["diagnosis=1", "diagnosis=2"]
    table = compare(gaps, texts, by="diagnosis", settings=QUICK).table
    assert set(zip(table["n_synthetic"], table["n_reference"])) == {(10, 10), (5, 5)}


def test_bad_measurements_are_refused_all_at_once() -> None:
    subjects, m = tables(10, 1)
    subjects.loc[0, "sex"] = "x"
    with pytest.raises(InputError, match="subject s0, column sex: 'x' is neither F nor M"):
        cohort_of("t", m, subjects)
    subjects.loc[0, "sex"] = "female"
    m.loc[0, "suv_mean"], m.loc[1, "volume_ml"], m.loc[2, "suv_max"] = 31000.0, -5.0, np.inf
    with pytest.raises(InputError) as caught:
        cohort_of("t", pd.concat([m, m.tail(1)]), subjects)
    told = "\n".join(caught.value.problems)
    for part in (
        "s0, organ liver, column suv_mean: 31000.0: beyond any SUV",
        "s1, organ liver, column volume_ml: -5.0",
    ):
        assert part in told
    assert "infinite" in told and "s9, organ spleen: measured twice" in told


def test_pairs_sharpen_what_demographics_drive() -> None:
    subjects, m = tables(60, 1)
    twins = m.copy()
    wanted = {"volume_ml": 1.03, "suv_mean": 1.0, "hu_mean": 1.0, "suv_max": 1.0}
    rng = np.random.default_rng(3)
    for metric, factor in wanted.items():
        twins[metric] = m[metric] * factor * (1 + 0.02 * rng.standard_normal(len(m)))
    order = rng.permutation(len(subjects))
    a, b = pair(cohort_of("twins", twins, subjects.iloc[order]), cohort_of("real", m, subjects))
    assert list(a.people.index) == list(b.people.index)
    loose, tight = (
        cell(compare(a, b, by="all", settings=QUICK, paired=p).table, "all", "liver", "volume_ml")
        for p in (False, True)
    )
    x, y = a.column(("liver", "volume_ml")), b.column(("liver", "volume_ml"))
    assert tight["p_location"] == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert tight["p_rank"] == pytest.approx(stats.wilcoxon(x, y).pvalue, rel=1e-6)
    assert tight["location_test"] == "paired t" and tight["verdict"] == EQUIVALENT
    width = [r["difference_percent_high"] - r["difference_percent_low"] for r in (tight, loose)]
    boot = tight["boot_percent_high"] - tight["boot_percent_low"]
    assert width[0] < 0.2 * width[1] and boot == pytest.approx(width[0], rel=0.2)


def test_pairs_that_are_none_are_refused() -> None:
    a, b = cohort("twins", 20, 1), cohort("real", 20, 1)
    a.people["height_cm"] = a.people["height_cm"] + np.where(np.arange(20) == 7, 9.0, 0.0)
    with pytest.raises(InputError, match="subject s7, column height_cm"):
        pair(a, b)
    c = cohort("real", 20, 1)
    c.people.index = pd.Index([f"r{i}" for i in range(20)])
    twins, real = pair(cohort("twins", 20, 1), c.rows(range(5, 20)))  # other names: by the row of the matched table
    assert list(twins.people.index) == [f"s{i}" for i in range(5, 20)] and real.people.index[0] == "r5"
    assert "5 subjects have no pair (by index)" in twins.notes[-1]
    bodies = c.rows([0, 0, *range(1, 19)])  # the second row of index 0 has nobody left to be paired with
    bodies.people.index = pd.Index([f"r{i}" for i in range(20)])
    twins, real = pair(cohort("twins", 20, 1), bodies)
    assert list(zip(twins.people.index[:3], real.people.index[:3])) == [("s0", "r0"), ("s1", "r2"), ("s2", "r3")]
    with pytest.raises(InputError, match="as many subjects"):
        compare(twins, c, paired=True)


def test_segmenters_that_differ_are_said() -> None:
    notes = compare(cohort("twins", 20, 1), read_reference("autopet-2025"), settings=QUICK).notes
    assert any("segmenters differ" in note for note in notes)


def test_anova_over_summaries_and_values_is_welchs() -> None:
    a, b, c = cohort("a", 50, 1), cohort("b", 70, 2), cohort("c", 90, 3, shift=1.2)
    row = anova({"a": a, "b": b}, by="all").set_index(["organ", "metric"]).loc[("liver", "volume_ml")]
    x, y = (k.column(("liver", "volume_ml")) for k in (a, b))
    assert row["p"] == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)  # of two groups it is Welch's t
    table = anova({"a": a, "b": b, "c": c}, by="all")
    three = table.set_index(["organ", "metric"]).loc[("liver", "volume_ml")]
    assert three["groups"] == 3 and three["p_holm"] < 0.01
    names = ("autopet-2025", "yoon2025-flow", "yoon2025-diffusion")
    published = anova({name: read_reference(name) for name in names})
    assert len(published) == 18 and published["p"].notna().all()


def test_a_large_comparison_is_quick() -> None:
    organs = AnalysisSettings().organs
    rng = np.random.default_rng(0)
    cohorts = []
    for name in ("twins", "real"):
        n = 1000
        people = pd.DataFrame({"sex": rng.choice(["F", "M"], n)}, index=[f"{name}{i}" for i in range(n)])
        cells = tuple((o, m) for o in organs for m in AnalysisSettings().metrics)
        values = rng.lognormal(1, 0.2, (n, len(cells)))
        cohorts.append(Cohort(name, people, cells, values, np.zeros(values.shape, dtype=bool)))
    start = time.process_time()
    compared = compare(cohorts[0], cohorts[1])
    table = compared.table
    samples = samples_by_sex(cohorts[0], cohorts[1], list(cohorts[0].cells))
    page = build_report(Content(compared.to_dict(), Provenance("vtrial report", (), {}, {}, {}, ()), samples)).html
    # 10,000 bootstraps of 1,000 against 1,000 subjects, 12 organs, 5 metrics, by sex, and the report: 1.5 s of a core.
    assert time.process_time() - start < 10
    assert page.count("<svg") > 10
    assert len(table) == 120 and table["boot_percent_low"].notna().sum() == 96  # HU has no percent


def odd_tables(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A cohort as it should not be: a handful of people, constants, zeros, gaps, values beyond the ceiling."""
    subjects, m = tables(int(rng.choice([1, 2, 3, 5, 6, 20])), int(rng.integers(1_000_000)))
    for column in ("volume_ml", "hu_mean", "suv_mean", "suv_max"):
        change = rng.choice(["none", "empty", "constant", "zero", "gaps", "high", "binary"])
        if change in ("empty", "constant"):
            m[column] = np.nan if change == "empty" else 5.0
        elif change == "zero":
            m.loc[m["organ"] == "liver", column] = 0.0
        elif change == "gaps":
            m.loc[rng.random(len(m)) < 0.6, column] = np.nan
        elif change == "high":
            m[column] = (m[column] * 5).clip(upper=900)
        elif change == "binary":
            m[column] = rng.integers(0, 2, len(m)).astype(float)
    if rng.random() < 0.2:
        m = m[m["organ"] == "spleen"]
    if rng.random() < 0.2:
        subjects["sex"] = "F"
    subjects.loc[rng.random(len(subjects)) < 0.2, "age_years"] = np.nan
    return m, subjects


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(25))
def test_odd_cohorts_never_crash_and_every_gap_has_its_reason(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = QUICK.model_copy(update={"bootstraps": 100, "shufflings": 200})
    a, b = (cohort_of(name, *odd_tables(rng)) for name in ("twins", "real"))
    by = str(rng.choice(["all", "sex", "sex,age_group", "sex*bmi_group"]))
    for paired in [False, True] if len(a) == len(b) else [False]:
        result = compare(a, b, by=by, settings=settings, paired=paired)
        json.dumps(result.to_dict(), allow_nan=False)
        t = result.table
        assert t["verdict"].isin([EQUIVALENT, DIFFERENT, TOO_FEW, NOT_COMPARED]).all()
        assert (t.loc[~t["judged"], "message"].str.len() > 0).all() and (t["why"].str.len() > 0).all()
        assert not t["why"].str.contains("nan").any()
        for end in ("synthetic", "reference"):
            assert t.loc[t[f"n_{end}"] == 0, f"mean_{end}"].isna().all()
