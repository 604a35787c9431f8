"""The people of a training set that training never sees, written as a folder of real PET/CT: to judge twins by.

`vtrial prepare` keeps volumes as arrays on the grid of the method. Here those of the split "test" become
`scans/<id>/CTres.nii.gz` (int16 HU) and `SUV.nii.gz` (float32 g/ml), with `people.csv` beside them. Voxels stay as they
are: 2 mm in plane, along z what the study's own field of view asks for, axes to the right, front and head. Where the
body lay in its scanner is not known any more, so the middle of the grid is the origin, as in twins.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pyarrow.lib import ArrowException

from vtrial.execution import cpu_count
from vtrial.geometry import IN_PLANE_MM, SHAPE
from vtrial.imaging.discovery import FoundScan
from vtrial.imaging.files import CT_NAME, SUV_NAME, nifti_bytes
from vtrial.preparation.dataset import TABLE
from vtrial.preparation.split import Split
from vtrial.records import InputError, PetCt
from vtrial.storage import Folder, place, write_if_new

SPLIT: Split = "test"
SCANS, PEOPLE = "scans", "people.csv"
MADE_OF = "arrays.sha256"  # beside the files of a scan and written last: what it was made of
_BODY = ("sex", "age_years", "height_cm", "weight_kg", "bmi")
_WRITERS = 4  # scans at once, of 250 MB each
_DESCRIPTION = "prepared by vtrial"


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A training set, and the rows of its table that are of the split."""

    folder: Folder
    table: pd.DataFrame

    @property
    def people(self) -> pd.DataFrame:
        """Who was scanned: subject_id, sex, age_years, height_cm, weight_kg, bmi and, where it is told, diagnosis."""
        known = [name for name in ("subject_id", *_BODY, "diagnosis") if name in self.table.columns]
        return self.table[known].reset_index(drop=True)

    @property
    def found(self) -> tuple[FoundScan, ...]:
        """The scans as they are named below `scans/`, in the order of `people`, whether they are there or not."""
        pairs = zip(self.table["subject_id"], self.table["person"], strict=True)
        return tuple(FoundScan(name, who, f"{name}/{CT_NAME}", f"{name}/{SUV_NAME}") for name, who in pairs)

    def write(self, work: Folder, ended: Callable[[str, str], None]) -> None:
        """Write into `scans/` of a folder what is not there; `ended` is told of each subject, and what is wrong.

        A subject whose arrays cannot be read stops no other. InputError where a scan is there that was made of other
        arrays than the training set has now, as masks and measurements would be of it too; OSError if the folder does
        not take what is written.
        """
        write_if_new(work, f"{SCANS}/{PEOPLE}", self.people.to_csv(index=False).encode())
        rows = list(zip(self.table["subject_id"], self.table["spacing_z_mm"].astype(float), strict=True))
        with ThreadPoolExecutor(min(_WRITERS, cpu_count())) as pool:
            for (name, _), problem in zip(rows, pool.map(lambda row: self._write(work, *row), rows), strict=True):
                ended(name, problem)

    def _write(self, work: Folder, name: str, spacing_z_mm: float) -> str:
        """Write a scan unless it is there; what is wrong with its arrays, if anything."""
        arrays = [f"{kind}/{name}.npy" for kind in ("ct", "suv")]
        try:
            data = [self.folder.read(array) for array in arrays]
        except OSError as error:
            return f"{' or '.join(arrays)}: cannot be read ({error.strerror or error}); run vtrial prepare again"
        digest = hashlib.sha256(f"{spacing_z_mm!r}".encode())
        for each in data:
            digest.update(hashlib.sha256(each).digest())
        scan, made_of = f"{SCANS}/{name}", digest.hexdigest()
        ct, suv, mark = (f"{scan}/{file}" for file in (CT_NAME, SUV_NAME, MADE_OF))
        if work.size(mark) is not None:
            if work.read(mark).decode() != made_of:
                raise InputError(
                    f"{work.location}: the work on {self.folder.location} as it was before: {name} is another volume "
                    "now; remove that folder, and the same command does the work anew"
                )
            if work.size(ct) is not None and work.size(suv) is not None:
                return ""
        try:
            pet_ct = _pet_ct(data, spacing_z_mm)
        except ValueError as error:
            return f"{' or '.join(arrays)}: not a readable volume ({error}); remove it and run vtrial prepare again"
        for file, voxels in ((ct, pet_ct.ct_hu), (suv, pet_ct.suv)):
            packed, _ = nifti_bytes(voxels, pet_ct.spacing_mm, _DESCRIPTION)
            work.write(file, packed)
        work.write(mark, made_of.encode())
        return ""


def held_out(folder: Folder) -> HeldOut:
    """The people of a training set that training never sees; InputError where there are none, or the set is torn."""
    table, again = place(folder.location, f"{TABLE}.parquet"), "run vtrial prepare again"
    try:
        rows = pd.read_parquet(io.BytesIO(folder.read(f"{TABLE}.parquet")))
    except (OSError, ArrowException, ValueError) as error:
        raise InputError(f"{table}: cannot be read ({error}); {again}") from None
    needed = ("subject_id", "person", "split", *_BODY, "spacing_z_mm")
    if missing := [name for name in needed if name not in rows.columns]:
        raise InputError(f"{table}: columns missing: {', '.join(missing)}; {again}")
    ours = rows[rows["split"] == SPLIT]
    if ours.empty:
        splits = ", ".join(f"{count} in {split}" for split, count in rows["split"].value_counts().items())
        raise InputError(
            f'{folder.location}: a training set with nobody in the split "{SPLIT}" ({splits}): training uses all of '
            "them. Name scans that it never saw, or prepare a larger collection: one person in ten is for testing"
        )
    return HeldOut(folder, ours)


def _pet_ct(files: Sequence[bytes], spacing_z_mm: float) -> PetCt:
    """The volume of two files of arrays, HU and SUV; ValueError where they are none, or not on one grid."""
    hu, uptake = (np.lib.format.read_array(io.BytesIO(data), allow_pickle=False) for data in files)
    if hu.ndim != 3 or not hu.size:
        raise ValueError(f"a CT of shape {hu.shape}")
    in_plane = IN_PLANE_MM * SHAPE[0] / hu.shape[0]
    return PetCt(hu.astype(np.int16, copy=False), uptake.astype(np.float32), (in_plane, in_plane, spacing_z_mm))
