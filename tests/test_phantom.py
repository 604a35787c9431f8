"""The phantom population: anatomy that must hold for everybody, exact masks, reproducible bodies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtrial.geometry import SHAPE, extent_mm
from vtrial.organs import ORGAN_IDS, labels_of
from vtrial.phantom import Phantom, make_phantom
from vtrial.phantom.anthropometry import TABLE_1_VOLUME_ML, TEST_BODY, draw_volumes
from vtrial.phantom.canvas import Canvas, rotation, smooth_noise
from vtrial.phantom.render import blur
from vtrial.phantom.uptake import draw_organ_suvs, plan_uptake
from vtrial.records import Subject

MAN = Subject("man", 0, 7, "M", 58.0, 177.0, 83.0)
WOMAN = Subject("woman", 1, 7, "F", 59.0, 165.0, 76.0)


@pytest.fixture(scope="module")
def phantoms() -> dict[str, Phantom]:
    return {s.subject_id: make_phantom(s) for s in (MAN, WOMAN)}


def volume_ml(phantom: Phantom, organ: str) -> float:
    voxel = float(np.prod(phantom.pet_ct.spacing_mm)) / 1000.0
    return float(np.isin(phantom.labels, labels_of(organ)).sum() * voxel)


def test_grid_and_extent(phantoms: dict[str, Phantom]) -> None:
    man = phantoms["man"]
    assert man.pet_ct.ct_hu.shape == man.pet_ct.suv.shape == man.labels.shape == SHAPE
    assert man.pet_ct.ct_hu.dtype == np.int16 and man.labels.dtype == np.uint8
    assert man.pet_ct.spacing_mm[2] * 384 == pytest.approx(extent_mm(177.0))


@pytest.mark.parametrize("who", ["man", "woman"])
@pytest.mark.parametrize("organ", ["liver", "heart", "kidneys", "spleen", "pancreas", "stomach", "lungs"])
def test_planned_volumes_are_met_within_2_percent(phantoms: dict[str, Phantom], who: str, organ: str) -> None:
    planned = phantoms[who].truth[f"{organ}_volume_ml"]
    assert volume_ml(phantoms[who], organ) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("who", ["man", "woman"])
def test_organs_lie_where_they_should(phantoms: dict[str, Phantom], who: str) -> None:
    labels = phantoms[who].labels

    def centre(organ: str) -> np.ndarray:
        return np.argwhere(np.isin(labels, labels_of(organ))).mean(0)

    liver, spleen, heart = centre("liver"), centre("spleen"), centre("heart")
    assert liver[0] > spleen[0], "+x is the patient's right: the liver lies right of the spleen"
    assert heart[2] > liver[2] > centre("urinary_bladder")[2]
    assert centre("kidney_right")[0] > centre("kidney_left")[0]
    assert heart[1] > centre("vertebrae_T7")[1], "+y is anterior"
    assert centre("clavicula_right")[2] > centre("lungs")[2] > centre("sacrum")[2]
    left, right = (np.isin(labels, ids).sum() for ids in ((10, 11), (12, 13, 14)))
    assert 0.6 < left / right < 1.0, "the heart takes its room from the left lung"


@pytest.mark.parametrize("who", ["man", "woman"])
def test_tissues_look_right(phantoms: dict[str, Phantom], who: str) -> None:
    p = phantoms[who]
    ct, suv, labels = p.pet_ct.ct_hu, p.pet_ct.suv, p.labels

    def mean(image: np.ndarray, organ: str) -> float:
        return float(image[np.isin(labels, labels_of(organ))].mean())

    assert -900 < mean(ct, "lungs") < -650
    assert 60 < mean(ct, "liver") < 140
    assert mean(ct, "vertebrae_L3") > 150
    assert mean(suv, "urinary_bladder") > mean(suv, "liver") > mean(suv, "lungs")
    below_the_arms = slice(0, 230)
    assert float(suv[0, :, below_the_arms].max()) < 0.5 and ct[0, :, below_the_arms].max() < -900
    names = {name for name, label in ORGAN_IDS.items() if (labels == label).any()}
    assert {f"rib_{side}_{i}" for side in ("left", "right") for i in range(1, 13)} <= names
    assert {f"vertebrae_T{i}" for i in range(1, 13)} | {f"vertebrae_L{i}" for i in range(1, 6)} <= names
    assert {"aorta", "inferior_vena_cava", "trachea", "gallbladder", "colon", "small_bowel", "sternum"} <= names


def test_body_volume_follows_the_plan(phantoms: dict[str, Phantom]) -> None:
    for p in phantoms.values():
        voxel = float(np.prod(p.pet_ct.spacing_mm)) / 1000.0
        tissue = float((p.pet_ct.ct_hu > -300).sum() * voxel)
        planned = p.truth["body_volume_ml"] - p.truth["lungs_volume_ml"]
        assert tissue == pytest.approx(planned, rel=0.04)


def test_same_subject_same_body_other_seed_other_body(phantoms: dict[str, Phantom]) -> None:
    again = make_phantom(MAN)
    assert np.array_equal(again.pet_ct.ct_hu, phantoms["man"].pet_ct.ct_hu)
    assert np.array_equal(again.pet_ct.suv, phantoms["man"].pet_ct.suv)
    other = make_phantom(Subject("other", 0, 8, "M", 58.0, 177.0, 83.0))
    assert (other.labels != again.labels).mean() > 0.01


def test_fasting_state_and_urine_cause_the_hot_spots(phantoms: dict[str, Phantom]) -> None:
    for p in phantoms.values():
        heart = p.labels == ORGAN_IDS["heart"]
        # The hottest voxel is the hottest part of the ventricle's wall, whose uptake varies by region.
        assert 0.8 < p.pet_ct.suv[heart].max() / p.truth["myocardium_suv"] < 2.5
        kidneys = np.isin(p.labels, labels_of("kidneys"))
        assert p.pet_ct.suv[kidneys].max() > 1.6 * p.truth["kidneys_suv"]


def cohort(sex: str, n: int) -> list[Subject]:
    rng = np.random.default_rng(3)
    height, weight, sd_h, sd_w = TEST_BODY[sex]
    z = rng.standard_normal((n, 3))
    r = {"M": 0.43, "F": 0.33}[sex]
    weights = np.clip(weight + sd_w * (r * z[:, 0] + np.sqrt(1 - r * r) * z[:, 1]), 42, 135)
    return [Subject("", i, 1, sex, 58 + 15 * z[i, 2], height + sd_h * z[i, 0], weights[i]) for i in range(n)]  # type: ignore[arg-type]


@pytest.mark.parametrize("sex", ["M", "F"])
def test_drawn_volumes_have_the_published_means_spreads_and_slopes(sex: str) -> None:
    subjects = cohort(sex, 4000)
    rng = np.random.default_rng(0)
    drawn = [draw_volumes(s, rng) for s in subjects]
    for organ, by_sex in TABLE_1_VOLUME_ML.items():
        values = np.array([d[organ] for d in drawn])
        assert values.mean() == pytest.approx(by_sex[sex][0], rel=0.03)
        assert values.std() == pytest.approx(by_sex[sex][1], rel=0.10)
    design = np.array([[1.0, s.weight_kg, s.height_cm] for s in subjects])
    slopes = np.linalg.lstsq(design, np.array([d["liver"] for d in drawn]), rcond=None)[0]
    assert slopes[1] == pytest.approx(7.88, rel=0.3) and slopes[2] == pytest.approx(6.98, rel=0.3)


@pytest.mark.parametrize("sex", ["M", "F"])
def test_drawn_uptake_has_the_published_correlations(sex: str) -> None:
    rng = np.random.default_rng(0)
    subjects = cohort(sex, 3000)
    drawn = [draw_organ_suvs(s, rng) for s in subjects]
    column = {organ: np.array([d[organ] for d in drawn]) for organ in drawn[0]}
    assert np.corrcoef(column["liver"], column["aorta"])[0, 1] > 0.8
    assert np.corrcoef(column["liver"], column["spleen"])[0, 1] > 0.7
    assert np.corrcoef(column["liver"], [s.bmi for s in subjects])[0, 1] == pytest.approx(0.45, abs=0.06)
    hearts = np.array([plan_uptake(s, rng).drawn["myocardium"] for s in subjects])
    assert abs(np.corrcoef(column["liver"], hearts)[0, 1]) < 0.1
    assert (hearts < 4).mean() > 0.3 and (hearts > 6).mean() > 0.25, "two fasting states"


def test_canvas_meets_volumes_and_keeps_what_is_painted() -> None:
    axis = torch.arange(40.0)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    canvas = Canvas(x, y, z, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.001)
    from vtrial.phantom.tissues import Material

    box = canvas.around([(20.3, 20.1, 19.8)], 15)
    first = canvas.paint(box, box.ellipsoid((20.3, 20.1, 19.8), (5, 5, 5)), Material.LIVER, 5, volume_ml=0.9)
    assert int(first.sum()) == pytest.approx(900, abs=6)
    second = canvas.paint(box, box.ellipsoid((22.1, 20.4, 19.7), (5, 5, 5)), Material.SPLEEN, 1, volume_ml=0.5)
    assert int(second.sum()) == pytest.approx(500, abs=6) and not (first & second).any()
    assert int((canvas.labels == 5).sum()) == int(first.sum())


def test_ellipsoid_and_tube_distances() -> None:
    axis = torch.arange(60.0)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    canvas = Canvas(x, y, z, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.001)
    box = canvas.box((0, 0, 0), (59, 59, 59))
    sphere = (box.ellipsoid((30, 30, 30), (12, 12, 12), rotation(10, 20, 30)) < 0).sum()
    assert int(sphere) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.02)
    tube = box.tube([(30, 30, 10), (30, 30, 50)], [6, 6])
    assert float(tube[30, 36, 30]) == pytest.approx(0.0, abs=1e-4)
    assert float(tube[30, 40, 30]) == pytest.approx(4.0, abs=1e-4)
    assert int((tube < 0).sum()) == pytest.approx(np.pi * 36 * 40 + 4 / 3 * np.pi * 216, rel=0.04)


def test_blur_keeps_the_sum_and_has_the_width_asked_for() -> None:
    point = torch.zeros(33, 33, 33)
    point[16, 16, 16] = 1.0
    out = blur(point, (1.2, 1.2, 2.0))
    assert float(out.sum()) == pytest.approx(1.0, abs=1e-4)
    offset = torch.arange(33.0) - 16
    assert float((out.sum((0, 1)) * offset**2).sum()) ** 0.5 == pytest.approx(2.0, rel=0.06)
    assert float((out.sum((1, 2)) * offset**2).sum()) ** 0.5 == pytest.approx(1.2, rel=0.06)


def test_smooth_noise_is_unit_variance_and_smooth() -> None:
    field = smooth_noise((64, 64, 64), (12, 12, 12), torch.Generator().manual_seed(1))
    assert float(field.std()) == pytest.approx(0.85, abs=0.2)
    assert float((field[1:] - field[:-1]).std()) < 0.35
