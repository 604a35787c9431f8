"""Training on Ray Train: workers train their shares in step, and when one dies all begin again from the checkpoint.

The checkpoint is the file that a training without Ray writes, in a folder that all machines see: one format, whoever
goes on with it. Ray is told the step after each, and replaces the workers that die.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train as _train
import ray.train.torch as _train_torch
import torch

from vtrial.cluster.executor import RayExecutor
from vtrial.course import Line, read_lines
from vtrial.execution import MAX_ATTEMPTS, CannotGoOn, Resources
from vtrial.training import Job, Share, held, saved_step
from vtrial.training.checkpoint import TrainingState
from vtrial.training.fitting import METRICS
from vtrial.training.watch import VALIDATION

ray_train: Any = _train  # typed in part only
ray_torch: Any = _train_torch

POLL_S = 0.5  # how often the driver looks for metrics, and Ray for dead workers (2 s by default)


def train_on_ray(executor: RayExecutor, job: Job, progress: Callable[[Line], None]) -> None:
    """Do `job` with the workers of `executor`, which is stopped afterwards; `progress` gets every line of metrics.

    A dead worker is replaced, and all go on from the last checkpoint. CannotGoOn where workers die `MAX_ATTEMPTS` times
    without a checkpoint between, or Ray does not start; InputError if it cannot give what was asked for, the job is
    not sound, or another training is at work in its folder.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    files = job.out / ".ray" / uuid.uuid4().hex[:8]
    job.check(progress)
    if saved_step(job.out) >= job.config.steps:
        return
    with held(job.out):
        try:
            resources = executor.start()
            told = _Told(job, progress, executor.say)
            while True:
                before = saved_step(job.out)
                cause = _fit(_trainer(executor, resources, job, files), told)
                if cause is None:
                    return
                if saved_step(job.out) <= before:
                    raise CannotGoOn(f"workers die before they reach the next checkpoint: {cause}")
        finally:
            executor.stop()
            shutil.rmtree(files.parent, ignore_errors=True)


def _trainer(executor: RayExecutor, resources: Resources, job: Job, files: Path) -> Any:
    """`files` is where Ray leaves what it wants to remember; it finds out whether all workers see that folder."""
    # two workers on one GPU cannot talk by NCCL
    whole_gpus = resources.gpus >= 1.0
    return ray_torch.TorchTrainer(
        _train_share,
        train_loop_config={"job": job, "threads": resources.threads},
        torch_config=ray_torch.TorchConfig(backend="nccl" if whole_gpus else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": executor.cpus} | ({"GPU": resources.gpus} if resources.gpus else {}),
        ),
        run_config=ray_train.RunConfig(
            name=files.name,
            storage_path=str(files.parent),
            failure_config=ray_train.FailureConfig(max_failures=MAX_ATTEMPTS - 1),
        ),
    )


def _train_share(told: dict[str, Any]) -> None:
    """What each worker does, at its start and whenever the workers begin again."""
    torch.set_num_threads(told["threads"])
    context = ray_train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size(), ray_torch.get_device())

    def heard(state: TrainingState) -> None:
        ray_train.report({"step": state.step, "skipped": state.skipped})

    told["job"].run(share, saved=heard)


def _fit(trainer: Any, told: _Told) -> str | None:
    """Train to the end, telling of it meanwhile; what went wrong, if it did.

    Ray waits in a thread: it would catch the interrupts of the main one, which are to end the command.
    """
    causes: list[str | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            causes.append(None)
        except Exception as error:  # Ray's own, and what it could not start with
            causes.append(_cause(error))

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        told.look()
    return causes[0]


class _Told:
    """Tells each line of metrics and validation once, as it appears, and that workers were replaced."""

    def __init__(self, job: Job, progress: Callable[[Line], None], say: Callable[[str], None]) -> None:
        self._progress, self._say = progress, say
        self._told = dict.fromkeys((job.out / METRICS, job.out / VALIDATION), saved_step(job.out))
        self._stamps: dict[Path, int] = {}
        self._begun: object = None

    def look(self) -> None:
        for file, told in self._told.items():
            stamp = file.stat().st_mtime_ns if file.exists() else 0
            if stamp == self._stamps.get(file, 0):
                continue
            self._stamps[file] = stamp
            for line in read_lines(file, after=told):
                self._told[file] = int(str(line["step"]))
                if line.get("begun", self._begun) not in (None, self._begun):
                    if self._begun is not None:
                        self._say(f"A worker died and was replaced; training went on from step {line['begun']}")
                    self._begun = line["begun"]
                self._progress(line)


def _cause(error: Exception) -> str:
    """The telling line of each worker's failure, except that another one is gone."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {0: error}
    ends = [str(failure).strip().splitlines()[-1] for failure in failures.values()]
    first = [end for end in ends if not re.search(r"[Cc]onnection|closed by peer|NCCL", end)]
    return "; ".join(sorted(set(first or ends)))
