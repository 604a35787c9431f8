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


MODELS = ("diffusion", "flow")


@cache
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


def test_all_have_the_sexes_of_the_paper_and_the_same_bodies(page: str) -> None:
    people = cohort("phantoms").people
    assert people["sex"].value_counts().to_dict() == {"M": 108, "F": 92}
    for name in (*MODELS, "again"):
        same = ["sex", "age_years", "height_cm", "weight_kg"]
        pd.testing.assert_frame_equal(cohort(name).people[same], people[same])
    assert "All 200 people, 108 men and 92 women, have twins by both models" in page


@pytest.mark.parametrize(("name", "column"), [("diffusion", 1), ("flow", 2), ("again", 3)])
def test_the_figures_of_the_summary(name: str, column: int, page: str) -> None:
    cells = compared(name).table
    size, inside = cells["difference_percent"].abs(), cells["sd_ratio"].between(0.8, 1.25)
    assert len(cells) == 18
    slopes = compare_slopes(cohort(name), cohort("phantoms"), SETTINGS, EIGHT)
    for start, value in (
        ("mean absolute difference", f"{size.mean():.1f} %"),
        ("largest difference", f"{size.max():.1f} %"),
        ("SD ratios within 0.8 to 1.25", f"{inside.sum()} of 18"),
        ("slopes in the phantoms' interval", f"{int(slopes['inside_reference'].sum())} of 8"),
    ):
        assert cells_of(page, start)[column] == value


@pytest.mark.parametrize(("model", "column"), [("diffusion", 5), ("flow", 6)])
def test_the_published_figures_are_those_of_the_printed_means(model: str, column: int, page: str) -> None:
    real, theirs = (read_reference(name).data for name in ("autopet-2025", f"yoon2025-{model}"))
    cells = compare(theirs, real, by="sex", settings=SETTINGS).table
    size = cells["difference_percent"].abs()
    assert len(cells) == 18
    assert cells_of(page, "mean absolute difference")[column] == f"{size.mean():.1f} %"
    assert cells_of(page, "largest difference")[column] == f"{size.max():.1f} %"
    assert cells_of(page, "SD ratios")[column] == f"{cells['sd_ratio'].between(0.8, 1.25).sum()} of 18"


def test_every_cell_of_table_1(page: str) -> None:
    rows = zip(*(compared(name).table.itertuples() for name in (*MODELS, "again")), strict=True)
    for diffusion, flow, again in rows:
        decimals = 0 if diffusion.metric == "volume_ml" else 2
        found = [f"{diffusion.mean_reference:.{decimals}f} ± {diffusion.sd_reference:.{decimals}f}"]
        for twins in (diffusion, flow):
            found += [
                f"{twins.mean_synthetic:.{decimals}f} ± {twins.sd_synthetic:.{decimals}f}",
                f"{twins.difference_percent:+.1f} %",
                f"{twins.sd_ratio:.2f}",
                twins.verdict,
            ]
        found += [f"{again.difference_percent:+.1f} %", f"{again.sd_ratio:.2f}"]
        start = f"{diffusion.stratum[-1]} | {diffusion.organ} | {METRICS[diffusion.metric]} "
        assert cells_of(page, start)[3:] == found


@pytest.mark.parametrize("model", MODELS)
def test_the_headline_is_on_the_page(model: str, page: str) -> None:
    counted = compared(model).headline.split("; largest")[0].removeprefix(f"{model} against phantoms: ")
    assert counted in " ".join(page.split())


def test_what_the_page_says_of_phantoms_made_again(page: str) -> None:
    verdicts = compared("again").table["verdict"].value_counts()
    assert f"it says that {verdicts['equivalent']} cells are equivalent" in " ".join(page.split())
    assert "different" not in verdicts
