"""Who lies inside what a model was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from vtrial.cohort.spec import CohortSpec, Stratum, SubjectsSpec
from vtrial.cohort.table import raise_all
from vtrial.records import Subject, Support

_KG_PER_POUND = 0.45359237


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
    reasons = [] if subject.sex in support.sex else [f"sex {subject.sex} is not among those the model was trained on"]
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


def support_of(spec: CohortSpec) -> Support:
    """The bodies that a cohort may hold: the limits of its strata, or the ranges of its listed subjects."""
    if isinstance(spec, SubjectsSpec):
        return Support.of(spec.subjects)
    return reduce(Support.union, map(_limits, spec.strata))


def _limits(stratum: Stratum) -> Support:
    whole = Support((0.0, 0.0), (0.0, 0.0), (0.0, 1000.0))  # no limit of weight or BMI
    size = (stratum.size.min, stratum.size.max)
    weight, bmi = (size, stratum.bmi_limits) if stratum.size_is == "weight" else (stratum.weight_limits, size)
    age, height = ((m.min, m.max) for m in (stratum.age, stratum.height))
    return Support(age, height, weight or whole.weight_kg, bmi or whole.bmi, (stratum.sex,))
