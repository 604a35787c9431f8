"""What is looked at and kept while a network is trained: its error on people held out, pictures, snapshots.

Nothing here changes the training: examples, noise levels and noise are the same each time, so that values compare.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vtrial.course import Journal, Line
from vtrial.diffusion.sampler import SamplerConfig, sample
from vtrial.precision import usual_dtype
from vtrial.storage import write_atomic
from vtrial.training.batches import Batch, make_batch
from vtrial.training.checkpoint import TrainingState
from vtrial.training.config import TrainingConfig
from vtrial.training.data import StoredVolumes, VolumeSource
from vtrial.training.loop import noise_of
from vtrial.training.share import Share
from vtrial.training.snapshots import save_snapshot
from vtrial.training.stream import PhantomStream

VALIDATION, SAMPLES = "validation.jsonl", "samples"
FIXED_STEP = 0  # training begins with step 1, so nobody is trained on the examples of this one
HELD_OUT, LEVELS = 8, 8
PICTURED = 3
PICTURE_STEPS = 24


def held_out(data: Path, config: TrainingConfig) -> StoredVolumes | None:
    """The people of the split "validation"; None where a set has none, or is an endless stream."""
    if not data.is_dir() or not StoredVolumes.has(data, "validation"):
        return None
    source = StoredVolumes(data, phases=config.data.phases, seed=config.seed, split="validation")
    return source if source.has_whole or config.stage != "super-resolution" else None


class Watch:
    """Looks at a state after each step of one worker's share; `tell` gets what was found."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        source: VolumeSource,
        apart: VolumeSource | None,
        step: int,
        share: Share,
        tell: Callable[[Line], None],
    ) -> None:
        self._config, self._folder, self._share, self._tell = config, folder, share, tell
        self._apart = apart
        self._pictured = source if apart is None else apart
        if isinstance(source, PhantomStream) and share.leads and config.watch.sample_steps:
            self._pictured = replace(source)  # that one moves on, in the thread that prepares the next batch
        self._journal = Journal(folder / VALIDATION if share.leads else None, step)

    def look(self, state: TrainingState) -> None:
        """What is due after this step; all workers must call it, as they measure together."""
        watch = self._config.watch
        if self._apart is not None and _due(state.step, watch.validate_steps):
            line = {"step": state.step, **measure(self._config, self._apart, state, self._share)}
            self._journal.add(line)
            self._tell(line)
        if self._share.leads and _due(state.step, watch.sample_steps):
            picture = draw(self._config, self._pictured, state)
            write_atomic(self._folder / SAMPLES / f"{state.step:08d}.png", picture)
        if self._share.leads and _due(state.step, watch.snapshot_steps):
            save_snapshot(self._folder, state)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
@torch.no_grad()
def averaged_weights(state: TrainingState) -> Iterator[None]:
    """The shortest average in place of the weights, as a model would have it."""
    average = state.ema.averages[min(state.ema.averages)]
    parameters = state.parameters()
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        for name, value in parameters.items():
            value.copy_(average[name])
        yield
    finally:
        for name, value in parameters.items():
            value.copy_(kept[name])


@torch.no_grad()
def measure(config: TrainingConfig, source: VolumeSource, state: TrainingState, share: Share) -> Line:
    """The error of the averaged weights on `HELD_OUT` examples at `LEVELS` levels of noise, equal parts of those
    trained on: their mean, and the mean at each level."""
    sigmas = config.noise.draw(32 * LEVELS, torch.Generator().manual_seed(config.seed)).sort().values[16::32]
    errors = torch.zeros(LEVELS, HELD_OUT, device=state.device)
    dtype = usual_dtype(state.device, config.precision)
    mine = share.of(HELD_OUT)
    with averaged_weights(state):
        for i in mine:
            example = make_batch(config, source, FIXED_STEP, range(i, i + 1)).part(0, 1, state.device)
            clean = state.stage.encode(example.target)
            for level, sigma in enumerate(sigmas.to(state.device)):
                noise = noise_of(config, FIXED_STEP, LEVELS * i + level, clean[0])[None]
                _, error = state.denoiser.loss(clean, sigma[None], noise, example.conditions(state.stage), dtype)
                errors[level, i] = error[0]
    share.add_up([errors])
    by_level = {f"{s:.3g}": round(e, 5) for s, e in zip(sigmas.tolist(), errors.mean(1).tolist(), strict=True)}
    return {"validation_error": float(errors.mean()), "validation_error_by_sigma": by_level}


@torch.no_grad()
def draw(config: TrainingConfig, source: VolumeSource, state: TrainingState) -> bytes:
    """A PNG of what the averaged weights make: a row for each of `PICTURED` examples.

    In it coronal slices of CT and PET in model space, first as they are and then as they were sampled: stage 1 from the
    demographics alone, its expert from the example at the noise where it takes over, stage 2 from the low resolution.
    """
    batch = make_batch(config, source, FIXED_STEP, range(PICTURED))
    rows = []
    with averaged_weights(state):
        for i in range(PICTURED):
            example = batch.part(i, 1, state.device)
            made = _sampled(config, state, example, i)
            low = 0.0 if example.upsampled is None else example.upsampled
            rows.append(np.concatenate([_coronal((v + low)[0].cpu().numpy()) for v in (example.target, made)], axis=1))
    picture = Image.fromarray(np.concatenate(rows))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _sampled(config: TrainingConfig, state: TrainingState, example: Batch, i: int) -> torch.Tensor:
    stage, dtype = state.stage, usual_dtype(state.device, config.precision)
    clean = stage.encode(example.target)
    noise = noise_of(config, FIXED_STEP, i, clean[0])[None]
    shape = (clean.shape[2], clean.shape[3], clean.shape[4])
    prepared = state.denoiser.network.prepare(example.conditions(stage), shape, dtype)
    highest = config.noise.sigma_max
    if stage.stage == "global-detail":
        highest /= 2.0  # as a model samples it
        noise = noise + clean / highest
    sampler = SamplerConfig(steps=PICTURE_STEPS, sigma_min=config.noise.sigma_min, sigma_max=highest)

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        out: torch.Tensor = state.denoiser(x, x.new_full((1,), sigma), prepared, dtype)
        return out

    *_, made = sample(denoise, noise, sampler)
    return stage.decode(made)


def _coronal(pair: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The middle coronal slices of CT and PET (2, x, y, z) side by side as grey, head up, the PET's dark where hot."""
    ct, pet = pair[:, :, pair.shape[2] // 2]
    grey = np.concatenate([ct, 1.0 - pet])[::-1, ::-1].T
    return (np.ascontiguousarray(grey).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
