"""How large a body and its organs are: numbers drawn from published relations, before anything is painted.

Sources, beside each constant: ICRP 89/110 reference persons; `healthy-fdg` = regressions over 80 adults (hedyPET);
Yoon et al. 2025, Table 1 (means and SDs of liver, heart, kidneys by sex in AutoPET); GLI 2021 (lung volumes);
Deurenberg 1991 (body fat).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtrial.geometry import extent_mm
from vtrial.records import Sex, Subject

REFERENCE_LENGTH_MM = {"M": 568.0, "F": 561.0}  # sacrum bottom to clavicle top, ICRP 110
REFERENCE_HEIGHT_CM = {"M": 176.0, "F": 163.0}
REFERENCE_FAT_FREE_KG = {"M": 55.5, "F": 41.5}
# Field of view over trunk length: 737 mm / 568 mm for the reference man (reference: released preprocessing).
FOV_PER_TRUNK = {"M": 1.295, "F": 1.262}
FOV_BOTTOM_FRACTION = -0.2

# Mean and SD in ml by sex of the paper's real test cohort (Table 1), whose mean body is TEST_BODY.
TABLE_1_VOLUME_ML = {
    "liver": {"M": (1760.0, 440.0), "F": (1550.0, 370.0)},
    "heart": {"M": (680.0, 150.0), "F": (550.0, 90.0)},
    "kidneys": {"M": (355.0, 80.0), "F": (300.0, 60.0)},  # 0.30 printed for men; the printed differences imply 0.355
}
TEST_BODY = {"M": (177.0, 83.0, 7.0, 15.0), "F": (165.0, 76.0, 7.0, 19.0)}  # height, weight, their SDs
TEST_R_HEIGHT_WEIGHT = {"M": 0.43, "F": 0.33}  # NHANES 2017-2018 adults
# ml per kg, ml per cm (healthy-fdg regressions); kidneys' height slope is not significant and set to 0.
SLOPES = {"liver": (7.88, 6.98), "heart": (1.33, 5.66), "kidneys": (2.07, 0.0)}
# Organs without a Table 1 row: mean by sex at the test body, residual CV, ml per kg, ml per cm (healthy-fdg).
OTHER_VOLUMES = {
    "spleen": ({"M": 250.0, "F": 190.0}, 0.33, 2.4, 1.4),
    "pancreas": ({"M": 88.0, "F": 74.0}, 0.22, 0.4, 0.4),
    "stomach": ({"M": 290.0, "F": 260.0}, 0.28, 0.65, 1.0),
    "gallbladder": ({"M": 28.0, "F": 24.0}, 0.45, 0.1, 0.0),
    "bladder": ({"M": 150.0, "F": 130.0}, 0.50, 0.0, 0.0),
}


@dataclass(frozen=True)
class BodyPlan:
    """Everything about a body's size that the painter needs. Volumes in ml, lengths in mm."""

    sex: Sex
    bmi: float
    age_years: float
    extent_mm: float
    scale_x: float  # body mm per reference mm
    scale_y: float
    scale_z: float
    bottom_mm: float  # reference z of the lower end of the field of view
    lean_scale: float  # in-plane size of the lean outline relative to the reference person, on top of scale_x
    belly_mm: float  # how far visceral fat pushes the abdominal wall forward
    body_ml: float  # whole body inside the field of view
    breast_ml: float  # each side
    cage_scale: float  # width of the rib cage relative to the reference
    kyphosis_mm: float
    volumes: dict[str, float]

    @property
    def reference_length_mm(self) -> float:
        """Length of the reference trunk, the unit of z fractions."""
        return REFERENCE_LENGTH_MM[self.sex]


def body_fat_fraction(subject: Subject) -> float:
    """Fat mass over body mass (Deurenberg 1991: 1.20 BMI + 0.23 age − 10.8 male − 5.4, in percent)."""
    percent = 1.20 * subject.bmi + 0.23 * subject.age_years - 10.8 * (subject.sex == "M") - 5.4
    return float(np.clip(percent / 100.0, 0.08, 0.58))


def lung_volume_ml(subject: Subject) -> float:
    """Expected lung volume on a shallow-breathing PET/CT: functional residual capacity, GLI 2021 without splines.

    The published volumes on such scans (healthy-fdg: 3.37 l men, 2.61 l women) are 0.93 of it.
    """
    ln_age, ln_height = np.log(max(subject.age_years, 18.0)), np.log(subject.height_cm)
    if subject.sex == "M":
        frc = np.exp(-13.4898 + 0.1111 * ln_age + 2.7634 * ln_height)
    else:
        frc = np.exp(-12.7674 + 0.1251 * ln_age + 2.6049 * ln_height)
    return float(930.0 * frc)


def _table_1_volume(organ: str, subject: Subject, z: float) -> float:
    """Volume whose mean and SD over the test cohort are Table 1's and whose slopes are the published ones."""
    mean, sd = TABLE_1_VOLUME_ML[organ][subject.sex]
    per_kg, per_cm = SLOPES[organ]
    height, weight, sd_h, sd_w = TEST_BODY[subject.sex]
    r = TEST_R_HEIGHT_WEIGHT[subject.sex]
    explained = (per_kg * sd_w) ** 2 + (per_cm * sd_h) ** 2 + 2 * r * per_kg * sd_w * per_cm * sd_h
    expected = mean + per_kg * (subject.weight_kg - weight) + per_cm * (subject.height_cm - height)
    expected = max(expected, 0.6 * mean)
    residual = np.sqrt(max(sd**2 - explained, (0.3 * sd) ** 2))
    # Log-normal around the expected volume: same mean and SD, never negative.
    s2 = np.log1p((residual / expected) ** 2)
    return float(expected * np.exp(np.sqrt(s2) * z - s2 / 2))


def draw_volumes(subject: Subject, rng: np.random.Generator) -> dict[str, float]:
    """Organ volumes in ml: `liver`, `heart`, `kidneys`, `lungs`, and those of OTHER_VOLUMES."""
    z = np.clip(rng.standard_normal(9), -2.6, 2.6)
    volumes = {organ: _table_1_volume(organ, subject, z[i]) for i, organ in enumerate(TABLE_1_VOLUME_ML)}
    volumes["lungs"] = lung_volume_ml(subject) * float(np.exp(0.15 * z[3] - 0.011))
    height, weight, _, _ = TEST_BODY[subject.sex]
    for i, (organ, (means, cv, per_kg, per_cm)) in enumerate(OTHER_VOLUMES.items()):
        mean = means[subject.sex]
        expected = mean + per_kg * (subject.weight_kg - weight) + per_cm * (subject.height_cm - height)
        s = np.sqrt(np.log1p(cv**2))
        volumes[organ] = float(max(expected, 0.4 * mean) * np.exp(s * z[4 + i] - s * s / 2))
    return volumes


def plan_body(subject: Subject, rng: np.random.Generator) -> BodyPlan:
    """Draw the size of a subject's body and organs."""
    sex = subject.sex
    z = np.clip(rng.standard_normal(8), -2.5, 2.5)
    volumes = draw_volumes(subject, rng)
    frame = (subject.height_cm / REFERENCE_HEIGHT_CM[sex]) ** 0.6
    extent = extent_mm(subject.height_cm)
    scale_z = extent / (FOV_PER_TRUNK[sex] * REFERENCE_LENGTH_MM[sex]) * (1 + 0.012 * z[0])
    scale_x = frame * (1 + 0.025 * z[1])
    scale_y = frame * (1 + 0.03 * z[2])
    fat_free = subject.weight_kg * (1 - body_fat_fraction(subject))
    lean_area = fat_free / REFERENCE_FAT_FREE_KG[sex] / scale_z
    lean_scale = float(np.clip(np.sqrt(lean_area) / np.sqrt(scale_x * scale_y), 0.88, 1.22))
    per_bmi, start = (1.9, 24.0) if sex == "M" else (1.15, 24.0)
    belly = per_bmi * (subject.bmi - start) + 0.12 * (subject.age_years - 50) + 5.0 * z[3]
    reference_ml = FOV_PER_TRUNK[sex] * REFERENCE_LENGTH_MM[sex] * scale_z
    lungs_reference = {"M": 3250.0, "F": 2500.0}[sex] * scale_x * scale_y * scale_z
    cage = float(np.clip((volumes["lungs"] / lungs_reference) ** 0.22, 0.9, 1.1))
    # ICRP 110: the field of view holds 0.57 of the reference man's and woman's mass; added weight is mostly trunk.
    body = 0.62 * subject.weight_kg - 3.8 + 0.012 * (reference_ml - 735.0) + 0.6 * z[4]
    body += (volumes["lungs"] - 3000.0) / 1000.0 * 0.6
    return BodyPlan(
        sex=sex,
        bmi=subject.bmi,
        age_years=subject.age_years,
        extent_mm=extent,
        scale_x=float(scale_x),
        scale_y=float(scale_y),
        scale_z=float(scale_z),
        bottom_mm=(FOV_BOTTOM_FRACTION + 0.008 * float(z[5])) * REFERENCE_LENGTH_MM[sex],
        lean_scale=lean_scale,
        belly_mm=float(np.clip(belly, -12.0, 48.0)),
        body_ml=float(1000.0 * max(body, 0.42 * subject.weight_kg)),
        breast_ml=float(np.clip(330 + 38 * (subject.bmi - 25), 110, 1100) * np.exp(0.3 * z[6])) if sex == "F" else 0.0,
        cage_scale=cage,
        kyphosis_mm=float(0.12 * (subject.age_years - 50) + 3 * z[7]),
        volumes=volumes,
    )
