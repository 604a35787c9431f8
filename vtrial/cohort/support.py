"""Who lies inside what a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vtrial.cohort.table import raise_all
from vtrial.records import Sex, Subject

_KG_PER_POUND = 0.45359237


@dataclass(frozen=True)
class Support:
    """The bodies that a model knows: inclusive ranges in years, cm, kg and kg/m²."""

    age_years: tuple[float, float]
    height_cm: tuple[float, float]
    weight_kg: tuple[float, float]
    bmi: tuple[float, float] = (0.0, math.inf)
    sexes: frozenset[Sex] = frozenset({"F", "M"})


@dataclass(frozen=True)
class Flagged:
    """A subject outside the support, and in what."""

    subject_id: str
    reasons: tuple[str, ...]


def check_support(subjects: Iterable[Subject], support: Support, extrapolate: bool = False) -> list[Flagged]:
    """The subjects outside `support`; InputError that names them all unless `extrapolate`."""
    flagged = [Flagged(s.subject_id, reasons) for s in subjects if (reasons := _reasons(s, support))]
    if not extrapolate:
        _refuse(flagged)
    return flagged


def _refuse(flagged: Sequence[Flagged]) -> None:
    remedy = "correct it, leave the subject out, or give --extrapolate"
    raise_all([f"subject {f.subject_id}: {'; '.join(f.reasons)}; {remedy}" for f in flagged])


def _reasons(subject: Subject, support: Support) -> tuple[str, ...]:
    reasons = [] if subject.sex in support.sexes else [f"sex {subject.sex} is not among those the model was trained on"]
    for name, unit in (("age_years", "years"), ("height_cm", "cm"), ("weight_kg", "kg"), ("bmi", "kg/m²")):
        value: float = getattr(subject, name)
        low, high = getattr(support, name)
        if not low <= value <= high:
            hint = ""
            if name == "weight_kg" and value > high and low <= value * _KG_PER_POUND <= high:
                hint = f" (if these are pounds, write {value * _KG_PER_POUND:.1f})"
            reasons.append(
                f"{name} {value:g} is outside {low:g} to {high:g} {unit} that the model was trained on{hint}"
            )
    return tuple(reasons)
