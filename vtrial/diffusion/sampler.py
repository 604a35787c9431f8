"""Samplers of the probability-flow ODE and its stochastic form, over any `denoise(x, sigma) -> D`.

Karras et al. 2022 (arXiv 2206.00364): noise levels of equation 5, Heun's method with churn of algorithm 2. Lu et al.
2022 (arXiv 2211.01095): DPM-Solver++(2M), equation 18 of its multistep form, with σ for the noise level (α = 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""D(x; σ): the expected clean x."""


SamplerName = Literal["heun", "heun-churn", "dpmpp-2m"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)


class SamplerConfig(BaseModel):
    """How one stage is sampled. Churn acts in "heun-churn" alone (s_* are those of algorithm 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SamplerName = "heun"
    steps: Annotated[int, Field(ge=2)] = 35
    sigma_min: Annotated[float, Field(gt=0.0)] = 0.002
    sigma_max: Annotated[float, Field(gt=0.0)] = 80.0
    rho: Annotated[float, Field(gt=0.0)] = 7.0
    s_churn: Annotated[float, Field(ge=0.0)] = 40.0
    s_min: Annotated[float, Field(ge=0.0)] = 0.05
    s_max: Annotated[float, Field(ge=0.0)] = 50.0
    s_noise: Annotated[float, Field(gt=0.0)] = 1.003

    @model_validator(mode="after")
    def _ordered(self) -> SamplerConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        return self

    def sigmas(self) -> list[float]:
        """Noise levels from sigma_max to sigma_min (equation 5), then 0."""
        low, high = self.sigma_min ** (1.0 / self.rho), self.sigma_max ** (1.0 / self.rho)
        ramp = [(high + i / (self.steps - 1) * (low - high)) ** self.rho for i in range(self.steps)]
        return [*ramp, 0.0]

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for one sample."""
        return self.steps if self.name == "dpmpp-2m" else 2 * self.steps - 1


def sample(
    denoise: Denoise, noise: Tensor, config: SamplerConfig, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yields x after each step, the last one clean. `noise` is standard normal; `generator` is needed for churn."""
    sigmas = config.sigmas()
    x = noise * sigmas[0]
    if config.name == "dpmpp-2m":
        return dpmpp_2m(denoise, x, sigmas)
    if config.name == "heun":
        return heun(denoise, x, sigmas)
    return heun(denoise, x, sigmas, churn=config, generator=generator)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    churn: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """EDM algorithm 2 along `sigmas` (deterministic without `churn`); a step to 0 is an Euler step."""
    gamma_max = min(churn.s_churn / (len(sigmas) - 1), math.sqrt(2.0) - 1.0) if churn else 0.0
    for sigma, following in itertools.pairwise(sigmas):
        if churn and churn.s_min <= sigma <= churn.s_max and gamma_max > 0.0:
            hat = sigma * (1.0 + gamma_max)
            fresh = torch.randn(x.shape, generator=generator, device=generator.device if generator else x.device).to(x)
            x = torch.add(x, fresh, alpha=churn.s_noise * math.sqrt(hat**2 - sigma**2))
        else:
            hat = sigma
        slope = (x - denoise(x, hat)) / hat
        ahead = torch.add(x, slope, alpha=following - hat)
        if following > 0.0:
            slope = slope.add_((ahead - denoise(ahead, following)), alpha=1.0 / following)
            ahead = torch.add(x, slope, alpha=(following - hat) / 2.0)
        x = ahead
        yield x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) along `sigmas`: one evaluation a step, second order; a step to 0 gives D itself."""
    before: Tensor | None = None
    h_before = 0.0
    for sigma, following in itertools.pairwise(sigmas):
        clean = denoise(x, sigma)
        if following == 0.0:
            x = clean
        else:
            h = math.log(sigma / following)
            target = clean if before is None else torch.lerp(before, clean, 1.0 + h / (2.0 * h_before))
            x = torch.add(x * (following / sigma), target, alpha=-math.expm1(-h))
            before, h_before = clean, h
        yield x
