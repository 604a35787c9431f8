"""`vtrial prepare`: a collection becomes a training set that `vtrial train` reads; every end can be gone on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.patients import (
    ENDS,
    EXTENT_MM,
    LESION,
    LESION_HU,
    LESION_SUV,
    PEOPLE,
    TISSUE_HU,
    TISSUE_SUV,
    Patient,
    ball,
    points_of,
    scan,
    write_study,
)
from tests.petcts import FDG
from vtrial import pipeline
from vtrial.execution import LocalExecutor, Progress, Resources
from vtrial.geometry import EXTENT_SLICES_PER_M
from vtrial.imaging.files import centred_affine, nifti_bytes, nifti_from_bytes, spacing_of
from vtrial.imaging.scans import Scan
from vtrial.imaging.volume import Volume
from vtrial.organs import ORGAN_IDS
from vtrial.preparation.grid import Grid
from vtrial.records import InputError, PetCt, Subject
from vtrial.segmentation import SegmenterPlan
from vtrial.training import StoredVolumes
from vtrial.training.data import read_extent

LOW_MM = -420.0
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


@pytest.fixture
def source(collection: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(collection, tmp_path / "collection"))


def prepare(source: Path, out: Path, **more: object) -> tuple[pipeline.PrepareSummary, Reports]:
    told: Reports = []
    wanted = pipeline.Wanted(str(source), **more)  # type: ignore[arg-type]
    command = ["vtrial", "prepare", str(source), "--out", str(out), f"--key={wanted.key}", "--fast"]
    return pipeline.prepare(wanted, str(out), LocalExecutor(threads=1), told.append, command=command), told


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
    (session,) = manifest["sessions"]
    assert (session["n"], session["done"], session["failed"], session["workers"]) == (3, 3, 0, 1)
    assert session["command"] == ["vtrial", "prepare", "SRC", "--out", str(out), "--key=None", "--fast"]
    assert session["started"] < session["finished"] and "pandas" in session["versions"]
    assert (out / "sheet.png").stat().st_size > 10_000
    for path in out.rglob("*"):
        if path.suffix in (".csv", ".json", ".jsonl"):
            assert "PETCT_" not in path.read_text() and "Ganzkoerper" not in path.read_text()


@pytest.mark.usefixtures("coarse")
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
    manifest, stamp = (out / "manifest.json").read_text(), (out / "subjects.parquet").stat().st_mtime_ns
    idle, told = prepare(source, out)
    assert idle.new == 0 and not told
    assert (out / "manifest.json").read_text() == manifest and len(json.loads(manifest)["sessions"]) == 3
    assert (out / "subjects.parquet").stat().st_mtime_ns == stamp
    demographics = source / "demographics.csv"
    demographics.write_text(demographics.read_text().replace(",160.0,", ",161.0,"))
    mended, told = prepare(source, out)
    assert mended.new == 0 and not told
    assert 161.0 in pd.read_parquet(out / "subjects.parquet")["height_cm"].tolist()
    (out / "subjects.csv").unlink()  # as a kill after the last volume leaves it
    assert prepare(source, out)[0].new == 0 and (out / "subjects.csv").exists()
    last = json.loads((out / "manifest.json").read_text())["sessions"][-1]
    assert last["done"] == 0 and last["finished"]


@pytest.mark.usefixtures("coarse")
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
    assert str(key) not in (out / "manifest.json").read_text()
    assert told_of[f"PETCT_{10:010x}/{FDG[1]}"] in set(pd.read_parquet(out / "subjects.parquet")["subject_id"])


class LoadPatient:
    """In the place of phantoms: the patient that is drawn by formula, on a grid of 4 mm around the origin."""

    def __call__(self, resources: Resources) -> Callable[[Subject], Scan]:
        shape = (112, 80, 210)
        at = points_of(shape, centred_affine(shape, (4.0, 4.0, 4.0)))
        return lambda subject: Scan(PetCt(Patient().ct(at), Patient().suv(at), (4.0, 4.0, 4.0)))


def test_a_collection_of_ours_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`phantom --layout autopet`, then `prepare`: demographics exactly, values to what the resampling costs."""
    monkeypatch.setattr("vtrial.pipeline.making.LoadPhantom", LoadPatient)
    monkeypatch.setattr("vtrial.preparation.volume.SHAPE", (112, 112, 192))
    monkeypatch.setattr("vtrial.preparation.volume.IN_PLANE_MM", 4.0)
    executor, source = LocalExecutor(threads=1), tmp_path / "collection"
    pipeline.phantom(pipeline.Cohort("oncology", 1, 5), executor, print, out=str(source), layout="autopet")
    summary, _ = prepare(source, tmp_path / "data")
    assert (summary.done, summary.left_out, summary.flags, summary.notes) == (1, {}, {}, ())
    drawn = pd.read_parquet(source / "subjects.parquet").iloc[0]
    (row,) = pd.read_parquet(tmp_path / "data" / "subjects.parquet").to_dict("records")
    body = ["sex", "age_years", "height_cm", "weight_kg"]
    assert [row[name] for name in body] == drawn[body].tolist()
    assert row["extent_mm"] == pytest.approx(EXTENT_MM, abs=4.0)
    spacing = (4.0, 4.0, row["spacing_z_mm"])
    at = points_of((112, 112, 192), Grid((112, 112, 192), spacing, (-224.0, -224.0, -350.0)).affine)
    ct, suv = (np.load(tmp_path / "data" / row[f"{kind}_path"]).astype(float) for kind in ("ct", "suv"))
    core, belly = (ball(at, centre, 25.0, 1e-6) == 1.0 for centre in (LESION, (40.0, 0.0, -120.0)))
    for region, hu, value in ((core, LESION_HU, LESION_SUV), (belly, TISSUE_HU, TISSUE_SUV)):
        assert (ct[region].mean(), suv[region].mean()) == pytest.approx((hu, value), rel=0.01)
    around = ball(at, LESION, 60.0, 1e-6) == 1.0
    assert (suv * at[..., 2])[around].sum() / suv[around].sum() == pytest.approx(
        (Patient().suv(at) * at[..., 2])[around].sum() / Patient().suv(at)[around].sum(), abs=2.0
    )


@pytest.mark.usefixtures("coarse")
def test_what_cannot_go_together_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allow-partial"):
        prepare(source, tmp_path / "data", choice=pipeline.Choice("none"))
    with pytest.raises(InputError, match="nothing is there"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    prepare(source, tmp_path / "data")


@pytest.mark.usefixtures("coarse")
def test_partial_studies_may_be_allowed_later(source: Path, tmp_path: Path) -> None:
    write_study(source, 8, scan(low_mm=-420.0, high_mm=100.0)[:2])
    with (source / "demographics.csv").open("a") as file:
        file.write(f"PETCT_{8:010x}/{FDG[1]},M,40,175,70\n")
    out = tmp_path / "data"
    assert "--allow-partial" in prepare(source, out)[0].left_out["s0004"]
    manifest = json.loads((out / "manifest.json").read_text())  # as sets had it when this could not come later
    manifest["identity"]["allow_partial"] = 0
    (out / "manifest.json").write_text(json.dumps(manifest))
    prepare(source, out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    before = stamps(out)
    allowed, told = prepare(source, out, allow_partial=True)
    assert (allowed.done, allowed.new, len(told) > 0) == (4, 1, True) and not allowed.left_out
    assert len(before) == 3  # one file name in ct and suv
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert not prepare(source, out, allow_partial=True)[1]  # and now all is done
    with pytest.raises(InputError, match="was made with --allow-partial; give it again"):
        prepare(source, out)
