"""Small PET/CTs as NIfTI: what a voxel holds tells where it lies in the patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from vtrial.imaging.volume import Volume
from vtrial.preparation.sources import Collection, Study
from vtrial.preparation.volume import check_pair
from vtrial.records import InputError

SHAPE = (12, 14, 16)
AFFINE = np.array([[4.0, 0, 0, -24], [0, 5.0, 0, -30], [0, 0, 6.0, -40], [0, 0, 0, 1]])
FDG = ("PETCT_0011f3deaf", "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445")


def world(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each voxel lies (mm)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def hu_at(mm: NDArray[np.float64], shift: float = 0.0) -> NDArray[np.float64]:
    return np.maximum(np.rint(mm @ np.array([6.0, 7.0, 8.0])) - 400.0 + shift, -1000.0)


def suv_at(mm: NDArray[np.float64], shift: float = 0.0) -> NDArray[np.float64]:
    return 3.0 + shift + mm @ np.array([0.01, 0.02, 0.03])


def save(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def write_pair(ct: Path, suv: Path, affine: NDArray[np.float64] = AFFINE, shift: float = 0.0) -> None:
    """CT and SUV on one grid; `shift` makes the patient another one."""
    mm = world(SHAPE, affine)
    save(ct, hu_at(mm, shift).astype(np.int16), affine)
    save(suv, suv_at(mm, shift / 100.0).astype(np.float32), affine)


def write_fdg(root: Path, patient: str = FDG[0], study: str = FDG[1], shift: float = 0.0) -> Path:
    """A study as FDG-PET-CT-Lesions has it; gives its folder."""
    folder = root / patient / study
    write_pair(folder / "CTres.nii.gz", folder / "SUV.nii.gz", shift=shift)
    save(folder / "SEG.nii.gz", np.zeros(SHAPE, np.uint8))
    return folder


def write_case(root: Path, case: str, shift: float = 0.0) -> None:
    """A case as nnU-Net raw has it: CT, then SUV."""
    write_pair(*(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz" for channel in (0, 1)), shift=shift)


def in_place(ct: Volume, suv: Volume, shift: float = 0.0) -> bool:
    """Whether both volumes hold what they should where their affines say that it lies, on upright axes."""
    for volume in (ct, suv):
        if not (np.diag(volume.affine)[:3] > 0).all():
            return False
    there = hu_at(world(ct.voxels.shape, ct.affine), shift)
    taken = suv_at(world(suv.voxels.shape, suv.affine), shift / 100.0)
    return bool(np.abs(ct.voxels - there).max() <= 1.0 and np.abs(suv.voxels - taken).max() < 1e-4)


def only(collection: Collection) -> Study:
    assert not collection.left_out, collection.left_out
    (study,) = collection.studies
    return study


def refusal(collection: Collection) -> str:
    """Why the only study is refused, by its looks, when it is read, or as a pair."""
    if collection.left_out:
        return "; ".join(reason for left in collection.left_out for reason in left.reasons)
    with pytest.raises(InputError) as caught:
        check_pair(*only(collection).load())
    return str(caught.value)


def facts(study: Study) -> tuple[object, ...]:
    """Sex, age, height, weight."""
    person = study.person
    return person.sex, person.age_years, person.height_cm, person.weight_kg
