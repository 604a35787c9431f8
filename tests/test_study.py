"""docs/study.md says what its tables of measurements say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from vtrial.validation import Cohort, Comparison, compare, read_reference, read_settings
from vtrial.validation.conditional import SlopeQuestion, compare_slopes

ROOT = Path(__file__).parents[1]
SETTINGS = read_settings(ROOT / "configs" / "analysis-table-1.toml")
BOTH = {"weight_kg": ("height_cm", "sex"), "height_cm": ("weight_kg", "sex")}
EIGHT = [
    SlopeQuestion(o, "volume_ml", on, rest)
    for o in ("liver", "spleen", "kidneys", "heart")
    for on, rest in BOTH.items()
]
METRICS = {"volume_ml": "volume", "suv_mean": "SUVmean", "suv_max": "SUVmax"}


def cohort(name: str) -> Cohort:
    data = read_reference(ROOT / "docs" / "study" / f"{name}.parquet").data
    assert isinstance(data, Cohort)
    return data


@cache
def compared(name: str) -> Comparison:
    return compare(cohort(name), cohort("phantoms"), by="sex", settings=SETTINGS.model_copy(update={"bootstraps": 0}))


def cells_of(page: str, start: str) -> list[str]:
    (row,) = (row for row in page.splitlines() if row.startswith(f"| {start}"))
    return [cell.strip() for cell in row.split("|")[1:-1]]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "study.md").read_text().replace("−", "-")


def test_all_have_the_sexes_of_the_paper_and_the_same_bodies() -> None:
    people = [cohort(name).people for name in ("phantoms", "twins", "again")]
    assert people[0]["sex"].value_counts().to_dict() == {"M": 108, "F": 92}
    for others in people[1:]:
        same = ["sex", "age_years", "height_cm", "weight_kg"]
        pd.testing.assert_frame_equal(others[same], people[0][same])


@pytest.mark.parametrize(("name", "column"), [("twins", 1), ("again", 2)])
def test_the_figures_of_the_summary(name: str, column: int, page: str) -> None:
    table = compared(name).table
    size, inside = table["difference_percent"].abs(), table["sd_ratio"].between(0.8, 1.25)
    assert len(table) == 18
    slopes = compare_slopes(cohort(name), cohort("phantoms"), SETTINGS, EIGHT)
    for start, value in (
        ("mean absolute difference", f"{size.mean():.1f} %"),
        ("largest difference", f"{size.max():.1f} %"),
        ("SD ratios within 0.8 to 1.25", f"{inside.sum()} of 18"),
        ("slopes in the phantoms' interval", f"{int(slopes['inside_reference'].sum())} of 8"),
    ):
        assert cells_of(page, start)[column] == value


def test_the_published_figures_are_those_of_the_printed_means(page: str) -> None:
    real, theirs = (read_reference(name).data for name in ("autopet-2025", "yoon2025-diffusion"))
    table = compare(theirs, real, by="sex", settings=SETTINGS).table
    size = table["difference_percent"].abs()
    assert len(table) == 18
    assert cells_of(page, "mean absolute difference")[4] == f"{size.mean():.1f} %"
    assert cells_of(page, "largest difference")[4] == f"{size.max():.1f} %"
    assert cells_of(page, "SD ratios")[4] == f"{table['sd_ratio'].between(0.8, 1.25).sum()} of 18"


def test_every_cell_of_table_1(page: str) -> None:
    rows = zip(compared("twins").table.itertuples(), compared("again").table.itertuples(), strict=True)
    for twins, again in rows:
        decimals = 0 if twins.metric == "volume_ml" else 2
        assert cells_of(page, f"{twins.stratum[-1]} | {twins.organ} | {METRICS[twins.metric]} ")[3:] == [
            f"{twins.mean_reference:.{decimals}f} ± {twins.sd_reference:.{decimals}f}",
            f"{twins.mean_synthetic:.{decimals}f} ± {twins.sd_synthetic:.{decimals}f}",
            f"{twins.difference_percent:+.1f} %",
            f"{twins.sd_ratio:.2f}",
            twins.verdict,
            f"{again.difference_percent:+.1f} %",
            f"{again.sd_ratio:.2f}",
        ]


def test_the_headline_is_on_the_page(page: str) -> None:
    counted = compared("twins").headline.split("; largest")[0].removeprefix("twins against phantoms: ")
    assert counted in " ".join(page.split())
    equivalent = (compared("again").table["verdict"] == "equivalent").sum()
    assert f"it says that {equivalent} cells are equivalent" in " ".join(page.split())
    assert not (compared("again").table["verdict"] == "different").any()
