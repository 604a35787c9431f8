"""Names, units and numbers as people read them."""

from __future__ import annotations

import math
import re
from typing import Any

EQUIVALENT, DIFFERENT, TOO_FEW, NOT_COMPARED = "equivalent", "different", "too few to tell", "not compared"
# A mark and a style beside each word, so that nobody has to go by colour.
MARKS = {EQUIVALENT: "≈", DIFFERENT: "≠", TOO_FEW: "?", NOT_COMPARED: "–"}
STYLES = {EQUIVALENT: "same", DIFFERENT: "apart", TOO_FEW: "few", NOT_COMPARED: "none"}
NOTHING = "–"

_METRICS = {
    "volume_ml": ("volume", "ml"),
    "hu_mean": ("HU mean", "HU"),
    "suv_mean": ("SUVmean", "g/ml"),
    "suv_sd": ("SUV SD", "g/ml"),
    "suv_max": ("SUVmax", "g/ml"),
    "suv_peak": ("SUVpeak", "g/ml"),
    "suv_p95": ("SUV 95th percentile", "g/ml"),
    "suv_liver_ratio": ("SUVmean / liver", ""),
}
_PREDICTORS = {
    "bsa_m2": ("body surface", "m²"),
    "height_cm": ("height", "cm"),
    "weight_kg": ("weight", "kg"),
    "bmi": ("BMI", "kg/m²"),
    "age_years": ("age", "year"),
    "sex": ("sex (men)", ""),
}
_STRATA = {"all": "everybody", "sex=F": "women", "sex=M": "men"}
# Between the parts of a stratum's name; a diagnosis may hold commas and equals signs of its own.
_BETWEEN = re.compile(r", (?=(?:sex|age_group|bmi_group|diagnosis)=)")


def organ_label(organ: str) -> str:
    """An organ's name without underscores."""
    return organ.replace("_", " ")


def metric_label(metric: str) -> str:
    """A metric's name without its unit."""
    return _METRICS.get(metric, (metric, ""))[0]


def metric_unit(metric: str) -> str:
    """A metric's unit, "" where it has none."""
    return _METRICS.get(metric, ("", ""))[1]


def with_unit(metric: str) -> str:
    """A metric's name and unit."""
    unit = metric_unit(metric)
    return f"{metric_label(metric)} ({unit})" if unit else metric_label(metric)


def predictor_label(name: str) -> str:
    """What a slope is on."""
    return _PREDICTORS.get(name, (name, ""))[0]


def slope_unit(metric: str, on: str) -> str:
    """Unit of a slope, such as "ml per m²"."""
    per = _PREDICTORS.get(on, ("", ""))[1]
    return f"{metric_unit(metric) or '1'} per {per}" if per else metric_unit(metric)


def stratum_label(stratum: str) -> str:
    """A stratum in words: "women", "men, age group 45–60"."""
    parts = _BETWEEN.split(stratum)
    return ", ".join(_STRATA.get(part, part.replace("_", " ").replace("=", " ", 1)) for part in parts)


def grouping_of(stratum: str) -> str:
    """The variables of a stratum, such as "sex" or "sex × age_group"."""
    return " × ".join(part.partition("=")[0] for part in _BETWEEN.split(stratum))


def slug(text: str) -> str:
    """A text as part of an id: lower-case letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def known(value: Any) -> bool:
    """Whether there is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def decimals(*values: Any) -> int:
    """Decimals that give the largest of the values three significant digits."""
    size = max((abs(v) for v in values if known(v)), default=0.0)
    return 2 if size == 0 else min(max(2 - math.floor(math.log10(size)), 0), 6)


def fixed(value: Any, places: int, *, plus: bool = False) -> str:
    """A number with so many decimals, a true minus sign, and a + where asked for."""
    if not known(value):
        return NOTHING
    text = f"{value:+.{places}f}" if plus else f"{value:.{places}f}"
    if not float(text):  # no "-0.0"
        text = text.lstrip("+-")
    return text.replace("-", "−")


def number(value: Any) -> str:
    """A number with three significant digits."""
    return fixed(value, decimals(value))


def span(value: Any, low: Any, high: Any, places: int, *, plus: bool = False) -> str:
    """ "−3.9 (−9.1 to +1.3)", without the brackets where there is no interval."""
    text = fixed(value, places, plus=plus)
    if not (known(value) and known(low) and known(high)):
        return text
    return f"{text} ({fixed(low, places, plus=plus)} to {fixed(high, places, plus=plus)})"


def p_value(p: Any) -> str:
    """A p value to three decimals."""
    if not known(p):
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"
