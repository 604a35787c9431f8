"""What a report is made of: results that others computed, as plain data. Nothing here knows how they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
Cell = tuple[str, str]  # organ, metric
SEXES = ("sex=F", "sex=M")  # the strata of a comparison by sex


class Measured(Protocol):
    """Subjects with measurements, such as a cohort."""

    @property
    def people(self) -> pd.DataFrame:
        """One row a subject, with a column sex (F, M)."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Organ and metric of what was measured."""

    def column(self, cell: Cell) -> Array:
        """Values of one cell, (subjects,); NaN where missing."""


class Correlated(Protocol):
    """Correlations of both cohorts between organs: square tables by organ, pairs, and their root mean square gap."""

    @property
    def synthetic(self) -> pd.DataFrame:
        """Organ by organ, NaN where unknown."""

    @property
    def reference(self) -> pd.DataFrame:
        """Organ by organ, NaN where unknown."""

    @property
    def pairs(self) -> pd.DataFrame:
        """One row a pair of organs."""

    @property
    def rms(self) -> float:
        """Root mean square difference."""

    @property
    def rms_expected(self) -> float:
        """What it would be for two samples of one population."""


@dataclass(frozen=True)
class Sample:
    """Values behind one cell of a stratum, any order, NaN where missing; None where there are no subjects to show."""

    stratum: str
    organ: str
    metric: str
    synthetic: Array | None
    reference: Array | None


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    label: str
    png: bytes


@dataclass(frozen=True)
class Portrait:
    """A subject in the gallery."""

    title: str
    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Demographic:
    """Mean and SD of one variable, such as "age (years)", in one stratum of one cohort."""

    cohort: str
    stratum: str
    variable: str
    n: int
    mean: float
    sd: float


@dataclass(frozen=True)
class Exclusion:
    """What was left out of a cohort at a step of the trial, why, and how many of how many (`of` None: unknown)."""

    cohort: str
    step: str
    reason: str
    count: int
    of: int | None = None


@dataclass(frozen=True)
class ModelNote:
    """A model that had a part in this. `role` is "generator" for the one that made the synthetic subjects, "generator
    of …" for those of other sides, or "segmenter"."""

    role: str
    name: str
    trained_on: str
    digest: str = ""
    note: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where everything comes from. `reference` tells title, source, licence and so on; `flags` what limits trust."""

    command: str
    models: tuple[ModelNote, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int | str] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    created: str = ""


@dataclass(frozen=True)
class Content:
    """Everything that a report shows.

    `comparison` has the keys synthetic, reference, verdict, headline, notes, settings, cells and spread, the last two
    lists of rows, as a comparison of cohorts gives them for JSON. `slopes` has one row a question; `anova` one a cell,
    with the cohorts' numbers in n_1, mean_1, sd_1, … and their names in `attrs["cohorts"]`. `likeness` has one row a
    cohort (cohort, n, mean, low, high, highest), `copies` one a twin, with its `attrs`. `absent` says of sections
    ("slopes", "correlations", "diversity", "copies", "anova", "gallery") why they are empty.
    """

    comparison: Mapping[str, Any]
    provenance: Provenance
    title: str = "Synthetic against real"
    samples: Sequence[Sample] = ()
    demographics: Sequence[Demographic] = ()
    slopes: pd.DataFrame | None = None
    correlations: Correlated | None = None
    correlation_metric: str = "suv_mean"
    anova: pd.DataFrame | None = None
    likeness: Sequence[Mapping[str, Any]] = ()
    copies: pd.DataFrame | None = None
    portraits: Sequence[Portrait] = ()
    exclusions: Sequence[Exclusion] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def samples_by_sex(synthetic: Measured | None, reference: Measured | None, cells: Iterable[Cell]) -> list[Sample]:
    """The values of both cohorts by sex; None for a cohort that is a summary, cells that nobody has are left out."""
    samples = []
    for organ, metric in cells:
        for stratum in SEXES:
            sides = [_values(cohort, (organ, metric), stratum[-1]) for cohort in (synthetic, reference)]
            if any(side is not None and np.isfinite(side).any() for side in sides):
                samples.append(Sample(stratum, organ, metric, sides[0], sides[1]))
    return samples


def _values(cohort: Measured | None, cell: Cell, sex: str) -> Array | None:
    if cohort is None or cell not in cohort.cells:
        return None
    return cohort.column(cell)[(cohort.people["sex"] == sex).to_numpy(dtype=bool)]
