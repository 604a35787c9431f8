"""Fields of a pydicom data set as plain values: what is missing, or no value at all, is None, "" or empty.

pydicom's warnings and log quote the values that they stumble over, and those may identify: `discreetly` silences them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pydicom

_PHILIPS = "Philips PET Private Group"
_NOBODY = re.compile(  # a word of what anonymisers put in the place of names and ids
    r"(?:anon(?:ym(?:ous|i[sz]ed)?)?|deidentified)?(?:patient|subject|person|case|study|name|id)?"
    r"|de|identified|unknown|unnamed|none|no|noname|null|na|removed|deleted|withheld|hidden|test|x{3,}"
)


@contextlib.contextmanager
def discreetly() -> Iterator[None]:
    """Neither pydicom's warnings nor its log, both of which quote what they stumble over."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def plain(text: str) -> str:
    """Letters and digits of a text in lower case: how names are compared."""
    return re.sub(r"[\W_]+", "", text).lower()


def names_nobody(text: str) -> bool:
    """Whether a name or id is empty or of such words alone (ANON, Anonymous^Patient): many people may share it."""
    return all(_NOBODY.fullmatch(word) for word in re.split(r"[\W_]+", text.lower()))


def value_of(dataset: Any, keyword: str) -> Any:
    """A field as pydicom has it; None where it is missing or broken."""
    try:
        return dataset.get(keyword)
    except Exception:  # a value that its representation does not allow; missing, for us
        return None


def texts_of(dataset: Any, keyword: str) -> list[str]:
    """The values of a field as texts, without padding."""
    value = value_of(dataset, keyword)
    if value is None:
        return []
    values = value if isinstance(value, (list, pydicom.multival.MultiValue)) else [value]
    return [str(part).strip(" \0") for part in values]


def text_of(dataset: Any, keyword: str) -> str:
    """The first value of a field as a text, empty where there is none."""
    return next(iter(texts_of(dataset, keyword)), "")


def number_of(dataset: Any, keyword: str) -> float | None:
    """The one finite number of a field, None where there is none or there are several."""
    return next(iter(numbers_of(dataset, keyword, 1) or ()), None)


def numbers_of(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The `count` finite numbers of a field, None where they are not so many."""
    try:
        numbers = tuple(float(text) for text in texts_of(dataset, keyword))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def coarse(number: float) -> str:
    """A number as it may be shown though it cannot be true: to four digits, so that it is nobody's id."""
    return f"{float(f'{number:.4g}'):g}"


def philips_factor(dataset: Any, offset: int) -> float | None:
    """A factor of Philips' private block, which implicit transfer syntaxes leave as bytes; 0 means none."""
    try:
        value = dataset.private_block(0x7053, _PHILIPS)[offset].value
        number = float(value.decode("ascii").strip(" \0") if isinstance(value, bytes) else value)
    except (KeyError, ValueError, TypeError, UnicodeDecodeError):
        return None
    return number if math.isfinite(number) and number != 0.0 else None
