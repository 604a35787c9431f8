"""Networks compute in bfloat16 only where the machine has kernels for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from vtrial.diffusion.cascade import load_cascade
from vtrial.precision import has_bfloat16, usual_dtype

CPU = torch.device("cpu")


def quickest(action: Callable[[], object]) -> float:
    def once() -> float:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun

    once()
    return min(once() for _ in range(3))


def test_what_is_chosen_has_kernels() -> None:
    def convolve(dtype: torch.dtype) -> Callable[[], object]:
        x = torch.randn(1, 32, 12, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        kernels = torch.randn(32, 32, 3, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        return lambda: F.conv3d(x, kernels, padding=1)

    chosen, exact = quickest(convolve(usual_dtype(CPU))), quickest(convolve(torch.float32))
    # the reference implementation takes some 300 times as long
    assert chosen < 10.0 * exact, f"{chosen:.4f} s in {usual_dtype(CPU)}, {exact:.4f} s in float32"


@pytest.mark.parametrize(("there", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_computes_in_what_the_machine_has(
    there: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtrial.precision.has_bfloat16", lambda device: there)
    assert usual_dtype(CPU) is dtype
    assert usual_dtype(CPU, "float32") is torch.float32
    assert load_cascade("phantom-v1").dtype is dtype
    assert load_cascade("phantom-v1", dtype=torch.float32).dtype is torch.float32, "what is asked for goes first"


def test_a_processor_without_onednn_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not has_bfloat16(CPU)
    assert has_bfloat16(torch.device("meta")), "where nothing is computed, as it would be elsewhere"
