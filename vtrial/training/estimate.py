"""What a training will take, told before it is begun: operations, memory, and time at the speed of this machine.

Operations and memory are counted on tensors without content, so that is quick for any network. Time is
measured: a step or two of one microbatch, or of as much of it as is seconds of work here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vtrial.diffusion.denoiser import Denoiser, Scaling, StageConfig
from vtrial.memory import total_memory_bytes
from vtrial.precision import usual_dtype
from vtrial.training.batches import Batch, make_batch
from vtrial.training.checkpoint import by_muon, new_state
from vtrial.training.config import TrainingConfig
from vtrial.training.data import StoredVolumes, VolumeSource
from vtrial.training.loop import learn, update
from vtrial.training.share import Share

META = torch.device("meta")
TIMED_FLOPS = 5e11  # on a CPU as many examples are timed as have so many, and one at least
PATIENCE_S = 20.0  # where the first pass takes longer, there is no second


@dataclass(frozen=True)
class Memory:
    """Bytes at each worker, besides those of Python and of what kernels work in.

    `activations` are what one microbatch takes at most, forwards and backwards, `batches` the worker's part of this
    step's and the next's, `volumes` the stored subvolumes when as many have been met as are kept, `exchange` is what
    gradients are summed in.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    exchange: int
    activations: int
    batches: int
    volumes: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    @property
    def on_device(self) -> int:
        """The part that is on the GPU, where there is one."""
        return self.total - self.batches - self.volumes


@dataclass(frozen=True)
class Seconds:
    """Of one step: gradients, the move along them, and meanwhile the next batch."""

    learning: float
    update: float
    batch: float

    @property
    def step(self) -> float:
        """What is waited for."""
        return max(self.learning + self.update, self.batch)


@dataclass(frozen=True)
class Estimate:
    """`flops` are those of all workers in a step, forwards and backwards; `memory` is that of each.

    `seconds` are of a step, on workers each as fast as `device`, and `seconds_left` of all that are left: None where
    the memory is too small to measure.
    """

    parameters: int
    flops: int
    memory: Memory
    device: str
    timed_examples: int
    seconds: Seconds | None
    steps_left: int
    seconds_left: float | None


def estimate(config: TrainingConfig, source: VolumeSource, done: int, workers: int, device: torch.device) -> Estimate:
    """What the steps after `done` take with so many workers; nothing is written."""
    # whatever the scalings are: nothing that is asked here depends on them
    stage = config.stage_config(Scaling(), Scaling(), (0.5,) * config.network.grid_channels if config.bands else ())
    share = Share(0, workers, device)
    kinds = _kinds(config, done)
    costs = [_cost(config, source, stage, step, share) for step, _ in kinds]
    memory = _memory(config, source, stage, costs, share)
    fits = memory.on_device - memory.activations + max(c.learning(c.timed) for c in costs) < _room(device)
    seconds = [_timed(config, source, stage, cost, device) for cost in costs] if fits else []
    return Estimate(
        parameters=_parameters(stage),
        flops=costs[0].flops * config.examples(costs[0].step),
        memory=memory,
        device=_named(device),
        timed_examples=costs[0].timed if fits else 0,
        seconds=seconds[0] if fits else None,
        steps_left=max(config.steps - done, 0),
        seconds_left=sum(s.step * count for s, (_, count) in zip(seconds, kinds, strict=True)) if fits else None,
    )


def _kinds(config: TrainingConfig, done: int) -> list[tuple[int, int]]:
    """(a step, how many like it are left): an expert ends on whole volumes."""
    first, after = done + 1, config.data.whole_after
    if config.stage == "global-detail" and after is not None and done < after < config.steps:
        return [(first, after - done), (after + 1, config.steps - after)]
    return [(first, max(config.steps - done, 0))]


@dataclass(frozen=True)
class _Cost:
    """Of a step's examples, `mine` at a worker, `part` of them at once: operations, bytes in a batch, and bytes that
    learning takes (`fixed` ones for any number)."""

    step: int
    mine: int
    part: int
    flops: int
    example_bytes: int
    learning_bytes: int
    fixed_bytes: int
    whole_bytes: int
    """Of the whole volume, in float16."""
    timed: int
    """Examples to time."""

    def learning(self, count: int) -> int:
        """Bytes that learning from `count` examples takes."""
        return self.fixed_bytes + count * self.learning_bytes


def _cost(config: TrainingConfig, source: VolumeSource, stage: StageConfig, step: int, share: Share) -> _Cost:
    example = make_batch(config, source, step, range(1))
    dtype = usual_dtype(share.device, config.precision)
    flops, one = _counted(dtype, stage, example, 1)
    _, two = _counted(dtype, stage, example, 2)
    mine = -(-config.examples(step) // share.world)
    part = min(config.microbatch or mine, mine)
    tensors = [example.target, *([] if example.upsampled is None else [example.upsampled])]
    return _Cost(
        step,
        mine,
        part,
        flops,
        example_bytes=sum(t.nbytes for t in tensors),
        learning_bytes=two - one,
        fixed_bytes=2 * one - two,
        whole_bytes=2 * example.target.shape[1] * math.prod(example.whole),
        timed=part if share.device.type == "cuda" else max(1, min(part, int(TIMED_FLOPS / flops))),
    )


def _counted(dtype: torch.dtype, stage: StageConfig, example: Batch, count: int) -> tuple[int, int]:
    """Operations, and the most bytes at once, of `count` examples like this one."""
    with META:
        denoiser = Denoiser(stage)
    for p in denoiser.parameters():
        p.grad = torch.zeros_like(p)
    low = None if example.upsampled is None else example.upsampled.to(META).repeat(count, 1, 1, 1, 1)
    batch = Batch(
        example.target.to(META).repeat(count, 1, 1, 1, 1),
        example.vector.to(META).repeat(count, 1),
        low,
        example.origins * count,
        example.whole,
    )
    clean = stage.encode(batch.target)
    sigma = torch.ones(count, device=META)
    known = [t for p in denoiser.parameters() for t in (p, p.grad) if t is not None]
    with FlopCounterMode(display=False) as counter, _Peak(known) as peak:
        conditions = batch.conditions(stage)
        loss, _ = denoiser.loss(clean, sigma, torch.empty_like(clean), conditions, dtype)
        loss.backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops(), peak.most


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors that come and go: `most` is the greatest number of bytes at once, beside those `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_storage(tensor) for tensor in known}
        self._alive: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self._known:
                self._alive[_storage(tensor)] = tensor.untyped_storage().nbytes()
        gone = [storage for storage in self._alive if storage.expired()]  # type: ignore[no-untyped-call]
        for storage in gone:
            del self._alive[storage]
        self.most = max(self.most, sum(self._alive.values()))
        return out


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _parameters(stage: StageConfig, which: Callable[[Denoiser], Callable[[nn.Parameter], bool]] | None = None) -> int:
    with META:
        denoiser = Denoiser(stage)
        chosen = which(denoiser) if which else lambda _: True
        return sum(p.numel() for p in denoiser.parameters() if chosen(p))


def _memory(
    config: TrainingConfig, source: VolumeSource, stage: StageConfig, costs: list[_Cost], share: Share
) -> Memory:
    parameters = _parameters(stage)
    matrices = _parameters(stage, partial(by_muon, config))
    volumes = 0
    if isinstance(source, StoredVolumes) and config.stage != "super-resolution":
        volumes = min(len(source.ids) * config.data.phases * costs[0].whole_bytes, source.memory)
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=4 * (matrices + 2 * (parameters - matrices)),
        averages=4 * parameters * len(config.ema),
        exchange=4 * parameters if share.world > 1 else 0,
        activations=max(cost.learning(cost.part) for cost in costs),
        batches=2 * max(cost.mine * cost.example_bytes for cost in costs),
        volumes=volumes,
    )


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_memory_bytes()


def _timed(
    config: TrainingConfig, source: VolumeSource, stage: StageConfig, cost: _Cost, device: torch.device
) -> Seconds:
    """Of a step, from some of its examples; batches as they are made once their volumes have been met."""
    trial = config.model_copy(update={"batch": cost.timed, "microbatch": None})
    state = new_state(config, stage, source.support, device)
    state.step = cost.step
    batch = make_batch(trial, source, cost.step)
    making = _clocked(device, lambda: make_batch(trial, source, cost.step))

    def once() -> None:
        learn(trial, state, batch, Share(device=device))

    learning = _clocked(device, once)
    if learning < PATIENCE_S:
        learning = _clocked(device, once)
    _clocked(device, lambda: update(config, state))
    scale = cost.mine / cost.timed
    return Seconds(scale * learning, _clocked(device, lambda: update(config, state)), scale * making)


def _clocked(device: torch.device, action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
