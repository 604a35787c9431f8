"""EDM preconditioning, and what a network is trained for: the uncertainty-weighted loss of diffusion, or flow matching.

Karras et al. 2022 (arXiv 2206.00364), table 1: D(x; σ) = c_skip x + c_out F(c_in x; c_noise). Karras et al. 2024,
equations 14 and 15: the loss at each noise level is divided by a learned variance exp(u(σ)). `vtrial.diffusion.flow`
tells how the same F gives a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vtrial.diffusion.bands import from_bands, to_bands
from vtrial.diffusion.conditions import PHASE, Demographics, from_grid, phase_vector, to_grid
from vtrial.diffusion.emphasis import EVEN, Emphasis
from vtrial.diffusion.flow import path, preconditioning
from vtrial.diffusion.layers import MPConv, MPFourier
from vtrial.diffusion.network import Conditions, Network, NetworkConfig, Prepared
from vtrial.diffusion.voxels import VoxelView

StageName = Literal["global", "global-detail", "super-resolution"]
"""Networks of the cascade; "global-detail" is stage 1 at low noise, an expert of its own."""
Objective = Literal["diffusion", "flow"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
LowNoise = tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(ge=0.0)]]


class Scaling(BaseModel):
    """Between model space (or residuals of it) and the units in which each channel has mean 0 and SD sigma_data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    center: tuple[float, float] = (0.0, 0.0)
    sd: tuple[PositiveFloat, PositiveFloat] = (0.5, 0.5)

    def encode(self, volume: Tensor, sigma_data: float) -> Tensor:
        """(b, 2, x, y, z) in model space -> scaled."""
        center, sd = self._columns(volume)
        return (volume - center) * (sigma_data / sd)

    def decode(self, scaled: Tensor, sigma_data: float) -> Tensor:
        """The inverse of `encode`."""
        center, sd = self._columns(scaled)
        return torch.addcmul(center, scaled, sd / sigma_data)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(like.new_tensor(v).view(1, 2, 1, 1, 1) for v in (self.center, self.sd))  # type: ignore[return-value]


class StageConfig(BaseModel):
    """One stage of the cascade: all that is needed, beside the weights, to use it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: StageName
    network: NetworkConfig
    objective: Objective = "diffusion"
    """What it was trained for; samplers work with either."""
    sigma_data: PositiveFloat = 0.5
    phase_condition: bool = False
    """Whether the sampling phase of a low-resolution volume is a condition (three more after the demographics)."""
    scaling: Scaling = Scaling()
    """Of the volume (global) or of the residual (super-resolution)."""
    low_scaling: Scaling = Scaling()
    """Of the upsampled low-resolution pair when it is a condition."""
    low_noise: LowNoise = (0.0, 0.0)
    """SD of the noise that the low-resolution CT and PET (model space) get before stage 2 sees them, in training and in
    use: the residual holds its correction, so small faults of a generated volume are mended too (conditioning
    augmentation, Ho et al. 2021, arXiv 2106.15282)."""
    band_sd: tuple[PositiveFloat, ...] = ()
    """SD of every channel of the scaled grid in Haar bands; empty: the grid holds voxels, all of SD sigma_data."""

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        expected = 7 if self.phase_condition else 4
        if self.network.conditions != expected:
            raise ValueError(f"condition_center and condition_scale need {expected} values")
        if self.network.low_resolution != (self.stage == "super-resolution"):
            raise ValueError("low_resolution belongs to the super-resolution stage, and only there")
        if any(self.low_noise) and self.stage != "super-resolution":
            raise ValueError("low_noise belongs to the super-resolution stage, and only there")
        if len(self.band_sd) not in (0, self.network.grid_channels):
            raise ValueError(f"band_sd needs {self.network.grid_channels} values, one for each channel of the grid")
        return self

    def vector(self, demographics: Demographics, phase: tuple[int, int, int] = PHASE) -> tuple[float, ...]:
        """The condition vector of a subject."""
        return demographics.vector() + (phase_vector(phase) if self.phase_condition else ())

    def encode(self, volume: Tensor) -> Tensor:
        """Volumes (b, 2, x, y, z), or residuals, to the scaled grid of the network."""
        return self.grid_of(self.scaling.encode(volume, self.sigma_data))

    def decode(self, grid: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return self.scaling.decode(self.voxels_of(grid), self.sigma_data)

    def grid_of(self, voxels: Tensor) -> Tensor:
        """Scaled voxels (b, 2, x, y, z) to the grid (b, 2p³, x/p, y/p, z/p) of voxels or bands: a rotation."""
        grid = to_grid(voxels, self.network.patch)
        return to_bands(grid, self.network.patch) if self.band_sd else grid

    def voxels_of(self, grid: Tensor) -> Tensor:
        """The inverse of `grid_of`."""
        return from_grid(from_bands(grid, self.network.patch) if self.band_sd else grid, self.network.patch)

    def channel_sd(self, like: Tensor) -> Tensor:
        """σ_data of the channels of a grid, to broadcast over it: (1, 2p³, 1, 1, 1), or one number for all."""
        return like.new_tensor(self.band_sd or (self.sigma_data,)).view(1, -1, 1, 1, 1)

    def disturb_low(self, low: Tensor, noise: Tensor) -> Tensor:
        """The low-resolution pair (2, x, y, z) with white `noise` (2, x, y, z) at the stage's SD."""
        return low + noise * low.new_tensor(self.low_noise).view(2, 1, 1, 1)

    def encode_low(self, upsampled: Tensor) -> Tensor:
        """The upsampled low-resolution pair (b, 2, x, y, z) to a grid of magnitude near 1."""
        return to_grid(self.low_scaling.encode(upsampled, 1.0), self.network.patch)


class NoiseConfig(BaseModel):
    """Distribution of training noise: ln σ ~ N(p_mean, p_std²), mixed with a log-uniform one.

    For a flow σ = t/(1 - t), so ln σ is the logit of t, and t logit-normal (Esser et al. 2024, arXiv 2403.03206,
    section 3.1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    p_mean: float = -0.4
    p_std: PositiveFloat = 1.0
    uniform: Fraction = 0.0
    """Share drawn log-uniformly between sigma_min and sigma_max."""
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min:g}) must be below sigma_max ({self.sigma_max:g})")
        return self

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` noise levels, stratified (one in each of `count` equal parts) so that batches are alike."""
        device = generator.device
        strata = torch.randperm(count, generator=generator, device=device)
        u = (strata + torch.rand(count, generator=generator, device=device)) / count
        # the first part of each stratum order is log-uniform, the rest normal: one number decides both
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        uniform = low + (high - low) * (u / max(self.uniform, 1e-12))
        v = ((u - self.uniform) / max(1.0 - self.uniform, 1e-12)).clamp(1e-6, 1.0 - 1e-6)
        normal = self.p_mean + self.p_std * math.sqrt(2.0) * torch.erfinv(2.0 * v - 1.0)
        return torch.where(u < self.uniform, uniform, normal).exp()


class Denoiser(nn.Module):
    """D(x; σ, conditions) on scaled grids (b, 2p³, x, y, z), and its training loss."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.network = Network(config.network)
        if config.objective == "diffusion":
            self.uncertainty_features = MPFourier(128)
            self.uncertainty = MPConv(128, 1, 0, learned_gain=True)

    def forward(self, x: Tensor, sigma: Tensor, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expected clean grid, float32, for noise levels `sigma` (b,); the network computes in `dtype`."""
        data = self.config.channel_sd(x)
        s = sigma.float().view(-1, 1, 1, 1, 1)
        total = (s**2 + data**2).sqrt()
        out = self._network(x / total, sigma, prepared, dtype)
        return torch.addcmul(x * (data**2 / total**2), out.to(x.dtype), s * data / total)

    def velocity(self, x_t: Tensor, sigma: Tensor, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        """u(x_t, t) at t = σ/(1 + σ), float32, from the same F as `forward`, so that D = x_t - t u."""
        data = self.config.channel_sd(x_t)
        skip, scale = preconditioning(sigma.float().view(-1, 1, 1, 1, 1), data)
        out = self._network(x_t * (scale / data), sigma, prepared, dtype)
        return torch.addcmul(x_t * skip, out.to(x_t.dtype), scale, value=-1.0)

    def _network(self, x: Tensor, sigma: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """F for a grid `x` of magnitude 1."""
        look = (
            partial(self._look, x, sigma.float().view(-1, 1, 1, 1, 1)) if self.config.network.voxel_channels else None
        )
        out: Tensor = self.network(x.to(dtype), sigma.float().log() / 4.0, prepared, look)
        return out

    def _look(self, x: Tensor, s: Tensor, out: Tensor) -> tuple[VoxelView, Callable[[Tensor], Tensor]]:
        """F as a voxel head sees it, and how its correction of D becomes one of F.

        The correction is in units of σ·s/√(σ² + s²), with the SD s of voxels: what noise leaves uncertain. No gradient
        goes through what is seen: through waves of high frequency it would tell the U-Net little.
        """
        config, data = self.config, self.config.channel_sd(x)
        total, voxel = (s**2 + data**2).sqrt(), self.config.sigma_data
        grid = torch.addcmul(x * (data**2 / total), out.detach().to(x.dtype), s * data / total)
        clean = config.voxels_of(grid)
        noise = config.voxels_of((x * total - grid) / s)

        def back(correction: Tensor) -> Tensor:
            part = config.grid_of(correction.to(x.dtype) * (voxel / (s**2 + voxel**2).sqrt()))
            return (part * (total / data)).to(correction.dtype)

        return VoxelView(config.scaling.decode(clean, voxel), clean / voxel, noise), back

    def loss(
        self,
        clean: Tensor,
        sigma: Tensor,
        noise: Tensor,
        conditions: Conditions,
        dtype: torch.dtype,
        emphasis: Emphasis = EVEN,
    ) -> tuple[Tensor, Tensor]:
        """(loss to minimise, weighted error (b,)): equations 14 and 15, or the squared error of the flow's velocity.

        The error, 1 before training, is that of F and means the same for both objectives. In bands, a channel weighs in
        it as its c_out (EDM's λ weighs all alike, the plain squared error as c_out²): fine bands are many and small.
        The flow's loss has no such weights: bands are a rotation, so it is the plain loss of voxels.

        With `emphasis` the loss, not the error, counts some places more. Its uptake is what D has there or, in stage 2,
        the low-resolution volume; its contrast that of D, in stage 2 a residual.
        """
        shape = (clean.shape[2], clean.shape[3], clean.shape[4])
        prepared = self.network.prepare(conditions, shape, dtype)
        s = sigma.view(-1, 1, 1, 1, 1)
        data = self.config.channel_sd(clean)
        scale = s * data / (s**2 + data**2).sqrt()  # c_out
        weight = scale / scale.mean(1, keepdim=True)
        if self.config.objective == "flow":
            keep, t = path(s)
            x_t = keep * clean + t * noise
            u = self.velocity(x_t, sigma, prepared, dtype)
            fault = u - (noise - clean)
            _, out = preconditioning(s, data)
            counts = self._counts((x_t - t * u).detach(), conditions, emphasis)
            return (counts * fault.square()).mean(), (weight * (fault.detach() / out).square()).flatten(1).mean(1)
        denoised = self(clean + s * noise, sigma, prepared, dtype)
        errors = weight * ((denoised - clean) / scale).square()
        counted = (self._counts(denoised.detach(), conditions, emphasis) * errors).flatten(1).mean(1)
        u = self.uncertainty(self.uncertainty_features(sigma.log() / 4.0))[:, 0]
        return (counted / u.exp() + u).mean(), errors.detach().flatten(1).mean(1)

    def _counts(self, denoised: Tensor, conditions: Conditions, emphasis: Emphasis) -> Tensor:
        """How much each place of the grid (b, 1, x, y, z) counts, 1 in the mean of an example."""
        if emphasis == EVEN:
            return denoised.new_ones([])
        patch = self.config.network.patch
        pet = self.config.voxels_of(denoised)[:, 1:] / self.config.sigma_data
        if conditions.low is not None:
            uptake = conditions.low[:, self.config.network.grid_channels // 2 :].mean(1, keepdim=True)
        else:
            uptake = F.avg_pool3d(pet, patch)
        return emphasis.counts(uptake, pet, patch)

    def normalize_(self) -> None:
        """Forced weight normalisation after an optimiser step."""
        self.network.normalize_()
        if self.config.objective == "diffusion":
            self.uncertainty.normalize_()


def load_denoiser(config: StageConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> Denoiser:
    """An inference-only denoiser from a state dict; RuntimeError if the weights do not fit the configuration."""
    denoiser = Denoiser(config)
    denoiser.load_state_dict({name: value.float() for name, value in weights.items()})
    denoiser.network.fold_(dtype)
    return denoiser.eval().requires_grad_(False)
