"""What the training of a segmenter of our own is told, read from TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vtrial.organs import ORGAN_IDS, labels_of
from vtrial.precision import Precision
from vtrial.records import InputError
from vtrial.segmentation.card import SPACING_MM, Head, Intensity

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]
Part = Annotated[float, Field(ge=0.0, lt=1.0)]
Triple = tuple[int, int, int]
NARROW = 2  # along the first axis: see vtrial.training.loop.dtype_for
Stride = Annotated[int, Field(ge=1, le=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkConfig(_Strict):
    """A `PlainConvUNet` with 3×3×3 kernels. `strides` are along z, y, x, and start with the full resolution."""

    features: tuple[Positive, ...] = Field(min_length=2)
    strides: tuple[tuple[Stride, Stride, Stride], ...]
    convolutions: tuple[Positive, ...]
    """For each stage of the encoder."""
    decoder_convolutions: tuple[Positive, ...]

    @model_validator(mode="after")
    def _lengths(self) -> NetworkConfig:
        n = len(self.features)
        if (len(self.strides), len(self.convolutions), len(self.decoder_convolutions)) != (n, n, n - 1):
            raise ValueError(f"{n} features need as many strides and convolutions, and {n - 1} decoder_convolutions")
        if self.strides[0] != (1, 1, 1):
            raise ValueError("strides must start with [1, 1, 1]: nnU-Net wants outputs as fine as its input")
        return self

    @property
    def divisor(self) -> Triple:
        """What sizes must be multiples of, along z, y, x."""
        z, y, x = 1, 1, 1
        for a, b, c in self.strides:
            z, y, x = z * a, y * b, x * c
        return z, y, x


class AugmentConfig(_Strict):
    """How examples differ from the stored phantoms: twins are blurrier and noisier than those."""

    tissue_hu: NotNegative = 12.0
    """SD of the shift of each organ's HU."""
    noise_hu: NotNegative = 35.0
    """Highest SD of noise before the blur, and half of that of noise after it."""
    blur_mm: NotNegative = 3.0
    """Highest SD of the blur; half of the examples have none."""


class OptimizerConfig(_Strict):
    """Muon for kernels at `matrix_lr`, Adam for the rest at `lr`; linear rise, and fall over the last `cooldown`."""

    lr: Annotated[float, Field(gt=0.0)] = 0.015
    matrix_lr: Annotated[float, Field(gt=0.0)] = 0.02
    ramp_steps: Annotated[int, Field(ge=0)] = 20
    cooldown: Part = 0.5

    def course(self, step: int, steps: int) -> float:
        """Part of the full rates at step 1, 2, … of `steps`."""
        ramp = min(step / self.ramp_steps, 1.0) if self.ramp_steps else 1.0
        cooling = min((steps + 1 - step) / (self.cooldown * steps), 1.0) if self.cooldown else 1.0
        return ramp * max(cooling, 0.0)


class SegmenterConfig(_Strict):
    """A segmenter and its training. `steps` counts optimiser steps; a time budget is an argument of the training."""

    name: str
    mode: Literal["fast", "fastest"]
    heads: tuple[str, ...] = Field(min_length=1)
    """Organs, or sums of organs (of which one at least), each one output; later ones are drawn over earlier ones."""
    network: NetworkConfig
    intensity: Intensity
    patch_size: Triple
    """Voxels along z, y, x that the segmenter sees at once."""
    median_shape: Triple
    training_patch: Triple
    stretch: Part = 0.05
    """Stored phantoms are longer or shorter by up to this along each axis."""
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    entropy_weight: NotNegative = 1.0
    """Of the cross-entropy, summed over heads, beside the mean Dice loss."""
    ema: Part = 0.995
    batch: Positive = 2
    steps: Positive
    seed: int = Field(default=0, ge=0)
    precision: Precision = "bfloat16"
    checkpoint_steps: Positive = 100
    metric_steps: Positive = 20

    @model_validator(mode="after")
    def _consistent(self) -> SegmenterConfig:
        for name in self.heads:
            try:
                labels_of(name)
            except KeyError:
                raise ValueError(f"heads: {name} is no organ and no sum of organs") from None
        narrow = self.training_patch[0] // self.network.divisor[0] <= NARROW
        if narrow and self.precision == "bfloat16":
            raise ValueError(
                "training_patch: its coarsest grid is 2 long or less along z, where gradients in bfloat16 are wrong; "
                'give longer patches, or precision = "float32"'
            )
        for what, sizes in (("patch_size", self.patch_size), ("training_patch", self.training_patch)):
            if any(size % by for size, by in zip(sizes, self.network.divisor, strict=True)):
                raise ValueError(f"{what}: sizes must be multiples of {self.network.divisor} for this network")
        return self

    @property
    def spacing_mm(self) -> float:
        """Voxel size of the grid of this mode."""
        return SPACING_MM[self.mode]

    @property
    def regions(self) -> tuple[Head, ...]:
        """The heads as the card tells them; a sum of organs writes its first organ's id."""
        covers = {name: labels_of(name) for name in self.heads}
        return tuple(Head(name=n, covers=c, writes=ORGAN_IDS.get(n, c[0])) for n, c in covers.items())


def read_segmenter_config(path: str | Path) -> SegmenterConfig:
    """A configuration from a TOML file; InputError names the file and every field that is wrong."""
    try:
        return SegmenterConfig.model_validate(tomllib.loads(Path(path).read_text()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a configuration in TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        where = [(".".join(map(str, e["loc"])) or "the file", e["msg"]) for e in error.errors()]
        raise InputError([f"{path}: {field}: {message}" for field, message in where]) from None
