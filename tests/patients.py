"""A patient drawn by formula: what lies at a point is known, so a scan can be taken on any grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from tests import dicoms
from tests.petcts import FDG, save
from vtrial.imaging.volume import Volume
from vtrial.organs import ORGAN_IDS

Points = NDArray[np.float64]
Point = tuple[float, float, float]

LESION, LESION_MM = (-40.0, 20.0, 30.0), 40.0
LESION_HU, LESION_SUV = 120.0, 6.0
TISSUE_HU, TISSUE_SUV = 40.0, 0.8
DOME_MM = 130.0  # where the liver ends and the lung begins
# z of the ends of bones in mm: a trunk of 560 mm, hips 70 mm below it.
ENDS = {"clavicula": (290.0, 320.0), "sacrum": (-240.0, -140.0), "hip": (-310.0, -120.0), "scapula": (150.0, 300.0)}
EXTENT_MM = (320.0 + 40.0) - (-310.0 - 40.0)


def rotation(degrees: float, axis: int) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = [k for k in range(3) if k != axis]
    turn = np.eye(3)
    turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return turn


def affine_around(shape: tuple[int, ...], directions: NDArray[np.float64], centre: Point) -> NDArray[np.float64]:
    """An affine with the columns of `directions` (mm a voxel) that has the middle of the grid at `centre`."""
    affine = np.eye(4)
    affine[:3, :3] = directions
    affine[:3, 3] = np.array(centre) - directions @ ((np.array(shape) - 1) / 2.0)
    return affine


def points_of(shape: tuple[int, ...], affine: NDArray[np.float64]) -> Points:
    """World positions (..., 3) of the voxel centres."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def every(affine: NDArray[np.float64], start: tuple[int, int, int], step: tuple[int, int, int]) -> NDArray[np.float64]:
    """The affine of `voxels[start::step]`."""
    scaled = affine @ np.diag([*step, 1.0])
    scaled[:3, 3] = affine[:3, :3] @ np.array(start) + affine[:3, 3]
    return scaled


def ball(points: Points, centre: Point, radius: float, soft_mm: float) -> NDArray[np.float64]:
    """1 inside a ball, 0 outside, falling over `soft_mm` around its surface."""
    away = np.linalg.norm(points - np.array(centre), axis=-1) - radius
    return np.clip(0.5 - away / soft_mm, 0.0, 1.0)


@dataclass(frozen=True)
class Patient:
    """Moves and faults: the PET lies off by `pet_shift`, its dome is higher by `breath_mm`, the arms may be down."""

    arms_down: bool = False
    pet_shift: Point = (0.0, 0.0, 0.0)
    breath_mm: float = 0.0
    mirror: float = 1.0
    pet_arm: bool = False  # raised out of the CT's sight

    def body(self, p: Points) -> NDArray[np.bool_]:
        x, y, z = np.moveaxis(p, -1, 0)
        body = (x / 165.0) ** 2 + (y / 105.0) ** 2 < 1.0
        if self.arms_down:
            arms = (np.abs(x) - 200.0) ** 2 + y**2 < 25.0**2
            body |= (arms & (z > -200.0)) | ((z > 250.0) & (np.abs(x) < 205.0) & (np.abs(y) < 40.0))
        return np.asarray(body)

    def chest(self, p: Points, dome_mm: float) -> NDArray[np.bool_]:
        x, y, z = np.moveaxis(p, -1, 0)
        return np.asarray((x / 130.0) ** 2 + (y / 75.0) ** 2 < 1.0) & (z > dome_mm) & (z < 260.0)

    def liver(self, p: Points, dome_mm: float) -> NDArray[np.bool_]:
        x, y, z = np.moveaxis(p, -1, 0)
        middle = ((self.mirror * x - 70.0) / 50.0) ** 2 + (y / 60.0) ** 2 < 1.0
        return np.asarray(middle & (z > dome_mm - 120.0) & (z <= dome_mm))

    def ct(self, p: Points) -> NDArray[np.int16]:
        x, y, _ = np.moveaxis(p, -1, 0)
        hu = np.full(p.shape[:-1], -1000.0)
        hu[(y < -107.0) & (y > -135.0) & (np.abs(x) < 220.0)] = -850.0  # mattress
        hu[(y <= -135.0) & (y > -141.0) & (np.abs(x) < 230.0)] = 150.0  # table
        hu[(y > 120.0) & (y < 123.0) & (np.abs(x) < 180.0)] = -200.0  # a fold of the blanket
        hu[self.body(p)] = TISSUE_HU
        hu[self.chest(p, DOME_MM)] = -850.0
        return np.rint(hu + (LESION_HU - TISSUE_HU) * ball(p, LESION, LESION_MM, 4.0)).astype(np.int16)

    def suv(self, p: Points) -> NDArray[np.float32]:
        p = p - np.array(self.pet_shift)
        x, y, z = np.moveaxis(p, -1, 0)
        suv = np.where(self.body(p), TISSUE_SUV, 0.01)
        suv[self.chest(p, DOME_MM + self.breath_mm)] = 0.4
        suv[self.liver(p, DOME_MM + self.breath_mm)] = 2.2
        if self.pet_arm:
            suv[((x - 215.0) ** 2 + (y - 40.0) ** 2 < 30.0**2) & (z > 0.0)] = 0.7
        return np.asarray(suv + (LESION_SUV - TISSUE_SUV) * ball(p, LESION, LESION_MM, 4.0), dtype=np.float32)

    def labels(self, p: Points) -> NDArray[np.uint8]:
        x, y, z = np.moveaxis(p, -1, 0)
        labels = np.zeros(p.shape[:-1], dtype=np.uint8)
        spine = np.abs(y + 60.0) < 20.0
        for bone, (low, high) in ENDS.items():
            at = spine & (z > low) & (z < high)
            if bone == "sacrum":
                labels[at & (np.abs(x) < 20.0)] = ORGAN_IDS[bone]
                continue
            for side, name in ((1.0, "right"), (-1.0, "left")):
                labels[at & (np.abs(x * side - 60.0) < 40.0)] = ORGAN_IDS[f"{bone}_{name}"]
        labels[(np.abs(x) < 40.0) & (np.abs(y - 20.0) < 40.0) & (z > 140.0) & (z < 220.0)] = ORGAN_IDS["heart"]
        labels[(np.abs(self.mirror * x + 90.0) < 20.0) & (np.abs(y) < 30.0) & (z > 60.0) & (z < 120.0)] = ORGAN_IDS[
            "spleen"
        ]
        labels[self.liver(p, DOME_MM)] = ORGAN_IDS["liver"]
        if self.arms_down:
            labels[(np.abs(x - 200.0) < 10.0) & (np.abs(y) < 10.0) & (z > 0.0) & (z < 280.0)] = ORGAN_IDS[
                "humerus_right"
            ]
        return labels


def scan(
    patient: Patient = Patient(),
    *,
    low_mm: float = -420.0,
    high_mm: float = 420.0,
    pet_turn: NDArray[np.float64] | None = None,
) -> tuple[Volume, Volume, Volume]:
    """CT at 4x4x5 mm (left-handed, axes in another order), PET at 5x5x4 mm (turned by `pet_turn`), labels as the CT."""
    middle = (low_mm + high_mm) / 2.0
    count = round((high_mm - low_mm) / 5.0)
    shape = (count, 120, 80)
    along = np.column_stack([(0.0, 0.0, -5.0), (-4.0, 0.0, 0.0), (0.0, 4.0, 0.0)])
    affine = affine_around(shape, along, (3.0, 0.0, middle))
    points = points_of(shape, affine)
    ct, labels = patient.ct(points), patient.labels(points)
    pet_shape = (110, 80, round((high_mm - low_mm) / 4.0))
    turn = np.eye(3) if pet_turn is None else pet_turn
    pet_affine = affine_around(pet_shape, turn @ np.diag([5.0, 5.0, 4.0]), (0.0, 0.0, middle))
    suv = patient.suv(points_of(pet_shape, pet_affine))
    return Volume(ct, affine), Volume(suv, pet_affine), Volume(labels, affine)


PEOPLE = (("F", 160.0, 60.0), ("M", 180.0, 85.0), ("F", 170.0, 75.0))


def write_study(root: Path, i: int, volumes: Sequence[Volume]) -> Path:
    """CT and PET as FDG-PET-CT-Lesions has them, of the patient with that number; gives the folder."""
    folder = root / f"PETCT_{i:010x}" / FDG[1]
    for name, volume in zip(("CTres", "SUV"), volumes):
        save(folder / f"{name}.nii.gz", volume.voxels, volume.affine)
    return folder


def write_collection(root: Path) -> Path:
    """Three patients of different uptake, and the table of who they are."""
    ct, suv, _ = scan()
    lines = ["study,sex,age_years,height_cm,weight_kg"]
    for i, (sex, height, weight) in enumerate(PEOPLE):
        folder = write_study(root, i, (ct, Volume(suv.voxels * np.float32(1.0 + i / 50.0), suv.affine)))
        lines.append(f"{folder.relative_to(root).as_posix()},{sex},{50 + i},{height},{weight}")
    (root / "demographics.csv").write_text("\n".join(lines) + "\n")
    return root


DICOM_GRID = dicoms.Grid(60, 40, 84, spacing=(8.0, 8.0), origin=(-236.0, -156.0, -415.0), step=(0.0, 0.0, 10.0))


def painted(then: dicoms.Edit | None = None, patient: Patient = Patient()) -> dicoms.Edit:
    """An edit that draws the patient into an image where its header says that it lies; `then` comes after."""

    def edit(dataset: Dataset, k: int) -> None:
        row, column = np.meshgrid(np.arange(dataset.Rows), np.arange(dataset.Columns), indexing="ij")
        along = np.array(dataset.ImageOrientationPatient, dtype=float)
        down, across = map(float, dataset.PixelSpacing)
        lps = np.array(dataset.ImagePositionPatient, dtype=float)
        lps = lps + column[..., None] * across * along[:3] + row[..., None] * down * along[3:]
        at = lps * np.array([-1.0, -1.0, 1.0])
        values = patient.suv(at) / dicoms.FACTOR if dataset.Modality == "PT" else patient.ct(at).astype(float)
        stored = (values - float(dataset.RescaleIntercept)) / float(dataset.RescaleSlope)
        dataset.PixelData = np.rint(stored).astype("<i2").tobytes()
        if then is not None:
            then(dataset, k)

    return edit


def write_patient(root: Path, study: int, *, ct: dicoms.Edit | None = None, pet: dicoms.Edit | None = None) -> Path:
    """The patient as a DICOM study, CT and PET in folders of their own; edits come after the drawing."""
    dicoms.write_series(root / "ct", "CT", grid=DICOM_GRID, study=study, edit=painted(ct))
    dicoms.write_series(root / "pet", "PT", grid=DICOM_GRID, study=study, edit=painted(pet))
    return root
