"""docs/study.md says what its tables of measurements say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from vtrial.validation import Cohort, compare, read_reference, read_settings
from vtrial.validation.conditional import SlopeQuestion, compare_slopes

ROOT = Path(__file__).parents[1]
SETTINGS = read_settings(ROOT / "configs" / "analysis-table-1.toml").model_copy(update={"bootstraps": 0})
BOTH = {"weight_kg": ("height_cm", "sex"), "height_cm": ("weight_kg", "sex")}
EIGHT = [
    SlopeQuestion(o, "volume_ml", on, rest)
    for o in ("liver", "spleen", "kidneys", "heart")
    for on, rest in BOTH.items()
]


def cohort(name: str) -> Cohort:
    data = read_reference(ROOT / "docs" / "study" / f"{name}.parquet").data
    assert isinstance(data, Cohort)
    return data


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "study.md").read_text()


@pytest.mark.parametrize("name", ["phantoms", "twins", "again"])
def test_the_people_are_those_of_the_paper(name: str) -> None:
    people = cohort(name).people
    assert people["sex"].value_counts().to_dict() == {"M": 108, "F": 92}
    pd.testing.assert_frame_equal(
        people[["age_years", "height_cm"]], cohort("phantoms").people[["age_years", "height_cm"]]
    )


@pytest.mark.parametrize("name", ["twins", "again"])
def test_the_page_has_the_figures_of_the_tables(name: str, page: str) -> None:
    table = compare(cohort(name), cohort("phantoms"), by="sex", settings=SETTINGS).table
    size, inside = table["difference_percent"].abs(), table["sd_ratio"].between(0.8, 1.25)
    assert len(table) == 18
    slopes = compare_slopes(cohort(name), cohort("phantoms"), SETTINGS, EIGHT)
    column = {"twins": 1, "again": 2}[name]
    for line, value in (
        ("mean absolute difference", f"{size.mean():.1f} %"),
        ("largest difference", f"{size.max():.1f} %"),
        ("SD ratios within 0.8 to 1.25", f"{inside.sum()} of 18"),
        ("slopes in the phantoms' interval", f"{int(slopes['inside_reference'].sum())} of 8"),
    ):
        (row,) = (row for row in page.splitlines() if row.startswith(f"| {line}"))
        assert row.split("|")[1 + column].strip() == value
