"""`vtrial prepare` of a source that changes between calls: what is away and comes back, and files that are mended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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
