"""Magnitude-preserving layers of EDM2 in three dimensions.

Written from the equations of Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models"
(arXiv 2312.02696); equation numbers stand at each function. Activations are expected to have magnitude (root mean
square) 1 everywhere, which the layers keep, so no normalisation with learned statistics is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtrial.diffusion.convolution import convolve

# Root mean square of silu(x) for x ~ N(0, 1), equation 81.
SILU_MAGNITUDE = 0.596


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of a normal input (equation 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def sum_weights(t: float) -> tuple[float, float]:
    """Factors of the two terms of the magnitude-preserving sum with blend `t` (equation 88)."""
    norm = math.sqrt((1.0 - t) ** 2 + t**2)
    return (1.0 - t) / norm, t / norm


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Blend of two uncorrelated inputs that keeps their magnitude (equation 88)."""
    wa, wb = sum_weights(t)
    return torch.add(a * wa, b, alpha=wb)


def mp_concat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenation along channels in which `b` contributes `t` whatever its channel count (equation 103)."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1.0 - t) ** 2 + t**2))
    return torch.cat([a * ((1.0 - t) * scale / math.sqrt(na)), b * (t * scale / math.sqrt(nb))], dim=1)


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-4) -> Tensor:
    """Scale the vector along `dim` at each position to magnitude 1 (equation 30)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x * (1.0 / (norm / math.sqrt(x.shape[dim]) + eps)).to(x.dtype)


def unit_rows(weight: Tensor, eps: float = 1e-4) -> Tensor:
    """Each output's weights scaled to magnitude 1 (equations 47 and 66)."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=torch.float32)
    return weight / (norm * math.sqrt(weight.shape[0] / weight.numel()) + eps)


class MPFourier(nn.Module):
    """Random Fourier features of a scalar, of magnitude 1 (equation 75): (b,) -> (b, channels)."""

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2.0 * math.pi * torch.rand(channels))
        self.frequencies: Tensor
        self.phases: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """√2 cos(f x + φ)."""
        return math.sqrt(2.0) * torch.cos(x.float()[:, None] * self.frequencies + self.phases)


class MPConv(nn.Module):
    """Convolution (kernel 1 or 3, zero-padded) or, with kernel 0, a linear layer, with unit-magnitude weights.

    Equation 47: the weights used are `scale · gain · unit_rows(weight) / √fan_in`. `scale` is a constant that the
    caller wants applied to the output (it costs nothing in the weights); `learned_gain` adds a scalar that starts at 0.
    """

    def __init__(self, cin: int, cout: int, kernel: int, *, scale: float = 1.0, learned_gain: bool = False) -> None:
        super().__init__()
        self.kernel = kernel
        self.scale = scale / math.sqrt(cin * max(kernel, 1) ** 3)
        self.folded = False
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel] * 3 if kernel else [])))
        self.gain = nn.Parameter(torch.zeros([])) if learned_gain else None

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The weights as they enter the convolution."""
        if self.folded:
            return self.weight.to(dtype)
        scale = self.scale if self.gain is None else self.scale * self.gain
        return (unit_rows(self.weight) * scale).to(dtype)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Forced weight normalisation after an optimiser step (equation 66)."""
        self.weight.copy_(unit_rows(self.weight))

    @torch.no_grad()
    def fold_(self, dtype: torch.dtype) -> None:
        """Replace the weights by the effective ones, for inference only: saves normalising them at each call."""
        weight = self.effective_weight(torch.float32)
        if self.kernel:
            weight = weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.folded = True

    def forward(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """Apply to (b, cin, x, y, z), or (b, cin) for a linear layer; `channels`: only these inputs are given."""
        weight = self.effective_weight(x.dtype)[:, channels]
        if not self.kernel:
            return F.linear(x, weight)
        if self.kernel == 3 or x.is_contiguous(memory_format=torch.channels_last_3d):
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return convolve(x, weight)


class Attention(nn.Module):
    """Cosine self-attention over all positions (section 2.1: unit query, key and value vectors), with MP residual."""

    def __init__(self, channels: int, head_channels: int, t: float = 0.3) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.keep, blend = sum_weights(t)
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.project = MPConv(channels, channels, 1, scale=blend)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, x, y, z) -> the same shape."""
        b, c = x.shape[:2]
        qkv = self.qkv(x).flatten(2).reshape(b, self.heads, c // self.heads, 3, -1)
        q, k, v = pixel_norm(qkv, dim=2).permute(3, 0, 1, 4, 2).unbind(0)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = y.transpose(2, 3).reshape(x.shape).contiguous(memory_format=torch.channels_last_3d)
        return torch.add(self.project(y), x, alpha=self.keep)


class Resample(nn.Module):
    """Trilinear resampling by 2: halving is the mean of 2×2×2, doubling interpolates (edges clamped)."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, x, y, z) -> (b, c, 2x, 2y, 2z) for "up", half of each for "down", unchanged for "keep"."""
        factor = {"down": 0.5, "keep": 1, "up": 2}[self.mode]
        return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="trilinear", align_corners=False)


class Block(nn.Module):
    """Residual block (figure 21 of the paper), modulated by the embedding of noise level and conditions.

    The factors of MP-SiLU and of the MP-sum are folded into the constant scale of the convolution beside them.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        *,
        encoder: bool,
        resample: str = "keep",
        heads: int = 0,
        shift: bool = False,
        t: float = 0.3,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.keep, blend = sum_weights(t)
        self.resample = Resample(resample)
        self.skip = MPConv(cin, cout, 1) if cin != cout else None
        self.conv0 = MPConv(cout if encoder else cin, cout, 3, scale=1.0 / SILU_MAGNITUDE)
        self.conv1 = MPConv(cout, cout, 3, scale=blend / SILU_MAGNITUDE)
        self.modulate = MPConv(embedding, cout, 0, learned_gain=True)
        self.shift = MPConv(embedding, cout, 0, learned_gain=True) if shift else None
        self.attention = Attention(cout, heads) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(b, cin, x, y, z), (b, embedding) -> (b, cout, x', y', z')."""
        x = self.resample(x)
        if self.encoder:
            x = pixel_norm(x if self.skip is None else self.skip(x))
        y = self.conv0(F.silu(x))
        gain = (1.0 + self.modulate(embedding)).to(x.dtype)[:, :, None, None, None]
        if self.shift is None:
            y = y * gain
        else:
            y = torch.addcmul(self.shift(embedding).to(x.dtype)[:, :, None, None, None], y, gain)
        y = self.conv1(F.silu(y))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        x = torch.add(y, x, alpha=self.keep)
        return x if self.attention is None else self.attention(x)
