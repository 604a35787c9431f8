"""Small bodies for tests of the networks: an ellipsoid whose size follows weight, with a hot or cold core."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vtrial.diffusion.conditions import Demographics
from vtrial.training import TensorVolume, TrainingConfig

SHAPE = (32, 32, 64)


def blob(i: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray, Demographics]:
    """HU int16, SUV float16 and demographics of subject `i`."""
    rng = np.random.default_rng(i)
    person = Demographics("FM"[i % 2], rng.uniform(30, 80), rng.uniform(155, 185), rng.uniform(50, 110))
    x, y, z = (
        np.linspace(-1, 1, n)[tuple(np.s_[:] if k == a else None for k in range(3))] for a, n in enumerate(shape)
    )
    radius = 0.5 + 0.003 * person.weight_kg
    body = (x / radius) ** 2 + (y / radius) ** 2 + 0.2 * z**2 < 1
    core = x**2 + y**2 + z**2 < 0.1
    ct = np.where(body, 40.0, -1000.0) + 10.0 * rng.standard_normal(shape)
    suv = np.where(body, 0.7, 0.0)
    suv[core] = rng.choice([1.5, 8.0])
    return ct.astype(np.int16), suv.astype(np.float16), person


def write_blobs(folder: Path, count: int, shape: tuple[int, int, int] = SHAPE) -> Path:
    """A training set of `count` subjects."""
    for name in ("ct", "suv"):
        (folder / name).mkdir(parents=True)
    rows = []
    for i in range(count):
        ct, suv, person = blob(i, shape)
        np.save(folder / "ct" / f"S{i}.npy", ct)
        np.save(folder / "suv" / f"S{i}.npy", suv)
        rows.append((f"S{i}", person.sex, person.age_years, person.height_cm, person.weight_kg))
    columns = ["subject_id", "sex", "age_years", "height_cm", "weight_kg"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "subjects.parquet")
    return folder


def tensor_blob(i: int, shape: tuple[int, int, int] = SHAPE) -> TensorVolume:
    """Subject `i` in model space."""
    from vtrial.imaging.codec import encode_ct, encode_suv

    ct, suv, person = blob(i, shape)
    return TensorVolume(
        torch.stack([encode_ct(torch.from_numpy(ct)), encode_suv(torch.from_numpy(suv.astype(np.float32)))]), person
    )


def tiny(stage: str, **changes: object) -> TrainingConfig:
    """A configuration that takes milliseconds a step."""
    high = stage == "super-resolution"
    network: dict[str, object] = {
        "patch": 4 if high else 2,
        "channels": (8, 16),
        "blocks": (1, 1),
        "merge": "sum" if high else "concat",
        "edge_kernel": 1 if high else 3,
        "attention_head_channels": 0 if high else 16,
        "low_resolution": high,
        "coordinates": True,
        "gated_output": True,
        "embedding_shift": True,
    }
    base: dict[str, object] = {
        "stage": stage,
        "network": network,
        "noise": {"p_mean": 0.0, "p_std": 1.5, "uniform": 0.3, "sigma_min": 0.01, "sigma_max": 20.0},
        "optimizer": {"lr": 0.02, "ramp_steps": 5, "decay_after": 200},
        "data": {"phases": 2, "patch_shape": (16, 16, 32), "peak_share": 0.5},
        "low_noise": (0.01, 0.02) if high else (0.0, 0.0),
        "batch": 4,
        "steps": 12,
        "seed": 3,
        "precision": "float32",
        "checkpoint_steps": 4,
        "metric_steps": 2,
    }
    return TrainingConfig.model_validate({**base, **changes})
