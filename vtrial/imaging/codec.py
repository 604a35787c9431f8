"""Between physical units and the [0, 1] of the model (Yoon et al. 2025, section 2.2).

CT is clipped to [-500, 500] HU and scaled linearly; SUV is clipped to [0, 25] g/ml and scaled as log(SUV + 1)/log 26.
So an SUV above 25 is censored at 25, and air is -500 HU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vtrial.records import MODEL_HU, MODEL_SUV, PetCt

HU_MIN, HU_MAX = MODEL_HU
_LOG_SCALE = math.log(MODEL_SUV + 1.0)


def encode_ct(ct_hu: Tensor) -> Tensor:
    """HU of any shape and type to float32 in [0, 1]."""
    return (ct_hu.float().clamp(HU_MIN, HU_MAX) - HU_MIN) / (HU_MAX - HU_MIN)


def decode_ct(ct: Tensor) -> Tensor:
    """Model space of any shape to int16 HU; values outside [0, 1] are clipped."""
    return (ct.float().clamp(0.0, 1.0) * (HU_MAX - HU_MIN) + HU_MIN).round().to(torch.int16)


def encode_suv(suv: Tensor) -> Tensor:
    """SUV in g/ml of any shape and type to float32 in [0, 1]."""
    return torch.log1p(suv.float().clamp(0.0, MODEL_SUV)) / _LOG_SCALE


def decode_suv(pet: Tensor) -> Tensor:
    """Model space of any shape to float32 SUV in g/ml; values outside [0, 1] are clipped."""
    return torch.expm1(pet.float().clamp(0.0, 1.0) * _LOG_SCALE)


def decode(model_space: Tensor, spacing_mm: tuple[float, float, float]) -> PetCt:
    """A model-space volume (2, x, y, z), CT then PET, to a PET/CT with `spacing_mm`; ValueError if not finite.

    A network that breaks down gives NaN, which clipping would hide as air.
    """
    if model_space.ndim != 4 or model_space.shape[0] != 2:
        raise ValueError(f"model space must be (2, x, y, z), not {tuple(model_space.shape)}")
    if not bool(torch.isfinite(model_space).all()):
        raise ValueError("the model gave values that are not finite")
    ct_hu: np.ndarray = decode_ct(model_space[0]).cpu().numpy()
    suv: np.ndarray = decode_suv(model_space[1]).cpu().numpy()
    return PetCt(ct_hu=ct_hu, suv=suv, spacing_mm=spacing_mm)
