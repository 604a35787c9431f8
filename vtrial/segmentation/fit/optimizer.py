"""Muon for kernels, Adam for the rest (decision 017), and the moving average of everything learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtrial.segmentation.fit.config import OptimizerConfig

LEAST_SIDE = 16  # smaller matrices have few directions for Muon to even out


class Optimizer:
    """Steps the parameters of a network in place; no rate is set before `set_rate`."""

    def __init__(self, network: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        kernels = [p for p in network.parameters() if _is_kernel(p)]
        chosen = {id(p) for p in kernels}
        rest = [p for p in network.parameters() if id(p) not in chosen]
        self.adam = torch.optim.Adam(rest, lr=0.0, betas=(0.9, 0.99))
        # torch's Muon takes flat matrices only: views that share the memory of the kernels
        self._flat = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in kernels]
        flat = [matrix for _, matrix in self._flat]
        self.muon = torch.optim.Muon(flat, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") if flat else None

    def set_rate(self, step: int, steps: int) -> None:
        """Learning rates of step 1, 2, … of `steps`."""
        course = self.config.course(step, steps)
        for group in self.adam.param_groups:
            group["lr"] = course * self.config.lr
        for group in self.muon.param_groups if self.muon else ():
            group["lr"] = course * self.config.matrix_lr

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


class Average:
    """Exponential average of a network's parameters and statistics, shorter at the start."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in _learned(network).items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the state after step 1, 2, …"""
        decay = min(self.decay, step / (step + 9.0))
        for name, value in _learned(network).items():
            self.values[name].lerp_(value.detach(), 1.0 - decay)

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's state dict with the averages in place of the values."""
        known = {id(value): name for name, value in _learned(network).items()}
        return {
            name: self.values[known[id(value)]] if id(value) in known else value
            for name, value in network.state_dict(keep_vars=True).items()
        }


def _learned(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that hold fractions, each tensor once, though networks name it several times."""
    buffers = {name: value for name, value in network.named_buffers() if value.is_floating_point()}
    return {**dict(network.named_parameters()), **buffers}


def _is_kernel(parameter: nn.Parameter) -> bool:
    """Kernels with neighbours; the outputs' 1×1×1 ones stay with Adam."""
    if parameter.ndim == 1 or parameter[0, 0].numel() == 1:
        return False
    return min(parameter.shape[0], parameter[0].numel()) >= LEAST_SIDE
