"""Averages of the weights kept on the way, and averages of any other length made of them when training is over."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vtrial.diffusion.ema import Profile, blend, gamma_of
from vtrial.records import InputError
from vtrial.storage import write_atomic
from vtrial.training.checkpoint import CHECKPOINT, TrainingState, read_checkpoint

SNAPSHOTS = "snapshots"
FARTHEST = 0.1  # a profile further off than this is of another length


def save_snapshot(folder: Path, state: TrainingState) -> Path:
    """Store the averages of a state in float16, as <steps taken>.safetensors."""
    taken = state.step - state.skipped
    tensors = {
        f"{length}/{name}": value.half().contiguous()
        for length, average in state.ema.averages.items()
        for name, value in average.items()
    }
    path = folder / SNAPSHOTS / f"{taken:08d}.safetensors"
    write_atomic(path, save(tensors))
    return path


def averaged(folder: Path, length: float) -> tuple[dict[str, Tensor], float]:
    """The average of relative length `length` at the last checkpoint of a run, and the error of its profile.

    Exact (error 0) for a length that was tracked. InputError where the snapshots are too few or too far between.
    """
    content = read_checkpoint(folder / CHECKPOINT)
    tracked: dict[float, dict[str, Tensor]] = {float(k): average for k, average in content["ema"].items()}
    if length in tracked:
        return tracked[length], 0.0
    last = content["step"] - content["skipped"]
    stored = [path for path in sorted((folder / SNAPSHOTS).glob("*.safetensors")) if int(path.stem) < last]
    steps = [*(int(path.stem) for path in stored), last]
    profiles = [Profile(gamma_of(known), step) for step in steps for known in tracked]
    factors, error = blend(profiles, Profile(gamma_of(length), last))
    if error > FARTHEST:
        known = ", ".join(f"{v:g}" for v in sorted(tracked))
        raise InputError(
            f"{folder}: no average of length {length:g}: {known} were kept, and {len(stored)} snapshots do not make it "
            f"(its profile would be {100 * error:.0f} % off); train with watch.snapshot_steps set"
        )
    total = {name: torch.zeros_like(value) for name, value in tracked[min(tracked)].items()}
    for step, row in zip(steps, factors.reshape(len(steps), len(tracked)), strict=True):
        averages = tracked if step == last else _read(folder / SNAPSHOTS / f"{step:08d}.safetensors", list(tracked))
        for factor, average in zip(row, averages.values(), strict=True):
            for name, value in total.items():
                value.add_(average[name].float(), alpha=float(factor))
    return total, error


def _read(path: Path, lengths: list[float]) -> dict[float, dict[str, Tensor]]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable snapshot ({error}); delete it and try again") from None
    return {
        length: {
            name.removeprefix(f"{length}/"): value for name, value in tensors.items() if name.startswith(f"{length}/")
        }
        for length in lengths
    }
