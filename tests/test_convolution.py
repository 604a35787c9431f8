"""Convolutions in float32 on a CPU: the fast ways give what the definition gives, and training goes by torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtrial.diffusion import convolution
from vtrial.diffusion.convolution import LEAST_POSITIONS, convolve, winograd


def operands(
    cin: int, cout: int, sides: tuple[int, int, int], kernel: int = 3, batch: int = 1
) -> tuple[Tensor, Tensor]:
    """An input and weights of magnitude 1, as magnitude-preserving layers have them."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(batch, cin, *sides, generator=noise).contiguous(memory_format=torch.channels_last_3d)
    return x, torch.randn(cout, cin, kernel, kernel, kernel, generator=noise) / (cin * kernel**3) ** 0.5


@pytest.mark.parametrize("sides", [(1, 1, 1), (4, 8, 4), (5, 6, 7), (13, 22, 9)])
def test_winograds_way_is_the_definition(sides: tuple[int, int, int]) -> None:
    x, weight = operands(5, 7, sides, batch=2)
    exact = F.conv3d(x.double(), weight.double(), padding=1)
    out = winograd(x, weight)
    assert out.shape == exact.shape and out.is_contiguous(memory_format=torch.channels_last_3d)
    # float32 through sums of up to 100 times the size; bfloat16, which networks are made for, errs by 4e-3
    assert float((out - exact).abs().max()) < 1e-3
    assert float((out - exact).square().mean().sqrt()) < 3e-5


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands(16, 16, (9, 30, 12))
    whole = winograd(x, weight)
    monkeypatch.setattr(convolution, "BLOCK_BYTES", 1)
    assert torch.allclose(winograd(x, weight), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "sides", "kernel"), [(64, (28, 28, 28), 3), (64, (9, 10, 11), 3), (8, (12, 8, 8), 1)]
)
def test_each_way_agrees_with_torch(channels: int, sides: tuple[int, int, int], kernel: int) -> None:
    x, weight = operands(channels, channels, sides, kernel)
    with torch.inference_mode():
        out, usual = convolve(x, weight), F.conv3d(x, weight, padding=kernel // 2)
    assert out.shape == usual.shape
    assert torch.allclose(out, usual, atol=1e-3)


def test_large_ones_go_by_winograd_where_there_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(convolution, "winograd", lambda x, _weight: asked.append(x.shape) or x)
    large, weight = operands(64, 64, (28, 28, 48))
    assert large[0, 0].numel() >= LEAST_POSITIONS
    small, _ = operands(64, 64, (14, 14, 24))
    thin, narrow = operands(32, 32, (28, 28, 48))
    for x, w in ((large, weight), (small, weight), (thin, narrow), (large.bfloat16(), weight.bfloat16())):
        # in bfloat16 one voxel: where there are no kernels for it a large one takes minutes
        convolve(x[..., :1, :1, :1] if x.dtype == torch.bfloat16 else x, w)
    assert asked == [large.shape]
    convolve(large, weight.requires_grad_()).mean().backward()
    assert asked == [large.shape] and weight.grad is not None
