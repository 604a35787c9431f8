"""Segmenters of our own on disk: a folder with `card.json` and `weights.safetensors`. Never pickle.

The card says what the model draws, what it was trained on, and how the nnU-Net folder that TotalSegmentator loads is
built from it (`nnunet.py`). A head is one output of the network: it covers a region (a union of TotalSegmentator
classes) and writes one class id where its sigmoid exceeds 0.5; later heads overwrite earlier ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from vtrial.diffusion.weights import load_weights, save_weights
from vtrial.organs import GROUPS, ORGAN_IDS, ORGAN_NAMES
from vtrial.records import InputError
from vtrial.storage import write_atomic

CARD, WEIGHTS = "card.json", "weights.safetensors"
SEGMENTERS = Path(__file__).parent.parent / "assets" / "segmenters"

Mode = Literal["total", "fast", "fastest"]
SPACING_MM: dict[Mode, float] = {"total": 1.5, "fast": 3.0, "fastest": 6.0}  # the grid a mode of TotalSegmentator has


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Strict):
    """One output: `name`, the class ids it covers, and the id it `writes`."""

    name: str
    covers: tuple[int, ...] = Field(min_length=1)
    writes: int

    @model_validator(mode="after")
    def _known(self) -> Head:
        if strange := [label for label in (*self.covers, self.writes) if label not in ORGAN_NAMES]:
            raise ValueError(f"head {self.name}: {strange} are not TotalSegmentator class ids (1-117)")
        if self.writes not in self.covers:
            raise ValueError(f"head {self.name}: writes {self.writes}, which it does not cover")
        if self.name in ORGAN_IDS and ORGAN_IDS[self.name] != self.writes:
            raise ValueError(f"head {self.name}: must write {ORGAN_IDS[self.name]}, the organ's id")
        if self.name not in ORGAN_IDS and self.name not in GROUPS:
            raise ValueError(f"head {self.name}: no organ or sum of organs has this name")
        return self


class Intensity(_Strict):
    """HU inside the organs of the training set: clip to the percentiles, subtract the mean, divide by sd."""

    mean: float
    std: float = Field(gt=0)
    percentile_00_5: float
    percentile_99_5: float
    min: float
    max: float
    median: float


class Architecture(_Strict):
    """The network by class name and arguments. `requires_import` lists the arguments that name a class of torch."""

    network_class: str
    arguments: dict[str, Any]
    requires_import: tuple[str, ...] = ()

    @field_validator("network_class")
    @classmethod
    def _public(cls, name: str) -> str:
        if not name.startswith("dynamic_network_architectures.architectures."):
            raise ValueError(f"{name}: not a network of dynamic_network_architectures")
        return name

    @model_validator(mode="after")
    def _imports(self) -> Architecture:
        for key in self.requires_import:
            value = self.arguments.get(key)
            if value is not None and not str(value).startswith("torch.nn."):
                raise ValueError(f"{key} = {value}: only classes of torch.nn may be named")
        return self


class SegmenterCard(_Strict):
    """What a segmenter is."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    training_data: str
    phantoms_only: bool
    """Trained on phantoms alone: for phantoms and for twins of models trained on them, never for patients."""
    license: str = "Apache-2.0"
    hardware: str = ""
    mode: Literal["fast", "fastest"]
    heads: tuple[Head, ...] = Field(min_length=1)
    patch_size: tuple[int, int, int]
    """Voxels along z, y, x, as nnU-Net orders them."""
    median_shape: tuple[int, int, int]
    intensity: Intensity
    architecture: Architecture
    parameters: int = 0
    sha256: str = ""
    """Of the weights; `write_segmenter` fills in this, the number of parameters and the aliases."""
    aliases: dict[str, str] = {}
    """Further names of weights: nnU-Net's networks list the same tensors under several, and they are stored once."""
    dice: dict[str, float] = {}
    """Head to mean Dice on volumes not trained on."""
    volume_bias: dict[str, float] = {}
    """Head to the mean of (volume drawn - true volume) / true volume on the same, in percent."""

    @model_validator(mode="after")
    def _regions(self) -> SegmenterCard:
        for what, values in (("names", [h.name for h in self.heads]), ("ids", [h.writes for h in self.heads])):
            if len(set(values)) < len(values):
                raise ValueError(f"two heads share their {what}")
        if all(len(head.covers) == 1 for head in self.heads):
            raise ValueError("no head covers two classes: nnU-Net would want 118 softmax outputs; let one cover more")
        return self

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs it draws as such; a sum of organs under one id, such as "ribs", is none."""
        return tuple(head.name for head in self.heads if head.name in ORGAN_IDS)

    @property
    def identity(self) -> str:
        """SHA-256 of what decides its masks and how it is named: the card and, through it, the weights."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def write_segmenter(folder: Path, weights: Mapping[str, Tensor], card: SegmenterCard) -> SegmenterCard:
    """Write a model from an nnU-Net network's state dict; gives the card with hash, sizes and aliases filled in.

    Matrices and kernels are stored as float16, so what is to be judged is the model read back. The card is written
    last, so a folder with one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aliases = _aliases(weights)
    stored = {name: value for name, value in weights.items() if name not in aliases}
    filled = {
        "sha256": save_weights(folder / WEIGHTS, {name: value.clone() for name, value in stored.items()}),
        "parameters": sum(value.numel() for value in stored.values()),
        "aliases": aliases,
    }
    card = SegmenterCard.model_validate({**card.model_dump(), **filled})
    write_atomic(folder / CARD, (card.model_dump_json(indent=1) + "\n").encode())
    return card


def _aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensors are, in type, shape and values, those of an earlier name."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, value in weights.items():
        array = value.detach().cpu().contiguous().numpy()
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def segmenter_folder(name_or_dir: str | Path) -> Path:
    """The folder of a bundled segmenter by name, or one by path; InputError if neither is there."""
    for folder in (SEGMENTERS / name_or_dir, Path(name_or_dir)):
        if (folder / CARD).is_file():
            return folder
    known = ", ".join(list_segmenters()) or "none bundled"
    raise InputError(
        f"segmenter {name_or_dir}: no such bundled segmenter ({known}) and no folder with {CARD}; give the folder of "
        "one, or totalsegmentator for the official weights"
    )


def read_segmenter_card(name_or_dir: str | Path) -> SegmenterCard:
    """The card of a segmenter; InputError if it is absent or not a card."""
    path = segmenter_folder(name_or_dir) / CARD
    try:
        return SegmenterCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError([f"{path}: not a segmenter's card: {_told(fault)}" for fault in error.errors()]) from None


def _told(fault: Any) -> str:
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"


def read_segmenter(name_or_dir: str | Path) -> tuple[SegmenterCard, dict[str, Tensor]]:
    """Card and weights (float32, aliases included) of a segmenter; InputError if absent or not each other's by hash."""
    folder, card = segmenter_folder(name_or_dir), read_segmenter_card(name_or_dir)
    weights = {name: value.float() for name, value in load_weights(folder / WEIGHTS, card.sha256).items()}
    return card, {**weights, **{name: weights[stored].clone() for name, stored in card.aliases.items()}}


def list_segmenters() -> list[str]:
    """Names of the bundled segmenters."""
    return sorted(path.parent.name for path in SEGMENTERS.glob(f"*/{CARD}"))
