"""A training set at low resolution: every fourth voxel along each axis, in model space, as stage 1 sees volumes."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyarrow.lib import ArrowException

from vtrial.diffusion.conditions import PHASE
from vtrial.geometry import FACTOR
from vtrial.imaging.codec import encode_ct, encode_suv
from vtrial.records import InputError, PetCt
from vtrial.training.data import trained_on

Triple = tuple[int, int, int]
TRIED = 3  # volumes that are opened to learn the grid of all
UNREADABLE = (InputError, OSError, ValueError, KeyError, BadZipFile)


@dataclass(frozen=True)
class TrainingSet:
    """A folder as `vtrial prepare` or `vtrial phantom --layout training` writes it.

    `ids` are the subjects that training sees and whose volumes are there, `of` counts those that it sees. `digest`
    changes with the table of subjects and with every file of a volume.
    """

    folder: Path
    ids: tuple[str, ...]
    of: int
    shape: Triple
    digest: str

    def low(self, subject_id: str) -> torch.Tensor:
        """Every fourth voxel in model space, (2, x / 4, y / 4, z / 4); OSError, ValueError, KeyError if unreadable."""
        return _low(self.folder, subject_id)


def open_training(location: str) -> TrainingSet:
    """The training set in a folder; InputError with what is wrong with it."""
    folder = Path(location)
    path = folder / "subjects.parquet"
    if not path.is_file():
        raise InputError(
            f"--train {location}: no subjects.parquet there; give a training set (vtrial phantom … --layout training)"
        )
    try:
        table, data = pd.read_parquet(path), path.read_bytes()
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    if "subject_id" not in table.columns:
        raise InputError(f"{path}: no column subject_id; it has {', '.join(map(str, table.columns))}")
    files = {kind: _files(folder / kind, ending) for kind, ending in (("ct", "npy"), ("suv", "npy"), ("low", "npz"))}
    names = [str(name) for name in trained_on(table)["subject_id"]]
    ids = tuple(name for name in names if (name in files["ct"] and name in files["suv"]) or name in files["low"])
    if len(ids) < 2:
        raise InputError(f"--train {location}: volumes of {len(ids)} subjects in ct/ and suv/; it needs two or more")
    shape = None
    for name in ids[:TRIED]:
        with suppress(*UNREADABLE):
            shape = shape_of(_low(folder, name))
            break
    if shape is None:
        raise InputError(f"--train {location}: the volume of {ids[0]} cannot be read; write the training set again")
    digest = hashlib.sha256(data + repr(sorted((k, sorted(v.items())) for k, v in files.items())).encode())
    return TrainingSet(folder, ids, len(names), shape, digest.hexdigest())


def low_of(pet_ct: PetCt) -> torch.Tensor:
    """A scan, as `TrainingSet.low`; ValueError where CT and SUV are no volumes of one grid."""
    return _encoded(pet_ct.ct_hu, pet_ct.suv)


def _low(folder: Path, subject_id: str) -> torch.Tensor:
    """A training subject, of whole volumes, or of the stored subvolume that lies nearest where these are taken."""
    ct, suv = (folder / kind / f"{subject_id}.npy" for kind in ("ct", "suv"))
    if ct.is_file() and suv.is_file():
        return _encoded(*(np.load(file, mmap_mode="r") for file in (ct, suv)))
    with np.load(folder / "low" / f"{subject_id}.npz") as stored:
        nearest = int(np.abs(stored["phases"].astype(int) - PHASE).sum(axis=1).argmin())
        return torch.from_numpy(stored["volumes"][nearest].astype(np.float32))


def _encoded(ct_hu: NDArray[np.generic], suv: NDArray[np.generic]) -> torch.Tensor:
    """Every fourth voxel of whole volumes, in model space; a mapped file is read there alone."""
    if ct_hu.ndim != 3 or ct_hu.shape != suv.shape:
        raise ValueError(f"CT {ct_hu.shape} and SUV {suv.shape} are no volumes of one grid")
    part = tuple(slice(phase, None, FACTOR) for phase in PHASE)
    ct_low, suv_low = (torch.from_numpy(np.array(array[part], dtype=np.float32)) for array in (ct_hu, suv))
    return torch.stack([encode_ct(ct_low), encode_suv(suv_low)])


def shape_of(voxels: torch.Tensor) -> Triple:
    """Low-resolution voxels along x, y, z of (2, x, y, z)."""
    x, y, z = voxels.shape[1:]
    return x, y, z


def _files(folder: Path, ending: str) -> dict[str, tuple[int, int]]:
    """Name without ending to size and time of the files of a folder."""
    found = {}
    for path in folder.glob(f"*.{ending}"):
        stat = path.stat()
        found[path.stem] = (stat.st_size, stat.st_mtime_ns)
    return found
