"""One row of a cohort table, checked: pydantic at the edge of the disk.

The validators raise ValueError with what is wrong and the remedy; `table.parse_rows` adds file, row, column and value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def _number(cell: object) -> float:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise ValueError("a number is needed here; fill it in or remove the row")
    try:
        value = float(cell.strip() if isinstance(cell, str) else cell)  # type: ignore[arg-type]  # anything may come
    except (TypeError, ValueError):
        raise ValueError("not a number; write it with a decimal point and without a unit, as 72.5") from None
    if not math.isfinite(value):
        raise ValueError("not a finite number; fill it in or remove the row")
    return value


def _within(low: float, high: float, unit: str) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"outside {low:g} to {high:g} {unit}; check the value and its unit")
        return value

    return check


def _optional(check: Callable[[float], float]) -> Callable[[object], float | None]:
    return lambda cell: None if cell is None else check(_number(cell))


def _height(value: float) -> float:
    if 0.3 <= value < 3.0:
        raise ValueError(f"looks like metres; heights are in cm: write {value * 100:g}")
    return _within(30.0, 260.0, "cm")(value)


def _sex(cell: object) -> str:
    if cell not in ("F", "M"):
        raise ValueError("sex is F or M")
    return str(cell)


def _share(value: float) -> float:
    if value <= 0.0:
        raise ValueError(
            "a share must be above 0 (shares are relative to each other); remove the row or give it weight"
        )
    return value


def _spread(value: float) -> float:
    if value < 0.0:
        raise ValueError("a standard deviation cannot be below 0; write its absolute value, or 0 for a constant")
    return value


def _correlation(value: float) -> float:
    if not -1.0 <= value <= 1.0:
        raise ValueError("outside [-1, 1]; a correlation is needed here")
    return value


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def _name(cell: object) -> str:
    text = _text(cell).strip()
    if not text:
        raise ValueError("a stratum needs a name")
    return text


def _subject_id(cell: object) -> str:
    text = _text(cell)
    if not text:
        raise ValueError("a subject needs an id")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError(
            "it names a file: no path, 1 to 64 of the characters A-Z a-z 0-9 . _ -, the first a letter or digit"
        )
    return text


Number = Annotated[float, BeforeValidator(_number)]
Age = Annotated[Number, AfterValidator(_within(0.0, 130.0, "years"))]
Height = Annotated[Number, AfterValidator(_height)]
Weight = Annotated[Number, AfterValidator(_within(0.5, 650.0, "kg"))]
Bmi = Annotated[Number, AfterValidator(_within(5.0, 150.0, "kg/m²"))]
Spread = Annotated[Number, AfterValidator(_spread)]
Correlation = Annotated[Number, AfterValidator(_correlation)]
OptionalWeight = Annotated[float | None, BeforeValidator(_optional(_within(0.5, 650.0, "kg")))]
OptionalBmi = Annotated[float | None, BeforeValidator(_optional(_within(5.0, 150.0, "kg/m²")))]
SexCell = Annotated[Literal["F", "M"], BeforeValidator(_sex)]
Text = Annotated[str, BeforeValidator(_text)]


class SubjectRow(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject_id: Annotated[str, BeforeValidator(_subject_id)]
    sex: SexCell
    age_years: Age
    height_cm: Height
    weight_kg: Weight


class StratumRow(BaseModel):
    """What every stratum tells; `WeightRow` and `BmiRow` add the body's size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stratum: Annotated[str, BeforeValidator(_name)]
    share: Annotated[Number, AfterValidator(_share)]
    sex: SexCell
    diagnosis: Text = ""
    source: Text = ""
    age_mean: Age
    age_sd: Spread
    age_min: Age
    age_max: Age
    height_mean: Height
    height_sd: Spread
    height_min: Height
    height_max: Height
    r_age_height: Correlation

    # These run as far as the fields before them were right, so one bad cell hides no other problem of its row.
    @field_validator("age_max", "height_max", "weight_max", "bmi_max", check_fields=False)
    @classmethod
    def _ordered(cls, high: float | None, info: ValidationInfo) -> float | None:
        variable = str(info.field_name).removesuffix("_max")
        low, mean, sd = (info.data.get(f"{variable}_{part}") for part in ("min", "mean", "sd"))
        if low is None or high is None:
            if (low is None) != (high is None) and f"{variable}_min" in info.data:
                raise ValueError(f"give both {variable}_min and {variable}_max, or neither")
            return high
        if low > high:
            raise ValueError(f"below {variable}_min ({low:g}); swap them")
        if mean is not None and not low <= mean <= high:
            raise ValueError(
                f"{variable}_mean {mean:g} lies outside {low:g} to {high:g}; widen the limits or move the mean"
            )
        if mean is not None and sd and not low < mean < high:
            raise ValueError(
                f"{variable}_mean {mean:g} lies on a limit, so nobody can vary; widen the limits or set the SD to 0"
            )
        return high

    @field_validator("r_height_weight", "r_height_bmi", check_fields=False)
    @classmethod
    def _positive_definite(cls, last: float, info: ValidationInfo) -> float:
        size = str(info.field_name).removeprefix("r_height_")
        a, b = info.data.get("r_age_height"), info.data.get(f"r_age_{size}")
        if a is None or b is None:
            return last
        matrix = np.array([[1.0, a, b], [a, 1.0, last], [b, last, 1.0]])
        if np.linalg.eigvalsh(matrix)[0] < 1e-6:
            raise ValueError(
                f"the correlations of stratum {info.data.get('stratum', '?')} (r_age_height {a:g}, r_age_{size} {b:g}, "
                f"r_height_{size} {last:g}) are not positive definite: no people can have them; move them towards 0"
            )
        return last


class WeightRow(StratumRow):
    """A stratum told by weight in kg."""

    weight_mean: Weight
    weight_sd: Spread
    weight_min: Weight
    weight_max: Weight
    bmi_min: OptionalBmi = None
    bmi_max: OptionalBmi = Field(default=None, validate_default=True)
    r_age_weight: Correlation
    r_height_weight: Correlation


class BmiRow(StratumRow):
    """A stratum told by BMI in kg/m²."""

    bmi_mean: Bmi
    bmi_sd: Spread
    bmi_min: Bmi
    bmi_max: Bmi
    weight_min: OptionalWeight = None
    weight_max: OptionalWeight = Field(default=None, validate_default=True)
    r_age_bmi: Correlation
    r_height_bmi: Correlation
