"""The training loop: a generator of steps. What is kept of them, and when, is `fitting`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtrial.course import unless_all_skipped
from vtrial.precision import usual_dtype
from vtrial.training.batches import Batch, batches
from vtrial.training.checkpoint import TrainingState
from vtrial.training.config import TrainingConfig
from vtrial.training.data import VolumeSource
from vtrial.training.share import Share

NARROW = 2


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: `loss` is what was minimised, `errors` the plain weighted errors at `sigmas`, per example.

    All of the whole batch, the same at every worker.
    """

    step: int
    loss: float
    sigmas: tuple[float, ...]
    errors: tuple[float, ...]
    skipped: bool


@dataclass(frozen=True)
class Gradients:
    """What a batch asks for: gradients in the parameters, the mean loss (0-d), noise levels and errors (b,)."""

    loss: Tensor
    sigmas: Tensor
    errors: Tensor


def steps(
    config: TrainingConfig,
    source: VolumeSource,
    state: TrainingState,
    last: int | None = None,
    share: Share | None = None,
) -> Iterator[StepReport]:
    """Train `state` in place from its step to `last` (config.steps by default), yielding after each step.

    Several workers, each with its `share`, all take the steps that one would take alone with the same batches.
    CannotGoOn where too many in a row were skipped (`vtrial.course.unless_all_skipped`).
    """
    share = share or Share(device=state.device)
    todo = batches(config, source, state.step + 1, last or config.steps, share)
    remedy = 'look for volumes with values that are not, lower optimizer.lr, or set precision = "float32"'
    return unless_all_skipped((_step(config, state, batch, share) for batch in todo), state, remedy)


def _step(config: TrainingConfig, state: TrainingState, batch: Batch | None, share: Share) -> StepReport:
    state.step += 1
    found = learn(config, state, batch, share)
    share.add_up([*_gradients(state, share), found.loss, found.errors])
    # every worker looks at the same sums, so all make the step or none does
    finite = math.isfinite(float(found.loss)) and _finite(_gradients(state, share))
    if finite:
        update(config, state)
    else:
        state.skipped += 1
    sigmas, errors = tuple(found.sigmas.tolist()), tuple(found.errors.tolist())
    return StepReport(state.step, float(found.loss), sigmas, errors, skipped=not finite)


def learn(config: TrainingConfig, state: TrainingState, batch: Batch | None, share: Share) -> Gradients:
    """The part of the gradients, the loss and the errors of a step's batch that comes from this worker's examples."""
    count, device = config.examples(state.step), state.device
    mine = share.of(count)
    sigmas = config.noise.draw(count, torch.Generator(device).manual_seed(config.seed * 1_000_003 + state.step))
    loss, errors = torch.zeros([], device=device), torch.zeros(count, device=device)
    state.optimizer.zero_grad()
    for first in mine[:: config.microbatch or count]:
        if batch is None:
            break
        last = min(first + (config.microbatch or count), mine.stop)
        part = batch.part(first - mine.start, last - first, device)
        clean = state.stage.encode(part.target)
        noise = torch.stack([noise_of(config, state.step, i, clean[0]) for i in range(first, last)])
        noise = noise.contiguous(memory_format=torch.channels_last_3d)
        mean, errors[first:last] = state.denoiser.loss(
            clean,
            sigmas[first:last],
            noise,
            part.conditions(state.stage),
            dtype_for(config, clean),
            config.emphasis,
        )
        weighted = mean * ((last - first) / count)
        weighted.backward()  # type: ignore[no-untyped-call]
        loss += weighted.detach()
    return Gradients(loss, sigmas, errors)


def dtype_for(config: TrainingConfig, grid: Tensor) -> torch.dtype:
    """What a grid (b, 2p³, x/p, y/p, z/p) is trained on in: the precision asked for, but float32 where that is wrong or
    the device has no kernels for it.

    Where its coarsest level is 2 wide along x, oneDNN's bfloat16 gradients of kernels are garbage (torch 2.13 on CPUs;
    other widths, other axes and the forward pass are right).
    """
    halvings = config.network.divisor // config.network.patch
    narrow = grid.device.type == "cpu" and grid.shape[2] // halvings <= NARROW
    return torch.float32 if narrow else usual_dtype(grid.device, config.precision)


def noise_of(config: TrainingConfig, step: int, example: int, like: Tensor) -> Tensor:
    """White noise of an example: it depends on nothing else, so neither parts nor workers change it."""
    seed = int(np.random.SeedSequence([config.seed, step, example]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randn(like.shape, generator=torch.Generator(like.device).manual_seed(seed), device=like.device)


def update(config: TrainingConfig, state: TrainingState) -> None:
    """Move the weights along the gradients, and their averages after them."""
    rate = config.optimizer.rate(state.step, config.steps)
    state.optimizer.set_rates(rate, rate * (config.optimizer.matrix_lr or 0.0) / config.optimizer.lr)
    state.optimizer.step()
    state.denoiser.normalize_()
    state.ema.update(state.parameters(), state.step - state.skipped)


def _gradients(state: TrainingState, share: Share) -> list[Tensor]:
    """Those there are; with several workers all, as the sums must be of the same tensors everywhere."""
    if share.world > 1:
        for p in filter(lambda p: p.requires_grad, state.denoiser.parameters()):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [p.grad for p in state.denoiser.parameters() if p.grad is not None]


def _finite(gradients: list[Tensor]) -> bool:
    norms: list[Tensor] = list(torch._foreach_norm(gradients))
    return bool(torch.isfinite(torch.stack(norms)).all())
