"""Flow matching along straight paths, written for noise levels σ so that it shares network and samplers with diffusion.

Lipman et al. 2022 (arXiv 2210.02747), section 4.1, and Liu et al. 2022 (arXiv 2209.03003), here with the data at t = 0:
x_t = (1 - t) x_0 + t ε. A point moves along its path with velocity ε - x_0; the network learns the mean velocity of all
paths through a place, u(x_t, t) = E[ε - x_0 | x_t], by plain squared error. Samples follow dx_t/dt = u down to t = 0.

With σ = t/(1 - t), x_t/(1 - t) = x_0 + σ ε: the noisy data of the diffusion. So any denoiser gives a velocity and any
velocity a denoiser, D(x; σ) = x_t - t u (Kingma & Gao 2023, arXiv 2303.00848; Gao et al. 2025, "Diffusion models and
Gaussian flow matching: two sides of the same coin"). What differs is what the loss weighs, and how a sampler steps.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Level = TypeVar("Level", float, Tensor)


def path(sigma: Level) -> tuple[Level, Level]:
    """1 - t and t at noise levels σ, the shares of data and noise in x_t; 1 - t keeps its digits at large σ."""
    keep = 1.0 / (1.0 + sigma)
    return keep, sigma * keep


def preconditioning(sigma: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """skip(t) and out(t) in u = skip·x_t - out·F, for channels of SD `data` at noise levels σ, to broadcast.

    skip is the best linear guess, Cov(u, x_t)/Var(x_t) = (t - (1 - t) s²)/v with v = t² + (1 - t)² s², and out the SD
    of what it leaves: Var(u) - skip² v = 1 + s² - (t - (1 - t) s²)²/v = s²/v. So F's target has variance 1 at every t.
    With the input x_t/√v, D = x_t - t u is EDM's D with the same F: c_skip = (1 - t skip)/(1 + σ) and c_out = t out.
    """
    keep, t = path(sigma)
    variance = t**2 + (keep * data) ** 2
    return (t - keep * data**2) / variance, data / variance.sqrt()
