"""Dates and times of DICOM headers, as far as decay needs them: how many seconds lie between two of them.

A moment never shows itself: its `repr` is empty, because dates identify people. DICOM PS3.5, section 6.2 has the forms
(DA, TM, DT); the older forms with dots and colons are read too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

DAY_S = 86400.0

_TIME = re.compile(r"(\d{2}):?(?:(\d{2}):?(?:(\d{2})(?:[.,](\d{1,6}))?)?)?")
_DATE = re.compile(r"(\d{4})([.\-/]?)(\d{2})\2(\d{2})")
_DATETIME = re.compile(r"(\d{8})(\d{2,6}(?:\.\d{1,6})?)([+-]\d{4})?")
_OFFSET = re.compile(r"([+-])(\d{2})(\d{2})")


@dataclass(frozen=True, repr=False, slots=True)
class Moment:
    """A time of the day in seconds, its day (ordinal) and its offset from UTC in seconds where they are known."""

    second: float
    day: int | None = None
    utc_offset_s: float | None = None


def time_of_day(text: str) -> float | None:
    """Seconds after midnight of a DICOM time (TM); None where there is none, or none that can be."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
    if hours > 23 or minutes > 59 or seconds > 60:  # 60: a leap second
        return None
    return hours * 3600.0 + minutes * 60.0 + seconds + float(f"0.{match[4] or 0}")


def day_of(text: str) -> int | None:
    """Ordinal of a DICOM date (DA); None where there is none, or none that can be."""
    match = _DATE.fullmatch(text.strip())
    if match is None:
        return None
    try:
        return date(int(match[1]), int(match[3]), int(match[4])).toordinal()
    except ValueError:  # a month 13, a day 31 of February
        return None


def moment_of(date_text: str, time_text: str) -> Moment | None:
    """The moment of a date and a time; without its day where the date is missing, None where the time is."""
    second = time_of_day(time_text)
    return None if second is None else Moment(second, day_of(date_text))


def moment_of_datetime(text: str) -> Moment | None:
    """The moment of a DICOM date-time (DT) with at least an hour; None where there is none, or none that can be."""
    match = _DATETIME.fullmatch(text.strip())
    if match is None:
        return None
    moment = moment_of(match[1], match[2])
    if moment is None or moment.day is None:
        return None
    return Moment(moment.second, moment.day, offset_s(match[3] or ""))


def offset_s(text: str) -> float | None:
    """Seconds east of UTC of an offset such as `+0100`; None where there is none."""
    match = _OFFSET.fullmatch(text.strip())
    if match is None:
        return None
    return (int(match[2]) * 3600.0 + int(match[3]) * 60.0) * (1.0 if match[1] == "+" else -1.0)


def seconds_between(earlier: Moment, later: Moment) -> float:
    """Seconds from one moment to another, negative if the second comes first.

    Where a day is unknown the two are taken to be less than twelve hours apart.
    """
    apart = later.second - earlier.second
    if earlier.day is not None and later.day is not None:
        return apart + (later.day - earlier.day) * DAY_S
    return (apart + DAY_S / 2.0) % DAY_S - DAY_S / 2.0


def shifted(moment: Moment, seconds: float) -> Moment:
    """The moment `seconds` later, or earlier if negative."""
    days, second = divmod(moment.second + seconds, DAY_S)
    return Moment(second, None if moment.day is None else moment.day + int(days), moment.utc_offset_s)
