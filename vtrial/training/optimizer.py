"""Adam for every parameter, or Muon for the weight matrices and Adam for the rest.

Muon (K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the averaged gradient
of a matrix by the nearest orthogonal one, so that all its directions move alike; a convolution's kernels are the rows
of its matrix. The same error takes a quarter of the steps here (docs/decisions/017-muon.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vtrial.training.config import OptimizerConfig

# Smaller matrices have few directions; the outputs' gains and the learned variance stay with Adam.
LEAST_SIDE = 16


class Optimizer:
    """Steps `parameters` in place; their rates follow `config`, of `steps` in all. No rate is set before `set_rate`."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.config = config
        everything = list(parameters)
        matrices = [p for p in everything if config.matrix_lr and _is_matrix(p)]
        chosen = {id(p) for p in matrices}
        self.adam = torch.optim.Adam(
            [p for p in everything if id(p) not in chosen], lr=0.0, betas=(0.9, 0.99), fused=True
        )
        # torch's Muon takes flat matrices only: views that share the memory of the kernels
        self._flat = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in matrices]
        self.muon = (
            torch.optim.Muon([flat for _, flat in self._flat], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            if matrices
            else None
        )

    def set_rate(self, step: int, steps: int) -> None:
        """Learning rates of step 1, 2, … of `steps`."""
        rate = self.config.rate(step, steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        for group in self.muon.param_groups if self.muon else ():
            group["lr"] = rate * (self.config.matrix_lr or 0.0) / self.config.lr

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


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE
