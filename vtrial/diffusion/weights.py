"""Models on disk: a folder with card.json and one safetensors file a stage. Never pickle.

The card tells what the weights were trained on, which demographics they cover, and each file's hash, which is checked
before the weights are used.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import Tensor

from vtrial.diffusion.denoiser import StageConfig, StageName
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.geometry import EXTENT_SLICES_AT_0, EXTENT_SLICES_PER_M
from vtrial.records import InputError, Support
from vtrial.storage import write_atomic

MODELS = Path(__file__).parent.parent / "assets" / "models"
CARD = "card.json"
KERNEL_DIMENSIONS = 5  # outputs, inputs, x, y, z
SCALE, SIZE = ".scale", ".size"  # of a kernel stored as int8: of its outputs, and of itself where it is deflated
LEVELS = 12.0  # int8 steps in the SD of an output's weights
WEIGHT_FILES: dict[StageName, str] = {
    "global": "global.safetensors",
    "global-detail": "global_detail.safetensors",
    "super-resolution": "super_resolution.safetensors",
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExtentFit(_Strict):
    """Length of the field of view in 2 mm slices = slope · height in m + intercept."""

    slices_per_m: float = EXTENT_SLICES_PER_M
    slices_at_0: float = EXTENT_SLICES_AT_0


class StageCard(_Strict):
    """One stage: its configuration and how it was trained."""

    config: StageConfig
    file: str
    sha256: str
    parameters: int
    steps: int
    images: int
    seconds: float
    ema_length: float
    loss: tuple[tuple[int, float], ...] = ()
    """(step, mean weighted error) along the training."""
    data_sha256: str = ""
    """Which training set it was; "" where that is not known."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it was trained, as far as `config` does not say: batch, rates, noise, data; {} where that is not known."""
    sampler: SamplerConfig


class ModelCard(_Strict):
    """What a model is."""

    name: str
    description: str = ""
    data: str = ""
    hardware: str = ""
    license: str = "Apache-2.0"
    support: Support
    extent: ExtentFit = ExtentFit()
    stages: dict[StageName, StageCard]
    fidelity: list[dict[str, Any]] | dict[str, Any] = Field(default_factory=list)
    """Twins against held-out volumes, and the command that makes the table."""

    @model_validator(mode="after")
    def _one_scaling(self) -> ModelCard:
        detail, low = self.stages.get("global-detail"), self.stages.get("global")
        if detail and low:
            for name in ("scaling", "sigma_data", "phase_condition"):
                if getattr(detail.config, name) != getattr(low.config, name):
                    raise ValueError(f"global-detail takes over from global: both need the same {name}")
        return self

    @property
    def handover(self) -> float:
        """The noise level below which "global-detail" takes over: its sampler's sigma_max; 0 without it."""
        detail = self.stages.get("global-detail")
        return detail.sampler.sigma_max if detail else 0.0

    @property
    def files(self) -> dict[str, str]:
        """File names and their SHA-256."""
        return {stage.file: stage.sha256 for stage in self.stages.values()}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_weights(path: Path, weights: Mapping[str, Tensor], *, small: bool = False) -> str:
    """Write a state dict: kernels and matrices as float16, vectors as they are; returns the hash. OSError if it cannot.

    With `small` kernels are int8 with a scale for each output, which suits magnitude-preserving layers, and deflated:
    some five bits a weight (decision 016).
    """
    compact: dict[str, Tensor] = {}
    for name, value in weights.items():
        value = value.detach().cpu().float()
        if small and value.ndim == KERNEL_DIMENSIONS:
            rows = value.flatten(1)
            scale = torch.maximum(rows.std(1, correction=0) / LEVELS, rows.abs().amax(1) / 127.0).clamp(min=1e-12)
            compact |= deflated(name, (value / scale.view(-1, 1, 1, 1, 1)).round().to(torch.int8), scale)
        else:
            compact[name] = value.to(torch.float16 if value.ndim > 1 else torch.float32).contiguous()
    data = save(compact)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def deflated(name: str, kernel: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of a file that hold an int8 `kernel` and the `scale` of its outputs."""
    # Huffman codes alone: there is nothing to find in weights but that small ones are frequent
    coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    code = coder.compress(kernel.numpy().tobytes()) + coder.flush()
    held = torch.from_numpy(np.frombuffer(code, np.uint8).copy())
    return {name: held, name + SCALE: scale, name + SIZE: torch.tensor(kernel.shape)}


def _inflated(stored: dict[str, Tensor], name: str) -> Tensor:
    value = stored[name]
    if name + SIZE in stored:
        held = np.frombuffer(zlib.decompress(value.numpy().tobytes()), np.int8).copy()
        value = torch.from_numpy(held).view(*stored[name + SIZE].tolist())
    scale = stored.get(name + SCALE)
    return value if scale is None else value.float() * scale.view(-1, 1, 1, 1, 1)


def _file_problems(path: Path, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"{path}: weights not found; the card names them: restore the file or choose another model"]
    found = sha256_of(path)
    if found == sha256:
        return []
    return [
        f"{path}: the weights are not those of the card: expected sha256 {sha256}, found {found}; "
        "restore the file or install the model again"
    ]


def load_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """A state dict from a safetensors file; InputError if it is absent or its hash is not `sha256`."""
    if problems := _file_problems(path, sha256):
        raise InputError(problems)
    stored: dict[str, Tensor] = load_file(path)
    return {name: _inflated(stored, name) for name in stored if not name.endswith((SCALE, SIZE))}


def write_card(folder: Path, card: ModelCard) -> None:
    """Write card.json, whole or not at all."""
    write_atomic(folder / CARD, (card.model_dump_json(indent=1) + "\n").encode())


def model_folder(name_or_dir: str | Path) -> Path:
    """The folder of a bundled model by name, or a model folder by path; InputError if neither is there."""
    for folder in (MODELS / name_or_dir, Path(name_or_dir)):
        if (folder / CARD).is_file():
            return folder
    known = ", ".join(list_models()) or "none bundled"
    raise InputError(f"model {name_or_dir}: no such bundled model ({known}) and no folder with {CARD}")


def read_card(name_or_dir: str | Path) -> ModelCard:
    """The card of a model; InputError if it is absent or not a card."""
    path = model_folder(name_or_dir) / CARD
    try:
        return ModelCard.model_validate_json(path.read_text())
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a model card: {error}") from None


def verify_model(name_or_dir: str | Path) -> ModelCard:
    """The card of a model that has both stages, its files present and theirs by hash; InputError with all faults."""
    folder, card = model_folder(name_or_dir), read_card(name_or_dir)
    problems = [f"{folder}: the model has no {stage} stage; train and export both" for stage in _missing(card)]
    for file, sha256 in card.files.items():
        problems += _file_problems(folder / file, sha256)
    if problems:
        raise InputError(problems)
    return card


def _missing(card: ModelCard) -> list[StageName]:
    needed: tuple[StageName, ...] = ("global", "super-resolution")
    return [stage for stage in needed if stage not in card.stages]


def list_models() -> list[str]:
    """Names of the bundled models."""
    if not MODELS.is_dir():
        return []
    return sorted(p.parent.name for p in MODELS.glob(f"*/{CARD}"))
