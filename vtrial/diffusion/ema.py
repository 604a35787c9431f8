"""Power-function averages of the weights (Karras et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
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
