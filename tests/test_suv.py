"""SUV from PET headers: what is stored and in which unit, what is refused, and eight vendors' headers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian

from tests.dicoms import FACTOR, Edit, headers_of, setting
from vtrial.imaging.dicom.suv import lean_mass_kg, sul_per_suv, suv_conversion
from vtrial.records import InputError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"Units": "PROPCNTS"}, "Units is PROPCNTS"),
    ({"Units": None}, "Units is missing"),
    ({"Units": "GML", "SUVType": "LBM"}, "SUVType is LBM"),
    ({"Units": "CNTS"}, "neither Philips factor"),
    ({"CorrectedImage": ["DECY", "SCAT"]}, "not attenuation corrected"),
    ({"CorrectedImage": None}, "not attenuation corrected"),
    ({"SeriesDescription": "WB PET_NoAC"}, "not attenuation corrected"),
    ({"AttenuationCorrectionMethod": "NONE"}, "not attenuation corrected"),
    ({"CorrectedImage": ["ATTN"]}, "holds no DECY"),
    ({"DecayCorrection": "NONE"}, "CorrectedImage holds DECY"),
    ({"DecayCorrection": None}, "DecayCorrection is missing"),
    ({"SeriesType": ["DYNAMIC", "IMAGE"]}, "DYNAMIC"),
    ({"LossyImageCompression": "01"}, "LossyImageCompression"),
    ({"PatientWeight": None}, "PatientWeight is missing"),
    ({"PatientWeight": "0"}, "PatientWeight is missing"),
    ({"PatientWeight": "70000"}, "PatientWeight is 70000 kg"),
    ({"PatientWeight": "165", "PatientSize": "0.70"}, "swapped"),
    ({"RadionuclideTotalDose": None}, "RadionuclideTotalDose is missing"),
    ({"RadionuclideTotalDose": "350"}, "looks like MBq"),
    ({"RadionuclideTotalDose": "-350000000"}, "RadionuclideTotalDose is -3.5e"),
    ({"RadionuclideHalfLife": "109.8"}, "RadionuclideHalfLife is 109.8 s"),
    ({"RadionuclideHalfLife": "1223"}, "RadionuclideHalfLife is 1223 s"),
    ({"RadiopharmaceuticalStartTime": None}, "one is needed"),
    ({"RadiopharmaceuticalStartTime": "103500"}, "plausible are 0 to 8 h"),
    ({"RadiopharmaceuticalStartTime": "013000"}, "lies 9.0 h before"),
    ({"RadiopharmaceuticalStartDateTime": "20190704080000"}, "40 min apart"),
    ({"AcquisitionTime": None}, "AcquisitionTime is missing or unreadable in 9 of 9"),
    ({"DecayCorrection": "NONE", "CorrectedImage": ["ATTN"], "ActualFrameDuration": None}, "ActualFrameDuration"),
    ({"RadiopharmaceuticalInformationSequence": [Dataset(), Dataset()]}, "2 radiopharmaceuticals"),
    ({"Radiopharmaceutical": "Ga-68 PSMA-11"}, "another than FDG"),
    ({"Radiopharmaceutical": "Sodium fluoride F^18^"}, "another than FDG"),
    ({"Radiopharmaceutical": "Solution"}, "not said to be FDG"),
    ({"Radiopharmaceutical": None}, "not said to be FDG"),
]


@pytest.mark.parametrize(("values", "reason"), REFUSED, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(REFUSED)])
def test_refused_with_the_reason(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        suv_conversion(headers_of(tmp_path, setting(**values)))


def test_a_weight_in_words_is_missing(tmp_path: Path) -> None:
    def edit(dataset: Dataset, _: int) -> None:
        dataset[0x00101030] = RawDataElement(Tag(0x00101030), "DS", 6, b"heavy ", 0, False, True)

    with pytest.raises(InputError, match="PatientWeight is missing"):
        suv_conversion(headers_of(tmp_path, edit))


def test_every_reason_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        suv_conversion(headers_of(tmp_path, setting(PatientWeight=None, RadionuclideTotalDose="350")))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("field", ["PatientWeight", "Units", "SeriesTime"])
def test_a_series_with_two_opinions_is_refused(tmp_path: Path, field: str) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        if k == 4:
            setattr(dataset, field, {"PatientWeight": "80", "Units": "GML", "SeriesTime": "102959"}[field])

    with pytest.raises(InputError, match="differs between the images"):
        suv_conversion(headers_of(tmp_path, edit))


@pytest.mark.parametrize("text", ["F-18 FDG", "Fluorodeoxyglucose F^18^", "FLUDEOXYGLUCOSE F18", "[18F]FDG"])
def test_fdg_by_its_names(tmp_path: Path, text: str) -> None:
    assert headers_of(tmp_path, setting(Radiopharmaceutical=text), count=1)[0].tracer == "fdg"


def test_fdg_by_its_code_and_other_tracers_on_request(tmp_path: Path) -> None:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "C-B1031", "SRT", "x"
    coded = setting(Radiopharmaceutical="Solution", RadiopharmaceuticalCodeSequence=[code])
    assert suv_conversion(headers_of(tmp_path, coded)).factors[0] == pytest.approx(FACTOR)
    gallium = setting(
        Radiopharmaceutical="PSMA", RadionuclideHalfLife="4062.6", RadiopharmaceuticalStartTime="092217.4"
    )
    assert suv_conversion(headers_of(tmp_path, gallium), "any").factors[0] == pytest.approx(FACTOR)
    with pytest.raises(InputError, match="RadionuclideHalfLife is missing"):
        suv_conversion(headers_of(tmp_path, setting(Radiopharmaceutical="x", RadionuclideHalfLife=None)), "any")


def test_a_missing_half_life_of_fdg_is_known(tmp_path: Path) -> None:
    found = suv_conversion(headers_of(tmp_path, setting(RadionuclideHalfLife=None)))
    assert (found.factors[0], len(found.notes)) == (pytest.approx(FACTOR), 1)


def test_stored_suv_passes_through_without_weight_or_dose(tmp_path: Path) -> None:
    bare = setting(Units="GML", PatientWeight=None, RadionuclideTotalDose=None, SUVType="BW")
    assert suv_conversion(headers_of(tmp_path, bare)).factors == (1.0,) * 9


def philips(suv: str, bqml: str, *, implicit: bool = False) -> Edit:
    def edit(dataset: Dataset, _: int) -> None:
        dataset.Units = "CNTS"
        block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
        for offset, text in ((0x00, suv), (0x09, bqml)):
            if text and implicit:
                block.add_new(offset, "UN", text.encode())
            elif text:
                block.add_new(offset, "DS", text)
        if implicit:
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    return edit


@pytest.mark.parametrize("implicit", [False, True])
def test_philips_factors(tmp_path: Path, implicit: bool) -> None:
    own = suv_conversion(headers_of(tmp_path, philips("0.00123", "2.5", implicit=implicit)))
    assert own.factors == pytest.approx([0.00123] * 9, rel=1e-12)
    for missing in ("", "0"):
        found = suv_conversion(headers_of(tmp_path, philips(missing, "2.5", implicit=implicit)))
        assert found.factors == pytest.approx([2.5 * FACTOR] * 9, rel=1e-9)


def test_philips_activity_is_not_scaled_by_the_factor_for_counts(tmp_path: Path) -> None:
    found = suv_conversion(headers_of(tmp_path, philips("0.00123", "2.5"), setting(Units="BQML")))
    assert found.factors == pytest.approx([FACTOR] * 9, rel=1e-9)


def test_vendor_vectors(tmp_path: Path, shared_data: Path) -> None:
    """Eight header sets of four vendors. They do not say their tracer."""
    with (shared_data / "suv-vectors" / "expected_suv_factors.csv").open() as file:
        expected = {row["file"]: float(row["suv_factor_g_per_ml_per_stored_unit"]) for row in csv.DictReader(file)}
    assert len(expected) == 8
    for name, factor in expected.items():
        instances = json.loads((shared_data / "suv-vectors" / name).read_text())
        edit = _of_vector(instances)
        found = suv_conversion(headers_of(tmp_path, edit, count=len(instances)), "any")
        assert found.factors == pytest.approx([factor] * len(instances), rel=1e-6), name


def _of_vector(instances: list[dict[str, Any]]) -> Edit:
    def edit(dataset: Dataset, k: int) -> None:
        values = dict(instances[k])
        private = values.pop("PhilipsPETPrivateGroup")
        cleared = {"PatientSize": None, "RadiopharmaceuticalStartDateTime": None, "Radiopharmaceutical": None}
        setting(**(cleared | {key: _text(value) for key, value in values.items()}))(dataset, k)
        units = dataset.Units
        philips(private.get("SUVScaleFactor", ""), private.get("ActivityConcentrationScaleFactor", ""))(dataset, k)
        dataset.Units = units

    return edit


def _text(value: Any) -> Any:
    return value if isinstance(value, list | str) else f"{value:.12g}"[:16]


@pytest.mark.parametrize(
    ("sex", "weight_kg", "height_m", "janmahasatian", "james"),
    [("M", 80.0, 1.80, 61.73, 62.72), ("F", 62.0, 1.65, 40.09, 45.44), ("M", 70.0, 1.75, 55.86, 56.52)],
)
def test_lean_mass(sex: Any, weight_kg: float, height_m: float, janmahasatian: float, james: float) -> None:
    assert lean_mass_kg(sex, weight_kg, height_m, "james") == pytest.approx(james, abs=0.01)
    assert lean_mass_kg(sex, weight_kg, height_m) == pytest.approx(janmahasatian, abs=0.01)
    assert sul_per_suv(sex, weight_kg, height_m) == pytest.approx(lean_mass_kg(sex, weight_kg, height_m) / weight_kg)


def test_lean_mass_where_a_formula_cannot_serve() -> None:
    assert lean_mass_kg("F", 120.0, 1.65) < 120.0
    with pytest.raises(InputError, match=r"falls above 36\.1"):
        lean_mass_kg("F", 120.0, 1.65, "james")
    for weight_kg, height_m in ((70.0, 170.0), (0.0, 1.7), (70.0, 0.0)):
        with pytest.raises(InputError):
            lean_mass_kg("M", weight_kg, height_m)


def test_headers_do_not_show_themselves(tmp_path: Path) -> None:
    told = repr(headers_of(tmp_path, count=1)[0])
    assert "2019" not in told and "30645" not in told
