"""The phantom population against the published one: 400 people of the paper's test cohort, measured with true masks."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch

from vtrial.cohort.registry import find_spec
from vtrial.fidelity import held_out
from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.organs import labels_of
from vtrial.phantom.anthropometry import TABLE_1_VOLUME_ML
from vtrial.phantom.population import PhantomTensors, render_phantom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

# Table 1 of Yoon et al. 2025, the real columns: mean and SD by sex.
SUV_MEAN = {
    "liver": {"M": (2.26, 0.42), "F": (2.34, 0.33)},
    "heart": {"M": (2.48, 1.03), "F": (3.07, 1.39)},
    "kidneys": {"M": (2.50, 0.41), "F": (2.70, 0.45)},
}
SUV_MAX = {"heart": {"M": 10.20, "F": 12.20}, "kidneys": {"M": 11.20, "F": 11.83}}
ORGANS = ("liver", "heart", "kidneys", "spleen", "aorta")
EACH_SEX = int(os.environ.get("VTRIAL_PHANTOMS_EACH_SEX", "200"))
CENSORED_AT = 25.0


def measure(p: PhantomTensors) -> dict[str, float]:
    labels, suv = p.labels.reshape(-1).long(), p.suv.reshape(-1)
    count = torch.bincount(labels, minlength=118).double()
    total = torch.bincount(labels, weights=suv.double(), minlength=118)
    peak = torch.zeros(118).scatter_reduce(0, labels, suv, "amax")
    row = {}
    for organ in ORGANS:
        ids = list(labels_of(organ))
        row[f"{organ}_ml"] = float(count[ids].sum()) * IN_PLANE_MM**2 * p.plan.extent_mm / SHAPE[2] / 1000
        row[f"{organ}_mean"] = float(total[ids].sum() / count[ids].sum())
        row[f"{organ}_max"] = min(float(peak[ids].max()), CENSORED_AT)
    return row


@pytest.fixture(scope="module")
def population() -> pd.DataFrame:
    people = held_out(find_spec("autopet-test"), EACH_SEX, seed=90_001)
    rows = [{"sex": s.sex, "h": s.height_cm, "w": s.weight_kg} | measure(render_phantom(s)) for s in people]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("sex", ["M", "F"])
def test_volumes_and_mean_uptake_are_the_real_cohorts(population: pd.DataFrame, sex: str) -> None:
    mine = population[population["sex"] == sex]
    off = []
    for table, suffix, unit in ((TABLE_1_VOLUME_ML, "ml", "ml"), (SUV_MEAN, "mean", "SUV")):
        for organ, by_sex in table.items():
            mean, sd = by_sex[sex]
            values = mine[f"{organ}_{suffix}"]
            difference, ratio = values.mean() / mean - 1, values.std() / sd
            if abs(difference) > 0.05 or not 0.8 <= ratio <= 1.25:
                off.append(f"{organ} {unit}: {100 * difference:+.1f} %, SD ratio {ratio:.2f}")
    assert not off, "\n".join(off)


@pytest.mark.parametrize("sex", ["M", "F"])
def test_hot_spots_reach_the_published_maximum(population: pd.DataFrame, sex: str) -> None:
    mine = population[population["sex"] == sex]
    for organ, by_sex in SUV_MAX.items():
        assert mine[f"{organ}_max"].mean() == pytest.approx(by_sex[sex], rel=0.25), organ


def test_uptake_is_correlated_as_published(population: pd.DataFrame) -> None:
    r = population[[f"{organ}_mean" for organ in ORGANS]].corr()
    assert r.loc["liver_mean", "aorta_mean"] >= 0.75
    assert r.loc["liver_mean", "spleen_mean"] >= 0.65
    assert r.loc["heart_mean"].drop("heart_mean").max() <= 0.35


def test_liver_follows_weight_and_height(population: pd.DataFrame) -> None:
    design = np.column_stack([np.ones(len(population)), population["w"], population["h"], population["sex"] == "M"])
    slopes = np.linalg.lstsq(design.astype(float), population["liver_ml"].to_numpy())[0]
    # Published (healthy-fdg): 7.88 ml/kg and 6.98 ml/cm. In 400 people with the published residual SD the slopes have
    # standard errors of about 1.3 ml/kg and 2.9 ml/cm, so chance can fail this; test_phantom.py tests the law.
    assert slopes[1] == pytest.approx(7.88, rel=0.3)
    assert slopes[2] == pytest.approx(6.98, rel=0.3)
