"""One DICOM image's header as plain values; the only place that touches pydicom's own, and the fields that identify.

Headers in the wild are broken in every field: a value that cannot be read counts as missing, and what needs it refuses.
Nothing of a header is ever logged, and no error quotes a text of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder

from vtrial.imaging.dicom.clock import moment_of, moment_of_datetime, offset_s, time_of_day
from vtrial.imaging.dicom.decay import PetHeader
from vtrial.imaging.dicom.fields import (
    discreetly,
    names_nobody,
    number_of,
    numbers_of,
    philips_factor,
    plain,
    text_of,
    texts_of,
    value_of,
)
from vtrial.imaging.dicom.people import Person, person_of
from vtrial.records import CannotRead, InputError

Kind = Literal["CT", "PT"]

_KINDS: dict[str, Kind] = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.128": "PT"}
_MULTI_FRAME = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1")
_FDG_CODES = ("35321007", "C-B1031")  # DICOM PS3.16, CID 4021: SCT and SRT
_OTHER_TRACER = re.compile(
    r"psma|dota|choline|naf|sodiumfluoride|fdgal|galactose|flt|thymid|miso|dopa|florbet|flutemet|fes\b"
)
_UNCORRECTED = re.compile(r"(?<![a-z])(nac(?![a-z])|uncorr|no[nt]?[ _-]*(ac(?![a-z])|att))")


@dataclass(frozen=True, repr=False, slots=True)
class Identity:
    """What identifies: for grouping, and for a key that the user asks for. It has no `repr`, lest it be printed.

    `patient` is the PatientID, else name and birth date; "" where these are nobody's (ANON).
    """

    patient: str
    study_uid: str
    words: frozenset[str]  # lower case, letters and digits only: what no shown name may hold


@dataclass(frozen=True, repr=False, slots=True)
class Image:
    """One CT or PET image: where it lies in the patient (mm, DICOM's LPS axes), how its values are rescaled.

    `columns_along` and `rows_along` are the directions of growing column and row index, `spacing_mm` the distances
    between columns and between rows. A collection has a million of these: what the images of a series have in common
    is one object.
    """

    path: Path
    kind: Kind
    identity: Identity
    series_uid: str
    image_uid: str
    frame_uid: str
    image_type: tuple[str, ...]
    series_number: float
    shape: tuple[int, int]  # columns, rows
    position: tuple[float, ...] | None
    columns_along: tuple[float, ...] | None
    rows_along: tuple[float, ...] | None
    spacing_mm: tuple[float, float] | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    padding: float | None
    lossy: bool
    announced_slices: float | None
    person: Person
    pet: PetHeader | None


@dataclass(frozen=True, repr=False)
class Other:
    """A DICOM file that is no CT or PET image of a stack: what it is, and whom it would name."""

    what: str
    identity: Identity


def read_header(path: Path) -> Image | Other | None:
    """The header of a file; None if it is no DICOM. OSError if it cannot be opened, InputError if it is broken."""
    with discreetly():
        return header_of(path)


def header_of(path: Path) -> Image | Other | None:
    """`read_header` for a caller who is `discreetly` reading many files, in threads if it likes."""
    if not _looks_like_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        return _image(path, dataset)
    except OSError:
        raise
    except Exception:  # a parser fed with rubbish raises anything; its words quote the rubbish
        raise InputError("the DICOM header is broken") from None


def read_pixels(path: Path) -> NDArray[Any]:
    """The stored values (rows, columns) of an image; InputError, with a remedy, if they are none, CannotRead where
    the file cannot be opened or nothing that is installed decompresses it."""
    with discreetly():
        syntax, has_decoder = "an unknown transfer syntax", True
        try:
            dataset = pydicom.dcmread(path, force=True)
            syntax, has_decoder = _syntax(dataset), _has_decoder(dataset)
            pixels = np.asarray(dataset.pixel_array)
        except OSError as error:
            raise CannotRead(f"cannot be read ({error.strerror})") from None
        except Exception:
            if not has_decoder:
                raise CannotRead(
                    f"the pixels ({syntax}) need a decoder that is not installed: pip install python-gdcm, or "
                    "decompress them, for example with `gdcmconv --raw`"
                ) from None
            raise InputError(
                f"the pixels ({syntax}) are damaged or cannot be decompressed here; copy the file again, or decompress "
                "it, for example with `gdcmconv --raw`"
            ) from None
    if pixels.ndim != 2:
        raise InputError(f"the pixels have {pixels.ndim} axes instead of rows and columns")
    return pixels


def _syntax(dataset: Any) -> str:
    uid = dataset.file_meta.get("TransferSyntaxUID")
    return str(uid.name) if uid is not None and uid.is_transfer_syntax and not uid.is_private else "private syntax"


def _has_decoder(dataset: Any) -> bool:
    """Whether pydicom finds what the pixels' syntax needs; of a syntax that it does not know nothing is missing."""
    try:
        return bool(get_decoder(dataset.file_meta.TransferSyntaxUID).is_available)
    except NotImplementedError:
        return True


def _looks_like_dicom(path: Path) -> bool:
    """By the mark after the preamble, or without one by a first element of group 2 or 8 (little endian)."""
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    return len(start) == 132 and start[0:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00"


def _image(path: Path, dataset: Any) -> Image | Other:
    uid = text_of(dataset, "SOPClassUID")
    image_type = tuple(part.upper() for part in texts_of(dataset, "ImageType"))
    identity = _identity(dataset)
    kind = _KINDS.get(uid)
    if uid in _MULTI_FRAME:
        return Other("multi-frame (enhanced) images, which are not read: export as single frames", identity)
    if kind is None:
        return Other(_name_of(uid), identity)
    if "LOCALIZER" in image_type:
        return Other("localizers", identity)
    if {"MIP", "PROJECTION IMAGE", "PROJECTION"} & set(image_type):
        return Other("projections", identity)
    along = numbers_of(dataset, "ImageOrientationPatient", 6)
    spacing = numbers_of(dataset, "PixelSpacing", 2)
    return Image(
        path=path,
        kind=kind,
        identity=identity,
        series_uid=_one(text_of(dataset, "SeriesInstanceUID")),
        image_uid=text_of(dataset, "SOPInstanceUID"),
        frame_uid=_one(text_of(dataset, "FrameOfReferenceUID")),
        image_type=_one(image_type),
        series_number=number_of(dataset, "SeriesNumber") or math.inf,
        shape=(int(number_of(dataset, "Columns") or 0), int(number_of(dataset, "Rows") or 0)),
        position=numbers_of(dataset, "ImagePositionPatient", 3),
        columns_along=_one(along[:3]) if along else None,
        rows_along=_one(along[3:]) if along else None,
        spacing_mm=_one((spacing[1], spacing[0])) if spacing else None,
        slope=number_of(dataset, "RescaleSlope"),
        intercept=number_of(dataset, "RescaleIntercept"),
        rescale_type=text_of(dataset, "RescaleType").upper(),
        padding=number_of(dataset, "PixelPaddingValue"),
        lossy=text_of(dataset, "LossyImageCompression") == "01",
        announced_slices=number_of(dataset, "NumberOfSlices"),
        person=_one(person_of(dataset)),
        pet=_one(_pet(dataset)) if kind == "PT" else None,
    )


def _name_of(uid: str) -> str:
    """A kind of DICOM object in words that hold nothing of the file's own."""
    name = pydicom.uid.UID(uid).name
    return "objects of unknown kind" if name == uid else f"{name} objects"


def _identity(dataset: Any) -> Identity:
    names = [part for part in re.split(r"[\W_]+", text_of(dataset, "PatientName").lower()) if part]
    ids = [text_of(dataset, "PatientID"), *texts_of(dataset, "OtherPatientIDs")]
    ids += [
        text_of(dataset, key) for key in ("AccessionNumber", "StudyID", "IssuerOfPatientID", "ReferringPhysicianName")
    ]
    words = {*names, *(plain(text) for text in (*ids, text_of(dataset, "PatientName"))), *_dates(dataset)}
    named = "" if names_nobody(" ".join(names)) else " ".join([*names, text_of(dataset, "PatientBirthDate")]).strip()
    patient = named if names_nobody(ids[0]) else ids[0]
    identity: Identity = _one(Identity(patient, text_of(dataset, "StudyInstanceUID"), frozenset(words - {""})))
    return identity


@lru_cache(maxsize=1024)
def _one(value: Any) -> Any:
    """The first of equal values."""
    return value


def _dates(dataset: Any) -> Iterator[str]:
    for key in ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        text = plain(text_of(dataset, key))
        if len(text) == 8:
            year, month, day = text[:4], text[4:6], text[6:]
            yield from (text, month + day + year, day + month + year)


def _pet(dataset: Any) -> PetHeader:
    sequence = value_of(dataset, "RadiopharmaceuticalInformationSequence") or []
    tracer = sequence[0] if len(sequence) else pydicom.Dataset()
    frame_ms, duration_ms = number_of(dataset, "FrameReferenceTime"), number_of(dataset, "ActualFrameDuration")
    return PetHeader(
        units=text_of(dataset, "Units").upper(),
        suv_type=text_of(dataset, "SUVType").upper(),
        corrections=frozenset(part.upper() for part in texts_of(dataset, "CorrectedImage")),
        attenuation_method=text_of(dataset, "AttenuationCorrectionMethod"),
        described_uncorrected=bool(_UNCORRECTED.search(text_of(dataset, "SeriesDescription").lower())),
        decay_correction=text_of(dataset, "DecayCorrection").upper(),
        series_type=text_of(dataset, "SeriesType").upper(),
        lossy=text_of(dataset, "LossyImageCompression") == "01",
        tracer=_tracer(tracer),
        injections=len(sequence),
        dose_bq=number_of(tracer, "RadionuclideTotalDose"),
        half_life_s=number_of(tracer, "RadionuclideHalfLife"),
        injection=moment_of_datetime(text_of(tracer, "RadiopharmaceuticalStartDateTime")),
        injection_time_s=time_of_day(text_of(tracer, "RadiopharmaceuticalStartTime")),
        timezone_s=offset_s(text_of(dataset, "TimezoneOffsetFromUTC")),
        series=moment_of(text_of(dataset, "SeriesDate"), text_of(dataset, "SeriesTime")),
        acquisition=moment_of(text_of(dataset, "AcquisitionDate"), text_of(dataset, "AcquisitionTime"))
        or moment_of_datetime(text_of(dataset, "AcquisitionDateTime")),
        frame_reference_s=None if frame_ms is None else frame_ms / 1000.0,
        frame_duration_s=duration_ms / 1000.0 if duration_ms is not None and duration_ms > 0.0 else None,
        decay_factor=number_of(dataset, "DecayFactor"),
        philips_suv=philips_factor(dataset, 0x00),
        philips_bqml=philips_factor(dataset, 0x09),
        weight_kg=number_of(dataset, "PatientWeight"),
        height_m=number_of(dataset, "PatientSize"),
    )


def _tracer(item: Any) -> Literal["fdg", "other", "unknown"]:
    """What names and codes say; one word for another tracer outweighs the rest, and "solution" says nothing."""
    texts, codes = [text_of(item, "Radiopharmaceutical")], []
    for code in value_of(item, "RadiopharmaceuticalCodeSequence") or []:
        texts.append(text_of(code, "CodeMeaning"))
        codes.append(text_of(code, "CodeValue"))
    words = [re.sub(r"[\W\d_]+", "", text).lower() for text in texts]
    if any(_OTHER_TRACER.search(word) for word in words):
        return "other"
    if any("fdg" in word or ("glucose" in word and "flu" in word) for word in words) or set(codes) & set(_FDG_CODES):
        return "fdg"
    return "unknown"
