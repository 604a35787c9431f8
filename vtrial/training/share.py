"""Which part of every batch a worker trains on, and how what the workers find comes together.

All workers hold the same weights. Each takes its own examples of a batch, the gradients are summed over the workers,
and all make the same step. A worker alone takes everything, and nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Worker `rank` of `world`, which computes on `device`. With several, torch.distributed must have its group."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this worker is the one that writes."""
        return self.rank == 0

    def of(self, count: int) -> range:
        """This worker's part of `count` examples; parts are consecutive and differ by one at most."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put into `tensors` (of one type and device) their sums over the workers: the same bits at every worker."""
        if self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, here: bool) -> bool:
        """Whether it is so at one worker at least; all workers must ask."""
        found = torch.tensor(float(here), device=self.device)
        self.add_up([found])
        return bool(found)

    def wait(self) -> None:
        """Until all workers are here."""
        self.any(False)


def usual_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
