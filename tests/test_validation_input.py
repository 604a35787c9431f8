"""What comparing takes and refuses: settings, sexes, summaries of one sex, constants, pairs by chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vtrial.records import InputError
from vtrial.validation import AnalysisSettings, Cohort, cohort_of, compare, read_reference, read_settings
from vtrial.validation.conditional import compare_slopes
from vtrial.validation.diversity import spread_of_values
from vtrial.validation.inference import equivalence_interval, moments, tost_ratio
from vtrial.validation.match import pair
from vtrial.validation.strata import parse_by
from vtrial.validation.verdict import DIFFERENT, NOT_COMPARED

SETTINGS = AnalysisSettings(bootstraps=0, shufflings=200)


def table(n: int, seed: int = 0, prefix: str = "s") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    people = pd.DataFrame({"subject_id": [f"{prefix}{i}" for i in range(n)], "sex": ["F", "M"] * (n // 2)})
    people["age_years"], people["height_cm"] = 40.0 + np.arange(n), 160.0 + np.arange(n) % 30
    people["weight_kg"] = 60.0 + np.arange(n) % 40
    return people.assign(organ="liver", suv_mean=rng.normal(5, 0.5, n), volume_ml=rng.normal(1500, 150, n))


def cohort(n: int = 40, seed: int = 0, prefix: str = "s", **columns: object) -> Cohort:
    return cohort_of(f"{prefix}-cohort", table(n, seed, prefix).assign(**columns))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('metrics = ["suv_men"]', "metrics: .*unknown metrics suv_men; use volume_ml, .*suv_liver_ratio"),
        ('metrics = ["suv_mean", "suv_mean"]', "suv_mean more than once; keep one"),
        ('organs = ["liver", "heart", "liver"]', "liver more than once; keep one"),
        ("[margins.metric_percent]\nsuv_men = 5.0", "metric_percent: .*unknown metrics suv_men"),
        ("[margins.metric_absolute]\nhu = 5.0", "metric_absolute: .*unknown metrics hu"),
        ("[margins.metric_absolute]\nsuv_max = 2.0", "suv_max: values that end with the scale .*use metric_percent"),
        ("[margins.metric_percent]\nhu_mean = 5.0", "zero HU means nothing.*use metric_absolute"),
        (
            "[margins.metric_percent]\nsuv_mean = 5.0\n[margins.metric_absolute]\nsuv_mean = 0.2",
            "suv_mean: a margin in percent and one in its own unit; keep one",
        ),
    ],
)
def test_settings_name_what_is_measured_once(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=f"mine.toml, .*{told}"):
        read_settings(tmp_path / "mine.toml")


def test_margins_of_single_metrics_are_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[margins.metric_percent]\nsuv_mean = 5.0\nsuv_liver_ratio = 7.0")
    margins = read_settings(tmp_path / "mine.toml").margins
    assert (margins.relative("suv_mean"), margins.relative("suv_liver_ratio")) == (5.0, 7.0)
    (tmp_path / "mine.toml").write_text("[margins.metric_absolute]\nvolume_ml = 50.0")
    margins = read_settings(tmp_path / "mine.toml").margins
    assert margins.absolute("volume_ml") == 50.0 and np.isnan(margins.relative("volume_ml"))
    assert margins.absolute("hu_mean") == 10.0 and np.isnan(margins.relative("hu_mean"))


def test_metrics_that_neither_side_has_are_told() -> None:
    with pytest.raises(InputError, match=r"neither has suv_peak of liver.*there are: suv_mean, volume_ml"):
        compare(cohort(), cohort(seed=1), settings=SETTINGS.model_copy(update={"metrics": ("suv_peak",)}))


@pytest.mark.parametrize("by", ["sex,sex", "sex*sex", "sex*age_group,age_group*sex"])
def test_a_grouping_named_twice_is_refused(by: str) -> None:
    with pytest.raises(InputError, match="stands there twice"):
        parse_by(by)


@pytest.mark.parametrize("sex", ["missing", "mixed", "Frau", "fx", "nan", ""])
def test_a_sex_is_a_word_for_it_and_not_its_first_letter(sex: str) -> None:
    rows = table(10)
    rows.loc[3, "sex"] = sex
    with pytest.raises(InputError, match=f"t, row 4, subject s3, column sex: {sex!r} is neither F nor M"):
        cohort_of("t", rows)


def test_the_usual_words_for_a_sex(tmp_path: Path) -> None:
    words = [*("f", "Female", "W", "WOMAN", "women"), *("m", "Male", " man ", "MEN", "M")]
    assert cohort_of("t", table(10).assign(sex=words)).people["sex"].tolist() == ["F"] * 5 + ["M"] * 5
    path = tmp_path / "t.csv"
    path.write_text("# title: five\nsubject_id,organ,sex,suv_mean\na,liver,F,1\nb,liver,missing,2\n")
    with pytest.raises(InputError, match="row 4, subject b, column sex: 'missing'"):
        read_reference(path)


def test_who_is_not_finished_needs_no_sex() -> None:
    subjects = table(10).drop(columns=["organ", "suv_mean", "volume_ml"]).assign(status="ok")
    subjects.loc[2, ["sex", "status"]] = "", "failed"
    assert len(cohort_of("t", table(10).drop(columns="sex"), subjects)) == 9


def test_two_sexes_of_one_subject_are_refused() -> None:
    rows = pd.concat([table(4), table(4).assign(organ="spleen")], ignore_index=True)
    rows.loc[5, "sex"] = "F"
    with pytest.raises(InputError, match=r"subject s1, column sex: 'F' in row 6, but 'M' in row 2"):
        cohort_of("t", rows)
    rows.loc[5, "sex"] = "male"  # the same, in other words
    assert cohort_of("t", rows).people["sex"].tolist() == ["F", "M", "F", "M"]


def test_a_summary_of_women_is_not_compared_with_everybody(tmp_path: Path) -> None:
    path = tmp_path / "women.csv"
    path.write_text("organ,metric,sex,n,mean,sd\nliver,suv_mean,F,50,5,0.5\n")
    women = read_reference(path)
    row = compare(cohort(), women, by="all", settings=SETTINGS).table.set_index("metric").loc["suv_mean"]
    assert row["verdict"] == NOT_COMPARED and row["n_reference"] == 0
    assert row["message"] == "women has suv_mean of liver for one sex alone, without men: compare by sex"
    by_sex = compare(cohort(), women, settings=SETTINGS).table.set_index(["stratum", "metric"])
    assert by_sex.loc[("sex=F", "suv_mean"), "n_reference"] == 50
    only = cohort_of("women", table(40)[lambda t: t["sex"] == "F"])
    assert compare(only, women, by="all", settings=SETTINGS).table["n_reference"].max() == 50


def test_constants_that_differ_are_different() -> None:
    one, two = cohort(suv_mean=1.0), cohort(seed=1, prefix="r", suv_mean=2.0)
    row = compare(one, two, by="all", settings=SETTINGS).table.set_index("metric").loc["suv_mean"]
    assert row["verdict"] == DIFFERENT and row["location_test"] == "Mann–Whitney"
    assert "all 40 values are identical" in row["message"]
    same = compare(one, cohort(seed=1, prefix="r", suv_mean=1.0), by="all", settings=SETTINGS).table.set_index("metric")
    assert same.loc["suv_mean", "verdict"] != DIFFERENT
    shifted = cohort_of("shifted", table(40).assign(suv_mean=lambda t: t["suv_mean"] + 2.0))  # each pair by the same
    paired = compare(*pair(shifted, cohort()), by="all", settings=SETTINGS, paired=True).table.set_index("metric")
    assert paired.loc["suv_mean", "verdict"] == DIFFERENT and paired.loc["suv_mean", "location_test"] == "Wilcoxon"


@pytest.mark.parametrize(("n", "m"), [(5, 5), (8, 30), (60, 100)])
def test_equivalence_and_its_interval_are_one(n: int, m: int) -> None:
    rng, k = np.random.default_rng(0), 5000
    a = moments(rng.normal(rng.uniform(0.95, 1.08, k), rng.uniform(0.02, 0.3, k), (n, k)))
    b = moments(rng.normal(1, rng.uniform(0.02, 0.3, k), (m, k)))
    low, high = equivalence_interval(a, b, 0.9)
    equal = tost_ratio(a, b, np.full(k, 0.1)) < 0.05
    assert 50 < equal.sum() < k - 50
    assert (((low > 0.9) & (high < 1.1)) == equal).all()


def test_published_slopes_of_as_many_people_as_terms(tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("organ,metric,sex,n,mean,sd\nliver,suv_mean,F,50,5,0.5\n")
    slopes = "organ,metric,on,adjusted_for,n,slope,se\nliver,suv_mean,bmi,sex,3,0.06,0.01\n"
    (tmp_path / "few.slopes.csv").write_text(slopes)
    row = compare_slopes(cohort(), read_reference(tmp_path / "few.csv"), SETTINGS).iloc[0]
    assert row["verdict"] == NOT_COMPARED and "published from 3 people, too few" in row["message"]


def test_spread_of_two_values_that_are_as_frequent() -> None:
    a, b = np.tile([[1.0], [3.0]], (10, 1)), np.tile([[1.0], [5.0]], (10, 1))
    found = spread_of_values(a, b, level=0.95, alarm_below=0.9)
    assert (found.spread_ratio, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5)) and found.alarm


def test_one_name_by_chance_pairs_nobody() -> None:
    real = table(40, 1, "r")
    real.loc[0, "subject_id"] = "s7"
    twins, paired = pair(cohort(), cohort_of("real", real))  # by the rows of the table, whose bodies agree
    assert len(twins) == len(paired) == 40 and paired.people.index[0] == "s7"
    real["height_cm"] += 9
    with pytest.raises(InputError, match="share 1 subject_id of 40, too few to pair by, and by index pairs are unlike"):
        pair(cohort(), cohort_of("real", real))
    assert len(pair(cohort(), cohort_of("real", table(24, 1)))[0]) == 24
