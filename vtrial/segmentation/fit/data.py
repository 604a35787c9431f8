"""Phantoms on the segmenter's grid: rendered and stored once, one file a phantom, and drawn from while training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.cohort.recruit import recruit
from vtrial.cohort.spec import read_spec
from vtrial.phantom.population import Phantom, make_phantom
from vtrial.records import InputError, Subject
from vtrial.segmentation.fit.config import SegmenterConfig, Triple
from vtrial.segmentation.fit.grid import FULL, GridCase, to_grid
from vtrial.storage import write_atomic

SET = "set.json"
_FORMAT = 1
_ARRAYS = ("ct", "label", "other", "share")


def prepare_phantoms(
    config: SegmenterConfig,
    spec: str | Path,
    out: str | Path,
    n: int,
    seed: int,
    *,
    make: Callable[[Subject], Phantom] = make_phantom,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Render `n` phantoms of a cohort spec and store them on the grid in `out`; gives `out`.

    The same call again makes what is missing, and a larger `n` adds to the set: phantom i depends on (seed, i) alone.
    InputError for a bad spec, or an `out` that holds another set. `progress` gets the number of phantoms there are,
    after each that is made.
    """
    folder, facts = Path(out), _facts(config, seed, Path(spec).name)
    known = _read_facts(folder) if (folder / SET).exists() else None
    if known is not None and known != facts:
        changed = sorted(name for name in {*known, *facts} if known.get(name) != facts.get(name))
        raise InputError(f"{folder}: holds another set of phantoms (differs in {', '.join(changed)}); choose another")
    people = recruit(read_spec(spec), n, seed)
    write_atomic(folder / SET, (json.dumps(facts, indent=1) + "\n").encode())
    for subject in people:
        path = folder / f"{subject.index:05d}.npz"
        if path.exists():
            continue
        _store(path, _stretched(config, make(subject), subject))
        if progress is not None:
            progress(subject.index + 1)
    return folder


def _facts(config: SegmenterConfig, seed: int, spec: str) -> dict[str, object]:
    return {"format": _FORMAT, "spec": spec, "seed": seed, "grid_mm": config.spacing_mm, "stretch": config.stretch}


def _read_facts(folder: Path) -> dict[str, object]:
    try:
        facts: dict[str, object] = dict(json.loads((folder / SET).read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder}: no set of a segmenter's phantoms ({SET}); give one, or a cohort spec") from None
    return facts


def _stretched(config: SegmenterConfig, phantom: Phantom, subject: Subject) -> GridCase:
    """The phantom on the grid as a body longer or shorter along each axis would be: its voxels' sizes are scaled."""
    scale = 1.0 + config.stretch * np.random.default_rng([subject.seed, subject.index]).uniform(-1.0, 1.0, 3)
    x, y, z = (float(s * k) for s, k in zip(phantom.pet_ct.spacing_mm, scale, strict=True))
    return to_grid(phantom.pet_ct.ct_hu, phantom.labels, (x, y, z), config.spacing_mm)


def _store(path: Path, case: GridCase) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: getattr(case, name) for name in _ARRAYS})
    write_atomic(path, buffer.getvalue())


@dataclass(frozen=True)
class StoredPhantoms:
    """A prepared set. InputError if `folder` holds none, one of another grid, or no phantoms yet."""

    folder: Path
    grid_mm: float

    def __post_init__(self) -> None:
        found = _read_facts(self.folder).get("grid_mm")
        if found != self.grid_mm:
            raise InputError(f"{self.folder}: phantoms on a grid of {found} mm; this segmenter's has {self.grid_mm} mm")
        if not self.files:
            raise InputError(f"{self.folder}: no phantoms in this set yet; go on making it")

    @property
    def files(self) -> list[Path]:
        """One a phantom, by index."""
        return sorted(self.folder.glob("[0-9]*.npz"))

    @property
    def source(self) -> str:
        """What the set is, for checkpoints and cards."""
        facts = _read_facts(self.folder)
        return f"{len(self.files)} phantoms of {facts.get('spec')}, seed {facts.get('seed')}"

    def draw(self, files: list[Path], rng: np.random.Generator, shape: Triple) -> GridCase:
        """A random part of `shape` of a random phantom; where that is smaller, air is added behind it."""
        path = files[int(rng.integers(len(files)))]
        try:
            with np.load(path) as stored:
                arrays = [stored[name] for name in _ARRAYS]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a readable phantom ({error}); delete it and prepare the set again") from None
        part = _origin(rng, arrays[0].shape, shape)
        return GridCase(*(_cut(a, part, shape, fill) for a, fill in zip(arrays, (-1000, 0, 0, FULL), strict=True)))


def _origin(rng: np.random.Generator, whole: tuple[int, ...], shape: Triple) -> Triple:
    """Where a part begins, along z, y, x: towards the middle in plane, as the rim is air, and often at an end in z."""
    z, y, x = (max(n - s, 0) for n, s in zip(whole, shape, strict=True))
    middle = [int((rng.random() + rng.random()) / 2.0 * (room + 1)) for room in (y, x)]
    beyond = shape[0] / 3.0
    return int(np.clip(rng.uniform(-beyond, z + beyond), 0, z)), middle[0], middle[1]


def _cut(array: NDArray[Any], origin: Triple, shape: Triple, fill: int) -> NDArray[Any]:
    cut = array[tuple(slice(o, o + s) for o, s in zip(origin, shape, strict=True))]
    return np.pad(cut, [(0, s - n) for s, n in zip(shape, cut.shape, strict=True)], constant_values=fill)
