"""The commands that judge cohorts, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.test_cli import vtrial_command
from vtrial.pipeline.origins import _counted


def test_references_are_listed_with_source_size_and_licence(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = vtrial_command(capfd, "references", "--json")
    listed = {r["name"]: r for r in json.loads(out)["references"]}
    assert code == 0 and {"autopet-2025", "healthy-fdg"} <= set(listed)
    assert listed["autopet-2025"]["n"] == 200 and listed["healthy-fdg"]["n"] == 80
    assert all(r["source"] and r["licence"] for r in listed.values())
    assert "autopet-2025" in vtrial_command(capfd, "references")[1]


def test_a_phantom_run_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    local = ("--executor", "local")
    assert vtrial_command(capfd, "phantom", "autopet-test", "--n", "1", "--out", "run", *local)[0] == 0
    code, out, err = vtrial_command(capfd, "measure", "run", *local)
    assert code == 0 and "1 of 1 subjects are measured, 1 now" in out and "[1/1] VT000000: ok" in err
    table = pd.read_parquet("run/measurements.parquet").set_index("organ")
    truth = pd.read_parquet("run/truth.parquet")
    assert table.loc["liver", "volume_ml"] == pytest.approx(float(truth["liver_volume_ml"].iloc[0]), rel=0.02)
    assert table.loc["kidneys", "volume_ml"] == pytest.approx(
        table.loc["kidney_left", "volume_ml"] + table.loc["kidney_right", "volume_ml"]
    )
    assert table.loc["prostate", "missing"] == "not found in the mask" and pd.isna(table.loc["prostate", "suv_mean"])
    before = Path("run/measurements.parquet").stat().st_mtime_ns
    code, out, _ = vtrial_command(capfd, "measure", "run", "--json", *local)
    assert code == 0 and json.loads(out)["new"] == 0
    assert Path("run/measurements.parquet").stat().st_mtime_ns == before

    for mask in Path("run/segmentations").iterdir():
        mask.unlink()
    code, _, err = vtrial_command(capfd, "measure", "run", *local)
    assert code == 2 and "no organ masks" in err
    code, _, err = vtrial_command(capfd, "measure", "elsewhere", *local)
    assert code == 2 and "elsewhere: no run is there" in err


def test_reasons_that_differ_in_the_subjects_name_alone_are_counted_as_one() -> None:
    reasons = [
        ("1", "scans/1/CTres.nii.gz: voxels of 2 x 2 x 1.5 mm; 1 of 12 slices"),
        ("12", "scans/12/CTres.nii.gz: voxels of 2 x 2 x 1.5 mm; 1 of 12 slices"),
        ("a.b", "imagesTr/a.b_0000.nii.gz: all air"),
        ("c", "imagesTr/c_0000.nii.gz: all air"),
        ("7", "mask of 7: not uint8"),
        ("8", "8: cannot be read"),
    ]
    told = {each.reason: each.count for each in _counted("run", "segment", reasons, 12)}
    assert told == {
        "scans/…/CTres.nii.gz: voxels of 2 x 2 x 1.5 mm; 1 of 12 slices": 2,
        "imagesTr/…_0000.nii.gz: all air": 2,
        "mask of …: not uint8": 1,
        "…: cannot be read": 1,
    }
