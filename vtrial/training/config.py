"""What a training run is told, read from TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vtrial.diffusion.denoiser import Fraction, LowNoise, NoiseConfig, Objective, Scaling, StageConfig, StageName
from vtrial.diffusion.emphasis import Emphasis
from vtrial.diffusion.network import NetworkConfig
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.geometry import FACTOR, LOW_SHAPE, SHAPE
from vtrial.precision import Precision
from vtrial.records import InputError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class OptimizerConfig(BaseModel):
    """Adam with betas 0.9 and 0.99; rate = lr · min(step / ramp_steps, 1) / √max(step / decay_after, 1).

    With `matrix_lr` Muon moves the weight matrices, at a rate of the same course (Adam's root mean square matched).
    Over the last `cooldown` of the steps the rate falls linearly to zero besides: short runs gain much by it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: Annotated[float, Field(gt=0.0)] = 0.01
    matrix_lr: Annotated[float, Field(gt=0.0)] | None = None
    ramp_steps: NotNegative = 100
    decay_after: Positive = 1000
    cooldown: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 1, 2, … of `steps`."""
        ramp = min(step / self.ramp_steps, 1.0) if self.ramp_steps else 1.0
        cooling = min((steps + 1 - step) / (self.cooldown * steps), 1.0) if self.cooldown else 1.0
        return float(self.lr * ramp * max(cooling, 0.0) / max(step / self.decay_after, 1.0) ** 0.5)


class DataConfig(BaseModel):
    """How examples are cut from the volumes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phases: Positive = 4
    """Stage 1: random subvolumes (of the 64 of a subject) held in memory for each subject."""
    refresh_steps: NotNegative = 0
    """After how many steps the volumes in memory change: a stored set cuts other subvolumes (stage 1), a stream of
    phantoms moves on by one; 0: as is usual, a stored set never and a stream after each."""
    patch_shape: tuple[Positive, Positive, Positive] = (64, 64, 64)
    """Voxels of a training patch; the network of stage 1 at high noise sees whole volumes."""
    whole_after: Positive | None = None
    """Stage 1's expert: after this step every batch is one whole volume, so that it learns what lies beyond the rims
    of patches; never when absent."""
    region: tuple[tuple[Fraction, Fraction, Fraction], tuple[Fraction, Fraction, Fraction]] | None = None
    """Stage 1's expert: two corners, in parts of a volume, of a box (the kidneys', say) in which `region_share` of the
    patches lie, whatever is there: so what is learned stays the same, only sooner."""
    region_share: Fraction = 0.5
    patches_per_volume: Positive = 2
    """Stage 2: patches cut from one volume of a batch."""
    peak_share: Fraction = 0.0
    """Stage 2: share of patches around low-resolution voxels whose PET stands out from their neighbours', above all hot
    spots of a voxel or two (`vtrial.training.batches.sharpness`); the others lie anywhere."""

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        if self.region is not None and any(low >= high for low, high in zip(*self.region, strict=True)):
            raise ValueError("region: its first corner must lie below the second along each axis")
        return self

    def epoch(self, step: int, usual: int = 0) -> int:
        """How often the volumes in memory have changed before a step; `usual` is the source's own `refresh_steps`."""
        every = self.refresh_steps or usual
        return step // every if every else 0


class WatchConfig(BaseModel):
    """What is looked at and kept on the way, each after so many steps (0: never)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    validate_steps: NotNegative = 500
    """The error on people of the split "validation"."""
    sample_steps: NotNegative = 0
    """A picture of what the network makes."""
    snapshot_steps: NotNegative = 0
    """The averages of the weights, of which one of any length can be made later; best with two lengths in `ema`."""
    keep_steps: NotNegative = 0
    """A checkpoint that stays."""
    keep_last: Positive = 1
    """How many of the last checkpoints stay besides."""


class TrainingConfig(BaseModel):
    """One stage's training. `steps` counts optimiser steps; a time budget is an argument of `train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: StageName
    network: NetworkConfig
    objective: Objective = "diffusion"
    phase_condition: bool = False
    sigma_data: Annotated[float, Field(gt=0.0)] = 0.5
    scaling: Scaling | None = None
    """Measured from the data when absent."""
    bands: bool = False
    """Whether the grid holds Haar bands, each with an SD measured from the data, in place of voxels."""
    low_scaling: Scaling | None = None
    low_noise: LowNoise = (0.0, 0.0)
    """Stage 2: what `StageConfig.low_noise` is to be."""
    noise: NoiseConfig = NoiseConfig()
    uptake_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """How much more the loss counts places of high uptake, to which power (`Denoiser.loss`)."""
    uptake_power: Annotated[float, Field(ge=1.0)] = 2.0
    contrast_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """How much more the loss counts hot spots of a voxel or two (`Emphasis.contrast`)."""
    trains: Literal["all", "voxel-head"] = "all"
    """What is trained: everything, or the voxel head alone, which takes a third of the time and leaves the rest."""
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    ema: Annotated[tuple[Annotated[float, Field(gt=0.0, lt=0.28)], ...], Field(min_length=1)] = (0.05, 0.10)
    batch: Positive = 4
    microbatch: Positive | None = None
    """Examples in memory at once; the batch is accumulated from such parts. The whole batch when absent."""
    steps: Positive
    seed: Annotated[int, Field(ge=0, le=10**12)] = 0  # with the step it makes numbers of 64 bits
    precision: Precision = "bfloat16"
    """float32 on machines without kernels for bfloat16 (`vtrial.precision`)."""
    checkpoint_steps: Positive = 250
    metric_steps: Positive = 25
    watch: WatchConfig = WatchConfig()
    sampler: SamplerConfig | None = None
    """How the stage is sampled, noise levels and all, until a card says otherwise; in the usual way over the levels of
    `noise` when absent."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        self.stage_config(Scaling(), Scaling())
        divisor, shape = self.network.divisor, SHAPE if self.stage == "super-resolution" else LOW_SHAPE
        if any(n % divisor for n in shape):
            raise ValueError(
                f"network: patch and the number of channels make it need sides that are multiples of {divisor} voxels, "
                f"which {times(shape)} are not; take fewer levels of channels and blocks, or a smaller patch"
            )
        if self.stage != "global" and any(n % max(divisor, FACTOR) for n in self.data.patch_shape):
            raise ValueError(f"data.patch_shape must be multiples of {max(divisor, FACTOR)} for this network")
        if self.stage != "global" and any(n > most for n, most in zip(self.data.patch_shape, shape, strict=True)):
            raise ValueError(
                f"data.patch_shape ({times(self.data.patch_shape)}) is larger than the volumes of {times(shape)}; "
                "choose a smaller one"
            )
        if self.stage == "global-detail" and self.noise.sigma_min >= self.noise.sigma_max / 2.0:
            raise ValueError("noise: sigma_min must be below half of sigma_max, from which an expert is sampled")
        if self.data.region is not None and self.stage != "global-detail":
            raise ValueError('data.region is for patches of stage "global-detail"')
        if self.trains == "voxel-head" and not self.network.voxel_channels:
            raise ValueError('trains = "voxel-head": this network has none; set network.voxel_channels')
        if self.batch % (self.microbatch or self.batch):
            raise ValueError("batch must be a multiple of microbatch")
        return self

    @property
    def emphasis(self) -> Emphasis:
        """Where the loss looks more closely."""
        return Emphasis(uptake=self.uptake_weight, power=self.uptake_power, contrast=self.contrast_weight)

    def sees_whole(self, step: int) -> bool:
        """Whether the batch of a step holds whole volumes."""
        after = self.data.whole_after
        return self.stage == "global" or (self.stage == "global-detail" and after is not None and step > after)

    def examples(self, step: int) -> int:
        """Volumes or patches in the batch of a step."""
        return 1 if self.stage == "global-detail" and self.sees_whole(step) else self.batch

    def images(self, step: int) -> int:
        """Volumes or patches seen by the end of a step."""
        patches = min(step, self.data.whole_after or step) if self.stage == "global-detail" else step
        return patches * self.batch + step - patches

    def stage_config(self, scaling: Scaling, low_scaling: Scaling, band_sd: tuple[float, ...] = ()) -> StageConfig:
        """The part that goes with the weights."""
        return StageConfig(
            stage=self.stage,
            network=self.network,
            objective=self.objective,
            sigma_data=self.sigma_data,
            phase_condition=self.phase_condition,
            scaling=self.scaling or scaling,
            low_scaling=self.low_scaling or low_scaling,
            low_noise=self.low_noise,
            band_sd=band_sd,
        )


def times(shape: tuple[int, ...]) -> str:
    """Sides of a volume as people write them: 56×56×96."""
    return "×".join(map(str, shape))


def read_config(path: str | Path) -> TrainingConfig:
    """A training configuration from a TOML file; InputError names the file and every field that is wrong."""
    try:
        text = Path(path).read_text()
        return TrainingConfig.model_validate(tomllib.loads(text))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        where = [(".".join(map(str, e["loc"])) or "the file", e["msg"]) for e in error.errors()]
        raise InputError([f"{path}: {field}: {message}" for field, message in where]) from None
