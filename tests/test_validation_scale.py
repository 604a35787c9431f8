"""What a model cannot hold does not make the verdict: HU beyond ±500, uptake beyond SUV 25."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from vtrial.imaging import codec
from vtrial.organs import GAS_OR_BONE
from vtrial.pipeline.evidence import _likeness
from vtrial.records import MODEL_HU, MODEL_SUV
from vtrial.reporting.content import Content, Provenance
from vtrial.reporting.report import build_report
from vtrial.validation import AnalysisSettings, Cohort, Summary, anova, cohort_of, compare
from vtrial.validation.conditional import SlopeQuestion, compare_correlations, compare_slopes
from vtrial.validation.verdict import DIFFERENT, EQUIVALENT, NOT_COMPARED

STUDY = Path(__file__).parents[1] / "docs" / "study"
SETTINGS = AnalysisSettings(bootstraps=0, shufflings=1000)
UPTAKE = ("suv_mean", "suv_max", "suv_peak", "suv_p95")


def measured(name: str) -> pd.DataFrame:
    return pd.read_parquet(STUDY / f"{name}.parquet")


def clipped(table: pd.DataFrame) -> pd.DataFrame:
    """What the best of models would make of these people: their scans, ended where a model's do."""
    table = table.copy()
    for metric in UPTAKE:
        table[metric] = table[metric].clip(upper=MODEL_SUV)
    table["hu_mean"] = table["hu_mean"].clip(*MODEL_HU)
    gas = table["organ"].isin(["stomach"])
    bone = table["organ"].str.startswith("vertebrae") | (table["organ"] == "sacrum")
    table["hu_mean"] += 40.0 * gas - 8.0 * bone  # as measured on clipped phantoms
    return table


def row_of(table: pd.DataFrame, organ: str, metric: str, stratum: str = "sex=F") -> pd.Series:
    chosen = (table["organ"] == organ) & (table["metric"] == metric) & (table["stratum"] == stratum)
    (i,) = np.flatnonzero(chosen)
    return table.iloc[i]


@pytest.fixture(scope="module")
def phantoms() -> Cohort:
    return cohort_of("phantoms", measured("phantoms"))


def test_the_range_is_that_of_the_codec() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert tuple(codec.decode_ct(ends).tolist()) == MODEL_HU
    assert codec.decode_suv(ends).tolist() == pytest.approx([0.0, MODEL_SUV])
    assert AnalysisSettings().suv_ceiling == MODEL_SUV
    assert {"lungs", "lung_upper_lobe_left", "ribs", "rib_left_1", "hips", "vertebrae_L1", "stomach"} <= GAS_OR_BONE
    assert not {"liver", "heart", "urinary_bladder", "spinal_cord", "kidneys"} & GAS_OR_BONE


def test_people_are_not_different_from_themselves_where_a_model_ends(phantoms: Cohort) -> None:
    result = compare(cohort_of("perfect", clipped(measured("phantoms"))), phantoms, settings=SETTINGS)
    table = result.table
    assert not (table["verdict"] == DIFFERENT).any() and not result.spread["alarm"].any()
    beyond = table[table["off_scale"]]
    cells = {(r.organ, r.metric) for r in beyond.itertuples()}
    assert cells == {
        *((organ, "hu_mean") for organ in ("lungs", "stomach", "vertebrae_L1", "vertebrae_L3", "sacrum")),
        ("urinary_bladder", "suv_mean"),
    }
    assert (beyond["verdict"] == NOT_COMPARED).all() and not beyond["judged"].any()
    assert beyond[["mean_synthetic", "mean_reference", "difference"]].notna().all(axis=None), "they are shown"
    assert beyond["p_location_holm"].isna().all() and beyond["p_spread_joint"].isna().all(), "they are in no family"
    assert "12 more not judged, as a model's scale ends within them" in result.headline
    lungs = row_of(table, "lungs", "hu_mean")["message"]
    assert "the CT of perfect ends at -500 and 500 HU, lungs reach beyond: not judged" in lungs
    bladder = row_of(table, "urinary_bladder", "suv_mean")["message"]
    assert "urinary_bladder reaches 25 in 29.3 % of perfect and 29.3 % of phantoms" in bladder


def test_twins_are_not_judged_by_lungs_that_no_model_can_hold(phantoms: Cohort) -> None:
    result = compare(cohort_of("twins", measured("diffusion")), phantoms, settings=SETTINGS)
    row = row_of(result.table, "lungs", "hu_mean")
    assert -500 < row["mean_synthetic"] < -440 and row["mean_reference"] < -600
    assert (
        result.table.loc[result.table["organ"] == "lungs", "off_scale"] == [False, True, False, False, False] * 2
    ).all()
    with_lungs = result.spread["cells"]
    without = compare(
        cohort_of("twins", measured("diffusion")[lambda t: t["organ"] != "lungs"]),
        cohort_of("phantoms", measured("phantoms")[lambda t: t["organ"] != "lungs"]),
        settings=SETTINGS,
    ).spread["cells"]
    assert (with_lungs - without == 4).all(), "of five cells of the lungs their HU have no part in the alarm"


def test_scans_that_go_beyond_are_judged_in_full(phantoms: Cohort) -> None:
    table = compare(cohort_of("again", measured("again")), phantoms, settings=SETTINGS).table
    assert not table["off_scale"].any()
    assert row_of(table, "lungs", "hu_mean")["verdict"] == EQUIVALENT
    assert np.isfinite(row_of(table, "urinary_bladder", "suv_mean")["p_location_joint"])


def test_two_models_are_compared_within_their_scale_but_for_cut_averages() -> None:
    twins = measured("diffusion")
    table = compare(cohort_of("a", twins), cohort_of("b", clipped(measured("again"))), settings=SETTINGS).table
    assert not row_of(table, "lungs", "hu_mean")["off_scale"]
    assert row_of(table, "urinary_bladder", "suv_mean")["off_scale"]


def test_peaks_end_with_the_scale_and_go_by_ranks(phantoms: Cohort) -> None:
    hot = measured("phantoms")
    assert (hot["suv_peak"] > 25).any()
    values, reached = phantoms.select([("urinary_bladder", "suv_peak"), ("urinary_bladder", "suv_p95")])
    assert values.max(axis=0).tolist() == [22.5, 25.0] and reached.any(axis=0).all()
    shrunk = clipped(hot)  # a sphere that holds clipped voxels has others beside them
    shrunk.loc[shrunk["suv_peak"] >= 25, "suv_peak"] = 23.4
    row = row_of(
        compare(cohort_of("perfect", shrunk), phantoms, settings=SETTINGS).table, "urinary_bladder", "suv_peak", "sex=M"
    )
    assert row["basis"] == "censored" and row["p_location"] == 1.0 and "reach 22.5: by ranks" in row["message"]


def test_few_cut_averages_move_no_mean(phantoms: Cohort) -> None:
    """Hearts of 7.6 % of the women have a twentieth beyond 25, which moves the mean by a hundredth: still judged."""
    row = row_of(
        compare(cohort_of("perfect", clipped(measured("phantoms"))), phantoms, settings=SETTINGS).table,
        "heart",
        "suv_mean",
    )
    assert 0.07 < row["ceiling_reference"] < 0.08 and row["judged"]


def test_without_a_percentile_the_flag_tells(phantoms: Cohort) -> None:
    columns = ["subject_id", "sex", "organ", "suv_mean", "censored"]
    few = cohort_of("hospital", clipped(measured("phantoms"))[columns])
    table = compare(few, phantoms, settings=SETTINGS).table
    assert (
        row_of(table, "urinary_bladder", "suv_mean")["off_scale"]
        and not row_of(table, "spleen", "suv_mean")["off_scale"]
    )


def test_liver_ratios_of_cut_organs_are_not_judged_either(phantoms: Cohort) -> None:
    settings = SETTINGS.model_copy(update={"metrics": ("suv_liver_ratio",)})
    table = compare(cohort_of("perfect", clipped(measured("phantoms"))), phantoms, settings=settings).table
    assert row_of(table, "urinary_bladder", "suv_liver_ratio")["off_scale"]
    assert not row_of(table, "spleen", "suv_liver_ratio")["off_scale"]


def test_slopes_correlations_and_variance_leave_them_out_too(phantoms: Cohort) -> None:
    perfect = cohort_of("perfect", clipped(measured("phantoms")))
    questions = [SlopeQuestion(organ, "suv_mean", "bmi") for organ in ("urinary_bladder", "liver")]
    slopes = compare_slopes(perfect, phantoms, SETTINGS, questions)
    assert slopes["verdict"].tolist()[0] == NOT_COMPARED and "not judged" in slopes["message"][0]
    assert np.isfinite(slopes["slope_synthetic"]).all() and np.isfinite(slopes["p"][1])
    assert "urinary_bladder" not in compare_correlations(perfect, phantoms, SETTINGS).synthetic.index
    again = cohort_of("again", measured("again"))
    table = anova({c.name: c for c in (perfect, phantoms, again)}, settings=SETTINGS)
    lungs, liver = row_of(table, "lungs", "hu_mean"), row_of(table, "liver", "hu_mean")
    assert np.isnan(lungs["p"]) and lungs["groups"] == 0 and "ends at -500" in lungs["message"]
    assert np.isfinite(lungs[["mean_1", "mean_2", "mean_3"]].to_numpy(dtype=float)).all() and np.isfinite(liver["p"])


def test_a_summary_tells_by_its_lungs() -> None:
    def summary(mean: float) -> Summary:
        frame = pd.DataFrame(
            [{"organ": o, "metric": "hu_mean", "sex": "F", "n": 50, "mean": m, "sd": 30.0, "note": ""}
             for o, m in (("lungs", mean), ("sacrum", 280.0))]
        )  # fmt: skip
        return Summary("published", frame)

    twins = cohort_of("twins", measured("diffusion"))
    for mean, beyond in ((-760.0, True), (-470.0, False)):
        table = compare(twins, summary(mean), settings=SETTINGS).table
        assert (
            row_of(table, "lungs", "hu_mean")["off_scale"] == row_of(table, "sacrum", "hu_mean")["off_scale"] == beyond
        )


def test_the_report_shows_them(phantoms: Cohort) -> None:
    result = compare(cohort_of("twins", measured("diffusion")), phantoms, settings=SETTINGS)
    report = build_report(Content(comparison=result.to_dict(), provenance=Provenance("vtrial report")))
    place = int(np.flatnonzero((result.table["organ"] == "lungs") & result.table["off_scale"])[0])
    page = " ".join(report.html.split())
    assert page.count(f'data-row="cells/{place}"') == 5, (
        "three numbers of the first table, a row of all cells, statistics"
    )
    assert 'id="not-compared"' not in page, "no side lacks it"
    assert "the CT of twins ends at -500 and 500 HU, lungs reach beyond: not judged" in page
    shown = f"{result.table['mean_synthetic'][place]:.0f}".replace("-", "−")
    assert "* p" in page and shown.startswith("−4") and shown in page


def test_likeness_is_not_that_of_clipped_lungs(phantoms: Cohort) -> None:
    twins = cohort_of("twins", measured("diffusion"))
    settings = SETTINGS.model_copy(update={"metrics": ("hu_mean",), "organs": ("liver", "spleen", "lungs", "kidneys")})
    mean = _likeness(twins, phantoms, "phantoms", settings)[0]["mean"]
    assert mean < 0.5, "by lungs, nine SDs off, all twins would be one another's like"
