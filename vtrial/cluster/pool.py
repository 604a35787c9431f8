"""A pool of actors, each with the model in memory, fed by the driver.

Volumes never travel: an actor writes its files and returns a row. The driver gives an actor one subject to make at a
time; while that one's files are being compressed and written, the next is made. Whoever is aboard when an actor dies
has used up an attempt and is tried again alone, so a subject that kills its worker cannot use up its neighbour's
attempts. A dead actor is replaced by a new one (`max_restarts=0`: a restarting actor refuses calls for a while, and
that would look like another death).
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vtrial.cluster.session import RayError, ray
from vtrial.execution import Attempt, CannotGoOn, Reply, Resources, Saved, Work, WorkFactory, attempt

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


class Pool:
    """`size` actors at work on items; `say` is told when none starts."""

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
        """End the actors."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def work_through(self, items: Sequence[Any]) -> Iterator[Attempt]:
        """Every attempt at every item, as they end; CannotGoOn if the run must stop."""
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
