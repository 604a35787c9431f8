"""Strata: who is compared with whom. Knows people, not measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pandas as pd

from vtrial.records import InputError
from vtrial.validation.scale import Mask
from vtrial.validation.settings import Edges

VARIABLES = ("all", "sex", "age_group", "bmi_group", "diagnosis")
ALL = "all"
_SOURCE = {"age_group": "age_years", "bmi_group": "bmi"}


@dataclass(frozen=True)
class Stratum:
    """One stratum: its name, such as "all", "sex=F" or "sex=F, age_group=45-60", and the levels it is made of."""

    name: str
    levels: tuple[tuple[str, str], ...]

    @property
    def sex(self) -> str | None:
        """F or M where the stratum is that sex and nothing else; None otherwise."""
        return self.levels[0][1] if len(self.levels) == 1 and self.levels[0][0] == "sex" else None


EVERYBODY = Stratum(ALL, ((ALL, ALL),))


def parse_by(by: str | Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groupings from "sex,age_group" (one after the other) or "sex*age_group" (crossed); InputError for others."""
    parts = by.split(",") if isinstance(by, str) else list(by)
    groupings = tuple(tuple(v.strip() for v in part.split("*")) for part in parts if part.strip()) or ((ALL,),)
    unknown = [v for grouping in groupings for v in grouping if v not in VARIABLES]
    if unknown:
        raise InputError([f"--by: unknown variable {v!r}; choose from {', '.join(VARIABLES)}" for v in unknown])
    named = [" * ".join(grouping) for grouping in groupings]
    if len({frozenset(grouping) for grouping in groupings}) < len(groupings) or any(
        len({*grouping}) < len(grouping) for grouping in groupings
    ):
        raise InputError(f"--by {', '.join(named)}: a variable or grouping stands there twice; keep one")
    return groupings


def group_labels(values: pd.Series[float], edges: Sequence[float]) -> pd.Series[str]:
    """Each value's group: "<45", "45-60", …, ">=75"; a value on an edge belongs above. Missing ones stay missing."""
    texts = [f"{e:g}" for e in edges]
    names = [f"<{texts[0]}", *(f"{a}-{b}" for a, b in pairwise(texts)), f">={texts[-1]}"] if texts else ["any"]
    labels = pd.Series([names[k] for k in np.searchsorted(list(edges), values.to_numpy(), side="right")], values.index)
    return labels.where(values.notna())


def levels_of(people: pd.DataFrame, variable: str, edges: Edges) -> pd.Series[str] | None:
    """The level of every subject, missing where unknown; None where the cohort does not have the variable."""
    if variable == ALL:
        return pd.Series(ALL, index=people.index)
    column = _SOURCE.get(variable, variable)
    if column not in people.columns or people[column].isna().all():
        return None
    if variable in _SOURCE:
        return group_labels(people[column], edges.age_years if variable == "age_group" else edges.bmi)
    # A numeric code is one level, whether or not a gap in its column has made it a fraction.
    text = people[column].astype(str).str.strip().str.replace(r"^(-?\d+)\.0$", r"\1", regex=True)
    return text.where(people[column].notna() & (text != ""))


def members(people: pd.DataFrame, stratum: Stratum, edges: Edges) -> Mask:
    """Which subjects belong to a stratum, (subjects,); nobody where a variable is unknown."""
    inside = np.ones(len(people), dtype=bool)
    for variable, level in stratum.levels:
        labels = levels_of(people, variable, edges)
        inside &= np.zeros(len(people), dtype=bool) if labels is None else (labels == level).to_numpy(dtype=bool)
    return inside


def strata_of(cohorts: Sequence[pd.DataFrame], by: str | Sequence[str], edges: Edges) -> list[Stratum]:
    """All strata that occur in any of the cohorts' people, grouping after grouping, levels in order."""
    found: list[Stratum] = []
    for grouping in parse_by(by):
        levels = [_all_levels(cohorts, variable, edges) for variable in grouping]
        for chosen in product(*levels):
            stratum = Stratum(
                ", ".join(v if v == ALL else f"{v}={level}" for v, level in zip(grouping, chosen)),
                tuple(zip(grouping, chosen)),
            )
            if any(members(people, stratum, edges).any() for people in cohorts):
                found.append(stratum)
    return found


def _all_levels(cohorts: Sequence[pd.DataFrame], variable: str, edges: Edges) -> list[str]:
    columns = [levels_of(people, variable, edges) for people in cohorts]
    seen = {level for labels in columns if labels is not None for level in labels.dropna().unique()}
    if variable in _SOURCE:
        cuts = edges.age_years if variable == "age_group" else edges.bmi
        middle = [(a + b) / 2.0 for a, b in pairwise(cuts)]
        inner = [cuts[0] - 1.0, *middle, cuts[-1] + 1.0] if cuts else [0.0]
        order = list(group_labels(pd.Series(inner), cuts))
        return [level for level in order if level in seen]
    return sorted(seen)


def unknown_counts(name: str, people: pd.DataFrame, by: str | Sequence[str], edges: Edges) -> list[str]:
    """What to say of subjects that belong to no stratum because a variable is unknown."""
    notes = []
    for variable in sorted({v for grouping in parse_by(by) for v in grouping}):
        labels = levels_of(people, variable, edges)
        missing = len(people) if labels is None else int(labels.isna().sum())
        if missing:
            notes.append(f"{name}: {variable} is unknown for {missing} of {len(people)} subjects: in no such stratum")
    return notes
