"""What the user decides before a comparison: margins, levels, strata. `configs/analysis.toml` holds the defaults."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vtrial.organs import GROUPS, ORGAN_IDS
from vtrial.records import MODEL_SUV, InputError
from vtrial.validation.scale import ENDING
from vtrial.validation.tables import LIVER_RATIO, METRICS

Percent = Annotated[float, Field(gt=0, lt=100)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
USUAL = ("volume_ml", "hu_mean", "suv_mean", "suv_max", "suv_peak")
_KNOWN = (*METRICS, LIVER_RATIO)
_HU = {"hu_mean": 10.0}  # margin in HU: where zero means nothing, neither does a percentage
ORGANS = (
    *("liver", "spleen", "kidneys", "heart", "lungs", "aorta", "pancreas", "stomach", "urinary_bladder"),
    *("vertebrae_L1", "vertebrae_L3", "sacrum"),
)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_metrics(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; use {', '.join(_KNOWN)}")


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)} more than once; keep one")
    return names


class Margins(_Settings):
    """Differences within these do not matter. HU keep a margin of their own, unless another is given for them."""

    percent: Percent = 10.0
    sd_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.25
    slope_percent: Percent = 25.0
    metric_percent: dict[str, Percent] = {}
    metric_absolute: dict[str, Positive] = _HU

    @field_validator("metric_percent", "metric_absolute")
    @classmethod
    def _measured(cls, margins: dict[str, float]) -> dict[str, float]:
        _check_metrics(margins)
        return margins

    @field_validator("metric_absolute")
    @classmethod
    def _with_hu(cls, margins: dict[str, float]) -> dict[str, float]:
        return _HU | margins

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if "hu_mean" in self.metric_percent:
            raise ValueError("metric_percent: hu_mean: zero HU means nothing, and so do percent; use metric_absolute")
        if ranked := [name for name in self.metric_absolute if name in ENDING]:
            raise ValueError(
                f"metric_absolute: {', '.join(ranked)}: values that end with the scale go by ratios of medians; "
                "use metric_percent"
            )
        if both := [name for name in self.metric_absolute if name in self.metric_percent]:
            raise ValueError(f"{', '.join(both)}: a margin in percent and one in its own unit; keep one")
        return self

    def relative(self, metric: str) -> float:
        """Margin of a metric in percent of the reference mean; NaN where it has one in its own unit."""
        return float("nan") if metric in self.metric_absolute else self.metric_percent.get(metric, self.percent)

    def absolute(self, metric: str) -> float:
        """Margin of a metric in its own unit; NaN where it has one in percent."""
        return self.metric_absolute.get(metric, float("nan"))


class Edges(_Settings):
    """Lower edges of the second and later groups."""

    age_years: tuple[Positive, ...] = (45.0, 60.0, 75.0)
    bmi: tuple[Positive, ...] = (18.5, 25.0, 30.0)

    @field_validator("age_years", "bmi")
    @classmethod
    def _rising(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if any(b <= a for a, b in pairwise(edges)):
            raise ValueError("edges must rise; sort them and remove repeats")
        return edges


class Collapse(_Settings):
    """When lost spread, or a likeness to training subjects, is an alarm."""

    spread_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    copy_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6


class AnalysisSettings(_Settings):
    """All that a comparison needs to know besides the cohorts."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    adjustment: Literal["joint", "holm", "bh"] = "joint"
    bootstraps: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000
    shufflings: Annotated[int, Field(ge=200, le=1_000_000)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 0
    min_subjects: Annotated[int, Field(ge=3)] = 5
    suv_ceiling: Positive = MODEL_SUV
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = USUAL
    organs: Annotated[tuple[str, ...], Field(min_length=1)] = ORGANS
    margins: Margins = Margins()
    strata: Edges = Edges()
    collapse: Collapse = Collapse()

    @field_validator("organs")
    @classmethod
    def _known(cls, organs: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [o for o in organs if o not in ORGAN_IDS and o not in GROUPS]
        if unknown:
            raise ValueError(f"unknown organs {', '.join(unknown)}; use TotalSegmentator names or {', '.join(GROUPS)}")
        return _each_once(organs)

    @field_validator("metrics")
    @classmethod
    def _measured(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        _check_metrics(metrics)
        return _each_once(metrics)


def read_settings(path: str | Path | None = None) -> AnalysisSettings:
    """Settings from a TOML file, all defaults without one.

    InputError with every wrong field: file, field, value, what is allowed.
    """
    if path is None:
        return AnalysisSettings()
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return AnalysisSettings.model_validate(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error}); start from configs/analysis.toml") from None
    except ValidationError as error:
        raise InputError(
            [
                f"{path}, {'.'.join(map(str, item['loc']))}: {item['input']!r}: {item['msg']}; "
                "see configs/analysis.toml for what is allowed"
                for item in error.errors()
            ]
        ) from None
