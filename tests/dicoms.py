"""Small DICOM studies of known content: what a voxel holds is a plane function of where it lies in the patient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from vtrial.imaging.dicom.decay import PetHeader
from vtrial.imaging.dicom.headers import Image, read_header

Edit = Callable[[Dataset, int], None]

CT_CLASS, PET_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.128"
ROOT_UID = "1.2.826.0.1.3680043.10.9077"
NAME, PATIENT, ACCESSION = "Quorzelda^Ximenes", "ZQX-778812", "ACC55120"
BIRTH, DAY = "19510203", "20190704"
FACTOR = 4e-4  # g/ml per Bq/ml of the PET made here: 70 kg, 350 MBq, one half-life after the injection
HALF_LIFE_S = 6586.2


def ramp(ras_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """What lies at a place (..., 3) in the patient: different along each axis, so that no flip or swap goes unseen."""
    return 300.0 + ras_mm @ np.array([2.0, 3.0, 5.0])


@dataclass(frozen=True)
class Grid:
    """Where the images of a series lie (mm, LPS); 12 axial slices of a patient on the back by default."""

    columns: int = 10
    rows: int = 8
    count: int = 12
    spacing: tuple[float, float] = (6.0, 5.0)  # between columns, between rows
    origin: tuple[float, float, float] = (-27.0, -17.0, -20.0)
    columns_along: tuple[float, float, float] = (1.0, 0.0, 0.0)
    rows_along: tuple[float, float, float] = (0.0, 1.0, 0.0)
    step: tuple[float, float, float] = (0.0, 0.0, 4.0)

    def moved(self, by: tuple[float, float, float]) -> Grid:
        x, y, z = (a + b for a, b in zip(self.origin, by, strict=True))
        return replace(self, origin=(x, y, z))

    def values(self, k: int) -> NDArray[np.float64]:
        """The content of slice k (rows, columns)."""
        row, column = np.meshgrid(np.arange(self.rows), np.arange(self.columns), indexing="ij")
        lps = (
            np.array(self.origin)
            + k * np.array(self.step)
            + column[..., None] * self.spacing[0] * np.array(self.columns_along)
            + row[..., None] * self.spacing[1] * np.array(self.rows_along)
        )
        return ramp(lps * np.array([-1.0, -1.0, 1.0]))


def image(kind: str, k: int, grid: Grid, study: int, series: int) -> Dataset:
    """Slice k of a series. A PET's rescale slope differs from slice to slice."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = PET_CLASS if kind == "PT" else CT_CLASS
    dataset.SOPInstanceUID = f"{ROOT_UID}.{study}.{series}.{k + 1}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{ROOT_UID}.{study}", f"{ROOT_UID}.{study}.{series}"
    dataset.FrameOfReferenceUID = f"{ROOT_UID}.{study}.99"
    dataset.ImageType, dataset.Modality = ["ORIGINAL", "PRIMARY"], kind
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = NAME, PATIENT, ACCESSION
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = BIRTH, "F", "068Y"
    dataset.PatientSize, dataset.PatientWeight = "1.65", "70.0"
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = DAY
    dataset.SeriesTime, dataset.SeriesNumber, dataset.InstanceNumber = "103000", series, grid.count - k
    dataset.Columns, dataset.Rows = grid.columns, grid.rows
    dataset.PixelSpacing = [grid.spacing[1], grid.spacing[0]]
    dataset.ImagePositionPatient = [a + k * b for a, b in zip(grid.origin, grid.step, strict=True)]
    dataset.ImageOrientationPatient = [*grid.columns_along, *grid.rows_along]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    slope, intercept = (0.5 + 0.01 * k, 0.0) if kind == "PT" else (1.0, -1024.0)
    dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:g}", f"{intercept:g}"
    stored = np.rint((grid.values(k) - intercept) / slope).astype("<i2")
    dataset.PixelData = stored.tobytes()
    if kind == "PT":
        _say_pet(dataset)
    return dataset


def _say_pet(dataset: Dataset) -> None:
    dataset.Units, dataset.DecayCorrection, dataset.SeriesType = "BQML", "START", ["WHOLE BODY", "IMAGE"]
    dataset.CorrectedImage = ["DECY", "ATTN", "SCAT", "NORM"]
    dataset.AcquisitionTime, dataset.ActualFrameDuration = "103000", "120000"
    tracer = Dataset()
    tracer.Radiopharmaceutical, tracer.RadionuclideTotalDose = "FDG -- fluorodeoxyglucose", "350000000"
    tracer.RadionuclideHalfLife, tracer.RadiopharmaceuticalStartTime = str(HALF_LIFE_S), "084013.800000"
    dataset.RadiopharmaceuticalInformationSequence = [tracer]


def write_series(
    folder: Path,
    kind: str,
    *,
    grid: Grid | None = None,
    study: int = 1,
    series: int | None = None,
    edit: Edit | None = None,
    name: str = "{:03d}.dcm",
    skip: Iterable[int] = (),
) -> Path:
    """Write a series, its slices in mixed order of names; `edit` changes each image before. Gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = grid or Grid()
    number = series if series is not None else (2 if kind == "PT" else 3)
    for k in set(range(grid.count)) - set(skip):
        dataset = image(kind, k, grid, study, number)
        if edit is not None:
            edit(dataset, k)
        dataset.save_as(folder / name.format((k * 5) % grid.count), enforce_file_format=True)
    return folder


def write_study(root: Path, *, study: int = 1, pet: Edit | None = None, ct: Edit | None = None) -> Path:
    """A CT and a PET in folders of their own."""
    write_series(root / "ct", "CT", study=study, edit=ct, grid=CT_GRID)
    write_series(root / "pet", "PT", study=study, edit=pet)
    return root


CT_GRID = Grid(columns=20, rows=16, count=24, spacing=(2.5, 2.5), origin=(-24.0, -19.0, -21.0), step=(0.0, 0.0, 2.0))


def setting(**values: object) -> Edit:
    """An edit that sets fields of the image, and of its radiopharmaceutical where they belong there; None deletes."""

    def edit(dataset: Dataset, _: int) -> None:
        for keyword, value in values.items():
            tracer = dataset.RadiopharmaceuticalInformationSequence[0] if "PT" in dataset.Modality else Dataset()
            place = tracer if keyword.startswith("Radio") and keyword in _OF_TRACER else dataset
            if value is None:
                if keyword in place:
                    delattr(place, keyword)
            else:
                setattr(place, keyword, value)

    return edit


_OF_TRACER = {
    "Radiopharmaceutical",
    "RadionuclideTotalDose",
    "RadionuclideHalfLife",
    "RadiopharmaceuticalStartTime",
    "RadiopharmaceuticalStartDateTime",
    "RadiopharmaceuticalCodeSequence",
}


def headers_of(tmp_path: Path, *edits: Edit, count: int = 9) -> list[PetHeader]:
    """The headers of PET images as they come back from files."""
    headers = []
    for k in range(count):
        dataset = image("PT", k, Grid(count=count), 1, 2)
        for edit in edits:
            edit(dataset, k)
        path = tmp_path / f"{k}"
        dataset.save_as(path, enforce_file_format=True)
        found = read_header(path)
        assert isinstance(found, Image) and found.pet is not None
        headers.append(found.pet)
    return headers
