"""Where comparisons go, and what spoilt files of a run do: cohorts of one name, tables that are torn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from judged import here, segmenters  # noqa: F401
from test_cli import vtrial_command
from test_validate import Capture
from test_validate_also import REPORT, made, run  # noqa: F401

from vtrial.pipeline.scans import plain_name


def site(run: Path, folder: str, factor: float = 1.0) -> str:  # noqa: F811
    """A hospital's table, named as everybody's."""
    sexes = pd.read_parquet(run / "subjects.parquet")[["subject_id", "sex"]]
    table = pd.read_parquet(run / "measurements.parquet").merge(sexes, on="subject_id")
    table["suv_mean"] *= factor
    Path(folder).mkdir()
    table.to_parquet(f"{folder}/table.parquet")
    return f"{folder}/table.parquet"


def test_tables_of_one_name_are_two_cohorts(run: Path, capfd: Capture) -> None:  # noqa: F811
    a, b = site(run, "siteA"), site(run, "siteB", 1.5)
    code, out, err = vtrial_command(capfd, *REPORT, "--real", a, "--also", b, "--json")
    assert code == 0, err
    first = Path(json.loads(out)["report"])
    assert first.parent == run.absolute() / "validation/table"
    kept = first.read_bytes()
    code, out, err = vtrial_command(capfd, *REPORT, "--real", b, "--json")
    second = Path(json.loads(out)["report"])
    assert code == 0 and second.parent.name.startswith("table-") and first.read_bytes() == kept, err
    for asked, place in ((a, first), (b, second), (f"siteA/../{b}", second)):
        code, out, err = vtrial_command(capfd, *REPORT, "--real", asked, "--json")
        assert code == 0 and Path(json.loads(out)["report"]) == place, err
    code, _, err = vtrial_command(capfd, *REPORT, "--real", a, "--also", f"siteB/../{a}")
    assert code == 2 and f"that is what --real {a} names" in err


def test_names_in_any_script() -> None:
    assert [plain_name(name) for name in ("Köln 2", "東京", "a/b", "..", "***")] == [
        "Köln-2",
        "東京",
        "a-b",
        "unnamed",
        "unnamed",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("measurements.parquet", "delete it and give vtrial measure again"),
        ("subjects.parquet", "give the command that made the run again"),
    ],
)
def test_a_torn_table_is_told_with_the_remedy(run: Path, capfd: Capture, name: str, told: str) -> None:  # noqa: F811
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: len(data) // 2])
    code, _, err = vtrial_command(capfd, *REPORT)
    assert code == 2 and f"{run.absolute()}/{name}: not a readable Parquet file" in err and told in err
    assert "Traceback" not in err


@pytest.mark.parametrize("spoilt", ["", '{"reference": "a', "[]", "{}"])
def test_a_torn_report_is_made_again(run: Path, capfd: Capture, spoilt: str) -> None:  # noqa: F811
    assert vtrial_command(capfd, *REPORT)[0] == 0
    numbers = run / "validation/autopet-2025/report.json"
    whole = json.loads(numbers.read_text())
    numbers.write_text(spoilt)
    code, _, err = vtrial_command(capfd, *REPORT)
    assert code == 0 and json.loads(numbers.read_text())["cells"] == whole["cells"], err
    assert "nothing was left" in vtrial_command(capfd, *REPORT)[1]
    shutil.rmtree(run / "validation")


def test_a_project_that_moved_has_its_report_where_it_was(run: Path, capfd: Capture) -> None:  # noqa: F811
    asked = ("--settings", "quick.toml", "--real")
    assert vtrial_command(capfd, "report", str(run), *asked, "runs/others")[0] == 0
    shutil.move("runs", "moved")
    assert vtrial_command(capfd, "report", "moved/twins", *asked, "moved/others")[0] == 0
    assert [path.name for path in Path("moved/twins/validation").iterdir()] == ["others"]
