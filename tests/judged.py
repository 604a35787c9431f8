"""Small cohorts to be judged: 16³ twins, a segmenter that cuts them in halves, and folders as data sets have them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import LoadFake, fake_plan

import vtrial.pipeline
from vtrial.execution import Resources
from vtrial.imaging.files import nifti_from_bytes, write_nifti_atomic
from vtrial.imaging.scans import Scan
from vtrial.organs import ORGAN_IDS
from vtrial.records import InputError, Subject
from vtrial.segmentation import Segmenter, SegmenterPlan
from vtrial.segmentation import home as homes

SETTINGS = """
bootstraps = 200
shufflings = 200
min_subjects = 3
organs = ["liver", "heart"]
"""
ORGANS = ("liver", "heart")


@dataclass(frozen=True)
class LoadHalves:
    """Liver to the patient's right, heart to the left; a CT whose first voxel is 499 HU cannot be segmented."""

    def __call__(self, resources: Resources) -> Segmenter:
        return self.segment

    def in_session(self, session: str) -> LoadHalves:
        return self

    def segment(self, ct: bytes) -> bytes:
        voxels, affine = nifti_from_bytes(ct, "ct")
        if voxels.flat[0] == 499:
            raise ArithmeticError("planted failure")
        mask = np.full(voxels.shape, ORGAN_IDS["liver"], np.uint8)
        mask[voxels.shape[0] // 2 :] = ORGAN_IDS["heart"]
        mask[:2] = mask[-2:] = 0
        mask[:, :1] = mask[:, -1:] = mask[:, :, :1] = mask[:, :, -1:] = 0
        import nibabel

        data: bytes = nibabel.Nifti1Image(mask, affine).to_bytes()
        return data


@dataclass(frozen=True)
class LoadLabelled(LoadFake):
    """Scans that come with exact masks, as phantoms do."""

    def render(self, subject: Subject) -> Scan:
        scan = super().render(subject)
        labels = np.full(scan.pet_ct.ct_hu.shape, ORGAN_IDS["liver"], np.uint8)
        labels[5:] = ORGAN_IDS["heart"]
        return replace(scan, labels=labels)


@dataclass
class Segmenters:
    """In the place of `segmenter_plan`: these, and what was asked for. A folder is a segmenter of one's own."""

    known: tuple[str, ...] = ("halves", "phantom-v1", "totalsegmentator")
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, name: str, *, mode: str | None = None, weights: str | None = None) -> SegmenterPlan:
        self.asked.append((name, mode))
        folder = str(Path(name).absolute()) if Path(name).is_dir() else ""
        if name not in self.known and not folder:
            raise InputError(f"segmenter {name}: no such bundled segmenter")
        name, ours = Path(name).name, name != "totalsegmentator"
        facts = {"training_data": "halves of cubes"} if ours else {}
        full = name if mode is None else f"{name}-{mode}"
        facts |= {"organs": list(ORGANS)}
        return SegmenterPlan(full, f"sha of {full}", LoadHalves(), ours, ORGANS, facts, folder)


@pytest.fixture
def segmenters(monkeypatch: pytest.MonkeyPatch) -> Segmenters:
    """Segmenters that need no weights; phantom-v1 is one of them."""
    found = Segmenters()
    monkeypatch.setattr(vtrial.pipeline.masks, "segmenter_plan", found)
    monkeypatch.setattr(vtrial.pipeline.masks, "list_segmenters", lambda: ["phantom-v1"])
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a table of twelve people, quick settings, and a model that makes 16³ twins at once."""
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(homes, "sessions_folder", lambda: temporary)
    monkeypatch.setattr(vtrial.pipeline.making, "cascade_plan", fake_plan(LoadFake()))
    (work / "people.csv").write_text(people(12))
    (work / "quick.toml").write_text(SETTINGS)
    return work


def people(n: int) -> str:
    rows = [f"A{i},{'FM'[i % 2]},{40 + i},{160 + i},{60 + 2 * i}" for i in range(n)]
    return "\n".join(["subject_id,sex,age_years,height_cm,weight_kg", *rows]) + "\n"


def write_scan(ct: Path, suv: Path, seed: int, first: int = 0) -> None:
    """A CT and its SUV of 16³ voxels, the liver's side hotter."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(-500, 490, (16, 16, 16), dtype=np.int16)
    voxels.flat[0] = first
    uptake = (rng.random(voxels.shape, dtype=np.float32) + 1) * np.float32(1 + 0.1 * (seed % 5))
    for path, array in ((ct, voxels), (suv, uptake)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti_atomic(path, array, (2.0, 2.0, 2.0))


def lesions_folder(root: Path, n: int) -> Path:
    """As FDG-PET-CT-Lesions lies on a disk: a folder a study, the table of people with a row for each series."""
    rows = ["Subject ID,Study UID,Modality,diagnosis,age,sex"]
    for i in range(n):
        name = f"PETCT_{i:010x}"
        study = root / "FDG-PET-CT-Lesions" / name / f"0{1 + i % 9}-01-2003-NA-PET-CT Ganzkoerper-{50000 + i}"
        write_scan(study / "CTres.nii.gz", study / "SUV.nii.gz", i)
        sex, age = ("female", "male")[i % 2], f"{40 + i:03d}Y"
        rows += [f"{name},1.2.{i},{series},MELANOMA,{age},{sex}" for series in ("CT", "PT", "SEG")]
    (root / "Clinical Metadata.csv").write_text("\n".join(rows) + "\n")
    return root
