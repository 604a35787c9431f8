"""`vtrial prepare` of a source that changes between calls: what is away and comes back, and files that are mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.dicoms import setting
from tests.patients import write_patient
from vtrial import pipeline
from vtrial.execution import LocalExecutor

pytestmark = pytest.mark.usefixtures("coarse")


def prepare(source: Path, out: Path, table: Path | None = None) -> pipeline.PrepareSummary:
    wanted = pipeline.Wanted(str(source), table, choice=pipeline.Choice("none"), allow_partial=True)
    return pipeline.prepare(wanted, str(out), LocalExecutor(threads=1), lambda _: None)


@pytest.fixture
def source(collection: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(collection, tmp_path / "collection"))


def test_studies_that_are_away_are_told_and_come_back(source: Path, tmp_path: Path) -> None:
    out, place = tmp_path / "data", sorted(source.glob("PETCT_*"))[0]
    prepare(source, out)
    before = (out / "subjects.csv").read_text()
    place.rename(tmp_path / "away")
    without = prepare(source, out)
    assert (without.done, without.new) == (2, 0)
    assert [note for note in without.notes if note.startswith("1 studies of the set are not in the source now")]
    assert json.loads((out / "manifest.json").read_text())["facts"]["away"] == 1
    (tmp_path / "away").rename(place)
    back = prepare(source, out)
    assert (back.done, back.new) == (3, 0) and not any("in the source now" in note for note in back.notes)
    assert (out / "subjects.csv").read_text() == before


def test_a_damaged_file_copied_again_is_tried_again(tmp_path: Path) -> None:
    """It lies where no fingerprint samples it, and has the length it had."""
    source, out = tmp_path / "src", tmp_path / "data"
    for i in (1, 2):
        own = setting(PatientID=f"A{i}")
        write_patient(source / f"p{i}", i, ct=own, pet=own)
    file = source / "p2" / "pet" / "001.dcm"
    good = file.read_bytes()
    at = good.index(b"\x28\x00\x00\x01US") + 8  # BitsAllocated
    file.write_bytes(good[:at] + b"\x20" + good[at + 1 :])
    damaged = prepare(source, out)
    assert (damaged.done, list(damaged.left_out)) == (1, ["s0002"]) and "damaged" in damaged.left_out["s0002"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    assert prepare(source, out).left_out == damaged.left_out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "an idle call writes nothing"
    when = file.stat()
    file.write_bytes(good)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))  # as a copy that keeps times
    mended = prepare(source, out)
    assert (mended.done, mended.new, mended.left_out) == (2, 1, {})


def test_a_weight_corrected_in_the_table_makes_suv_again(tmp_path: Path) -> None:
    """Where the header has none, SUV goes by it."""
    source, out, table = tmp_path / "src", tmp_path / "data", tmp_path / "p.csv"
    for i in (1, 2):
        own = setting(PatientID=f"A{i}", PatientWeight=None if i == 2 else "70")
        write_patient(source / f"p{i}", i, ct=own, pet=own)
    levels = []
    for weight, new in ((60, 2), (60, 0), (66, 1)):
        table.write_text(f"PatientID,weight\nA1,71\nA2,{weight}\n")
        summary = prepare(source, out, table)
        assert (summary.done, summary.new) == (2, new)
        levels.append([np.load(out / "suv" / f"s000{i}.npy").astype(float).max() for i in (1, 2)])
    (one, other), _, (same, grown) = levels
    assert other == pytest.approx(one * 60 / 70, rel=0.01)
    assert same == one and grown == pytest.approx(other * 1.1, rel=0.01)
    told = pd.read_parquet(out / "subjects.parquet").set_index("subject_id")
    assert told["weight_kg"].tolist() == [71.0, 66.0] and told.loc["s0002", "suv_weight_kg"] == 66.0
