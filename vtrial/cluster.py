"""Ray, and nothing else here imports it: a pool of actors, each with the model in memory, fed by the driver.

Volumes never travel: an actor writes its files and returns a row. The driver gives an actor one subject to make at a
time; while that one's files are being compressed and written, the next is made. Whoever is aboard when an actor dies
has used up an attempt and is tried again alone, so a subject that kills its worker cannot use up its neighbour's
attempts. A dead actor is replaced by a new one (`max_restarts=0`: a restarting actor refuses calls for a while, and
that would look like another death).
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vtrial.execution import (
    MAX_ATTEMPTS,
    Attempt,
    CannotGoOn,
    Reply,
    Resources,
    Saved,
    Work,
    WorkFactory,
    attempt,
    cpu_count,
    gpu_shares,
    threads_that_fit,
)
from vtrial.records import InputError

# Before ray is imported. No usage reports; no second environment in the workers under `uv run` (it copies the folder
# and breaks relative paths); an actor without GPUs must not see any.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray as _ray
from ray.exceptions import RayError

ray: Any = _ray  # typed in part only

OBJECT_STORE_BYTES = 128 * 2**20  # rows only; Ray's default is 30 % of the memory
PATIENCE_S = 60.0  # without any worker, before saying so
MAX_BARREN_DEATHS = 3  # workers in a row that die while loading, before the run is stopped


class Worker:
    """The actor: one thread makes, another saves. Errors come back as values; only a death is an exception."""

    def __init__(self, factory: WorkFactory, resources: Resources) -> None:
        self._factory = factory
        self._resources = resources
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="make")  # torch keeps its thread pool per caller
        self._work: Work | None = None
        self._products: dict[int, Any] = {}

    def load(self) -> Reply:
        """Build the work; every failure here is fatal, as each subject would meet it."""

        def build() -> None:
            self._work = self._factory(self._resources)

        reply = self._maker.submit(attempt, build).result()
        return Reply(fatal=f"the worker could not start: {reply.error}") if reply.error else reply

    def make(self, ticket: int, item: Any) -> Reply:
        """Make an item and keep the product here under `ticket`."""
        assert self._work is not None
        reply = self._maker.submit(attempt, self._work.make, item).result()
        if not reply.error and not reply.fatal:
            self._products[ticket] = reply.value
        return Reply(error=reply.error, fatal=reply.fatal, seconds=reply.seconds)

    def save(self, ticket: int, item: Any) -> Reply:
        """Save the product of `ticket` and give its row."""
        assert self._work is not None
        return attempt(self._work.save, item, self._products.pop(ticket))


@dataclass(eq=False)
class _Task:
    item: Any
    ticket: int
    attempts: int = 0  # begun
    seconds: float = 0.0


@dataclass(eq=False)
class _Slot:
    """A place in the pool and the actor in it now."""

    actor: Any
    loaded: bool = False
    making: _Task | None = None
    saving: list[_Task] = field(default_factory=list)

    def may_make(self, task: _Task) -> bool:
        """Whether the actor is free to make `task`: a subject tried before is alone aboard."""
        if not self.loaded or self.making is not None or len(self.saving) > 1:
            return False
        return not self.saving or (task.attempts == 0 and self.saving[0].attempts == 1)


@dataclass
class RayExecutor:
    """A pool of actors on this machine or on the cluster at `address`.

    Without `workers` there is one for every GPU share, or one for every machine where there is no GPU. The CPU threads
    are shared out as evenly as the machines allow unless `threads` says otherwise. `say` is told when Ray starts.
    """

    workers: int | None = None
    threads: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None
    say: Callable[[str], None] = lambda text: None
    name: str = "ray"
    _started_here: bool = field(default=False, init=False)
    _resources: Resources | None = field(default=None, init=False)
    _cpus: int = field(default=1, init=False)  # a worker's, as Ray counts them

    def start(self) -> Resources:
        """Start Ray here or join the cluster; InputError if it cannot give what was asked for."""
        if self._resources is not None:
            return self._resources
        self._connect()
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [float(machine.get("GPU", 0)) for machine in machines]
        share = self.gpus_per_worker if self.gpus_per_worker is not None else (1.0 if any(gpus) else 0.0)
        if share > max(gpus, default=0):
            self.stop()
            raise InputError(
                f"--gpus-per-worker {share:g}: no machine has more than {max(gpus, default=0):g} GPUs; "
                "give 0 to work on CPUs"
            )
        cores = [int(machine.get("CPU", 0)) for machine, count in zip(machines, gpus) if count >= share]
        workers = self.workers or (
            sum(gpu_shares(count, share) for count in gpus) if share else sum(c > 0 for c in cores)
        )
        workers = max(1, workers)
        fitting = threads_that_fit(cores, workers)
        threads = self.threads or fitting
        # Threads asked for are given, not counted, so that more of them than there are cores still start.
        self._cpus = min(threads, fitting)
        self._resources = Resources(workers, threads, share, "cuda" if share else "cpu")
        return self._resources

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        # Ray prints a paragraph on stdout for every death of a worker, which we tell in a line.
        if hasattr(ray._private.worker, "print_to_stdstream"):
            ray._private.worker.print_to_stdstream = lambda *unused, **unused_too: None
        address = self.address or os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            self.say(f"Joining the Ray cluster at {address}")
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RayError, RuntimeError, ValueError) as error:
                raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None
            return
        wanted = (self.workers or 1) * (self.threads or 1)
        cores = max(cpu_count(), wanted)
        self.say(f"Starting Ray on this machine with {cpu_count()} CPU cores (a few seconds)")
        self._started_here = True
        try:
            ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        except (OSError, RayError, RuntimeError, ValueError) as error:
            self.stop()
            raise CannotGoOn(
                f"Ray does not start here ({error}); see `vtrial doctor`, or give --executor local"
            ) from None

    def stop(self) -> None:
        """Shut Ray down if it was started here; leave a cluster we joined alone."""
        self._resources = None
        if self._started_here:
            self._started_here = False
            ray.shutdown()

    def run(self, factory: WorkFactory, items: Sequence[Any], max_attempts: int = MAX_ATTEMPTS) -> Generator[Attempt]:
        """Every attempt at every item, as they end; CannotGoOn if the run must stop. Closing it ends the workers."""
        resources = self.start()
        size = min(resources.workers, len(items))
        pool = _Pool(factory, resources, self._cpus, size, max_attempts, self.say)
        try:
            yield from pool.work_through(items)
        finally:
            pool.close()


class _Pool:
    def __init__(
        self,
        factory: WorkFactory,
        resources: Resources,
        cpus: int,
        size: int,
        max_attempts: int,
        say: Callable[[str], None],
    ) -> None:
        actor_class = ray.remote(Worker)
        self._new_actor: Callable[[], Any] = lambda: actor_class.options(
            num_cpus=cpus,
            num_gpus=resources.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=3,  # one make and at most two saves
        ).remote(factory, resources)
        self._size, self._max_attempts, self._say = size, max_attempts, say
        self._slots: list[_Slot] = []
        self._flying: dict[Any, tuple[_Slot, str, _Task | None]] = {}
        self._queue: deque[_Task] = deque()
        self._barren_deaths = 0

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)

    def work_through(self, items: Sequence[Any]) -> Iterator[Attempt]:
        self._queue.extend(_Task(item, ticket) for ticket, item in enumerate(items))
        for _ in range(self._size):
            slot = _Slot(None)
            self._slots.append(slot)
            self._enlist(slot)
        complaint_due = time.monotonic() + PATIENCE_S
        while True:
            self._hand_out()
            if not self._queue and not any(slot.making or slot.saving for slot in self._slots):
                return
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=5.0)
            for reference in ready:
                yield from self._land(reference)
            if time.monotonic() > complaint_due and not any(slot.loaded for slot in self._slots):
                self._say("No worker has started yet; the cluster may have no free CPUs or GPUs. Waiting on")
                complaint_due = math.inf

    def _enlist(self, slot: _Slot) -> None:
        """Put a new actor into a slot; it takes subjects once it has loaded."""
        slot.actor, slot.loaded, slot.making, slot.saving = self._new_actor(), False, None, []
        self._flying[slot.actor.load.remote()] = (slot, "load", None)

    def _hand_out(self) -> None:
        for slot in self._slots:
            if not self._queue or not slot.may_make(self._queue[0]):
                continue
            task = self._queue.popleft()
            task.attempts += 1
            slot.making = task
            self._flying[slot.actor.make.remote(task.ticket, task.item)] = (slot, "make", task)

    def _land(self, reference: Any) -> Iterator[Attempt]:
        flight = self._flying.pop(reference, None)
        if flight is None:  # its actor died a moment ago and took it along
            return
        slot, step, task = flight
        try:
            reply: Reply = ray.get(reference)
        except RayError as error:
            yield from self._bury(slot, error)
            return
        if reply.fatal:
            raise CannotGoOn(reply.fatal)
        if task is None:
            slot.loaded, self._barren_deaths = True, 0
            return
        task.seconds += reply.seconds
        if step == "make":
            slot.making = None
        else:
            slot.saving.remove(task)
        if reply.error:
            yield self._again(task, reply.error)
        elif step == "make":
            slot.saving.append(task)
            self._flying[slot.actor.save.remote(task.ticket, task.item)] = (slot, "save", task)
        else:
            assert isinstance(reply.value, Saved)
            yield Attempt(task.item, task.attempts, task.seconds, saved=reply.value)

    def _bury(self, slot: _Slot, error: RayError) -> Iterator[Attempt]:
        """The actor of a slot is gone: everyone aboard has lost an attempt, and a new actor takes its place."""
        aboard = [*slot.saving, *([slot.making] if slot.making else [])]
        self._flying = {ref: flight for ref, flight in self._flying.items() if flight[0] is not slot}
        ray.kill(slot.actor)  # dead already, or unreachable and not to come back
        if not aboard:
            self._barren_deaths += 1
            if self._barren_deaths >= MAX_BARREN_DEATHS:
                raise CannotGoOn(f"workers die while loading the model ({_cause(error)}); is there enough memory?")
        self._enlist(slot)
        for task in aboard:
            yield self._again(task, f"the worker died ({_cause(error)}): killed, crashed or out of memory")

    def _again(self, task: _Task, error: str) -> Attempt:
        final = task.attempts >= self._max_attempts
        seconds, task.seconds = task.seconds, 0.0
        if not final:
            self._queue.append(task)
        return Attempt(task.item, task.attempts, seconds, error=error, final=final)


def _cause(error: RayError) -> str:
    """The one telling part of Ray's long messages."""
    kind = re.search(r"Worker exit type: (\w+)", str(error))
    return f"{type(error).__name__}, {kind[1]}" if kind else type(error).__name__
