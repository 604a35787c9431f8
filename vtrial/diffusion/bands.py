"""The frequency bands of a space-to-depth grid: an orthonormal Haar transform of each p×p×p block.

White noise stays white under an orthonormal transform, so diffusion runs in bands just as in voxels; but a band has an
SD of its own, and with it a preconditioning of its own (`vtrial.diffusion.denoiser`). A fine band of a body, smooth but
for a few edges, is small: there even an untrained network removes most noise. Haar, 1910; wavelet domains in diffusion:
Guth et al. 2022 (arXiv 2208.05003).
"""

from __future__ import annotations

import torch
from torch import Tensor


def haar_matrix(patch: int) -> Tensor:
    """Orthonormal, (p³, p³), for blocks flattened as `to_grid` does; the first row is the block's mean times p^1.5."""
    line = torch.ones(1, 1, dtype=torch.float64)
    while line.shape[0] < patch:
        coarse = torch.kron(line, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        fine = torch.kron(torch.eye(line.shape[0], dtype=torch.float64), torch.tensor([[1.0, -1.0]]).double())
        line = torch.cat([coarse, fine]) / 2.0**0.5
    return torch.kron(torch.kron(line, line), line).float()


def to_bands(grid: Tensor, patch: int) -> Tensor:
    """A grid (b, c p³, x, y, z) of voxels to one of bands, of the same shape, channels_last_3d."""
    return _rotate(grid, haar_matrix(patch).T)


def from_bands(grid: Tensor, patch: int) -> Tensor:
    """The inverse of `to_bands`."""
    return _rotate(grid, haar_matrix(patch))


def _rotate(grid: Tensor, matrix: Tensor) -> Tensor:
    last = grid.movedim(1, -1)
    blocks = last.reshape(*last.shape[:-1], -1, matrix.shape[0])
    return (blocks @ matrix.to(grid)).reshape(last.shape).movedim(-1, 1)
