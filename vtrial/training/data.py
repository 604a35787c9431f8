"""Where training volumes come from: a stored set, memory-mapped, or any endless stream with the same two verbs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from vtrial.diffusion.conditions import PHASE, Demographics
from vtrial.diffusion.weights import ExtentFit
from vtrial.geometry import FACTOR
from vtrial.imaging.codec import encode_ct, encode_suv
from vtrial.records import InputError, Support
from vtrial.runs import MANIFEST

Triple = tuple[int, int, int]
PHASES: tuple[Triple, ...] = tuple((x, y, z) for x in range(FACTOR) for y in range(FACTOR) for z in range(FACTOR))
COLUMNS = ("subject_id", "sex", "age_years", "height_cm", "weight_kg")


class Volume(Protocol):
    """One full-resolution pair in model space, read in parts."""

    @property
    def demographics(self) -> Demographics:
        """Whose body it is."""

    @property
    def shape(self) -> Triple:
        """Voxels along x, y, z."""

    def read(self, where: tuple[slice, slice, slice]) -> Tensor:
        """A part (2, …) in model space, float32; slices may have steps."""


class VolumeSource(Protocol):
    """An endless supply. All randomness comes from the generator given, so training resumes exactly."""

    @property
    def support(self) -> Support:
        """Ranges of the demographics."""

    @property
    def device(self) -> torch.device:
        """Where the volumes live."""

    def draw(self, rng: np.random.Generator, epoch: int) -> Volume:
        """A random volume; what there is to choose from may change with the epoch."""

    def draw_low(self, rng: np.random.Generator, epoch: int) -> tuple[Tensor, Triple, Demographics]:
        """A random low-resolution volume (2, x/4, y/4, z/4), its sampling phase and whose it is."""


@dataclass(frozen=True)
class TensorVolume:
    """A volume in memory or on a GPU: `pair` (2, x, y, z) in model space."""

    pair: Tensor
    demographics: Demographics

    @property
    def shape(self) -> Triple:
        """Voxels along x, y, z."""
        return self.pair.shape[1], self.pair.shape[2], self.pair.shape[3]

    def read(self, where: tuple[slice, slice, slice]) -> Tensor:
        """A part of it."""
        return self.pair[(slice(None), *where)].float()


@dataclass(frozen=True)
class StoredVolume:
    """A volume of a training set: int16 HU and float16 SUV, memory-mapped."""

    ct_file: Path
    suv_file: Path
    demographics: Demographics

    @property
    def shape(self) -> Triple:
        """Voxels along x, y, z."""
        x, y, z = np.load(self.ct_file, mmap_mode="r").shape
        return x, y, z

    def read(self, where: tuple[slice, slice, slice]) -> Tensor:
        """A part of it, encoded to model space."""
        ct = np.load(self.ct_file, mmap_mode="r")[where]
        suv = np.load(self.suv_file, mmap_mode="r")[where]
        return torch.stack(
            [encode_ct(torch.from_numpy(np.array(ct))), encode_suv(torch.from_numpy(np.array(suv, dtype=np.float32)))]
        )


def sample_low(volume: Volume, phase: Triple) -> Tensor:
    """One of the 64 stratified subvolumes, I[x::4, y::4, z::4] from offset `phase` (Yoon et al. 2025, section 2.2)."""
    x, y, z = (slice(p, None, FACTOR) for p in phase)
    return volume.read((x, y, z))


def write_low(folder: str | Path, subject_id: str, volume: Volume, rng: np.random.Generator, count: int) -> Path:
    """Store `count` random subvolumes as DATA/low/<subject_id>.npz, which stage 1 takes instead of the full volume.

    2.4 MB a pair of subvolumes in place of 77 MB a subject.
    """
    path = Path(folder) / "low" / f"{subject_id}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = TensorVolume(volume.read((slice(None),) * 3), volume.demographics)
    phases = rng.choice(len(PHASES), size=count, replace=False)
    lows = np.stack([sample_low(whole, PHASES[i]).cpu().numpy().astype(np.float16) for i in phases])
    part = path.with_suffix(".part.npz")
    np.savez(part, volumes=lows, phases=np.array([PHASES[i] for i in phases], dtype=np.int8))
    return part.replace(path)


@dataclass
class StoredVolumes:
    """A training set on disk: subjects.parquet, ct/<id>.npy, suv/<id>.npy and, for stage 1 alone, low/<id>.npz.

    Of a table with a column `split` only those of one split are taken.
    `phases` subvolumes a subject are cut on first use and kept in memory as float16 (1.2 MB each). Stage 2 draws
    from the subjects that have full volumes.
    """

    folder: Path
    phases: int = 4
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    split: str = "train"

    @staticmethod
    def has(folder: Path, split: str) -> bool:
        """Whether the training set in `folder` has people in a split."""
        table = _read_subjects(folder / "subjects.parquet")
        return "split" in table.columns and split in set(table["split"])

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        path = self.folder / "subjects.parquet"
        table = trained_on(_read_subjects(path), self.split)
        if table.empty:
            raise InputError(f"{path}: nobody in the split {self.split}")
        self.ids = [str(v) for v in table["subject_id"]]
        self.demographics = [
            Demographics(sex, float(age), float(height), float(weight))
            for sex, age, height, weight in zip(*(table[c] for c in COLUMNS[1:]), strict=True)
        ]
        self._whole = [i for i, name in enumerate(self.ids) if all(f.exists() for f in self._files(name))]
        whole = {self.ids[i] for i in self._whole}
        missing = [i for i in self.ids if i not in whole and not self._low_file(i).exists()]
        if missing:
            raise InputError(f"{self.folder}: {len(missing)} subjects without volumes, the first is {missing[0]}")
        self._cache: dict[int, tuple[int, NDArray[np.float16], list[Triple]]] = {}

    @property
    def support(self) -> Support:
        """Of the population that phantoms were drawn from, as their manifest tells; else what the table covers."""
        known = _manifest(self.folder, "facts").get("support")
        return TypeAdapter(Support).validate_python(known) if known else Support.of(self.demographics)

    @property
    def has_whole(self) -> bool:
        """Whether anybody has full volumes, which stage 2 needs."""
        return bool(self._whole)

    def _files(self, subject_id: str) -> tuple[Path, Path]:
        return self.folder / "ct" / f"{subject_id}.npy", self.folder / "suv" / f"{subject_id}.npy"

    def _low_file(self, subject_id: str) -> Path:
        return self.folder / "low" / f"{subject_id}.npz"

    def volume(self, i: int) -> StoredVolume:
        """Subject `i` of the table."""
        ct, suv = self._files(self.ids[i])
        return StoredVolume(ct, suv, self.demographics[i])

    def draw(self, rng: np.random.Generator, epoch: int) -> Volume:
        """A random one of the subjects that have full volumes; InputError if none has."""
        if not self._whole:
            raise InputError(f"{self.folder}: no full volumes (ct/, suv/), which stage 2 is trained on")
        return self.volume(self._whole[int(rng.integers(len(self._whole)))])

    def draw_low(self, rng: np.random.Generator, epoch: int) -> tuple[Tensor, Triple, Demographics]:
        """A random subvolume of a random subject; which ones are in memory depends on the epoch alone."""
        i = int(rng.integers(len(self.ids)))
        cached = self._cache.get(i)
        if cached is None or cached[0] != epoch:
            cached = self._cache[i] = (epoch, *self._cut(i, epoch))
        _, volumes, phases = cached
        k = int(rng.integers(len(phases)))
        return torch.from_numpy(volumes[k].astype(np.float32)), phases[k], self.demographics[i]

    def _cut(self, i: int, epoch: int) -> tuple[NDArray[np.float16], list[Triple]]:
        file = self._low_file(self.ids[i])
        rng = np.random.default_rng([self.seed, i, epoch])
        if file.exists():
            with np.load(file) as stored:
                kept = rng.permutation(len(stored["phases"]))[: self.phases]
                return stored["volumes"][kept], [(int(x), int(y), int(z)) for x, y, z in stored["phases"][kept]]
        chosen = [PHASES[k] for k in rng.choice(len(PHASES), size=min(self.phases, len(PHASES)), replace=False)]
        ct_file, suv_file = self._files(self.ids[i])
        # one pass over each file, then strided cuts in memory
        ct, suv = np.load(ct_file), np.load(suv_file)
        out = np.empty((len(chosen), 2, *(n // FACTOR for n in ct.shape)), dtype=np.float16)
        for k, (x, y, z) in enumerate(chosen):
            part = (slice(x, None, FACTOR), slice(y, None, FACTOR), slice(z, None, FACTOR))
            out[k, 0] = encode_ct(torch.from_numpy(ct[part].astype(np.float32))).numpy()
            out[k, 1] = encode_suv(torch.from_numpy(suv[part].astype(np.float32))).numpy()
        return out, chosen


def _read_subjects(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise InputError(f"{path}: not found; a training set is a folder with subjects.parquet, ct/ and suv/")
    table = pd.read_parquet(path)
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing or table.empty:
        raise InputError(f"{path}: " + (f"columns missing: {', '.join(missing)}" if missing else "no subjects"))
    return table


def trained_on(table: pd.DataFrame, split: str = "train") -> pd.DataFrame:
    """The subjects of a training set that training sees: those in the split "train", or all where nothing is split."""
    return table[table["split"] == split] if "split" in table.columns else table


def data_sha256(data: Path) -> str:
    """SHA-256 that names what is trained on, of a cohort spec or of a stored set; two sets made alike have the same.

    Of a stored set: how it was made, as its manifest's identity tells, and who is in which split, with the fingerprints
    of the studies where they are real.
    """
    if data.is_file():
        return hashlib.sha256(data.read_bytes()).hexdigest()
    table = _read_subjects(data / "subjects.parquet")
    columns = [name for name in (*COLUMNS, "split", "fingerprint") if name in table.columns]
    people = table[columns].sort_values("subject_id").to_csv(index=False, lineterminator="\n")
    return hashlib.sha256((json.dumps(_manifest(data, "identity"), sort_keys=True) + people).encode()).hexdigest()


def _manifest(folder: Path, part: str) -> dict[str, Any]:
    """A part of the manifest of a training set; nothing where there is none."""
    manifest = folder / MANIFEST
    found: dict[str, Any] = json.loads(manifest.read_text())[part] if manifest.is_file() else {}
    return found


def read_extent(data: Path) -> ExtentFit | None:
    """How the field of view goes with height in a training set of real scans; None where that is not told."""
    known = _manifest(data, "facts").get("extent") if data.is_dir() else None
    return None if known is None else ExtentFit.model_validate(known)


def patch_pair(volume: Volume, origin: Triple, shape: Triple) -> tuple[Tensor, Tensor, Triple]:
    """A patch (2, *shape) at `origin` (multiples of 4), the low-resolution block (2, …) that its upsampling needs (one
    voxel more at each side where there is one), and the patch's origin in that block's full-resolution voxels."""
    part = tuple(slice(o, o + s) for o, s in zip(origin, shape, strict=True))
    first = [max(o // FACTOR - 1, 0) for o in origin]
    last = [min((o + s) // FACTOR, n // FACTOR - 1) for o, s, n in zip(origin, shape, volume.shape, strict=True)]
    block = [slice(FACTOR * a + p, FACTOR * b + p + 1, FACTOR) for a, b, p in zip(first, last, PHASE, strict=True)]
    inner = tuple(o - FACTOR * a for o, a in zip(origin, first, strict=True))
    return (
        volume.read((part[0], part[1], part[2])),
        volume.read((block[0], block[1], block[2])),
        (inner[0], inner[1], inner[2]),
    )
