"""Power-function averages of the weights (Karras et al. 2024, section 3.1), and others made of them later (3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ whose averaging profile has relative width `sigma_rel` (0 < σ_rel < 0.28).

    σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) (equation 123), the largest real root of
    γ³ + 7 γ² + (16 - σ_rel⁻²) γ + 12 - σ_rel⁻² = 0.
    """
    t = sigma_rel**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def decay(step: int, gamma: float) -> float:
    """β_t = (1 - 1/t)^(γ + 1) for step t = 1, 2, … (equation 127)."""
    return float((1.0 - 1.0 / step) ** (gamma + 1.0))


class Profile(NamedTuple):
    """How an average at step `step` weighs the weights of steps τ before: p(τ) = (γ + 1) τ^γ / t^(γ + 1)."""

    gamma: float
    step: int


def products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """∫ p_a p_b dτ for all pairs (len(a), len(b)), from 0 to the earlier of both steps, m:

    (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · (m/t_a)^(γ_a + 1) (m/t_b)^(γ_b + 1) / m.
    """
    gamma_a, t_a = (np.array([getattr(p, name) for p in a], dtype=float)[:, None] for name in Profile._fields)
    gamma_b, t_b = (np.array([getattr(p, name) for p in b], dtype=float)[None, :] for name in Profile._fields)
    m = np.minimum(t_a, t_b)
    powers = (m / t_a) ** (gamma_a + 1.0) * (m / t_b) ** (gamma_b + 1.0) / m
    found: NDArray[np.float64] = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0) * powers
    return found


def blend(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """The factors with which stored averages add up to `wanted` most nearly, and how far off their profile is.

    Least squares over τ (section 3.2 and appendix C.2). The error is the root mean square of the difference over that
    of the profile wanted: 0.01 is as good as tracked, 1 is nothing alike.
    """
    gram, right = products(stored, stored), products(stored, [wanted])[:, 0]
    # profiles of neighbouring steps are nearly alike: directions lost in rounding are left out
    factors = np.asarray(np.linalg.lstsq(gram, right, rcond=1e-12)[0], dtype=np.float64)
    factors /= factors.sum()  # weights change by less than they are: a sum of 0.999 would be the greatest error
    square = float(products([wanted], [wanted])[0, 0])
    rest = square - 2.0 * float(factors @ right) + float(factors @ gram @ factors)
    return factors, float((max(rest, 0.0) / square) ** 0.5)


class PowerEma:
    """Several running averages of one set of parameters, a length σ_rel each."""

    def __init__(self, parameters: Mapping[str, Tensor], lengths: tuple[float, ...]) -> None:
        self.gammas = {length: gamma_of(length) for length in lengths}
        self.averages = {length: {k: v.detach().clone() for k, v in parameters.items()} for length in lengths}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Take in the parameters after optimiser step `step` (from 1)."""
        values = [v.detach() for v in parameters.values()]
        for length, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), values, 1.0 - decay(step, self.gammas[length]))
