"""`vtrial prepare`: a collection becomes a training set that `vtrial train` reads; every end can be gone on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from tests.patients import ENDS, Patient, scan
from tests.petcts import FDG, save
from vtrial import pipeline
from vtrial.execution import LocalExecutor, Progress, Resources
from vtrial.geometry import EXTENT_SLICES_PER_M
from vtrial.imaging.dicom.series import Volume
from vtrial.imaging.files import nifti_bytes, nifti_from_bytes, spacing_of
from vtrial.organs import ORGAN_IDS
from vtrial.records import InputError
from vtrial.segmentation import SegmenterPlan
from vtrial.training import StoredVolumes
from vtrial.training.data import read_extent

LOW_MM = -420.0
PEOPLE = (("F", 160.0, 60.0), ("M", 180.0, 85.0), ("F", 170.0, 75.0))
Reports = list[Progress]


def bones_of(ct: bytes) -> bytes:
    """A segmenter that knows at which heights the patient's bones lie."""
    voxels, affine = nifti_from_bytes(ct, "ct")
    labels = np.zeros(voxels.shape, dtype=np.uint8)
    z_mm = LOW_MM + (np.arange(voxels.shape[2]) + 0.5) * spacing_of(affine)[2]
    x = voxels.shape[0] // 2
    for bone, (low, high) in ENDS.items():
        planes = np.flatnonzero((z_mm > low) & (z_mm < high))
        for name, shift in ((bone, 0), (f"{bone}_left", -20), (f"{bone}_right", 20)):
            if name in ORGAN_IDS and len(planes):
                labels[x + shift - 5 : x + shift + 5, 60:80, planes[0] : planes[-1] + 1] = ORGAN_IDS[name]
    return nifti_bytes(labels, spacing_of(affine))[0]


class LoadBones:
    """It pickles, as a segmenter for workers must."""

    def __call__(self, resources: Resources) -> Callable[[bytes], bytes]:
        return bones_of

    def in_session(self, session: str) -> LoadBones:
        return self


@pytest.fixture(autouse=True)
def bones(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SegmenterPlan("bones", "0" * 64, LoadBones(), phantoms_only=False)
    monkeypatch.setattr("vtrial.pipeline.preparing.segmenter_plan", lambda *unused, **unused_too: plan)


def write_study(root: Path, i: int, volumes: Sequence[Volume]) -> Path:
    folder = root / f"PETCT_{i:010x}" / FDG[1]
    for name, volume in zip(("CTres", "SUV"), volumes, strict=True):
        voxels: NDArray[np.generic] = volume.voxels
        save(folder / f"{name}.nii.gz", voxels, volume.affine)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "collection"
    rows = []
    for i, (sex, height, weight) in enumerate(PEOPLE):
        ct, suv, _ = scan(Patient(pet_shift=(0.1 * i, 0.0, 0.0)))
        folder = write_study(root, i, (ct, suv))
        rows.append(f"{folder.relative_to(root).as_posix()},{sex},{50 + i},{height},{weight}")
    (root / "demographics.csv").write_text("study,sex,age_years,height_cm,weight_kg\n" + "\n".join(rows) + "\n")
    return root


def prepare(source: Path, out: Path, **more: object) -> tuple[pipeline.PrepareSummary, Reports]:
    told: Reports = []
    wanted = pipeline.Wanted(str(source), **more)  # type: ignore[arg-type]
    return pipeline.prepare(wanted, str(out), LocalExecutor(threads=1), told.append), told


def stamps(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for kind in ("ct", "suv") for p in (out / kind).iterdir()}


def test_a_collection_becomes_a_training_set(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    summary, _ = prepare(source, out)
    assert (summary.total, summary.done, summary.new, summary.left_out, summary.failures) == (3, 3, 3, {}, {})
    table = pd.read_parquet(out / "subjects.parquet")
    assert table["height_cm"].tolist() == [height for _, height, _ in PEOPLE]
    assert set(table["split"]) <= {"train", "validation", "test"} and summary.splits["train"] >= 1
    volumes = StoredVolumes(out)
    assert volumes.volume(0).shape == (224, 224, 384)
    assert volumes.ids == table.loc[table["split"] == "train", "subject_id"].tolist()
    assert read_extent(out).slices_per_m == EXTENT_SLICES_PER_M, "three people do not tell a slope"
    assert volumes.support.height_cm[0] >= 160.0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "prepare" and "extent" in manifest["facts"] and "no such people" not in manifest["note"]
    assert (out / "sheet.png").stat().st_size > 10_000
    for path in out.rglob("*"):
        if path.suffix in (".csv", ".json", ".jsonl"):
            assert "PETCT_" not in path.read_text() and "Ganzkoerper" not in path.read_text()


def test_it_goes_on_and_grows(source: Path, tmp_path: Path) -> None:
    """Finished volumes stay untouched; a study that sorts first does not take another one's name."""
    out = tmp_path / "data"
    later = source / f"PETCT_{0:010x}"
    shutil.move(later, tmp_path / "later")
    prepare(source, out)
    before, names = stamps(out), pd.read_parquet(out / "subjects.parquet").set_index("fingerprint")["subject_id"]
    shutil.move(tmp_path / "later", later)
    grown, told = prepare(source, out)
    assert (grown.done, grown.new) == (3, 1) and told[-1].done == 1
    after = pd.read_parquet(out / "subjects.parquet").set_index("fingerprint")
    assert after.loc[names.index, "subject_id"].tolist() == names.tolist()
    assert sorted(after["subject_id"]) == ["s0001", "s0002", "s0003"]
    assert after.loc[after["subject_id"] == "s0003", "height_cm"].tolist() == [PEOPLE[0][1]]
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    (out / "ct" / "s0002.npy").unlink()
    again, _ = prepare(source, out)
    assert again.new == 1 and (out / "ct" / "s0002.npy").exists()
    idle, told = prepare(source, out)
    assert idle.new == 0 and not told


def test_a_bad_study_stops_no_other(source: Path, tmp_path: Path) -> None:
    ct, suv, _ = scan()
    write_study(source, 7, (ct, Volume(suv.voxels * np.float32(5000.0), suv.affine)))  # Bq/ml
    short = scan(low_mm=-420.0, high_mm=100.0)
    write_study(source, 8, short[:2])
    with (source / "demographics.csv").open("a") as file:
        file.writelines(f"PETCT_{i:010x}/{FDG[1]},M,40,175,70\n" for i in (7, 8))
    write_study(source, 9, scan(Patient(pet_shift=(5.0, 0.0, 0.0)))[:2])  # nobody's: no row of demographics
    out, key = tmp_path / "data", tmp_path / "key.csv"
    summary, told = prepare(source, out, key=key)
    assert (summary.total, summary.done) == (6, 3)
    assert sorted(summary.left_out) == ["s0004", "s0005", "s0006"]
    assert "SUV" in summary.left_out["s0004"]
    assert "--allow-partial" in summary.left_out["s0005"]
    assert "unknown: sex" in summary.left_out["s0006"]
    assert pd.read_csv(out / "left_out.csv")["subject_id"].tolist() == ["s0004", "s0005", "s0006"]
    assert (told[-1].done, told[-1].failed) == (3, 2)
    write_study(source, 10, scan(Patient(pet_shift=(6.0, 0.0, 0.0)))[:2])
    with (source / "demographics.csv").open("a") as file:
        file.write(f"PETCT_{10:010x}/{FDG[1]},M,40,175,70\n")
    grown, _ = prepare(source, out, key=key)
    assert (grown.done, grown.new) == (4, 1)
    told_of = pd.read_csv(key).set_index("path")["subject_id"]
    assert told_of.is_unique and sorted(grown.left_out) == sorted(told_of.iloc[3:6])
    assert told_of[f"PETCT_{10:010x}/{FDG[1]}"] in set(pd.read_parquet(out / "subjects.parquet")["subject_id"])


def test_what_cannot_go_together_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allow-partial"):
        prepare(source, tmp_path / "data", choice=pipeline.Choice("none"))
    with pytest.raises(InputError, match="nothing is there"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    prepare(source, tmp_path / "data")
    with pytest.raises(InputError, match="allow_partial is 0 there and 1 here"):
        prepare(source, tmp_path / "data", allow_partial=True)
