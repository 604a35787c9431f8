"""Samplers of the probability-flow ODE and its stochastic form, over any `denoise(x, sigma) -> D`.

Karras et al. 2022 (arXiv 2206.00364): noise levels of equation 5, Heun's method with churn of algorithm 2. Lu et al.
2022 (arXiv 2211.01095): DPM-Solver++(2M), equation 18 of its multistep form, with σ for the noise level (α = 1).
Ma et al. 2024 (arXiv 2401.08740), section 2: the ODE of a flow, and the SDEs that share its marginals. As a denoiser
gives a velocity and the other way round (`vtrial.diffusion.flow`), every sampler works with every model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from vtrial.diffusion.flow import path

Denoise = Callable[[Tensor, float], Tensor]
"""D(x; σ): the expected clean x."""


SamplerName = Literal["heun", "heun-churn", "dpmpp-2m", "dpmpp-2m-churn", "flow-heun", "flow-stochastic"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)


class SamplerConfig(BaseModel):
    """How one stage is sampled.

    Churn (s_* are those of EDM's algorithm 2) acts in "heun-churn", "dpmpp-2m-churn" and "flow-stochastic" alone.
    """

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
    def stochastic(self) -> bool:
        """Whether fresh noise enters on the way."""
        return self.name.endswith(("churn", "stochastic"))

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for one sample."""
        return self.steps if self.name.startswith("dpmpp-2m") else 2 * self.steps - 1


def sample(
    denoise: Denoise, noise: Tensor, config: SamplerConfig, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yields x after each step, the last one clean. `noise` is standard normal; `generator` is needed for churn."""
    sigmas = config.sigmas()
    stir = _Churn(config, generator) if config.stochastic else None
    walk = {"heun": heun, "dpmpp": dpmpp_2m, "flow": flow_heun}[config.name.partition("-")[0]]
    return walk(denoise, noise * sigmas[0], sigmas, stir)


@dataclass(frozen=True)
class _Churn:
    """EDM algorithm 2, lines 4 to 6: fresh noise before a step, so that what was settled wrongly is settled again."""

    config: SamplerConfig
    generator: torch.Generator | None

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """x with more noise, and its level; both as they are outside of s_min to s_max."""
        config = self.config
        gamma = min(config.s_churn / config.steps, math.sqrt(2.0) - 1.0)
        if not config.s_min <= sigma <= config.s_max or gamma == 0.0:
            return x, sigma
        hat = sigma * (1.0 + gamma)
        device = self.generator.device if self.generator else x.device
        fresh = torch.randn(x.shape, generator=self.generator, device=device).to(x)
        return torch.add(x, fresh, alpha=config.s_noise * math.sqrt(hat**2 - sigma**2)), hat


Churn = Callable[[Tensor, float], tuple[Tensor, float]]


def heun(denoise: Denoise, x: Tensor, sigmas: list[float], churn: Churn | None = None) -> Iterator[Tensor]:
    """EDM algorithm 2 along `sigmas` (deterministic without `churn`); a step to 0 is an Euler step."""
    for sigma, following in itertools.pairwise(sigmas):
        x, hat = churn(x, sigma) if churn else (x, sigma)
        slope = (x - denoise(x, hat)) / hat
        ahead = torch.add(x, slope, alpha=following - hat)
        if following > 0.0:
            slope = slope.add_((ahead - denoise(ahead, following)), alpha=1.0 / following)
            ahead = torch.add(x, slope, alpha=(following - hat) / 2.0)
        x = ahead
        yield x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float], churn: Churn | None = None) -> Iterator[Tensor]:
    """DPM-Solver++(2M) along `sigmas`: one evaluation a step, second order; a step to 0 gives D itself.

    With `churn` a step begins with fresh noise, which D before it had not seen. The extrapolation is kept all the same:
    of normal data, steps of first order would keep 86 % of the SD, these 101 %.
    """
    before: Tensor | None = None
    h_before = 0.0
    for sigma, following in itertools.pairwise(sigmas):
        x, hat = churn(x, sigma) if churn else (x, sigma)
        clean = denoise(x, hat)
        if following == 0.0:
            x = clean
        else:
            h = math.log(hat / following)
            target = clean if before is None else torch.lerp(before, clean, 1.0 + h / (2.0 * h_before))
            x = torch.add(x * (following / hat), target, alpha=-math.expm1(-h))
            before, h_before = clean, h
        yield x


def flow_heun(denoise: Denoise, x: Tensor, sigmas: list[float], churn: Churn | None = None) -> Iterator[Tensor]:
    """Heun's method on dx_t/dt = u(x_t, t) at the times t = σ/(1 + σ) of `sigmas`; a step to 0 is an Euler step.

    x is x_t/(1 - t) between the steps. Where `heun` gets half of its slope from the end of a step, whose noise may be
    far less, a velocity has one scale all along: of normal data these steps lose or add less SD (decision 041).

    `churn` makes it the SDE dx_t = (u - ½ w s) dt + √w dW, in reverse time, with the score s = -(x_t + (1 - t) u)/t and
    w(t) = 2κ t/(1 - t), κ = ln(1 + γ) over the step in ln σ: noise is added by the path's own forward process, of
    diffusion 2t/(1 - t), and the ODE goes as much further. Neither part changes the marginals, so no SD is lost or won
    by the noise, as it is in Euler-Maruyama steps.
    """
    for sigma, following in itertools.pairwise(sigmas):
        x, hat = churn(x, sigma) if churn else (x, sigma)
        (keep, t), (keep_next, t_next) = path(hat), path(following)
        x_t = x * keep
        u = (x_t - denoise(x, hat)) / t
        ahead = torch.add(x_t, u, alpha=t_next - t)
        if following > 0.0:
            u = u.add_(ahead - denoise(ahead / keep_next, following), alpha=1.0 / t_next)
            ahead = torch.add(x_t, u, alpha=(t_next - t) / 2.0)
        x = ahead / keep_next
        yield x
