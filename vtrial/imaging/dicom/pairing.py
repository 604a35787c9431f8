"""Which PET and which CT of a study belong together, chosen from their headers by rules that are told.

PET: attenuation corrected, convertible to SUV (rather with its weight than for one to come), the longest; among equals
axial and original slices before reformatted ones, then the one acquired first, then the lowest series number. CT: in
the PET's frame of reference, an even grid, the one that covers most of the PET; among equals axial and original slices,
then the widest field of view (the CT for attenuation correction rather than a diagnostic one), then the slice distance
nearest to the PET's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtrial.imaging.dicom.clock import DAY_S
from vtrial.imaging.dicom.decay import PetHeader
from vtrial.imaging.dicom.headers import Image
from vtrial.imaging.dicom.series import Series, series_of
from vtrial.imaging.dicom.suv import SuvConversion, Tracer, is_attenuation_corrected, suv_conversion
from vtrial.imaging.volume import covered_length
from vtrial.records import InputError

Labelled = tuple[str, list[Image]]

_ALIKE_MM = 10.0
_WHOLE = 0.99


def choose_pet(
    found: Sequence[Labelled], tracer: Tracer, weightless: bool = False
) -> tuple[Series, SuvConversion, list[str]]:
    """The PET to take, its conversion, and notes on the rest; InputError with every reason if none can be used."""
    corrected = [(label, stack) for label, stack in found if is_attenuation_corrected(_pet(stack[0]))]
    usable: list[tuple[Series, SuvConversion]] = []
    problems: list[str] = []
    for label, stack in corrected or found:
        try:
            usable.append(_judged(label, stack, tracer, weightless))
        except InputError as error:
            problems.extend(error.problems)
    if not usable:
        raise InputError(problems)
    usable.sort(key=lambda pair: (pair[1].lacks_weight, _preference(pair[0])))
    series, conversion = usable[0]
    notes = [f"{series.where}: taken of {len(found)} PET series, attenuation corrected"] if len(found) > 1 else []
    taken = {label for label, _ in corrected}
    notes += [f"{label}: passed over, not attenuation corrected" for label, _ in found if label not in taken]
    notes += [f"{other.where}: passed over, another attenuation-corrected PET" for other, _ in usable[1:]]
    return series, conversion, [*notes, *(f"passed over: {problem}" for problem in problems)]


def _judged(label: str, stack: list[Image], tracer: Tracer, weightless: bool) -> tuple[Series, SuvConversion]:
    """A PET stack as series with its conversion; InputError with the reasons of both."""
    problems: list[str] = []
    series, conversion, headers = None, None, [_pet(image) for image in stack]
    try:
        series = series_of(stack, label)
        headers = [_pet(image) for image in series.images]
    except InputError as error:
        problems.extend(error.problems)
    try:
        conversion = suv_conversion(headers, tracer, weightless=weightless)
    except InputError as error:
        problems.extend(f"{label}: {problem}" for problem in error.problems)
    if series is None or conversion is None:
        raise InputError(problems)
    return series, conversion


def _preference(series: Series) -> tuple[float, bool, bool, float, float, str]:
    """The smallest goes first. Times of the day are enough to order the series of one study."""
    first = series.images[0]
    low, high = series.box_mm
    acquired = [moment for image in series.images if (moment := _pet(image).acquisition) is not None]
    start = min(((moment.day or 0) * DAY_S + moment.second for moment in acquired), default=float("inf"))
    length = round(float(high[2] - low[2]) / _ALIKE_MM)
    return -length, not _is_axial(series), "DERIVED" in first.image_type, start, first.series_number, str(first.path)


def choose_ct(found: Sequence[Labelled], pet: Series, least_coverage: float) -> tuple[Series, float, list[str]]:
    """The CT to take, what part of the PET's length it covers, and notes; InputError with every reason if none fits."""
    frame = pet.images[0].frame_uid
    usable: list[tuple[Series, float]] = []
    problems: list[str] = []
    for label, stack in found:
        if not frame or stack[0].frame_uid != frame:
            problems.append(
                f"{label}: FrameOfReferenceUID is not that of the PET, or missing: how the two lie to each other is "
                "not known"
            )
            continue
        try:
            series = series_of(stack, label)
        except InputError as error:
            problems.extend(error.problems)
            continue
        covered = covered_length(series.box_mm, pet.box_mm)
        if covered < least_coverage or covered == 0.0:
            problems.append(
                f"{label}: covers {covered:.0%} of the PET's length, side by side in part at least; "
                f"{max(least_coverage, 0.01):.0%} are needed"
            )
            continue
        usable.append((series, covered))
    if not usable:
        raise InputError(problems)
    usable.sort(key=lambda pair: _ct_preference(pair[0], pair[1], pet))
    series, covered = usable[0]
    notes = [f"{series.where}: taken of {len(found)} CT series"] if len(found) > 1 else []
    notes += [f"{other.where}: passed over, another CT" for other, _ in usable[1:]]
    notes += [f"passed over: {problem}" for problem in problems]
    if covered < _WHOLE:
        notes.append(f"the CT covers {covered:.0%} of the PET's length")
    return series, covered, notes


def _ct_preference(ct: Series, covered: float, pet: Series) -> tuple[float, bool, bool, float, float, str]:
    low, high = ct.box_mm
    width = round(float(high[0] - low[0]) / _ALIKE_MM)
    apart = abs(np.linalg.norm(ct.affine[:3, 2]) - np.linalg.norm(pet.affine[:3, 2]))
    first = ct.images[0]
    reformatted = not _is_axial(ct), "DERIVED" in first.image_type
    return -round(covered, 1), *reformatted, -width, round(float(apart), 2), str(first.path)


def _is_axial(series: Series) -> bool:
    return bool(np.argmax(np.abs(series.affine[:3, 2])) == 2)


def _pet(image: Image) -> PetHeader:
    assert image.pet is not None, "a PET image has a PET header"
    return image.pet
