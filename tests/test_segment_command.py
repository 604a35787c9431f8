"""`vtrial segment` as a user types it, with the real package and a tiny network, or with what is missing for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged import here, lesions_folder, people  # noqa: F401
from test_cli import vtrial_command
from test_segmentation import HEADS, nothing_left_at_home, tiny_card, tiny_model, tiny_network  # noqa: F401

import vtrial.pipeline
from vtrial.imaging.files import read_nifti
from vtrial.segmentation import write_segmenter

LOCAL = ("--executor", "local", "--threads-per-worker", "1")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(here: Path, nothing_left_at_home: Path, capfd: Capture) -> Path:  # noqa: F811
    Path("two.csv").write_text(people(2))
    assert vtrial_command(capfd, "generate", "two.csv", "--out", "run", *LOCAL)[0] == 0
    return Path("run")


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_segmented_by_a_segmenter_of_our_own_and_measured(run: Path, tiny_model: Path, capfd: Capture) -> None:  # noqa: F811
    code, out, err = vtrial_command(capfd, "segment", "run", "--segmenter", str(tiny_model), *LOCAL)
    assert code == 0 and "2 of 2 subjects are segmented, 2 now" in out and "[2/2] A1: ok" in err, err
    assert out.endswith(f"  masks    {run.absolute()}/segmentations\n")
    mask, affine = read_nifti(run / "segmentations" / "A0.nii.gz")
    ct, ct_affine = read_nifti(run / "scans" / "A0" / "CTres.nii.gz")
    assert mask.shape == ct.shape and affine == pytest.approx(ct_affine) and mask.max() > 0
    before = {p: p.stat().st_mtime_ns for p in files(run) if p.name != ".lock"}
    told = json.loads(vtrial_command(capfd, "segment", "run", "--segmenter", str(tiny_model), "--json", *LOCAL)[1])
    assert (told["done"], told["new"], told["failures"]) == (2, 0, {})
    assert {p: p.stat().st_mtime_ns for p in files(run) if p.name != ".lock"} == before
    code, out, err = vtrial_command(capfd, "measure", "run", "--segmenter", str(tiny_model), *LOCAL)
    assert code == 0, err
    import pandas as pd

    table = pd.read_parquet(run / "measurements.parquet")
    drawn = {head.name for head in HEADS if head.name != "ribs"}
    assert drawn <= set(table["organ"]) and "stomach" not in set(table["organ"])  # what it does not draw is not missing
    assert set(table["segmenter"]) == {"tiny"} and set(table["caution"]) == {""}


def test_what_is_missing_is_named_with_its_remedy(run: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run)
    monkeypatch.setattr(vtrial.pipeline.masks, "list_segmenters", lambda: [])
    for command in ("segment", "validate"):
        code, _, err = vtrial_command(capfd, command, "run", *LOCAL)
        assert code == 2 and "the segmenter phantom-v1 is not in this installation" in err
        assert "--segmenter DIR" in err and "--segmenter totalsegmentator" in err
    code, _, err = vtrial_command(capfd, "segment", "run", "--fast", *LOCAL)
    assert code == 2 and "totalseg_download_weights -t total_fast" in err and "TOTALSEG_WEIGHTS_PATH" in err
    real = lesions_folder(Path("real"), 1)
    code, _, err = vtrial_command(capfd, "segment", str(real), *LOCAL)  # real scans get the official one
    assert code == 2 and "totalseg_download_weights -t total`" in err
    code, _, err = vtrial_command(capfd, "segment", "run", "--fast", "--fastest", *LOCAL)
    assert code == 2 and "give one of them" in err
    code, _, err = vtrial_command(capfd, "segment", "nowhere", *LOCAL)
    assert code == 2 and "no run is there, and no PET/CT" in err
    assert files(run) == before and not Path("runs").exists()


def test_options_of_the_official_segmenter_are_not_for_ours(run: Path, tmp_path: Path, capfd: Capture) -> None:
    mine = tmp_path / "mine"
    write_segmenter(mine, tiny_network(len(HEADS)), tiny_card())
    code, _, err = vtrial_command(capfd, "segment", "run", "--segmenter", str(mine), "--fast", *LOCAL)
    assert code == 2 and "leave --fast" in err
    real = lesions_folder(Path("real"), 1)
    code, _, err = vtrial_command(capfd, "segment", str(real), "--segmenter", str(mine), *LOCAL)
    assert code == 2 and "tiny was trained on phantoms alone" in err
