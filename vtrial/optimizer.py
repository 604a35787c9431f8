"""Adam for every parameter, or Muon for the weight matrices and Adam for the rest.

Muon (K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the averaged gradient
of a matrix by the nearest orthogonal one, so that all its directions move alike; a convolution's kernels are the rows
of its matrix. The same error takes a quarter of the steps here (docs/decisions/017-muon.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

LEAST_SIDE = 16  # smaller matrices have few directions for Muon to even out


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether Muon is of use: weights with `LEAST_SIDE` outputs and inputs at least."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE


class Optimizer:
    """Steps `parameters` in place: those that `by_muon` chooses by Muon, the rest by Adam. Rates are 0 until set."""

    def __init__(self, parameters: Iterable[nn.Parameter], by_muon: Callable[[nn.Parameter], bool]) -> None:
        everything = list(parameters)
        matrices = [p for p in everything if by_muon(p)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in everything if id(p) not in chosen]
        self.adam = torch.optim.Adam(rest, lr=0.0, betas=(0.9, 0.99), fused=True)
        # torch's Muon takes flat matrices only: views that share the memory of the kernels
        self._flat = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in matrices]
        flat = [matrix for _, matrix in self._flat]
        self.muon = torch.optim.Muon(flat, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") if flat else None

    def set_rates(self, adam: float, muon: float) -> None:
        """Learning rates of the next step; Muon's has the root mean square of Adam's steps."""
        for group in self.adam.param_groups:
            group["lr"] = adam
        for group in self.muon.param_groups if self.muon else ():
            group["lr"] = muon

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)
        for parameter, flat in self._flat:
            parameter.grad = flat.grad = None

    def step(self) -> None:
        """One step along the gradients."""
        self.adam.step()
        if self.muon is not None:
            for parameter, flat in self._flat:
                flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
            self.muon.step()  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Any]:
        """Averages of gradients, to go on with later."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict() if self.muon else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.adam.load_state_dict(state["adam"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])
