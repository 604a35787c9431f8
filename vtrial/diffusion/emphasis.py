"""Where a loss looks more closely. A weight that depends on the input alone does not move the minimum of a squared
error; it tells where to be near it (docs/decisions/018-where-training-looks.md)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

AROUND = 5  # voxels across: what hot spots stand out from


class Emphasis(BaseModel):
    """How much more places count, beside 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uptake: Annotated[float, Field(ge=0.0)] = 0.0
    """Times q to `power`: q is the uptake that is seen there, in SDs above the mean."""
    power: Annotated[float, Field(ge=1.0)] = 2.0
    contrast: Annotated[float, Field(ge=0.0)] = 0.0
    """Times the fourth power of the SDs by which the uptake of a voxel, as it is seen, exceeds that around it. Hot
    spots of a voxel or two are few beside large hot organs, of which `uptake` tells most."""

    def counts(self, uptake: Tensor, pet: Tensor, patch: int) -> Tensor:
        """Weights (b, 1, x/p, y/p, z/p) of places, 1 in the mean of an example, from the `uptake` there (same shape)
        and the PET of voxels as it is seen (b, 1, x, y, z), both in SDs."""
        counts = 1.0 + self.uptake * uptake.clamp(min=0.0) ** self.power
        if self.contrast:
            around = F.avg_pool3d(pet, AROUND, 1, AROUND // 2, count_include_pad=False)
            counts = counts + self.contrast * F.max_pool3d((pet - around).clamp(min=0.0), patch) ** 4
        return counts / counts.mean((2, 3, 4), keepdim=True)


EVEN = Emphasis()
"""All places count alike."""
