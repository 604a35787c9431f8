"""Adam for every parameter, or Muon for the weight matrices and Adam for the rest.

Muon (K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the averaged gradient
of a matrix by the nearest orthogonal one, so that all its directions move alike; a convolution's kernels are the rows
of its matrix. The same error takes a quarter of the steps here (docs/decisions/017-muon.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtrial.precision import usual_dtype

LEAST_SIDE = 16  # smaller matrices have few directions for Muon to even out
MOMENTUM = 0.95
ADAM_RMS = 0.2
"""Root mean square of Adam's steps at a rate of 1, which Muon's are given (J. Liu et al. 2025, arXiv 2502.16982)."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of `orthogonal`, which bring singular values from far below 1 near it in few rounds (Jordan 2024)."""


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether Muon is of use: weights with `LEAST_SIDE` outputs and inputs at least."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE


def orthogonal(matrix: Tensor) -> Tensor:
    """(n, m) with singular values near 1 in place of its own: nearly U V' of U S V', 0.7 to 1.2 but for the smallest.

    By five rounds of X <- a X + b (X X') X + c (X X')^2 X (Jordan 2024), in the precision this machine is fast in.
    """
    a, b, c = QUINTIC
    x = matrix.to(usual_dtype(matrix.device))
    wide = x if x.shape[0] <= x.shape[1] else x.T  # the products are as large as the shorter side
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum. torch's own computes in bfloat16 everywhere (docs/decisions/017-muon.md)."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """One step along the gradients; matrices without one stay as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad.flatten(1), self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(average, MOMENTUM))
                rate = group["lr"] * ADAM_RMS * max(gradient.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-rate)


class Optimizer:
    """Steps `parameters` in place: those that `by_muon` chooses by Muon, the rest by Adam. Rates are 0 until set."""

    def __init__(self, parameters: Iterable[nn.Parameter], by_muon: Callable[[nn.Parameter], bool]) -> None:
        everything = list(parameters)
        matrices = [p for p in everything if by_muon(p)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in everything if id(p) not in chosen]
        self.adam = torch.optim.Adam(rest, lr=0.0, betas=(0.9, 0.99), fused=True)
        self.muon = Muon(matrices) if matrices else None

    def set_rates(self, adam: float, muon: float) -> None:
        """Learning rates of the next step; Muon's has the root mean square of Adam's steps."""
        for group in self.adam.param_groups:
            group["lr"] = adam
        for group in self.muon.param_groups if self.muon else ():
            group["lr"] = muon

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)
        if self.muon is not None:
            self.muon.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step along the gradients."""
        self.adam.step()
        if self.muon is not None:
            self.muon.step()

    def state_dict(self) -> dict[str, Any]:
        """Averages of gradients, to go on with later."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict() if self.muon else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.adam.load_state_dict(state["adam"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])
