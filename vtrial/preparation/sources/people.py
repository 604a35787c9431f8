"""Sex, age, height and weight from the rows of a table, and of two sources together: never guessed, doubts told.

Values themselves are in no doubt: a cell of a hospital's table may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vtrial.imaging.dicom.people import Person
from vtrial.imaging.dicom.suv import BMI, HEIGHT_M, WEIGHT_KG
from vtrial.records import Sex

NOBODY = Person(None, None, None, None)
PERSON_COLUMNS = ("sex", "age_years", "height_cm", "weight_kg")
_LIMITS = {
    "age_years": (0.0, 120.0, "years"),
    "height_cm": (100.0 * HEIGHT_M[0], 100.0 * HEIGHT_M[1], "cm"),
    "weight_kg": (*WEIGHT_KG, "kg"),
}
_APART = {"age_years": 2.0, "height_cm": 10.0, "weight_kg": 10.0}  # between two sources: more is told
_GROWN = 18.0  # years
_SHRINKS_CM = 15.0  # between two scans of an adult: some age and slips, and heights that were asked for
_WORDS = {  # by which a doubt of a table or a header shows what it is about
    "sex": ("sex", "PatientSex"),
    "age_years": ("age_years", "PatientAge", "PatientBirthDate"),
    "height_cm": ("height", "PatientSize"),
    "weight_kg": ("weight", "PatientWeight"),
}


def person_of(rows: Sequence[Mapping[str, Any]]) -> Person:
    """The person that rows under our column names (`cohort.spec.usual_people`) tell of, each value where they agree."""
    doubts: list[str] = []
    cell = _agreed(rows, "sex", doubts)
    sex: Sex | None = "F" if cell == "F" else "M" if cell == "M" else None
    if cell is not None and sex is None:
        doubts.append("sex is not F or M: unknown")
    age, height, weight = (_number(rows, column, doubts) for column in _LIMITS)
    return _possible(Person(sex, age, height, weight, tuple(doubts)))


def _agreed(rows: Sequence[Mapping[str, Any]], column: str, doubts: list[str]) -> Any:
    """The one cell of a column, None where there is none or several."""
    cells = list(dict.fromkeys(row[column] for row in rows if _is_there(row.get(column))))
    if len(cells) == 1:
        return cells[0]
    doubts.append(f"{column} differs between the rows of the table: unknown" if cells else f"{column} is missing")
    return None


def _is_there(cell: object) -> bool:
    return cell is not None and cell == cell and str(cell).strip() != ""


def _number(rows: Sequence[Mapping[str, Any]], column: str, doubts: list[str]) -> float | None:
    cell = _agreed(rows, column, doubts)
    if cell is None:
        return None
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        doubts.append(f"{column} is not a number: unknown")
        return None
    low, high, unit = _LIMITS[column]
    if low <= value <= high:
        return value
    metres = "; it looks like metres: name the column height_m" if column == "height_cm" and 0.3 <= value < 3.0 else ""
    doubts.append(f"{column} is outside {low:g} to {high:g} {unit}{metres}: unknown")
    return None


def _possible(person: Person) -> Person:
    """The person without height and weight where no body has both."""
    if person.height_cm is None or person.weight_kg is None:
        return person
    bmi = person.weight_kg / (person.height_cm / 100.0) ** 2
    if BMI[0] <= bmi <= BMI[1]:
        return person
    doubt = f"height and weight give a body mass index outside {BMI[0]:g} to {BMI[1]:g}: both unknown"
    return replace(person, height_cm=None, weight_kg=None, doubts=(*person.doubts, doubt))


def together(first: Person, second: Person) -> Person:
    """Two sources about one person: the first counts, the second fills what it leaves open, contradictions are told.

    Two sexes are no sex: they are more likely a table joined wrongly than a slip.
    """
    values = {c: getattr(first, c) if getattr(first, c) is not None else getattr(second, c) for c in PERSON_COLUMNS}
    doubts = [_overruled(doubt) if _is_settled(doubt, second) else doubt for doubt in first.doubts]
    doubts = [*filter(None, doubts), *(doubt for doubt in second.doubts if not _is_settled(doubt, first))]
    if first.sex is not None and second.sex is not None and first.sex != second.sex:
        values["sex"] = None
        doubts.append("sex differs between the sources of demographics: unknown")
    for column, apart in _APART.items():
        one, other = getattr(first, column), getattr(second, column)
        if one is not None and other is not None and abs(one - other) > apart:
            doubts.append(
                f"{column} differs by more than {apart:g} between the sources of demographics: the first was taken"
            )
    return _possible(Person(**values, doubts=tuple(dict.fromkeys(doubts))))


def _is_settled(doubt: str, other: Person) -> bool:
    """Whether the other source knows all that a doubt is about."""
    about = [column for column, words in _WORDS.items() if any(word in doubt for word in words)]
    return bool(about) and all(getattr(other, column) is not None for column in about)


def _overruled(doubt: str) -> str:
    """What is left of a doubt about the first source, whose value the second gives; "" of a mere gap."""
    about, colon, _ = doubt.rpartition(": ")
    return f"{about}: that of the other source was taken" if colon else ""


def could_be_one(persons: Sequence[Person]) -> bool:
    """Whether studies can all be of one person: of one sex, and as tall in all that are of an adult."""
    grown = [p for p in persons if p.age_years is None or p.age_years >= _GROWN]
    heights = [person.height_cm for person in grown if person.height_cm is not None]
    sexes = {person.sex for person in persons} - {None}
    return len(sexes) < 2 and max(heights, default=0.0) - min(heights, default=0.0) <= _SHRINKS_CM
