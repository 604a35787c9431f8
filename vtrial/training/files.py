"""The files of a training set. One that is torn, or holds something else, is told by its name and what to do."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyarrow.lib import ArrowException
from pydantic import TypeAdapter

from vtrial.records import InputError
from vtrial.runs import MANIFEST
from vtrial.training.config import times

T = TypeVar("T")
COLUMNS = ("subject_id", "sex", "age_years", "height_cm", "weight_kg")
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, ArrowException, BadZipFile, zlib.error)


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """InputError for whatever the content of `file`, which should be `kind`, makes fail."""
    try:
        yield
    except UNREADABLE as error:
        raise InputError(f"{file}: not {kind} ({error}); copy it again, or make the training set again") from None


def read_subjects(path: Path) -> pd.DataFrame:
    """The table of a training set; InputError if there is none, or for people that cannot be trained on."""
    if not path.exists():
        raise InputError(f"{path}: not found; a training set is a folder with subjects.parquet, ct/ and suv/")
    with reading(path, "a readable Parquet file"):
        table = pd.read_parquet(path)
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing or table.empty:
        raise InputError(f"{path}: " + (f"columns missing: {', '.join(missing)}" if missing else "no subjects"))
    problems = []
    for name in COLUMNS[1:]:
        good = table["sex"].isin(("F", "M")) if name == "sex" else _finite(table[name])
        if not good.all():
            first, wanted = table[~good].iloc[0], "F or M" if name == "sex" else "a number"
            problems.append(
                f"{path}: {name} of {int((~good).sum())} subjects is not {wanted}, the first is {first['subject_id']} "
                f"with {first[name]}; mend the table, or leave these rows out"
            )
    if problems:
        raise InputError(problems)
    return table


def _finite(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce").astype("Float64").fillna(np.inf).abs() < np.inf


def read_pair(ct_file: Path, suv_file: Path, *, lazily: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """CT and SUV (x, y, z) of a subject, with `lazily` memory-mapped."""
    arrays: list[NDArray[Any]] = []
    for file in (ct_file, suv_file):
        with reading(file, "a volume"):
            array = np.load(file, mmap_mode="r" if lazily else None)
            if not isinstance(array, np.ndarray) or array.ndim != 3:
                raise ValueError("it holds no array of three dimensions")
        arrays.append(array)
    ct, suv = arrays
    if ct.shape != suv.shape:
        raise InputError(
            f"{ct_file}: {times(ct.shape)} voxels, but {suv_file} has {times(suv.shape)}; a subject's CT and SUV need "
            "one grid: make the training set again"
        )
    return ct, suv


def low_phases(file: Path) -> list[tuple[int, int, int]]:
    """The phases of the subvolumes that a file of low/ holds."""
    with reading(file, "a file of subvolumes"), np.load(file) as stored:
        return [(int(x), int(y), int(z)) for x, y, z in stored["phases"]]


def low_volumes(file: Path, phases: Sequence[tuple[int, int, int]]) -> NDArray[np.float16]:
    """The subvolumes (n, 2, x/4, y/4, z/4) of some of its phases."""
    known = low_phases(file)
    with reading(file, "a file of subvolumes"), np.load(file) as stored:
        volumes: NDArray[np.float16] = stored["volumes"][[known.index(phase) for phase in phases]]
    return volumes


def manifest_part(folder: Path, part: str) -> dict[str, Any]:
    """A part of the manifest of a training set; nothing where there is none."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    with reading(manifest, "the manifest of a training set"):
        content = json.loads(manifest.read_text())
        found = content.get(part) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"no {part} in it")
    return found


def fact(folder: Path, name: str, kind: type[T]) -> T | None:
    """One of the facts in the manifest; None where that does not tell it."""
    known = manifest_part(folder, "facts").get(name)
    if not known:
        return None
    with reading(folder / MANIFEST, f"the manifest of a training set: {name}"):
        return TypeAdapter(kind).validate_python(known)
