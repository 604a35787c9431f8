"""How like held-out phantoms a model's twins are, one by one with the same demographics: the table of the model card.

Measured on whole bodies, without any segmentation: volumes by HU, total activity, and the SUV of a fixed box where the
liver lies. Stage 1 is measured at 56×56×96, the cascade at 224×224×384.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage

from vtrial.cohort.recruit import recruit
from vtrial.cohort.spec import read_spec
from vtrial.diffusion.cascade import Cascade
from vtrial.diffusion.conditions import PHASE, Demographics
from vtrial.geometry import FACTOR, LOW_SHAPE, SHAPE, spacing_mm
from vtrial.imaging.codec import decode_ct, decode_suv, encode_ct, encode_suv
from vtrial.phantom.population import render_phantom
from vtrial.randomness import Purpose, subject_torch_seed
from vtrial.records import Sex, Subject

Level = Literal["global", "full"]
MEASURES = ("body_ml", "lung_ml", "bone_ml", "activity_g", "liver_box_suv")
BODY_HU, LUNG_HU, BONE_HU = -300.0, -350.0, 220.0
# Fractions of the grid (x, y, z) where the liver lies in most people, whatever their size.
LIVER_BOX = ((0.60, 0.70), (0.47, 0.62), (0.575, 0.635))
LUNGS_ABOVE = 0.50  # fraction of z: gas below it is bowel
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Agreement:
    """One measure of twins against phantoms: difference of means in %, ratio of SDs, and both slopes where asked."""

    measure: str
    sex: str
    n: int
    phantoms_mean: float
    phantoms_sd: float
    twins_mean: float
    twins_sd: float

    @property
    def difference_percent(self) -> float:
        """Difference of means in percent of the phantoms'."""
        return 100.0 * (self.twins_mean / self.phantoms_mean - 1.0)

    @property
    def sd_ratio(self) -> float:
        """SD of the twins over SD of the phantoms."""
        return self.twins_sd / self.phantoms_sd


def measure_body(ct_hu: NDArray[np.float32], suv: NDArray[np.float32], voxel_mm: Sequence[float]) -> dict[str, float]:
    """Volumes in ml, activity (SUV integral, g) and liver-box SUV of a body on any (x, y, z) grid over the full view.

    Body: voxels above -300 HU, holes of every axial slice filled. Lungs: voxels under -350 HU in it, upper half.
    """
    ml = float(np.prod(voxel_mm)) / 1000.0
    tissue = ct_hu > BODY_HU
    body = np.stack([ndimage.binary_fill_holes(tissue[:, :, k]) for k in range(tissue.shape[2])], axis=2)
    chest = int(LUNGS_ABOVE * body.shape[2])
    x, y, z = (slice(round(a * n), max(round(b * n), round(a * n) + 1)) for (a, b), n in zip(LIVER_BOX, ct_hu.shape))
    return {
        "body_ml": float(body.sum() * ml),
        "lung_ml": float((body & (ct_hu < LUNG_HU))[:, :, chest:].sum() * ml),
        "bone_ml": float((ct_hu > BONE_HU).sum() * ml),
        "activity_g": float(suv.sum(dtype=np.float64) * ml),
        "liver_box_suv": float(suv[x, y, z].mean()),
    }


def _measure_pair(pair: torch.Tensor, height_cm: float) -> dict[str, float]:
    """`measure_body` of a model-space pair (2, x, y, z)."""
    shape = (pair.shape[1], pair.shape[2], pair.shape[3])
    return measure_body(decode_ct(pair[0]).numpy(), decode_suv(pair[1]).numpy(), spacing_mm(height_cm, shape))


def held_out(spec: str | Path, each_sex: int, seed: int) -> list[Subject]:
    """The first `each_sex` women and men recruited from a spec with a seed that no training used."""
    subjects = recruit(read_spec(spec), 4 * each_sex + 20, seed)
    sexes: tuple[Sex, Sex] = ("F", "M")
    return [s for sex in sexes for s in [s for s in subjects if s.sex == sex][:each_sex]]


def measure_phantoms(subjects: Sequence[Subject], level: Level, report: Report | None = None) -> pd.DataFrame:
    """One row a subject: what their phantom measures, through the same intensity clipping as the model's volumes."""
    rows = []
    for i, subject in enumerate(subjects):
        phantom = render_phantom(subject)
        pair = torch.stack([encode_ct(phantom.ct_hu), encode_suv(phantom.suv)])
        if level == "global":
            px, py, pz = PHASE
            pair = pair[:, px::FACTOR, py::FACTOR, pz::FACTOR].contiguous()
        rows.append(_row(subject) | _measure_pair(pair, subject.height_cm))
        if report is not None:
            report("phantoms", i + 1, len(subjects))
    return pd.DataFrame(rows)


def measure_twins(
    cascade: Cascade, subjects: Sequence[Subject], level: Level, report: Report | None = None
) -> pd.DataFrame:
    """One row a subject: what the model's twin with the same demographics measures."""
    rows = []
    for i, s in enumerate(subjects):
        person = Demographics(s.sex, s.age_years, s.height_cm, s.weight_kg)
        noise = torch.Generator().manual_seed(subject_torch_seed(s.seed, s.index, Purpose.GLOBAL))
        if level == "global":
            pair = cascade.sample_low([person], noise=noise)[0]
        else:
            refine = torch.Generator().manual_seed(subject_torch_seed(s.seed, s.index, Purpose.SUPER_RESOLUTION))
            pair = cascade.sample(person, global_noise=noise, sr_noise=refine)
        expected = (2, *(LOW_SHAPE if level == "global" else SHAPE))
        assert tuple(pair.shape) == expected, f"{tuple(pair.shape)} is not {expected}"
        rows.append(_row(s) | _measure_pair(pair.cpu().float(), s.height_cm))
        if report is not None:
            report("twins", i + 1, len(subjects))
    return pd.DataFrame(rows)


def _row(s: Subject) -> dict[str, object]:
    return {"sex": s.sex, "age_years": s.age_years, "height_cm": s.height_cm, "weight_kg": s.weight_kg}


def agreements(phantoms: pd.DataFrame, twins: pd.DataFrame) -> list[Agreement]:
    """Every measure for women, men and all, in the order of MEASURES."""
    out = []
    for measure in MEASURES:
        for sex in ("F", "M", "all"):
            a, b = (t[measure] if sex == "all" else t.loc[t["sex"] == sex, measure] for t in (phantoms, twins))
            out.append(
                Agreement(
                    measure, sex, len(a), float(a.mean()), float(a.std(ddof=1)), float(b.mean()), float(b.std(ddof=1))
                )
            )
    return out


def slopes(table: pd.DataFrame) -> dict[str, float]:
    """Least-squares slopes that conditioning must carry: lung volume on height, body volume on weight (ml per unit).

    Adjusted for sex, so that they tell of bodies within a sex.
    """
    male = (table["sex"] == "M").to_numpy(dtype=float)
    out = {}
    for measure, cause in (("lung_ml", "height_cm"), ("body_ml", "weight_kg")):
        design = np.column_stack([np.ones(len(table)), table[cause].to_numpy(dtype=float), male])
        out[f"{measure} per {cause}"] = float(np.linalg.lstsq(design, table[measure].to_numpy(dtype=float))[0][1])
    return out
