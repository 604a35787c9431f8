"""Standardised uptake values from what a PET header says: the physics and its refusals, without any file.

    SUVbw = C · W / (D · 2^(−Δt / T½))      [g/ml]

C Bq/ml as decay-corrected by the scanner, W weight in g, D the activity at injection in Bq, Δt from injection to the
moment to which the image is corrected. Kinahan & Fletcher, Semin Ultrasound CT MR 31:496 (2010); which header field
means what: DICOM PS3.3, C.8.9, and the vendor-neutral computation of QIBA's FDG-PET/CT profile (2013), appendix G.

What cannot be converted safely is refused, with every reason at once. Reasons carry durations and doses, never a date.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vtrial.imaging.dicom.decay import F18_HALF_LIFE_S, PetHeader, decay_reference, frame_moments, injection_to
from vtrial.imaging.dicom.fields import coarse
from vtrial.records import InputError, Sex

Tracer = Literal["fdg", "any"]
LeanMass = Literal["janmahasatian", "james"]

WEIGHT_KG = (2.0, 350.0)
HEIGHT_M = (0.4, 2.5)
BMI = (8.0, 100.0)
_DOSE_BQ = (5e6, 2e9)  # a child's FDG to more than any adult's
_HALF_LIFE_TOLERANCE = 0.015  # scanners write 6584 to 6600 s for fluorine-18
_UNITS = ("BQML", "CNTS", "GML")
_DECAY = ("START", "ADMIN", "NONE")
# Terms of DICOM PS3.3, C.8.9.1 that are quoted in a refusal; another text in their place may be anything.
_KNOWN_UNITS = {"BQML", "CNTS", "GML", "PROPCNTS", "PROPCPS", "CPS", "PCNT", "CM2ML", "MLG", "MLML", "STDDEV", "NONE"}
_KNOWN_TYPES = {"BW", "BSA", "IBW", "LBM", "LBMJANMA", "LBMJAMES128"}
_OF_SERIES = {  # fields of the header that must be one for the series
    "units": "Units",
    "suv_type": "SUVType",
    "decay_correction": "DecayCorrection",
    "corrections": "CorrectedImage",
    "tracer": "the radiopharmaceutical",
    "dose_bq": "RadionuclideTotalDose",
    "half_life_s": "RadionuclideHalfLife",
    "weight_kg": "PatientWeight",
    "series": "SeriesDate or SeriesTime",
    "injection": "RadiopharmaceuticalStartDateTime",
    "injection_time_s": "RadiopharmaceuticalStartTime",
}


@dataclass(frozen=True)
class SuvConversion:
    """How the rescaled values of a PET series become SUV: multiply image i by `factors[i]` (g/ml per unit).

    `method` says it in words, `uptake_s` is the time from injection to the moment of decay correction where it was
    needed, `notes` what the reader should know. `weight_kg` is the body weight that went into the factors, None where
    the scanner's own SUV is taken. Where the header `lacks_weight` they are for 1 kg: `of_weight` makes them SUV.
    """

    factors: tuple[float, ...] = field(repr=False)
    method: str
    uptake_s: float | None = None
    notes: tuple[str, ...] = ()
    weight_kg: float | None = None
    lacks_weight: bool = False

    def of_weight(self, weight_kg: float) -> SuvConversion:
        """The conversion of a header that lacks the weight, for a body of this one."""
        assert self.lacks_weight
        factors = tuple(weight_kg * factor for factor in self.factors)
        return replace(self, factors=factors, weight_kg=weight_kg, lacks_weight=False)


def is_attenuation_corrected(header: PetHeader) -> bool:
    """Whether the header says so (ATTN in CorrectedImage, or where that is missing a method) and nothing denies it.

    Some scanners write ATTN into every series: a description of the series as uncorrected, or a method "none", counts.
    """
    method = header.attenuation_method.lower()
    if header.described_uncorrected or method in ("none", "no"):
        return False
    return "ATTN" in header.corrections if header.corrections else method != ""


def suv_conversion(headers: Sequence[PetHeader], tracer: Tracer = "fdg", *, weightless: bool = False) -> SuvConversion:
    """The factors of a series from the headers of its images; InputError with every reason why there are none.

    `tracer` "fdg" refuses a series that does not say it is FDG, "any" takes what is there. `weightless` takes one
    without PatientWeight, for a weight to come.
    """
    first = headers[0]
    problems = [*_differences(headers), *_quantity_problems(first, tracer)]
    if problems:
        raise InputError(problems)
    if first.units == "GML":
        return SuvConversion((1.0,) * len(headers), "GML: stored as body-weight SUV")
    if first.units == "CNTS" and all(header.philips_suv for header in headers):
        return _philips_suv(headers)
    to_bqml = [1.0] * len(headers)
    if first.units == "CNTS":
        to_bqml = [header.philips_bqml or 0.0 for header in headers]
        if not all(factor > 0.0 for factor in to_bqml):
            raise InputError(
                "Units is CNTS and neither Philips factor, (7053,xx00) SUV or (7053,xx09) Bq/ml, is there for every "
                "image: counts alone have no SUV; export again with private fields kept, or as BQML"
            )
    found = _from_activity(headers, tracer, to_bqml, weightless)
    return replace(found, weight_kg=first.weight_kg or None, lacks_weight=not first.weight_kg)


def _differences(headers: Sequence[PetHeader]) -> list[str]:
    """Fields that must be one for the series and are not."""
    return [
        f"{name} differs between the images of the series; it must be one: convert them apart"
        for key, name in _OF_SERIES.items()
        if len({getattr(header, key) for header in headers}) > 1
    ]


def _quantity_problems(header: PetHeader, tracer: Tracer) -> list[str]:
    """Why the stored values are no activity or SUV of this tracer."""
    problems = []
    if header.units not in _UNITS:
        problems.append(f"Units is {_told(header.units)}; SUV needs one of {', '.join(_UNITS)}")
    if header.units == "GML" and header.suv_type not in ("", "BW"):
        problems.append(f"SUVType is {_told(header.suv_type)}; only BW (body weight) is taken: export BQML or SUVbw")
    if not is_attenuation_corrected(header):
        problems.append(
            "not attenuation corrected, by CorrectedImage, AttenuationCorrectionMethod or SeriesDescription: take the "
            "corrected series"
        )
    if header.series_type in ("DYNAMIC", "GATED"):
        problems.append(f"SeriesType is {header.series_type}; only STATIC and WHOLE BODY are taken")
    if header.lossy:
        problems.append("LossyImageCompression is 01: lossy compression has changed the values; export without")
    if header.injections > 1:
        problems.append(f"{header.injections} radiopharmaceuticals are named; one is needed to know whose decay counts")
    if tracer == "fdg" and header.tracer != "fdg":
        what = "is another than FDG" if header.tracer == "other" else "is not said to be FDG"
        problems.append(f'the tracer {what} (RadiopharmaceuticalInformationSequence); tracer "any" takes it as it is')
    if header.units in ("BQML", "CNTS"):
        problems.extend(_decay_problems(header))
    return problems


def _decay_problems(header: PetHeader) -> list[str]:
    if header.decay_correction not in _DECAY:
        return [f"DecayCorrection is {_told(header.decay_correction)}; it must be one of {', '.join(_DECAY)}"]
    corrected = "DECY" in header.corrections
    if header.decay_correction == "NONE" and corrected:
        return ["DecayCorrection is NONE but CorrectedImage holds DECY: one of them is wrong"]
    if header.decay_correction != "NONE" and header.corrections and not corrected:
        return [f"DecayCorrection is {header.decay_correction} but CorrectedImage holds no DECY: one of them is wrong"]
    return []


def _philips_suv(headers: Sequence[PetHeader]) -> SuvConversion:
    if headers[0].decay_correction != "START":
        raise InputError(
            f"DecayCorrection is {headers[0].decay_correction}; the Philips SUV factor (7053,xx00) is for START"
        )
    factors = tuple(header.philips_suv or 0.0 for header in headers)
    if min(factors) <= 0.0 or not all(map(math.isfinite, factors)):
        raise InputError(f"the Philips SUV factor (7053,xx00) is {coarse(min(factors))}; it must be above 0")
    return SuvConversion(factors, "CNTS: the scanner's own SUV factor (7053,xx00)")


def _from_activity(
    headers: Sequence[PetHeader], tracer: Tracer, to_bqml: Sequence[float], weightless: bool
) -> SuvConversion:
    first = headers[0]
    half_life_s, notes, problems = _half_life(first, tracer)
    if first.weight_kg or not weightless:
        problems += weight_problems(first.weight_kg, first.height_m)
    problems += _dose_problems(first.dose_bq)
    if problems:
        raise InputError(problems)
    assert first.dose_bq is not None and half_life_s is not None
    scale = 1000.0 * (first.weight_kg or 1.0) / first.dose_bq
    if first.decay_correction == "ADMIN":
        factors = tuple(scale * factor for factor in to_bqml)
        return SuvConversion(factors, f"{first.units}, decay corrected to the injection", 0.0, tuple(notes))
    limit_s = 8 * 3600.0 if tracer == "fdg" else 10.0 * half_life_s
    if first.decay_correction == "START":
        reference = decay_reference(headers, half_life_s)
        delay = injection_to(first, reference.moment, half_life_s, limit_s)
        notes += [*reference.notes, *delay.notes]
        grown = 2.0 ** (delay.seconds / half_life_s)
        factors = tuple(scale * factor * grown for factor in to_bqml)
        method = f"{first.units}, decay corrected to the start: {reference.source}"
        return SuvConversion(factors, method, delay.seconds, tuple(notes))
    delays = [injection_to(first, moment, half_life_s, limit_s) for moment in frame_moments(headers, half_life_s)]
    notes += sorted({note for delay in delays for note in delay.notes})
    pairs = zip(to_bqml, delays, strict=True)
    factors = tuple(scale * factor * 2.0 ** (delay.seconds / half_life_s) for factor, delay in pairs)
    earliest = min(delay.seconds for delay in delays)
    return SuvConversion(
        factors, f"{first.units}, not decay corrected: each image by its own time", earliest, tuple(notes)
    )


def _half_life(header: PetHeader, tracer: Tracer) -> tuple[float | None, list[str], list[str]]:
    """Half-life in s, notes, problems. That of fluorine-18 is a constant of nature: it may be missing."""
    value = header.half_life_s
    if tracer == "fdg":
        if value is None:
            return F18_HALF_LIFE_S, ["RadionuclideHalfLife is missing: that of fluorine-18 was taken"], []
        if abs(value / F18_HALF_LIFE_S - 1.0) > _HALF_LIFE_TOLERANCE:
            return (
                None,
                [],
                [f"RadionuclideHalfLife is {coarse(value)} s; that of FDG is {F18_HALF_LIFE_S:g} s (109.77 min)"],
            )
    elif value is None or not 60.0 <= value <= 1e7:
        told = "missing" if value is None else f"{coarse(value)} s"
        return None, [], [f"RadionuclideHalfLife is {told}; it must lie between 60 and 1e7 s"]
    return value, [], []


def _dose_problems(dose_bq: float | None) -> list[str]:
    low, high = _DOSE_BQ
    if dose_bq is None:
        return ["RadionuclideTotalDose is missing; the injected activity in Bq is needed"]
    if not low <= dose_bq <= high:
        hint = " (it looks like MBq; DICOM wants Bq)" if 5.0 <= dose_bq <= 2000.0 else ""
        return [
            f"RadionuclideTotalDose is {coarse(dose_bq)} Bq{hint}; plausible are {low:g} to {high:g}: mend the header"
        ]
    return []


def weight_problems(weight_kg: float | None, height_m: float | None) -> list[str]:
    """Why a weight cannot be trusted: missing, out of range, or no human body with the height beside it."""
    low, high = WEIGHT_KG
    if weight_kg is None or weight_kg == 0.0:
        return ["PatientWeight is missing; body-weight SUV needs it in kg"]
    if not low <= weight_kg <= high:
        return [f"PatientWeight is {coarse(weight_kg)} kg; plausible are {low:g} to {high:g}: mend the header"]
    if height_m is not None and HEIGHT_M[0] <= height_m <= HEIGHT_M[1]:
        bmi = weight_kg / height_m**2
        if not BMI[0] <= bmi <= BMI[1]:
            return [
                f"PatientWeight {weight_kg:g} kg with PatientSize {height_m:g} m is a body mass index of {bmi:.0f}; "
                f"plausible are {BMI[0]:g} to {BMI[1]:g}: one of them is wrong (swapped?)"
            ]
    return []


def _told(code: str) -> str:
    """A code of a header as it may be shown."""
    return "missing" if not code else code if code in _KNOWN_UNITS | _KNOWN_TYPES else "no term of DICOM's"


def lean_mass_kg(sex: Sex, weight_kg: float, height_m: float, formula: LeanMass = "janmahasatian") -> float:
    """Lean body mass in kg; InputError for a body that is none, or that the formula cannot serve.

    Janmahasatian et al., Clin Pharmacokinet 44:1051 (2005): 9270 W / (6680 + 216 BMI) for men, 9270 W / (8780 + 244
    BMI) for women. James, Research on Obesity (HMSO 1976): 1.10 W − 128 (W/H)² and 1.07 W − 148 (W/H)² with H in cm,
    which falls again above a BMI of 43 (men) and 36 (women) and is refused there.
    """
    problems = weight_problems(weight_kg, height_m)
    if not HEIGHT_M[0] <= height_m <= HEIGHT_M[1]:
        problems.append(f"a height of {height_m:g} m; lean mass needs {HEIGHT_M[0]:g} to {HEIGHT_M[1]:g} m")
    if problems:
        raise InputError(problems)
    bmi = weight_kg / height_m**2
    if formula == "janmahasatian":
        return 9270.0 * weight_kg / (6680.0 + 216.0 * bmi if sex == "M" else 8780.0 + 244.0 * bmi)
    linear, square = (1.10, 128.0) if sex == "M" else (1.07, 148.0)
    highest = linear / (2.0 * square) * 1e4  # where the derivative in W is zero, in kg/m²
    if bmi > highest:
        raise InputError(
            f"a body mass index of {bmi:.1f}: the formula of James falls above {highest:.1f}; take janmahasatian"
        )
    return linear * weight_kg - square * (weight_kg / (100.0 * height_m)) ** 2


def sul_per_suv(sex: Sex, weight_kg: float, height_m: float, formula: LeanMass = "janmahasatian") -> float:
    """What body-weight SUV is multiplied by to give SUL, by lean body mass; InputError as in `lean_mass_kg`."""
    return lean_mass_kg(sex, weight_kg, height_m, formula) / weight_kg
