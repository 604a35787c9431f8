"""When a PET image was: the moment to which it is decay-corrected, and how long after the injection that is.

Scanners write the start of the acquisition into SeriesTime, but a series made later (a reformat, a copy from an
archive) carries the time of its making there. It is then found back from the images: DecayFactor or FrameReferenceTime
tell how long after the start each frame was. Sources: DICOM PS3.3, C.8.9.4; QIBA FDG-PET/CT profile (2013), appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vtrial.imaging.dicom.clock import DAY_S, Moment, seconds_between, shifted
from vtrial.records import InputError

F18_HALF_LIFE_S = 6586.2  # 109.77 min, Laboratoire National Henri Becquerel, table of radionuclides
_SAME_S = 1.0  # SeriesTime is often written to the second
_AGREE_S = 30.0  # estimates from several frames: 30 s is 0.3 % of SUV
_CONTRADICT_S = 300.0  # 3 % of SUV
_SHORT_LIVED_S = 4 * 3600.0  # injected on the day of the scan, or the evening before


@dataclass(frozen=True, repr=False, slots=True)
class PetHeader:
    """What the conversion needs of one PET image; None, "" or an empty set is what the header does not say.

    SI units but for `dose_bq` (Bq) and `weight_kg`. `described_uncorrected`: the series is called so. `tracer` is what
    names and codes tell. `philips_suv` and `philips_bqml` are the private factors (7053,xx00) and (7053,xx09), g/ml and
    Bq/ml a count.
    """

    units: str
    suv_type: str
    corrections: frozenset[str]
    attenuation_method: str
    described_uncorrected: bool
    decay_correction: str
    series_type: str
    lossy: bool
    tracer: Literal["fdg", "other", "unknown"]
    injections: int
    dose_bq: float | None
    half_life_s: float | None
    injection: Moment | None
    injection_time_s: float | None
    timezone_s: float | None
    series: Moment | None
    acquisition: Moment | None
    frame_reference_s: float | None
    frame_duration_s: float | None
    decay_factor: float | None
    philips_suv: float | None
    philips_bqml: float | None
    weight_kg: float | None
    height_m: float | None


@dataclass(frozen=True)
class Reference:
    """The moment to which a series is decay-corrected, and where that was read."""

    moment: Moment
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delay:
    """Seconds from the injection to a moment."""

    seconds: float
    notes: tuple[str, ...] = ()


def average_count_time_s(duration_s: float, half_life_s: float) -> float:
    """When within a frame the count rate has its average, in s after its start: ln(λT / (1 − e^(−λT))) / λ.

    DICOM PS3.3, C.8.9.4.1.5.
    """
    rate = math.log(2.0) / half_life_s
    return math.log(rate * duration_s / -math.expm1(-rate * duration_s)) / rate


def decay_reference(headers: Sequence[PetHeader], half_life_s: float) -> Reference:
    """The moment of decay correction START; InputError where the header's times do not tell it.

    SeriesTime where no image was acquired before it and nothing denies it. Otherwise, in this order: from DecayFactor,
    from FrameReferenceTime, the earliest AcquisitionTime, which is what START means.
    """
    acquired = _acquisitions(headers)
    start = min(acquired, key=lambda moment: seconds_between(acquired[0], moment))
    series = headers[0].series
    decay_offsets, frame_offsets = _decay_offsets(headers, half_life_s), _frame_offsets(headers, half_life_s)
    by_factor, by_frame = _by_offsets(acquired, decay_offsets), _by_offsets(acquired, frame_offsets)
    if series is not None and seconds_between(series, start) >= -_SAME_S:
        _refuse_denied(series, by_factor, by_frame)
        return Reference(series, "series time")
    told = "SeriesTime is missing" if series is None else "SeriesTime is later than the acquisition"
    note = f"{told}: the moment of decay correction was taken from the images"
    if by_factor is not None:
        return Reference(by_factor, "decay factor", (note,))
    if by_frame is not None:
        return Reference(by_frame, "frame reference time", (note,))
    if decay_offsets is not None or frame_offsets is not None:
        raise InputError(
            f"{told}, and AcquisitionTime with DecayFactor or FrameReferenceTime gives different starts for the "
            "images: the moment of decay correction is not known; take the series as it came from the scanner"
        )
    return Reference(start, "earliest acquisition time", (note,))


def _refuse_denied(series: Moment, by_factor: Moment | None, by_frame: Moment | None) -> None:
    """InputError where the images point to another moment than SeriesTime.

    By FrameReferenceTime to a later one alone: some scanners write the start of the whole acquisition into every image,
    and frames of its end then point to long before it.
    """
    told, apart = "DecayFactor", 0.0
    if by_factor is not None:
        apart = abs(seconds_between(series, by_factor))
    elif by_frame is not None:
        told, apart = "FrameReferenceTime", seconds_between(series, by_frame)
    if apart > _CONTRADICT_S:
        raise InputError(
            f"SeriesTime and {told} contradict each other by {apart / 60:.0f} min about the moment of decay "
            "correction; one of them was rewritten: take the series as it came from the scanner"
        )


def frame_moments(headers: Sequence[PetHeader], half_life_s: float) -> list[Moment]:
    """When each image of a series without decay correction was, on the average of its counts; InputError if unknown."""
    acquired = _acquisitions(headers)
    durations = [header.frame_duration_s or 0.0 for header in headers]
    if min(durations) <= 0.0:
        raise InputError(
            "DecayCorrection is NONE and ActualFrameDuration is missing or not positive: the frames' times are unknown"
        )
    frames = [header.frame_reference_s or 0.0 for header in headers]
    if _all_same(acquired) and max(frames) - min(frames) > max(durations) / 2.0:
        raise InputError(
            "DecayCorrection is NONE and all images have one AcquisitionTime but several FrameReferenceTimes: when "
            "each was acquired is not known; reconstruct with decay correction"
        )
    return [
        shifted(moment, average_count_time_s(duration, half_life_s))
        for moment, duration in zip(acquired, durations, strict=True)
    ]


def _acquisitions(headers: Sequence[PetHeader]) -> list[Moment]:
    known = [header.acquisition for header in headers if header.acquisition is not None]
    if len(known) < len(headers):
        raise InputError(
            f"AcquisitionTime is missing or unreadable in {len(headers) - len(known)} of {len(headers)} images; "
            "without it a rewritten SeriesTime cannot be told from a true one"
        )
    return known


def _all_same(moments: Sequence[Moment]) -> bool:
    return all(abs(seconds_between(moments[0], moment)) <= _SAME_S for moment in moments)


def _decay_offsets(headers: Sequence[PetHeader], half_life_s: float) -> list[float] | None:
    """Seconds from the moment of decay correction to each frame's start, by the factor that mended its decay."""
    offsets = []
    for header in headers:
        factor, duration = header.decay_factor, header.frame_duration_s
        if factor is None or factor <= 1.0 or not duration:
            return None
        offsets.append(math.log2(factor) * half_life_s - average_count_time_s(duration, half_life_s))
    return offsets


def _frame_offsets(headers: Sequence[PetHeader], half_life_s: float) -> list[float] | None:
    """The same by FrameReferenceTime, which is that of the frame's average counts, or of its start where one is 0."""
    frames = [header.frame_reference_s for header in headers]
    times = [frame for frame in frames if frame is not None]
    if len(times) < len(frames) or max(times) < _SAME_S:  # 0 in every image is how some scanners say nothing
        return None
    if min(times) < _SAME_S:  # no frame has its average at its start
        return times
    durations = [header.frame_duration_s for header in headers]
    if not all(durations):
        return None
    pairs = zip(times, durations, strict=True)
    return [time - average_count_time_s(duration or 0.0, half_life_s) for time, duration in pairs]


def _by_offsets(acquired: Sequence[Moment], offsets: Sequence[float] | None) -> Moment | None:
    """The one moment that all frames point back to; None if they do not agree."""
    if offsets is None:
        return None
    moments = [shifted(moment, -offset) for moment, offset in zip(acquired, offsets, strict=True)]
    apart = [seconds_between(moments[0], moment) for moment in moments]
    if max(apart) - min(apart) <= _AGREE_S:
        return moments[0]
    # Some scanners write the start of the whole acquisition into every image: the frames then lie at their offsets.
    return acquired[0] if _all_same(acquired) else None


def injection_to(header: PetHeader, moment: Moment, half_life_s: float, limit_s: float) -> Delay:
    """From the injection to `moment`, at most `limit_s`; InputError where that is not known or not plausible.

    The days decide where they are there and plausible. Otherwise the times of the day do, for a tracer that does not
    outlive a day: the injection was the last such time before the scan, across midnight if need be.
    """
    injection = _injection(header)
    dated = None
    if injection.day is not None and moment.day is not None:
        dated = seconds_between(injection, moment)
        if 0.0 <= dated <= limit_s:
            return Delay(dated)
    clock = (moment.second - injection.second) % DAY_S
    if half_life_s <= _SHORT_LIVED_S and clock <= limit_s:
        note = "the injection's date contradicts its time: the time of the day was taken"
        return Delay(clock, () if dated is None else (note,))
    told = clock if dated is None else dated
    raise InputError(
        f"the injection lies {told / 3600:.1f} h before the moment of decay correction; plausible are 0 to "
        f"{limit_s / 3600:.0f} h: RadiopharmaceuticalStartTime, SeriesTime or AcquisitionTime is wrong"
    )


def _injection(header: PetHeader) -> Moment:
    """When the tracer was injected, in local time; InputError if the header does not say, or says two times."""
    dated, second = header.injection, header.injection_time_s
    if dated is None and second is None:
        raise InputError(
            "RadiopharmaceuticalStartDateTime and RadiopharmaceuticalStartTime are missing or unreadable; one is needed"
        )
    if dated is None or second is None:
        only = Moment(second) if dated is None and second is not None else dated
        assert only is not None
        return _local(only, header.timezone_s)
    apart = abs(seconds_between(Moment(second), Moment(dated.second)))
    if apart <= 60.0:  # its offset from UTC, if any, is that of the other times too
        return dated
    if dated.utc_offset_s is not None and header.timezone_s is not None:
        local = _local(dated, header.timezone_s)
        if abs(seconds_between(Moment(second), Moment(local.second))) <= 60.0:
            return local
    raise InputError(
        f"RadiopharmaceuticalStartTime and RadiopharmaceuticalStartDateTime are {apart / 60:.0f} min apart; they must "
        "be one time: mend the header"
    )


def _local(moment: Moment, timezone_s: float | None) -> Moment:
    if moment.utc_offset_s is None or moment.utc_offset_s == timezone_s:
        return moment
    if timezone_s is None:
        raise InputError(
            "RadiopharmaceuticalStartDateTime has an offset from UTC and TimezoneOffsetFromUTC is missing: its local "
            "time is not known; mend the header"
        )
    return shifted(moment, timezone_s - moment.utc_offset_s)
