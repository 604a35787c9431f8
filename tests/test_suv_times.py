"""The times that SUV needs: from the injection to the moment of decay correction, however the header tells them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from tests.dicoms import FACTOR, HALF_LIFE_S, Edit, headers_of, setting
from vtrial.imaging.dicom.clock import Moment, day_of, moment_of_datetime, seconds_between, shifted, time_of_day
from vtrial.imaging.dicom.decay import average_count_time_s
from vtrial.imaging.dicom.suv import suv_conversion
from vtrial.records import InputError

BEDS = (0, 0, 0, 1, 1, 1, 2, 2, 2)
FRAME_S = 120.0


def of_beds(start: str = "103000", frame_reference: bool = True, decay_factor: bool = True) -> Edit:
    """Three bed positions of two minutes, each image with its own time, and what it says of the start."""
    rate = math.log(2.0) / HALF_LIFE_S
    average = average_count_time_s(FRAME_S, HALF_LIFE_S)

    def edit(dataset: Dataset, k: int) -> None:
        seconds = BEDS[k] * (FRAME_S + 10.0)
        began = shifted(Moment(time_of_day(start) or 0.0), seconds).second
        minutes, second = divmod(began, 60)
        dataset.AcquisitionTime = f"{int(minutes) // 60:02d}{int(minutes) % 60:02d}{second:09.6f}"
        if frame_reference:
            dataset.FrameReferenceTime = f"{1000 * (seconds + average):.3f}"
        if decay_factor:
            dataset.DecayFactor = f"{math.exp(rate * (seconds + average)):.6f}"

    return edit


def combined(*edits: Edit) -> Edit:
    def edit(dataset: Dataset, k: int) -> None:
        for each in edits:
            each(dataset, k)

    return edit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("083045", 30645.0), ("083045.5", 30645.5), ("08:30:45", 30645.0), ("0830", 30600.0), ("08", 28800.0)],
)
def test_times_of_the_day(text: str, seconds: float) -> None:
    assert time_of_day(text) == seconds


@pytest.mark.parametrize("text", ["", "25", "0861", "8:30", "abc", "083045.1234567"])
def test_what_is_no_time(text: str) -> None:
    assert time_of_day(text) is None


def test_moments_lie_apart_as_they_should() -> None:
    late, early = moment_of_datetime("20190704003000.00 "), moment_of_datetime("20190703233000+0200")
    assert late is not None and early is not None and early.utc_offset_s == 7200.0
    assert seconds_between(early, late) == 3600.0
    assert seconds_between(Moment(early.second), Moment(late.second)) == 3600.0  # the days unknown: across midnight
    assert seconds_between(late, early) == -3600.0
    assert day_of("2019.07.04") == day_of("20190704") == late.day
    assert day_of("20190231") is None and moment_of_datetime("2019") is None
    assert shifted(late, -3600.0) == Moment(early.second, early.day)
    assert "2019" not in repr(late) and str(late.day) not in repr(late)


def test_average_count_time_is_that_of_the_decaying_rate() -> None:
    duration, half_life = 1800.0, 1200.0
    t = np.linspace(0.0, duration, 2_000_001)
    mean = np.trapezoid(2.0 ** (-t / half_life), t) / duration
    assert average_count_time_s(duration, half_life) == pytest.approx(-math.log2(mean) * half_life, rel=1e-8)


def test_activity_after_one_half_life(tmp_path: Path) -> None:
    found = suv_conversion(headers_of(tmp_path))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-12)
    assert found.uptake_s == pytest.approx(HALF_LIFE_S)
    assert found.notes == ()


def test_corrected_to_the_injection_there_is_no_decay(tmp_path: Path) -> None:
    found = suv_conversion(headers_of(tmp_path, setting(DecayCorrection="ADMIN", SeriesTime="", AcquisitionTime="")))
    assert found.factors == pytest.approx([FACTOR / 2] * 9, rel=1e-12)


def test_without_correction_each_image_decays_by_its_own_time(tmp_path: Path) -> None:
    """The start-corrected value of a frame is its uncorrected one times DecayFactor, so the SUVs must be the same."""
    plain = setting(DecayCorrection="NONE", CorrectedImage=["ATTN", "SCAT"])
    headers = headers_of(tmp_path, of_beds(), plain)
    found = suv_conversion(headers)
    expected = [FACTOR * (header.decay_factor or 0.0) for header in headers]
    assert len(set(np.round(found.factors, 9))) == 3
    assert found.factors == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("said", ["both", "factor", "frame", "neither", "zero"])
def test_a_rewritten_series_time_is_seen_through(tmp_path: Path, said: str) -> None:
    beds = of_beds(frame_reference=said in ("both", "frame"), decay_factor=said in ("both", "factor"))
    if said == "zero":
        beds = combined(beds, setting(FrameReferenceTime="0"))
    for rewritten in (setting(SeriesTime="142233"), setting(SeriesTime=None), setting(SeriesDate="20200101")):
        found = suv_conversion(headers_of(tmp_path, beds, rewritten))
        assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-5)
        assert len(found.notes) == 1


@pytest.mark.parametrize("of_each_bed", [False, True])
def test_frame_reference_times_of_the_beds_starts(tmp_path: Path, of_each_bed: bool) -> None:
    """As the real GE scan has it, with AcquisitionTime of the whole in every image; or of each bed."""

    def edit(dataset: Dataset, k: int) -> None:
        of_beds(decay_factor=not of_each_bed)(dataset, k)
        dataset.FrameReferenceTime = f"{BEDS[k] * 130000}"
        if not of_each_bed:
            dataset.AcquisitionTime = "103000"

    assert suv_conversion(headers_of(tmp_path, edit)).factors == pytest.approx([FACTOR] * 9, rel=1e-9)
    found = suv_conversion(headers_of(tmp_path, edit, setting(SeriesTime="120000")))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-9)


def test_images_that_contradict_each_other_about_the_start_are_refused(tmp_path: Path) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        of_beds(decay_factor=False)(dataset, k)
        dataset.FrameReferenceTime = f"{1000 * (60 + 400 * BEDS[k])}"

    with pytest.raises(InputError, match="not known"):
        suv_conversion(headers_of(tmp_path, edit, setting(SeriesTime="142233")))


def test_a_series_time_that_the_decay_factors_deny_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contradict each other by 30 min"):
        suv_conversion(headers_of(tmp_path, of_beds(), setting(SeriesTime="100000")))


@pytest.mark.parametrize("of_each_bed", [False, True])
def test_a_series_time_before_all_frames_is_refused(tmp_path: Path, of_each_bed: bool) -> None:
    """Without DecayFactor; with AcquisitionTime of the whole in every image a frame may lie long after the start."""

    def edit(dataset: Dataset, k: int) -> None:
        of_beds(decay_factor=False)(dataset, k)
        if not of_each_bed:
            dataset.AcquisitionTime, dataset.FrameReferenceTime = "103000", "59500"

    with pytest.raises(InputError, match="SeriesTime and FrameReferenceTime contradict each other by 40 min"):
        suv_conversion(headers_of(tmp_path, edit, setting(SeriesTime="095000")))
    if not of_each_bed:
        late = setting(FrameReferenceTime="1328700")
        assert suv_conversion(headers_of(tmp_path, edit, late)).factors == pytest.approx([FACTOR] * 9, rel=1e-9)


def moved(hours: float) -> Edit:
    """All times `hours` later, days included where they are said."""

    def edit(dataset: Dataset, _: int) -> None:
        tracer = dataset.RadiopharmaceuticalInformationSequence[0]
        for place, key in (
            (dataset, "SeriesTime"),
            (dataset, "AcquisitionTime"),
            (tracer, "RadiopharmaceuticalStartTime"),
        ):
            second = shifted(Moment(time_of_day(str(place[key].value)) or 0.0), hours * 3600.0).second
            setattr(place, key, f"{int(second // 3600):02d}{int(second // 60) % 60:02d}{second % 60:09.6f}")

    return edit


def test_midnight_between_injection_and_scan(tmp_path: Path) -> None:
    across = moved(14.6)  # injected 23:16, scanned 01:06
    assert suv_conversion(headers_of(tmp_path, across)).factors == pytest.approx([FACTOR] * 9, rel=1e-9)
    dated = setting(RadiopharmaceuticalStartDateTime="20190703231613.8")
    found = suv_conversion(headers_of(tmp_path, across, dated))
    assert (found.factors[0], found.notes) == (pytest.approx(FACTOR, rel=1e-9), ())
    undated = setting(SeriesDate=None, AcquisitionDate=None)
    assert suv_conversion(headers_of(tmp_path, across, undated)).factors[0] == pytest.approx(FACTOR, rel=1e-9)


def test_midnight_between_start_and_last_bed(tmp_path: Path) -> None:
    """SeriesTime 23:58 without dates: the beds after midnight are no sign of a rewritten series."""
    late = of_beds("235800", decay_factor=False)
    times = setting(SeriesTime="235800", SeriesDate=None, AcquisitionDate=None, RadiopharmaceuticalStartTime="220813.8")
    found = suv_conversion(headers_of(tmp_path, late, times))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-9)
    assert found.method.endswith("series time")


def test_dates_of_an_injection_shifted_by_deidentification(tmp_path: Path) -> None:
    found = suv_conversion(headers_of(tmp_path, setting(RadiopharmaceuticalStartDateTime="19600101084013.8")))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-9)
    assert "contradicts" in found.notes[0]


def test_an_injection_in_universal_time(tmp_path: Path) -> None:
    utc = {"RadiopharmaceuticalStartDateTime": "20190704064013.8+0000", "RadiopharmaceuticalStartTime": None}
    found = suv_conversion(headers_of(tmp_path, setting(**utc, TimezoneOffsetFromUTC="+0200")))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-9)
    with pytest.raises(InputError, match="TimezoneOffsetFromUTC is missing"):
        suv_conversion(headers_of(tmp_path, setting(**utc)))
