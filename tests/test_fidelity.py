"""Measuring bodies without segmentation, and comparing twins with phantoms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vtrial.cohort.registry import find_spec
from vtrial.fidelity import LIVER_BOX, MEASURES, agreements, held_out, measure_all, measure_body, slopes
from vtrial.phantom import make_phantom
from vtrial.records import InputError, Subject

SHAPE = (40, 40, 60)
VOXEL_MM = (10.0, 10.0, 5.0)  # 0.5 ml


def made_up_body() -> tuple[np.ndarray, np.ndarray]:
    """A block of tissue with two air pockets high up, one low down, and a bone."""
    ct = np.full(SHAPE, -1000.0, dtype=np.float32)
    ct[5:35, 10:30, :] = 40
    ct[8:14, 14:24, 35:50] = -800
    ct[26:32, 14:24, 35:50] = -800
    ct[18:20, 14:16, 5:10] = -900  # bowel gas
    ct[19:21, 25:27, 20:40] = 400
    suv = np.where(ct > -500, 1.0, 0.0).astype(np.float32)
    return ct, suv


def test_measures_are_exact_on_boxes() -> None:
    measured = measure_body(*made_up_body(), VOXEL_MM)
    assert measured["body_ml"] == pytest.approx(30 * 20 * 60 * 0.5)
    assert measured["lung_ml"] == pytest.approx(2 * 6 * 10 * 15 * 0.5)
    assert measured["bone_ml"] == pytest.approx(2 * 2 * 20 * 0.5)
    inside = 30 * 20 * 60 - 2 * 6 * 10 * 15 - 2 * 2 * 5
    assert measured["activity_g"] == pytest.approx(inside * 0.5)


def test_the_liver_box_lies_in_the_liver_of_a_phantom() -> None:
    phantom = make_phantom(Subject("s", 3, 5, "F", 50, 168, 70))
    (a, b), (c, d), (e, f) = LIVER_BOX
    x, y, z = phantom.labels.shape
    box = phantom.labels[round(a * x) : round(b * x), round(c * y) : round(d * y), round(e * z) : round(f * z)]
    assert (box == 5).mean() > 0.8


def test_held_out_people_are_women_then_men_and_do_not_depend_on_how_many() -> None:
    few, more = (held_out(find_spec("autopet-test"), n, seed=5) for n in (3, 6))
    assert [s.sex for s in few] == ["F"] * 3 + ["M"] * 3
    assert [s.weight_kg for s in few[:3]] == [s.weight_kg for s in more[:3]]


def table(rng: np.random.Generator, n: int, shift: float, spread: float) -> pd.DataFrame:
    sex = np.where(np.arange(n) % 2 == 0, "F", "M")
    height, weight = rng.normal(170, 8, n), rng.normal(78, 15, n)
    out = pd.DataFrame({"sex": sex, "height_cm": height, "weight_kg": weight})
    for measure in MEASURES:
        out[measure] = (1 + shift) * (100 + spread * rng.normal(0, 10, n))
    out["lung_ml"] = 40 * height - 3600 + rng.normal(0, 100, n)
    out["body_ml"] = 620 * weight - 3000 + rng.normal(0, 500, n)
    return out


def test_agreement_sees_a_shift_and_a_lost_spread() -> None:
    rng = np.random.default_rng(0)
    rows = agreements(table(rng, 2000, 0.0, 1.0), table(rng, 2000, 0.05, 0.5))
    bone = next(a for a in rows if a.measure == "bone_ml" and a.sex == "all")
    assert bone.n == 2000 and bone.difference_percent == pytest.approx(5.0, abs=1.0)
    assert bone.sd_ratio == pytest.approx(0.525, abs=0.03)
    assert [a.measure for a in rows[::3]] == list(MEASURES)


def test_slopes_are_recovered_within_sex_and_know_their_error() -> None:
    found = slopes(table(np.random.default_rng(1), 2000, 0.0, 1.0))
    assert found["lung_ml per height_cm"].value == pytest.approx(40, rel=0.02)
    assert found["body_ml per weight_kg"].value == pytest.approx(620, rel=0.01)
    small = [slopes(table(np.random.default_rng(k), 40, 0.0, 1.0))["lung_ml per height_cm"] for k in range(300)]
    scatter = np.std([s.value for s in small], ddof=1)
    assert np.mean([s.error for s in small]) == pytest.approx(scatter, rel=0.12)


def test_a_cohort_without_enough_of_both_sexes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "men.csv").write_text("subject_id,sex,age_years,height_cm,weight_kg\nA,M,50,170,70\nB,M,60,180,80\n")
    with pytest.raises(InputError, match="not 3 women and men"):
        held_out(tmp_path / "men.csv", 3, seed=5)


def test_kept_rows_of_other_people_are_not_taken(tmp_path: Path) -> None:
    def measure(subject: Subject) -> dict[str, float]:
        return {"body_ml": subject.weight_kg}

    keep = tmp_path / "rows.csv"
    measure_all("phantoms", [Subject("a", 0, 5, "F", 50, 160, 61.3)], measure, keep, say=lambda line: None)
    other = measure_all("phantoms", [Subject("b", 0, 5, "M", 40, 180, 90.1)], measure, keep, say=lambda line: None)
    assert other["body_ml"].tolist() == [90.1]


def test_measuring_goes_on_where_it_stopped(tmp_path: Path) -> None:
    people = held_out(find_spec("autopet-test"), 3, seed=5)
    seen: list[int] = []

    def measure(subject: Subject) -> dict[str, float]:
        seen.append(subject.index)
        return {"body_ml": 2.0 * subject.weight_kg}

    keep = tmp_path / "rows.csv"
    measure_all("phantoms", people[:4], measure, keep, say=lambda line: None)
    whole = measure_all("phantoms", people, measure, keep, say=lambda line: None)
    assert sorted(seen) == sorted(s.index for s in people), "none measured twice"
    assert whole["body_ml"].tolist() == pytest.approx([2.0 * s.weight_kg for s in people])
