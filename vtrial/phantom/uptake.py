"""FDG uptake of the tissues of one subject, drawn jointly.

Means and SDs of liver, heart and kidneys: Yoon et al. 2025, Table 1 (real columns). Correlations between organs and the
ratios of the others to the liver: `healthy-fdg` (hedyPET, 80 adults). BMI trend: liver r about 0.5 with body size
(Tahari 2014). All SUV in g/ml (body weight).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtrial.phantom.tissues import Material
from vtrial.records import Subject

M = Material
ORGANS = ("liver", "spleen", "kidneys", "aorta", "lungs", "pancreas", "stomach", "colon", "marrow", "muscle")
# healthy-fdg correlations of SUVmean, in the order of ORGANS (marrow: L3, muscle: autochthon).
CORRELATION = np.array(
    [
        [1.00, 0.80, 0.52, 0.87, 0.59, 0.39, 0.36, 0.15, 0.57, 0.55],
        [0.80, 1.00, 0.59, 0.78, 0.67, 0.47, 0.18, 0.10, 0.67, 0.56],
        [0.52, 0.59, 1.00, 0.52, 0.53, 0.53, 0.07, 0.04, 0.53, 0.37],
        [0.87, 0.78, 0.52, 1.00, 0.63, 0.31, 0.31, 0.12, 0.62, 0.62],
        [0.59, 0.67, 0.53, 0.63, 1.00, 0.32, 0.02, 0.20, 0.62, 0.42],
        [0.39, 0.47, 0.53, 0.31, 0.32, 1.00, 0.20, 0.15, 0.51, 0.16],
        [0.36, 0.18, 0.07, 0.31, 0.02, 0.20, 1.00, 0.03, 0.05, 0.24],
        [0.15, 0.10, 0.04, 0.12, 0.20, 0.15, 0.03, 1.00, 0.22, 0.10],
        [0.57, 0.67, 0.53, 0.62, 0.62, 0.51, 0.05, 0.22, 1.00, 0.45],
        [0.55, 0.56, 0.37, 0.62, 0.42, 0.16, 0.24, 0.10, 0.45, 1.00],
    ]
)
# Mean SUV and coefficient of variation by sex. Liver, kidneys: Table 1 over the share that blur leaves in the mask
# (liver 0.965; kidneys: 0.925 of the parenchyma plus 0.0054 of the urine in the pelvis). Others: hedyPET's ratio to
# the liver.
MEANS = {
    "liver": {"M": (2.34, 0.186), "F": (2.425, 0.143)},
    "spleen": {"M": (1.85, 0.16), "F": (1.98, 0.14)},
    "kidneys": {"M": (2.58, 0.165), "F": (2.79, 0.165)},
    "aorta": {"M": (1.85, 0.16), "F": (1.92, 0.14)},
    "lungs": {"M": (0.50, 0.17), "F": (0.54, 0.15)},
    "pancreas": {"M": (1.62, 0.15), "F": (1.75, 0.15)},
    "stomach": {"M": (1.75, 0.23), "F": (1.75, 0.23)},
    "colon": {"M": (1.35, 0.38), "F": (1.35, 0.38)},
    "marrow": {"M": (1.55, 0.17), "F": (1.62, 0.17)},
    "muscle": {"M": (0.66, 0.13), "F": (0.68, 0.13)},
}
BMI_CORRELATION = 0.45  # of blood-like uptake with BMI
BMI_MEAN_SD = {"M": (26.5, 4.4), "F": (27.9, 6.4)}
# Myocardium: suppressed after a long fast, else hot (log-normal). Weight of the suppressed state, its mean, the hot
# state's mean and log SD: they give Table 1's mean, SD and maximum of the whole heart.
MYOCARDIUM = {"M": (0.45, 2.4, 8.3, 0.68), "F": (0.38, 2.6, 12.6, 0.60)}
URINE_PELVIS = {"M": (20.3, 0.42), "F": (21.5, 0.42)}  # mean SUV, log SD; diluted by blur to Table 1's SUVmax


@dataclass(frozen=True)
class UptakePlan:
    """SUV of every material, voxel noise at SUV 1, and the drawn organ values for the record."""

    suv: dict[Material, float]
    noise: float
    drawn: dict[str, float]


def draw_organ_suvs(subject: Subject, rng: np.random.Generator) -> dict[str, float]:
    """Jointly normal organ uptake with the published correlations and a common trend with BMI and age."""
    z = np.linalg.cholesky(CORRELATION + 1e-6 * np.eye(len(ORGANS))) @ rng.standard_normal(len(ORGANS))
    mean_bmi, sd_bmi = BMI_MEAN_SD[subject.sex]
    size = np.clip((subject.bmi - mean_bmi) / sd_bmi, -2.5, 2.5)
    out = {}
    for organ, value in zip(ORGANS, z):
        mean, cv = MEANS[organ][subject.sex]
        share = 0.0 if organ in ("stomach", "colon") else BMI_CORRELATION
        score = np.clip(share * size + np.sqrt(1 - share**2) * value, -2.6, 3.0)
        out[organ] = float(mean * (1 + cv * score))
    out["liver"] += 0.002 * (subject.age_years - 58)  # Rev Esp Med Nucl 2013, n = 603
    out["marrow"] *= 1 - 0.003 * (subject.age_years - 58)
    return out


def _log_normal(mean: float, log_sd: float, z: float) -> float:
    return float(mean * np.exp(log_sd * z - log_sd**2 / 2))


def plan_uptake(subject: Subject, rng: np.random.Generator) -> UptakePlan:
    """Draw the uptake of every material of one subject."""
    organ = draw_organ_suvs(subject, rng)
    z = np.clip(rng.standard_normal(12), -2.3, 2.3)
    suppressed, low, hot, log_sd = MYOCARDIUM[subject.sex]
    if rng.uniform() < suppressed:
        myocardium = _log_normal(low, 0.2, z[0])
    else:
        myocardium = _log_normal(hot, log_sd, z[0])
    blood, muscle = organ["aorta"], organ["muscle"]
    pelvis = _log_normal(*URINE_PELVIS[subject.sex], z[1])
    fat = 0.26 * (1 + 0.12 * z[2])
    suv = {
        M.SKIN: 0.45,
        M.FAT: fat,
        M.VISCERAL_FAT: 1.6 * fat,
        M.MUSCLE: muscle,
        M.BREAST: 0.55 * (1 + 0.2 * z[3]),
        M.BONE: 0.55 * organ["marrow"],
        M.CORTICAL: 0.45 * organ["marrow"],
        M.MARROW: organ["marrow"],
        M.DISC: 0.6 * organ["marrow"],
        M.CARTILAGE: 0.5,
        M.CORD: 1.35 * (1 + 0.1 * z[4]),
        M.LUNG: 0.85 * organ["lungs"],
        M.LUNG_VESSEL: 0.9 * blood,
        M.AIRWAY: 0.15,
        M.BLOOD: blood,
        M.VEIN: 0.97 * blood,
        M.LV_WALL: max(myocardium, 0.9 * blood),
        M.HEART_WALL: blood + 0.22 * max(myocardium - blood, 0.0),
        M.LIVER: organ["liver"],
        M.LIVER_VESSEL: 0.92 * organ["liver"],
        M.GALLBLADDER: 0.9,
        M.SPLEEN: organ["spleen"],
        M.PANCREAS: organ["pancreas"],
        M.ADRENAL: 1.1 * organ["pancreas"],
        M.RENAL_CORTEX: organ["kidneys"],
        M.RENAL_MEDULLA: 1.1 * organ["kidneys"],
        M.RENAL_PELVIS: pelvis,
        M.STOMACH_WALL: 1.35 * organ["stomach"],
        M.STOMACH_CONTENT: 0.6 * organ["stomach"],
        M.BOWEL: 1.25 * organ["colon"] * float(np.exp(0.2 * z[5])),
        M.COLON_WALL: 1.5 * organ["colon"],
        M.COLON_CONTENT: 0.8 * organ["colon"],
        M.GAS: 0.3,
        M.OESOPHAGUS: 1.75 * (1 + 0.15 * z[6]),
        M.BLADDER_WALL: 1.6,
        M.URINE: float(np.clip(_log_normal(22.0, 0.55, z[7]), 4, 90)),
        M.PELVIC_ORGAN: 1.6 * (1 + 0.2 * z[8]),
        M.THYROID: 1.35 * (1 + 0.2 * z[9]),
    }
    # Counts fall with attenuation: heavier people are noisier.
    noise = 0.26 * float(np.sqrt(subject.weight_kg / 80.0) * np.exp(0.12 * z[10]))
    return UptakePlan(suv=suv, noise=noise, drawn={**organ, "myocardium": myocardium, "renal_pelvis": pelvis})
