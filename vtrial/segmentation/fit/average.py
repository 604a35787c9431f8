"""The moving average of everything that a segmenter's network learned."""

from __future__ import annotations

from torch import Tensor, nn


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
