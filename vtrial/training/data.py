"""Where training volumes come from: a stored set, memory-mapped, or any endless stream with the same two verbs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtrial.diffusion.conditions import Demographics
from vtrial.diffusion.weights import ExtentFit
from vtrial.geometry import FACTOR
from vtrial.imaging.codec import encode_ct, encode_suv
from vtrial.memory import total_memory_bytes
from vtrial.records import InputError, Support
from vtrial.training.files import COLUMNS, fact, low_phases, low_volumes, manifest_part, read_pair, read_subjects

Triple = tuple[int, int, int]
PHASES: tuple[Triple, ...] = tuple((x, y, z) for x in range(FACTOR) for y in range(FACTOR) for z in range(FACTOR))


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

    @property
    def refresh_steps(self) -> int:
        """After how many steps what there is to choose from changes, where the configuration does not say; 0: never."""

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
        x, y, z = read_pair(self.ct_file, self.suv_file, lazily=True)[0].shape
        return x, y, z

    def read(self, where: tuple[slice, slice, slice]) -> Tensor:
        """A part of it, encoded to model space."""
        ct, suv = (volume[where] for volume in read_pair(self.ct_file, self.suv_file, lazily=True))
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
    `phases` subvolumes a subject are cut on first use and kept in memory as float16 (1.2 MB each), up to `memory` bytes
    in all; those of further subjects are read from the files at each draw. Stage 2 draws from the subjects that have
    full volumes.
    """

    refresh_steps: ClassVar[int] = 0

    folder: Path
    phases: int = 4
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    split: str = "train"
    memory: int = field(default_factory=lambda: memory_for_volumes(1))
    held_bytes: int = field(default=0, init=False)
    """What the subvolumes in memory take."""

    @staticmethod
    def has(folder: Path, split: str) -> bool:
        """Whether the training set in `folder` has people in a split."""
        table = read_subjects(folder / "subjects.parquet")
        return "split" in table.columns and split in set(table["split"])

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        path = self.folder / "subjects.parquet"
        table = trained_on(read_subjects(path), self.split)
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
        self._kept: dict[int, _Subvolumes] = {}

    @property
    def support(self) -> Support:
        """Of the population that phantoms were drawn from, as their manifest tells; else what the table covers."""
        return fact(self.folder, "support", Support) or Support.of(self.demographics)

    def check(self) -> None:
        """InputError with every file that is torn or no volume; of volumes the beginnings are read."""
        problems: list[str] = []
        for name in self.ids:
            low, (ct, suv) = self._low_file(name), self._files(name)
            try:
                if low.exists():
                    low_phases(low)
                if ct.exists() and suv.exists():
                    read_pair(ct, suv, lazily=True)
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)

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
        """A random subvolume of a random subject; which ones there are to draw depends on the epoch alone."""
        i = int(rng.integers(len(self.ids)))
        kept = self._kept.get(i)
        if kept is None or kept.epoch != epoch:
            phases = self._phases(i, epoch)
            if kept is None and self.held_bytes >= self.memory:
                phase = phases[int(rng.integers(len(phases)))]
                return _float32(self._cut(i, [phase])[0]), phase, self.demographics[i]
            self.held_bytes -= 0 if kept is None else kept.volumes.nbytes
            kept = self._kept[i] = _Subvolumes(epoch, phases, self._cut(i, phases))
            self.held_bytes += kept.volumes.nbytes
        k = int(rng.integers(len(kept.phases)))
        return _float32(kept.volumes[k]), kept.phases[k], self.demographics[i]

    def _phases(self, i: int, epoch: int) -> list[Triple]:
        """Of which subvolumes a subject's are drawn in an epoch."""
        rng = np.random.default_rng([self.seed, i, epoch])
        file = self._low_file(self.ids[i])
        if file.exists():
            known = low_phases(file)
            return [known[k] for k in rng.permutation(len(known))[: self.phases]]
        return [PHASES[k] for k in rng.choice(len(PHASES), size=min(self.phases, len(PHASES)), replace=False)]

    def _cut(self, i: int, phases: Sequence[Triple]) -> NDArray[np.float16]:
        """Subvolumes (n, 2, x/4, y/4, z/4) of a subject."""
        file = self._low_file(self.ids[i])
        if file.exists():
            return low_volumes(file, phases)
        # of several one pass over each file, then strided cuts in memory
        ct, suv = read_pair(*self._files(self.ids[i]), lazily=len(phases) == 1)
        out = np.empty((len(phases), 2, *(n // FACTOR for n in ct.shape)), dtype=np.float16)
        for k, (x, y, z) in enumerate(phases):
            part = (slice(x, None, FACTOR), slice(y, None, FACTOR), slice(z, None, FACTOR))
            out[k, 0] = encode_ct(torch.from_numpy(ct[part].astype(np.float32))).numpy()
            out[k, 1] = encode_suv(torch.from_numpy(suv[part].astype(np.float32))).numpy()
        return out


@dataclass(frozen=True)
class _Subvolumes:
    """Those of a subject that are in memory in an epoch: (n, 2, x/4, y/4, z/4), each from its phase."""

    epoch: int
    phases: list[Triple]
    volumes: NDArray[np.float16]


def memory_for_volumes(workers: int) -> int:
    """Bytes of subvolumes that one of so many workers may keep: in all half of this machine, where they may all be."""
    return total_memory_bytes() // (2 * workers)


def _float32(volume: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(volume.astype(np.float32))


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
    table = read_subjects(data / "subjects.parquet")
    columns = [name for name in (*COLUMNS, "split", "fingerprint") if name in table.columns]
    people = table[columns].sort_values("subject_id").to_csv(index=False, lineterminator="\n")
    return hashlib.sha256((json.dumps(manifest_part(data, "identity"), sort_keys=True) + people).encode()).hexdigest()


def read_extent(data: Path) -> ExtentFit | None:
    """How the field of view goes with height in a training set of real scans; None where that is not told."""
    return fact(data, "extent", ExtentFit) if data.is_dir() else None
