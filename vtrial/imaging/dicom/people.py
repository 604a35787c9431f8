"""Sex, age, height and weight from DICOM headers: what cannot be true is unknown, and the doubt is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vtrial.imaging.dicom.clock import day_of
from vtrial.imaging.dicom.fields import coarse, number_of, text_of
from vtrial.imaging.dicom.suv import BMI, HEIGHT_M, WEIGHT_KG
from vtrial.records import Sex

_LEAP = 0.003  # years: a day, as years of 365.25 days end up to one after the birthday
_AGE_YEARS = (0.0, 120.0)


@dataclass(frozen=True, slots=True)
class Person:
    """Who a header is about; None where it does not say, or says what cannot be. `doubts` tell why, in words."""

    sex: Sex | None
    age_years: float | None
    height_cm: float | None
    weight_kg: float | None
    doubts: tuple[str, ...] = ()


def person_of(dataset: Any) -> Person:
    """The person of one image's header (a pydicom data set), as it stands there."""
    told = text_of(dataset, "PatientSex").upper()
    sex: Sex | None = "F" if told == "F" else "M" if told == "M" else None
    height_m, weight_kg = number_of(dataset, "PatientSize"), number_of(dataset, "PatientWeight")
    age_years, doubts = _age(dataset)
    return Person(sex, age_years, round(100.0 * height_m, 1) if height_m else None, weight_kg or None, doubts)


def _age(dataset: Any) -> tuple[float | None, tuple[str, ...]]:
    """Age in years by PatientAge, else from birth to study."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", text_of(dataset, "PatientAge").upper())
    born, studied = day_of(text_of(dataset, "PatientBirthDate")), day_of(text_of(dataset, "StudyDate"))
    counted = None if born is None or studied is None else (studied - born) / 365.25
    if match is None:  # in whole years, as PatientAge is: to the day it would tell the day of birth
        return None if counted is None else float(math.floor(counted + _LEAP)), ()
    told = int(match[1]) / {"D": 365.25, "W": 365.25 / 7.0, "M": 12.0, "Y": 1.0}[match[2]]
    agree = counted is None or -0.5 <= counted - told <= 1.5  # PatientAge is in whole years
    return told, () if agree else ("PatientBirthDate tells another age than PatientAge, which was taken",)


def agreed_person(persons: Iterable[Person]) -> Person:
    """The person of a study from the headers of its images: each value where they agree and it can be true."""
    everyone = list(persons)
    doubts = sorted({doubt for person in everyone for doubt in person.doubts})
    sexes = {person.sex for person in everyone} - {None}
    if len(sexes) > 1:
        doubts.append("PatientSex differs between the images: sex unknown")
    elif not sexes:
        doubts.append("PatientSex is not F or M: sex unknown")
    low_cm, high_cm = (100.0 * limit for limit in HEIGHT_M)
    age = _agreed("PatientAge", "years", [p.age_years for p in everyone], _AGE_YEARS, 1.0, doubts)
    height = _agreed("PatientSize", "cm", [p.height_cm for p in everyone], (low_cm, high_cm), 2.0, doubts)
    weight = _agreed("PatientWeight", "kg", [p.weight_kg for p in everyone], WEIGHT_KG, 2.0, doubts)
    if height is not None and weight is not None:
        bmi = weight / (height / 100.0) ** 2
        if not BMI[0] <= bmi <= BMI[1]:
            doubts.append(f"height {height:g} cm and weight {weight:g} kg cannot both be: both unknown")
            height = weight = None
    sex = next(iter(sexes)) if len(sexes) == 1 else None
    return Person(sex, age, height, weight, tuple(doubts))


def _agreed(
    name: str, unit: str, told: list[float | None], limits: tuple[float, float], apart: float, doubts: list[str]
) -> float | None:
    """The first of the values that are there, if all are plausible and no further apart than `apart`."""
    values = [value for value in told if value is not None]
    if not values:
        doubts.append(f"{name} is missing: unknown")
        return None
    absurd = next((value for value in values if not limits[0] <= value <= limits[1]), None)
    if absurd is not None:
        doubts.append(f"{name} is {coarse(absurd)} {unit}; plausible are {limits[0]:g} to {limits[1]:g}: unknown")
        return None
    if max(values) - min(values) > apart:
        doubts.append(f"{name} differs between the images, {min(values):g} to {max(values):g} {unit}: unknown")
        return None
    return values[0]
