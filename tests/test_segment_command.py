"""`vtrial segment` as a user types it, with the real package and a tiny network, or with what is missing for that."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from judged import LoadLabelled, Segmenters, here, lesions_folder, people, segmenters, write_scan  # noqa: F401
from test_cli import vtrial_command
from test_segmentation import HEADS, nothing_left_at_home, tiny_card, tiny_model, tiny_network  # noqa: F401

import vtrial.pipeline
from vtrial.imaging.files import read_nifti
from vtrial.pipeline.masks import USUAL, Masks, settle
from vtrial.pipeline.scans import open_scans
from vtrial.segmentation import SegmenterPlan, SegmentJournal, segmenter_plan, write_segmenter
from vtrial.storage import open_folder

LOCAL = ("--executor", "local", "--threads-per-worker", "1")
QUICK = ("--settings", "quick.toml", *LOCAL)
FAST = ("--segmenter", "totalsegmentator", "--fast")
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
    table = pd.read_parquet(run / "measurements.parquet")
    drawn = {head.name for head in HEADS if head.name != "ribs"}
    assert drawn <= set(table["organ"]) and "stomach" not in set(table["organ"])  # what it does not draw is not missing
    assert set(table["segmenter"]) == {"tiny"} and set(table["caution"]) == {""}
    assert isinstance(settle(open_scans("run"), USUAL), Masks)
    (run / "segmentations" / "A0.nii.gz").unlink()
    left = settle(open_scans("run"), USUAL)  # the claim tells where the segmenter lies
    assert isinstance(left, SegmenterPlan) and left.sha256 == segmenter_plan(str(tiny_model)).sha256


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


# whose masks `validate` goes on with


def twins(capfd: Capture, n: int) -> Path:
    code, _, err = vtrial_command(capfd, "generate", "people.csv", "--n", str(n), "--out", "runs/twins", *LOCAL)
    assert code == 0, err
    return Path("runs/twins")


def spoil(run: Path, number: int) -> str:
    """A CT that cannot be read; whose it is."""
    scan = sorted((run / "scans").iterdir())[number]
    (scan / "CTres.nii.gz").write_bytes(b"spoilt")
    return scan.name


def but_for_one(capfd: Capture, *chosen: tuple[str, ...]) -> tuple[Path, str]:
    """A run of ten, segmented with each of these options but for one subject that cannot be; whose name is told."""
    run = twins(capfd, 10)
    lost = spoil(run, 3)
    for options in chosen:
        assert vtrial_command(capfd, "segment", str(run), *options, *LOCAL)[0] == 1
    return run, lost


def drawn(run: Path) -> tuple[list[str], dict[Path, int]]:
    """Whose masks there are, and when they were written."""
    masks = {path: path.stat().st_mtime_ns for path in run.glob("segmentations*/*")}
    return [claim.segmenter for claim in SegmentJournal(open_folder(run)).claims], masks


def test_one_failed_subject_is_no_reason_for_another_segmenter(
    here: Path,  # noqa: F811
    segmenters: Segmenters,  # noqa: F811
    capfd: Capture,
) -> None:
    run, lost = but_for_one(capfd, FAST)
    before = drawn(run)
    assert before[0] == ["totalsegmentator-fast"] and len(before[1]) == 9
    code, out, err = vtrial_command(capfd, "validate", str(run), *QUICK)
    assert code == 1 and f"failed: twins: {lost}: scans/{lost}/CTres.nii.gz: not a readable" in out, err
    assert drawn(run) == before and segmenters.asked[-1] == ("totalsegmentator", "fast")

    segmenters.known = ("phantom-v1",)  # on a machine without the weights the masks that are there will do
    code, out, err = vtrial_command(capfd, "validate", str(run), *QUICK)
    assert code == 1 and drawn(run) == before and f"failed: twins: {lost}" in out, err
    twins(capfd, 12)  # mends the CT too
    code, _, err = vtrial_command(capfd, "validate", str(run), *QUICK)
    assert code == 2 and "to be segmented by totalsegmentator-fast" in err and "--segmenter" in err

    segmenters.known = ("totalsegmentator",)
    code, _, err = vtrial_command(capfd, "validate", str(run), *QUICK)
    claims, masks = drawn(run)
    assert code == 0 and claims == ["totalsegmentator-fast"] and len(masks) == 12, err
    assert before[1].items() <= masks.items()


@pytest.mark.usefixtures("here", "segmenters")
def test_masks_of_another_version_are_not_drawn_anew_for_one_failed_subject(capfd: Capture) -> None:
    run, _ = but_for_one(capfd, ())
    journal = run / "segmentations.jsonl"
    journal.write_text(journal.read_text().replace("sha of phantom-v1", "sha of an older one"))
    before = drawn(run)
    assert vtrial_command(capfd, "validate", str(run), *QUICK)[0] == 1 and drawn(run) == before


@pytest.mark.usefixtures("here", "segmenters")
def test_of_several_that_have_begun_the_user_chooses(capfd: Capture) -> None:
    run, _ = but_for_one(capfd, FAST, ("--segmenter", "halves"))
    before = drawn(run)
    code, _, err = vtrial_command(capfd, "validate", str(run), *QUICK)
    assert code == 2 and "masks by totalsegmentator-fast, halves, none of them for all subjects; choose one" in err
    assert drawn(run) == before


@pytest.mark.parametrize("options", [FAST, ("--segmenter", "segmenters/mine")])
def test_both_sides_get_one_segmenter_whatever_it_is(
    options: tuple[str, ...],
    here: Path,  # noqa: F811
    segmenters: Segmenters,  # noqa: F811
    capfd: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, mine = twins(capfd, 10), Path("segmenters/mine")
    mine.mkdir(parents=True)
    monkeypatch.setattr(vtrial.pipeline.making, "LoadPhantom", LoadLabelled)
    assert vtrial_command(capfd, "phantom", "people.csv", "--seed", "3", "--out", "runs/phantoms", *LOCAL)[0] == 0
    assert vtrial_command(capfd, "segment", str(run), *options, *LOCAL)[0] == 0
    code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "runs/phantoms", *QUICK)
    assert code == 0 and drawn(Path("runs/phantoms"))[0] == drawn(run)[0], err
    if options is not FAST:
        shutil.rmtree("runs/phantoms")
        assert vtrial_command(capfd, "phantom", "people.csv", "--seed", "3", "--out", "runs/phantoms", *LOCAL)[0] == 0
        mine.rename("segmenters/elsewhere")
        code, _, err = vtrial_command(capfd, "validate", str(run), "--real", "runs/phantoms", *QUICK)
        assert code == 2 and "to be segmented by mine, as others are" in err and "choose with --segmenter" in err


# names of files that are no UTF-8


def test_a_folder_named_in_another_encoding_is_worked_on_like_any_other(
    here: Path,  # noqa: F811
    segmenters: Segmenters,  # noqa: F811
    capfd: Capture,
) -> None:
    root = Path(os.fsdecode(b"Kr\xfcger"))  # Latin-1
    for i, name in enumerate((b"M\xfcller", b"J\xf6rg", b"Schmidt")):
        scan = root / os.fsdecode(name)
        write_scan(scan / "CTres.nii.gz", scan / "SUV.nii.gz", i)
    (root / os.fsdecode(b"J\xf6rg") / "CTres.nii.gz").write_bytes(b"spoilt")
    told = "J-rg: J\\udcf6rg/CTres.nii.gz: not a readable NIfTI"
    code, out, err = vtrial_command(capfd, "segment", str(root), *LOCAL)
    assert code == 1 and "2 of 3 subjects are segmented, 2 now" in out and told in out, err
    code, out, err = vtrial_command(capfd, "segment", str(root), *LOCAL)
    assert code == 1 and "2 of 3 subjects are segmented, 0 now" in out, err
    work = Path("runs/real-Kr-ger")
    code, out, err = vtrial_command(capfd, "measure", str(work), *LOCAL)
    assert code == 1 and "2 of 3 subjects are measured, 2 now" in out and "J-rg" in out, err
    table = pd.read_parquet(work / "measurements.parquet").set_index("subject_id")
    assert (table["missing"].groupby("subject_id").first() == "").to_dict() == {
        "J-rg": False,
        "M-ller": True,
        "Schmidt": True,
    }
