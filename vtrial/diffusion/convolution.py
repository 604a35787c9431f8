"""Convolutions, and a faster way for those of float32 on a CPU.

oneDNN computes 3D convolutions by their definition. Where there are no kernels for bfloat16 (`vtrial.precision`) that
runs at the peak of the machine already, so large ones go by Winograd's minimal filtering F(4, 3) along each axis (Lavin
and Gray 2016, arXiv 1509.09308, section 4.1, nested to three dimensions): four outputs from six inputs by six products,
6³ for the 4³·27 of the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STEP, TAPS = 4, 6
"""Outputs, and inputs, of a tile along an axis."""
LEAST_CHANNELS, LEAST_POSITIONS = 64, 20_000
"""Below either the sums around the products take longer than the products saved."""
BLOCK_BYTES = 10 * 2**20
"""Tiles are computed in blocks that stay in a processor's cache."""

_KERNEL_TO_POINTS = (  # G: rows are the points 0, 1, -1, 2, -2 and infinity
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """`conv3d` of (b, c, x, y, z) with (k, c, n, n, n), n odd, padded to keep the shape: by the fastest way here."""
    padding = weight.shape[2] // 2
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if learning or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return F.conv3d(x, weight, padding=padding)
    if padding == 1 and min(weight.shape[:2]) >= LEAST_CHANNELS and x[0, 0].numel() >= LEAST_POSITIONS:
        return winograd(x, weight)
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return F.conv3d(x, weight, padding=padding)
    # torch would leave small grids to a way of its own, three times slower
    return torch.mkldnn_convolution(x, weight, None, (padding,) * 3, (1, 1, 1), (1, 1, 1), 1)


def winograd(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of (b, c, x, y, z), zero-padded by 1, with (k, c, 3, 3, 3): (b, k, x, y, z), channels_last_3d."""
    g = weight.new_tensor(_KERNEL_TO_POINTS)
    points = torch.einsum("ai,bj,dl,kcijl->abdck", g, g, g, weight).flatten(0, 2).contiguous()
    sides = x.shape[2:]
    out = x.new_empty(len(x), *(-(-side // STEP) * STEP for side in sides), len(weight))
    for volume, of_volume in zip(x.movedim(1, -1), out, strict=True):
        _one(volume, points, of_volume)
    inside = out[:, : sides[0], : sides[1], : sides[2]].movedim(-1, 1)
    return inside.contiguous(memory_format=torch.channels_last_3d)  # a copy where a side is no multiple of a tile's


def _one(volume: Tensor, points: Tensor, out: Tensor) -> None:
    """A volume (x, y, z, c) with a transformed kernel (216, c, k), to `out` (4 tx, 4 ty, 4 tz, k): of whole tiles."""
    tx, ty, tz = (side // STEP for side in out.shape[:3])
    right, back, top = (whole - side + 1 for whole, side in zip(out.shape[:3], volume.shape[:3], strict=True))
    padded = F.pad(volume, (0, 0, 1, top, 1, back, 1, right))
    rows = max(1, BLOCK_BYTES // (TAPS**3 * tz * volume.shape[3] * volume.element_size()))
    for i in range(tx):
        for j in range(0, ty, rows):
            n = min(rows, ty - j)
            x, y = STEP * i, STEP * j
            part = padded[x : x + TAPS, y : y + STEP * n + TAPS - STEP]
            _block(part, points, out[x : x + STEP, y : y + STEP * n])


def _block(part: Tensor, points: Tensor, out: Tensor) -> None:
    """One tile along x, some along y, all along z: (6, 4n + 2, 4m + 2, c) to `out` (4, 4n, 4m, k)."""
    channels, outputs = points.shape[1:]
    n, m = out.shape[1] // STEP, out.shape[2] // STEP
    # each axis in turn becomes a leading one of the six points
    along_z = part.new_empty(TAPS, TAPS, part.shape[1], m, channels)
    _to_points([part[:, :, k : k + STEP * m - 3 : STEP] for k in range(TAPS)], along_z)
    along_y = part.new_empty(TAPS, TAPS, TAPS, n, m, channels)
    _to_points([along_z[:, :, k : k + STEP * n - 3 : STEP] for k in range(TAPS)], along_y)
    along_x = part.new_empty(TAPS, TAPS, TAPS, n, m, channels)
    _to_points([along_y[:, :, k] for k in range(TAPS)], along_x)  # now (x, y, z) of points, n, m, c
    products = torch.bmm(along_x.view(TAPS**3, n * m, channels), points)
    in_x = products.view(TAPS, TAPS, TAPS, n, m, outputs)
    in_y = part.new_empty(STEP, TAPS, TAPS, n, m, outputs)
    _from_points(in_x, list(in_y))
    in_z = part.new_empty(STEP, STEP, TAPS, n, m, outputs)
    _from_points(in_y.transpose(0, 1), [in_z[:, k] for k in range(STEP)])
    tiles = out.view(STEP, n, STEP, m, STEP, outputs).permute(4, 0, 2, 1, 3, 5)
    _from_points(in_z.movedim(2, 0), list(tiles))


def _to_points(d: Sequence[Tensor], out: Tensor) -> None:
    """Bᵀ: six inputs to the values of their polynomial at six points."""
    a, b = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(a, b, out=out[1])
    torch.sub(a, b, out=out[2])
    torch.sub(d[4], d[2], out=a)
    torch.sub(d[3], d[1], out=b)
    torch.add(a, b, alpha=2, out=out[3])
    torch.sub(a, b, alpha=2, out=out[4])
    torch.sub(a, d[2], alpha=4, out=a)
    torch.add(a, d[0], alpha=4, out=out[0])
    torch.sub(d[5], d[3], out=a)
    torch.sub(a, b, alpha=4, out=out[5])


def _from_points(m: Tensor, out: Sequence[Tensor]) -> None:
    """Aᵀ: six products to four outputs."""
    p, q, r, s = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(m[0], p, out=out[0]).add_(r)
    torch.add(q, s, alpha=2, out=out[1])
    torch.add(p, r, alpha=4, out=out[2])
    torch.add(q, s, alpha=8, out=out[3]).add_(m[5])
