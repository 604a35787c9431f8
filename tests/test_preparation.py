"""From a real PET/CT pair to a training volume: what lies where, how much of it, and what is refused or told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.patients import (
    EXTENT_MM,
    LESION,
    LESION_HU,
    LESION_MM,
    LESION_SUV,
    TISSUE_HU,
    TISSUE_SUV,
    Patient,
    ball,
    every,
    points_of,
    rotation,
    scan,
)
from vtrial.imaging.dicom.studies import find_studies, read_study
from vtrial.imaging.volume import Volume
from vtrial.organs import ORGAN_IDS
from vtrial.preparation import volume as preparing
from vtrial.preparation.grid import Grid
from vtrial.preparation.volume import TrainingVolume, check_pair, fit_volume, save_volume
from vtrial.records import InputError
from vtrial.storage import open_folder
from vtrial.training import StoredVolumes


@pytest.fixture(scope="module")
def prepared() -> TrainingVolume:
    """A patient on a left-handed CT and an oblique PET, prepared at full resolution."""
    return fit_volume(*scan(pet_turn=rotation(5.0, 0) @ rotation(3.0, 2)))


def own_grid(volume: TrainingVolume) -> Grid:
    """Where a prepared patient lies: the body's axis is x = y = 0, the hips end at -310 mm."""
    spacing = volume.pet_ct.spacing_mm
    return Grid((224, 224, 384), spacing, (-224.0, -224.0, -350.0))


def test_a_patient_arrives_whole(prepared: TrainingVolume) -> None:
    pet_ct = prepared.pet_ct
    assert (pet_ct.ct_hu.dtype, pet_ct.suv.dtype, pet_ct.suv.shape) == (np.int16, np.float32, (224, 224, 384))
    assert prepared.figures["extent_mm"] == pytest.approx(EXTENT_MM, abs=4.0)
    assert pet_ct.spacing_mm == pytest.approx((2.0, 2.0, prepared.figures["extent_mm"] / 384))
    assert prepared.doubts == ()
    start, part = (56, 86, 100), (slice(56, 130), slice(86, 160), slice(100, 310))  # more than the lesion
    hu, suv = pet_ct.ct_hu[part], pet_ct.suv[part]
    affine = every(own_grid(prepared).affine, start, (1, 1, 1))
    at = points_of(suv.shape, affine)
    core, near = (ball(at, LESION, LESION_MM + more, 1e-6) == 1.0 for more in (-9.0, 15.0))
    assert hu[core].mean() == pytest.approx(LESION_HU, rel=0.01)
    assert suv[core].mean() == pytest.approx(LESION_SUV, rel=0.01)
    voxel_ml = own_grid(prepared).voxel_ml
    for values, half in ((hu, (LESION_HU + TISSUE_HU) / 2.0), (suv, (LESION_SUV + TISSUE_SUV) / 2.0)):
        lesion = (values > half) & near
        assert lesion.sum() * voxel_ml == pytest.approx(4.0 / 3.0 * np.pi * LESION_MM**3 / 1000.0, rel=0.01)
        assert at[lesion].mean(axis=0) == pytest.approx(LESION, abs=2.0)
    assert suv[near].mean() == pytest.approx(float(Patient().suv(at)[near].mean()), rel=0.01)


def test_table_mattress_and_blanket_are_gone_and_the_body_is_not(prepared: TrainingVolume) -> None:
    some = (slice(None, None, 2), slice(None, None, 2), slice(None, None, 16))
    hu, suv = prepared.pet_ct.ct_hu[some], prepared.pet_ct.suv[some]
    x, y, _ = np.moveaxis(points_of(hu.shape, every(own_grid(prepared).affine, (0, 0, 0), (2, 2, 16))), -1, 0)
    skin = (x / 165.0) ** 2 + (y / 105.0) ** 2 < 0.94
    assert (hu[(np.abs(x) > 178.0) | (np.abs(y) > 116.0)] == -1000).all()
    assert (suv[(np.abs(x) > 185.0) | (np.abs(y) > 125.0)] == 0.0).all()
    assert (hu[skin] != -1000).all()  # lungs are -850
    assert (suv[skin] > 0.1).all()


def test_what_is_written_is_read_by_training(prepared: TrainingVolume, tmp_path: Path) -> None:
    import pandas as pd

    saved = save_volume(open_folder(tmp_path), "s0001", prepared)
    assert saved.files == {name: (tmp_path / name).stat().st_size for name in ("ct/s0001.npy", "suv/s0001.npy")}
    body = {"subject_id": "s0001", "sex": "F", "age_years": 50.0, "height_cm": 165.0, "weight_kg": 70.0}
    pd.DataFrame([body | saved.row]).to_parquet(tmp_path / "subjects.parquet")
    stored = StoredVolumes(tmp_path).volume(0)
    assert stored.shape == (224, 224, 384)
    assert np.load(tmp_path / "ct/s0001.npy", mmap_mode="r").dtype == np.int16
    suv = np.load(tmp_path / "suv/s0001.npy", mmap_mode="r")
    assert suv.dtype == np.float16
    assert np.abs(suv[::5, ::5, ::5] - prepared.pet_ct.suv[::5, ::5, ::5]).max() < 0.004


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of the same field with a thirty-second of the voxels, for what needs no detail."""
    monkeypatch.setattr(preparing, "SHAPE", (56, 56, 192))
    monkeypatch.setattr(preparing, "IN_PLANE_MM", 8.0)


def flags(volume: TrainingVolume) -> set[str]:
    return set(volume.row["flags"].split(";")) - {""}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("patient", "expected"),
    [
        (Patient(), set()),
        (Patient(arms_down=True), {"arms_down"}),
        (Patient(pet_shift=(0.0, 25.0, 0.0)), {"misaligned", "pet_outside"}),
        (Patient(breath_mm=24.0), {"breathing"}),
        (Patient(mirror=-1.0), {"mirrored"}),
        (Patient(pet_arm=True), {"pet_outside"}),
    ],
    ids=["sound", "arms", "shift", "breath", "mirror", "arm-off-ct"],
)
def test_doubts_are_told(patient: Patient, expected: set[str]) -> None:
    volume = fit_volume(*scan(patient))
    assert flags(volume) == expected
    assert volume.figures["breathing_mm"] == pytest.approx(patient.breath_mm, abs=7.4)  # a step of the sketch


@pytest.mark.usefixtures("coarse")
def test_a_field_of_view_that_cuts_the_body_at_its_side_is_told() -> None:
    ct, suv, labels = scan()
    dense = (ct.voxels > -300).sum(axis=(0, 2))  # the second axis goes from right to left
    at = np.flatnonzero(dense > dense.max() / 2)[0]
    affine = ct.affine.copy()
    affine[:3, 3] += at * affine[:3, 1]
    assert "body_cut" in flags(fit_volume(Volume(ct.voxels[:, at:], affine), suv, labels))


@pytest.mark.usefixtures("coarse")
def test_arms_are_seen_without_bones_too() -> None:
    ct, suv, labels = scan(Patient(arms_down=True))
    none = np.isin(labels.voxels, [ORGAN_IDS["humerus_left"], ORGAN_IDS["humerus_right"]])
    bare = replace(labels, voxels=np.where(none, 0, labels.voxels).astype(np.uint8))
    assert flags(fit_volume(ct, suv, bare)) == {"arms_down"}


@pytest.mark.usefixtures("coarse")
def test_a_partial_field_is_refused_unless_asked_for() -> None:
    high = scan(low_mm=-180.0)  # the sacrum is cut
    with pytest.raises(InputError, match="sacrum reach the lower end") as refusal:
        fit_volume(*high)
    assert "--allow-partial" in str(refusal.value)
    volume = fit_volume(*high, allow_partial=True)
    assert flags(volume) == {"partial"}
    assert volume.row["partial"]
    assert volume.figures["extent_mm"] == pytest.approx(180.0 + 360.0, abs=5.0)
    with pytest.raises(InputError, match="no clavicles"):
        fit_volume(*scan(high_mm=270.0))
    with pytest.raises(InputError, match="no organ mask"):
        fit_volume(*scan()[:2], None)


@pytest.mark.usefixtures("coarse")
def test_margins_that_lack_are_told_and_hips_that_are_not_drawn_estimated() -> None:
    assert flags(fit_volume(*scan(low_mm=-330.0))) == {"short_margin"}
    ct, suv, labels = scan()
    hips = np.isin(labels.voxels, [ORGAN_IDS["hip_left"], ORGAN_IDS["hip_right"]])
    bare = replace(labels, voxels=np.where(hips, 0, labels.voxels).astype(np.uint8))
    volume = fit_volume(ct, suv, bare)
    assert flags(volume) == {"end_estimated"}
    assert volume.figures["extent_mm"] == pytest.approx(EXTENT_MM, abs=6.0)


def changed(volume: Volume, change: Any) -> Volume:
    return Volume(change(volume.voxels), volume.affine)


@pytest.mark.usefixtures("coarse")
def test_what_cannot_be_true_is_refused_with_its_reason() -> None:
    ct, suv, labels = scan()

    def reason(ct: Volume, suv: Volume, labels: Volume) -> str:
        with pytest.raises(InputError) as refusal:
            check_pair(ct, suv)
            fit_volume(ct, suv, labels)
        return str(refusal.value)

    assert "1024" in reason(changed(ct, lambda v: v + np.int16(1024)), suv, labels)
    assert "lowest values are -200" in reason(changed(ct, lambda v: v.clip(-200, 300)), suv, labels)
    assert "g/ml" in reason(ct, changed(suv, lambda v: v * np.float32(5000.0)), labels)
    assert "NaN" in reason(ct, changed(suv, lambda v: np.where(v > 5.0, np.nan, v)), labels)
    both = reason(changed(ct, lambda v: v + np.int16(1024)), changed(suv, lambda v: -10.0 * v), labels)
    assert "1024" in both
    assert "not negative" in both
    away = suv.affine.copy()
    away[2, 3] += 700.0
    assert "side by side" in reason(ct, Volume(suv.voxels, away), labels)
    assert "Dice" in reason(ct, scan(Patient(pet_shift=(0.0, 90.0, 0.0)))[1], labels)
    turned = np.diag([1.0, 1.0, -1.0, 1.0])
    over = [Volume(v.voxels, turned @ v.affine) for v in (ct, suv, labels)]
    assert "head down" in reason(over[0], over[1], over[2])
    elsewhere = Volume(labels.voxels, labels.affine + np.diag([0.0, 0.0, 1.0], 1) * 2000.0)
    with pytest.raises(InputError, match="mask of this CT"):
        fit_volume(ct, suv, elsewhere, allow_partial=True)
    empty = changed(ct, lambda v: np.full_like(v, -1000))
    assert "dense as tissue" in reason(empty, suv, labels)


def weighted(voxels: NDArray[Any], affine: NDArray[np.float64], centre: NDArray[np.float64], width: float) -> float:
    """The mean around a place, with a Gaussian of so many mm as the weight."""
    index = np.linalg.inv(affine) @ np.append(centre, 1.0)
    reach = np.ceil(3.5 * width / np.linalg.norm(affine[:3, :3], axis=0))
    part = tuple(slice(max(round(i - r), 0), round(i + r) + 1) for i, r in zip(index[:3], reach, strict=True))
    cut = voxels[part].astype(np.float64)
    moved = every(affine, (part[0].start, part[1].start, part[2].start), (1, 1, 1))
    weights = np.exp(-0.5 * (((points_of(cut.shape, moved) - centre) / width) ** 2).sum(axis=-1))
    return float((weights * cut).sum() / weights.sum())


def test_a_real_scan_keeps_its_units(shared_data: Path) -> None:
    (study,) = find_studies(shared_data / "acrin-nsclc-fdg-pet-042").studies
    ct, suv = read_study(study)
    with pytest.raises(InputError, match="no organ mask"):
        fit_volume(ct, suv, None)
    volume = fit_volume(ct, suv, None, allow_partial=True)
    assert flags(volume) == {"partial"}  # kidneys to shoulders, arms raised
    assert volume.figures["extent_mm"] == pytest.approx(135 * 3.27, abs=0.1)
    assert 2.0 < volume.figures["outline_gap_mm"] < 5.0
    assert 30.0 < volume.figures["body_l"] < 40.0
    spacing = volume.pet_ct.spacing_mm
    corner = (-225.512, -181.512, -361.815)
    grid = Grid((224, 224, 384), spacing, corner)
    hottest = np.unravel_index(ndimage.gaussian_filter(suv.voxels, 2.0).argmax(), suv.voxels.shape)
    regions = {"liver": (90.0, 0.0, -260.0), "spleen": (-80.0, -20.0, -270.0), "back": (0.0, -70.0, -200.0)}
    places = [(np.array(place), 15.0) for place in regions.values()]
    places.append(((suv.affine @ np.append(hottest, 1.0))[:3], 25.0))
    for place, width in places:
        before, after = (
            weighted(v, a, place, width) for v, a in ((suv.voxels, suv.affine), (volume.pet_ct.suv, grid.affine))
        )
        assert after == pytest.approx(before, rel=0.01)
        before, after = (
            weighted(v, a, place, width) for v, a in ((ct.voxels, ct.affine), (volume.pet_ct.ct_hu, grid.affine))
        )
        assert after + 1000.0 == pytest.approx(before + 1000.0, rel=0.01)
    assert volume.pet_ct.suv.sum(dtype=np.float64) * grid.voxel_ml == pytest.approx(
        suv.voxels.sum(dtype=np.float64) * np.prod(suv.spacing_mm) / 1000.0, rel=0.03
    )
