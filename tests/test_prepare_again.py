"""`vtrial prepare` once more: what was this moment's fault is tried again, and ids stay whose they are."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from vtrial import pipeline
from vtrial.execution import CannotGoOn, LocalExecutor, Resources
from vtrial.records import InputError
from vtrial.segmentation import SegmenterPlan
from vtrial.training.data import read_extent

pytestmark = pytest.mark.usefixtures("coarse")
NAMES = ["s0001", "s0002", "s0003"]


def prepare(source: Path, out: Path, segmenter: str = "none", key: Path | None = None) -> pipeline.PrepareSummary:
    wanted = pipeline.Wanted(str(source), choice=pipeline.Choice(segmenter), allow_partial=True, key=key)
    return pipeline.prepare(wanted, str(out), LocalExecutor(threads=1), lambda _: None)


def disk_without(patch: pytest.MonkeyPatch, part: str) -> None:
    """A disk that cannot read the files whose path has a part."""
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if part in str(path) and path.name.endswith(".nii.gz"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    patch.setattr(Path, "read_bytes", read_bytes)


def test_a_short_read_error_leaves_nobody_out_for_ever(collection: Path, tmp_path: Path) -> None:
    out, place = tmp_path / "data", sorted(collection.glob("PETCT_*"))[1].name
    with pytest.MonkeyPatch.context() as patch:
        disk_without(patch, place)
        summary = prepare(collection, out)
    assert (summary.done, summary.left_out, list(summary.failures)) == (2, {}, ["s0002"])
    assert "the CT cannot be read (Input/output error)" in summary.failures["s0002"]
    assert place not in (out / "journal.jsonl").read_text()
    again = prepare(collection, out)
    assert (again.done, again.new, again.failures) == (3, 1, {})


def test_a_disk_that_is_gone_is_told_and_gone_on_from(collection: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk_without(patch, "PETCT_")
        with pytest.raises(CannotGoOn, match=r"3 of 3 studies could not.*Input/output error.*\n.*the same command"):
            prepare(collection, tmp_path / "data")
    assert prepare(collection, tmp_path / "data").done == 3


class LoadGone:
    """A segmenter whose weights vanish during the run."""

    def __call__(self, resources: Resources) -> Callable[[bytes], bytes]:
        def segment(ct: bytes) -> bytes:
            raise InputError("the segmenter's weights are gone; restore them and go on")

        return segment

    def in_session(self, session: str) -> LoadGone:
        return self


def test_a_segmenter_that_vanishes_ends_the_run_and_blames_no_study(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SegmenterPlan("gone", "0" * 64, LoadGone(), phantoms_only=False)
    monkeypatch.setattr("vtrial.pipeline.preparing.segmenter_plan", lambda *unused, **unused_too: plan)
    with pytest.raises(CannotGoOn, match=r"weights are gone(.|\n)*the same command again to go on"):
        prepare(collection, tmp_path / "data", "gone")
    assert not (tmp_path / "data" / "journal.jsonl").exists()


def test_studies_without_a_fingerprint_keep_apart(collection: Path, tmp_path: Path) -> None:
    """Files that cannot be opened have none: each such study is left out under its own id, until they can."""
    out, key = tmp_path / "data", tmp_path / "key.csv"
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vtrial.preparation.sources.find.fingerprint", lambda files: "")
            with pytest.raises(InputError, match="none of 3 studies"):
                prepare(collection, out, key=key)
        left = pd.read_csv(out / "left_out.csv")
        assert left["subject_id"].tolist() == pd.read_csv(key)["subject_id"].tolist() == NAMES
        assert left["reasons"].str.contains("cannot be read now").all()
    assert prepare(collection, out).done == 3


def test_a_journal_of_old_may_have_studies_without_a_fingerprint(collection: Path, tmp_path: Path) -> None:
    """Their ids are not given to others, whose volumes would pass for made."""
    out = tmp_path / "data"
    prepare(collection, out)
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["row"]["fingerprint"] = ""
    (out / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = prepare(collection, out)
    assert (again.done, again.new) == (3, 2)
    assert pd.read_parquet(out / "subjects.parquet")["subject_id"].tolist() == ["s0001", "s0004", "s0005"]


def test_extents_of_partial_views_are_told_and_taken_for_training(collection: Path, tmp_path: Path) -> None:
    summary = prepare(collection, tmp_path / "data")
    assert any("extents were fitted on partial ones" in note for note in summary.notes)
    table = pd.read_parquet(tmp_path / "data" / "subjects.parquet")
    trained = table[table["split"] == "train"]
    extent = read_extent(tmp_path / "data")
    assert extent is not None and trained["partial"].all()
    fitted = 2.0 * (extent.slices_per_m * trained["height_cm"] / 100.0 + extent.slices_at_0)
    assert abs((fitted - trained["extent_mm"]).median()) < 1.0


@pytest.mark.parametrize("joined", [False, True], ids=["--key FILE", "--key=FILE"])
def test_paths_with_equals_signs_stay_out_of_the_manifest(collection: Path, tmp_path: Path, joined: bool) -> None:
    place = tmp_path / "site=A" / "Quorzelda=Ximenes"
    place.mkdir(parents=True)
    source = Path(shutil.copytree(collection, place / "src"))
    table = Path(shutil.copy(source / "demographics.csv", place / "table.csv"))
    wanted = pipeline.Wanted(
        str(source), table, choice=pipeline.Choice("none"), allow_partial=True, key=place / "k.csv"
    )
    options = {"--demographics": str(table), "--key": str(wanted.key)}
    named = [word for name, path in options.items() for word in ([f"{name}={path}"] if joined else [name, path])]
    out = tmp_path / "data"
    pipeline.prepare(wanted, str(out), LocalExecutor(threads=1), print, command=["prepare", str(source), *named])
    assert "Quorzelda" not in (out / "manifest.json").read_text()
    (session,) = json.loads((out / "manifest.json").read_text())["sessions"]
    plain = ["--demographics", "TABLE", "--key", "KEY"]
    assert session["command"] == ["prepare", "SRC", *(["--demographics=TABLE", "--key=KEY"] if joined else plain)]
