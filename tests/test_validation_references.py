"""Reference cohorts: the bundled ones, the user's tables, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vtrial.records import InputError
from vtrial.validation import AnalysisSettings, list_references, read_reference, read_settings
from vtrial.validation.references import Summary, literature_slopes
from vtrial.validation.statistic import LIVER_RATIO, Cohort

TABLE = """# source: a hospital
# segmenter: TotalSegmentator
subject_id,sex,age,organ,volume_ml,suv_mean
p1,M,50,liver,1500,2.2
p1,M,50,spleen,200,1.8
p2,F,60,liver,1400,2.4
p2,F,60,spleen,,1.9
"""


def test_every_bundled_reference_says_what_it_is() -> None:
    found = {r.name: r for r in list_references()}
    assert set(found) == {"autopet-2025", "healthy-fdg", "yoon2025-flow", "yoon2025-diffusion"}
    for r in found.values():
        assert r.title and r.source and r.licence and r.segmenter and r.kind == "summary"
    assert found["autopet-2025"].n == 200 and found["healthy-fdg"].n == 80
    assert {n for n, r in found.items() if r.role == "real"} == {"autopet-2025", "healthy-fdg"}


def test_autopet_2025_is_table_1_with_its_misprint_mended(shared_data: Path) -> None:
    printed = pd.read_csv(shared_data / "published-references" / "yoon2025_table1.csv")
    names = {"real": "autopet-2025", "flow": "yoon2025-flow", "diffusion": "yoon2025-diffusion"}
    for row in printed.itertuples():
        table = read_reference(names[row.cohort]).data.table
        metric, factor = ("volume_ml", 1000) if row.metric == "volume_l" else (row.metric, 1)
        ours = table[(table["organ"] == row.organ) & (table["metric"] == metric) & (table["sex"] == row.sex)].iloc[0]
        if row.cohort == "real" and (row.organ, row.metric, row.sex) == ("kidneys", "volume_l", "M"):
            assert ours["mean"] == 355 and "misprint" in ours["note"]
        else:
            assert ours["mean"] == pytest.approx(row.mean * factor)
        assert (ours["n"], ours["sd"]) == (row.n, pytest.approx(row.sd * factor))


def test_healthy_fdg_holds_the_aggregates(shared_data: Path) -> None:
    folder = shared_data / "healthy-fdg-organs"
    raw = pd.read_csv(folder / "organ_suv_and_volume_by_sex.csv")
    raw = raw[(raw["Task"] == "ts_total") & (raw["Erosion Iterations"] == 0)].set_index(["Label Name", "sex"])
    reference = read_reference("healthy-fdg")
    for row in reference.data.table.itertuples():
        if row.metric == "volume_ml":
            assert row.mean == pytest.approx(raw.loc[(row.organ, row.sex), "vol_mean"], abs=0.06)
        else:
            ratio = raw.loc[(row.organ, row.sex), "SUV_mean"] / raw.loc[("liver", row.sex), "SUV_mean"]
            assert row.metric == LIVER_RATIO and row.mean == pytest.approx(ratio, rel=0.02)
    r = pd.read_csv(folder / "organ_suv_correlations.csv", index_col=0)
    for row in reference.correlations.itertuples():
        assert row.r == r.loc[row.organ_a, row.organ_b]
    fits = pd.read_csv(folder / "organ_regressions_on_body_size.csv").set_index(["organ", "quantity"])
    for row in reference.slopes.itertuples():
        column = "per_kg" if row.on == "weight_kg" else "per_cm"
        assert row.slope == pytest.approx(fits.loc[(row.organ, row.metric), column], rel=1e-3) and row.se > 0


def test_published_standard_errors_of_slopes_are_consistent() -> None:
    # With 80 people of weight SD 14.3 kg, height SD 8.9 cm and r 0.47, all standard errors follow from residual SDs.
    slopes = read_reference("healthy-fdg").slopes
    ratio = slopes[slopes["on"] == "height_cm"]["se"].to_numpy() / slopes[slopes["on"] == "weight_kg"]["se"].to_numpy()
    assert np.ptp(ratio) < 0.05 * ratio.mean()


def test_literature_slopes_name_their_sources() -> None:
    table = literature_slopes()
    assert table["source"].str.len().gt(10).all() and set(table["on"]) == {"bsa_m2", "bmi"}


def test_pooled_moments_of_both_sexes() -> None:
    rng = np.random.default_rng(0)
    f, m = rng.normal(1, 1, 30), rng.normal(3, 2, 50)
    rows = [
        {"organ": "liver", "metric": "suv_mean", "sex": s, "n": len(x), "mean": x.mean(), "sd": x.std(ddof=1)}
        for s, x in (("F", f), ("M", m))
    ]
    both = Summary("s", pd.DataFrame(rows)).moments(("F", "M"), [("liver", "suv_mean"), ("heart", "suv_mean")])
    whole = np.concatenate([f, m])
    assert (both.n[0], both.mean[0], both.sd[0]) == pytest.approx((80, whole.mean(), whole.std(ddof=1)))
    assert both.n[1] == 0 and np.isnan(both.mean[1])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_measurements(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"hospital.{kind}"
    path.write_text(TABLE)
    if kind == "parquet":
        pd.read_csv(tmp_path / "hospital.parquet", comment="#").to_parquet(path)
    reference = read_reference(path)
    assert reference.kind == "subjects" and reference.n == 2 and isinstance(reference.data, Cohort)
    assert reference.data.people.loc["p2", "age_years"] == 60
    assert reference.data.column(("spleen", "volume_ml")) == pytest.approx([200, np.nan], nan_ok=True)
    assert reference.data.column(("spleen", LIVER_RATIO)) == pytest.approx([1.8 / 2.2, 1.9 / 2.4])
    if kind == "csv":
        assert reference.source == "a hospital" and reference.data.segmenter == "TotalSegmentator"


def test_a_measured_run_folder_and_its_subjects(tmp_path: Path) -> None:
    path = tmp_path / "hospital.csv"
    path.write_text(TABLE)
    whole = pd.read_csv(path, comment="#")
    whole.drop(columns=["sex", "age"]).to_parquet(tmp_path / "measurements.parquet")
    with pytest.raises(InputError, match="no column sex, and no subjects"):
        read_reference(tmp_path)
    whole[["subject_id", "sex"]].drop_duplicates().to_csv(tmp_path / "subjects.csv", index=False)
    assert read_reference(tmp_path).n == 2 and read_reference(tmp_path).data.name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "neither a table of measurements"),
        (TABLE.replace("1500", "large"), "subject p1, organ liver, column volume_ml: 'large': not a number"),
        (TABLE.replace("2.2", "31000"), "beyond any SUV"),
        ("organ,metric,sex,n,mean,sd\nliver,volume_ml,X,3,1,1\n", r"row 2, column sex: 'X'"),
        ("organ,metric,sex,n,mean,sd\nliver,volume_ml,F,3,1,-1\n", r"row 2, column sd: '-1'"),
        ("organ,metric,sex,n,mean,sd\n" + "liver,volume_ml,F,3,1,1\n" * 2, "row 3.*already in row 2"),
        ("organ,metric,sex,n,mean\nliver,volume_ml,F,3,1\n", "column sd is missing"),
    ],
)
def test_what_is_wrong_in_a_table_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_reference(path)


def test_unknown_names_and_empty_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; give a table.*autopet-2025"):
        read_reference("autopet")
    with pytest.raises(InputError, match="segment and measure it first"):
        read_reference(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_reference(tmp_path / "x.parquet")


def test_the_shipped_settings_are_the_defaults(repository: Path) -> None:
    assert read_settings(repository / "configs" / "analysis.toml") == AnalysisSettings() == read_settings()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alpha = 0.9", "alpha: 0.9"),
        ("[margins]\npercent = -3", "margins.percent: -3"),
        ("[margins]\nprocent = 3", "margins.procent: 3"),
        ("[strata]\nbmi = [30, 25]", "edges must rise"),
        ('organs = ["lever"]', "unknown organs lever"),
        ("alpha = = 1", "not a TOML file"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "analysis.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_settings(path)


def test_columns_that_mean_the_same_and_codes_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "real.csv"
    rows = [f"0{i},{i},F,60,60.5,00{1 + i % 2},liver,{1400 + 50 * i}" for i in range(6)]
    path.write_text("\n".join(["ID,index,Sex,age,age_years,diagnosis,organ,volume_ml", *rows]) + "\n")
    people = read_reference(path).data.people
    assert people.index.tolist() == [f"0{i}" for i in range(6)] and people["age_years"].tolist() == [60.5] * 6
    assert people["diagnosis"].tolist() == ["001", "002"] * 3
    assert people["index"].tolist() == list(range(6))  # as in a run's table, with which it is paired
