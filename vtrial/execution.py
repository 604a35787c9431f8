"""Many items, each made and saved by a worker, retried a few times: the contract, and the executor without a cluster.

A worker has two steps. `make` computes one item; `save` writes the result and returns its row. On a cluster saving one
item overlaps with making the next. The driver counts the attempts of each item and learns of every one of them.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vtrial.records import InputError

MAX_ATTEMPTS = 3

# What ails the storage and not the item: no other attempt can help, the run stops and can be resumed.
_STORAGE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
}


class CannotGoOn(RuntimeError):
    """The run must stop though the items are sound (full disk, model that does not load, workers that do not start)."""


def end_on_sigterm() -> None:
    """Take SIGTERM, which a batch system sends before it kills, as Ctrl-C: what is made is written down first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@dataclass(frozen=True)
class Resources:
    """What workers have: how many, CPU threads each, GPUs each (a fraction shares one)."""

    workers: int = 1
    threads: int = 1
    gpus: float = 0.0
    device: str = "cpu"  # or "cuda"


@dataclass(frozen=True)
class Saved:
    """What is known of a saved item: its files (name → bytes) and the columns of its row."""

    files: dict[str, int]
    row: dict[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """What a worker does. `make` is called from one thread only, `save` from others meanwhile."""

    def make(self, item: Any, /) -> Any:
        """Compute one item."""

    def save(self, item: Any, product: Any, /) -> Saved:
        """Write the product, whole or not at all."""


WorkFactory = Callable[[Resources], Work]  # called once in every worker; it must pickle


@dataclass(frozen=True)
class Attempt:
    """One attempt at an item: `saved` if it went well, else `error`; `final` says that no other will follow."""

    item: Any
    number: int
    seconds: float
    saved: Saved | None = None
    error: str = ""
    final: bool = True


@dataclass(frozen=True)
class Progress:
    """Where a command stands, and the attempt that has just ended (None at the start)."""

    done: int
    failed: int
    total: int
    latest: Attempt | None = None


Report = Callable[[Progress], None]


class Executor(Protocol):
    """Runs work over items. `start` takes the machines, `stop` gives them back."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    def start(self) -> Resources:
        """Take the machines and say what each worker has; InputError where they lack what was asked for."""

    def run(self, factory: WorkFactory, items: Sequence[Any], max_attempts: int = MAX_ATTEMPTS) -> Generator[Attempt]:
        """Every attempt at every item, as they end; CannotGoOn if the run must stop. Closing it ends the workers."""

    def stop(self) -> None:
        """Give the machines back; safe to call twice."""


@dataclass(frozen=True)
class Reply:
    """How one step ended, as a value: exceptions need not survive a journey between processes."""

    value: Any = None
    error: str = ""
    fatal: str = ""
    seconds: float = 0.0


def attempt(step: Callable[..., Any], *arguments: Any) -> Reply:
    """Call a step and tell how it ended; failures of the storage and bad input are fatal."""
    started = time.perf_counter()
    try:
        return Reply(value=step(*arguments), seconds=time.perf_counter() - started)
    except InputError as error:
        return Reply(fatal=str(error))
    except OSError as error:
        if error.errno in _STORAGE_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            return Reply(fatal=f"{where}cannot write ({error.strerror})")
        return Reply(error=_brief(error), seconds=time.perf_counter() - started)
    except Exception as error:
        return Reply(error=_brief(error), seconds=time.perf_counter() - started)


def _brief(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (line {frame.lineno} of {os.path.basename(frame.filename)})"  # noqa: PTH119


def cpu_count() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_that_fit(cores: Sequence[int], workers: int) -> int:
    """The most threads with which `workers` find room on machines with `cores`; 1 where even that is too many."""
    most = max(cores, default=1)
    return next((t for t in range(most, 0, -1) if sum(count // t for count in cores) >= workers), 1)


def gpu_shares(gpus: float, share: float) -> int:
    """Workers that `gpus` of one machine carry: a fraction shares one GPU, and never lies across two."""
    return int(gpus) * int(1.0 / share + 1e-9) if share < 1.0 else int(gpus // share)


@dataclass(frozen=True)
class LocalExecutor:
    """One worker in this process: for tests, notebooks and debuggers. A crash of the work is a crash of the run."""

    threads: int | None = None
    device: str = "cpu"
    name: str = "local"

    def start(self) -> Resources:
        """All cores of this process unless told otherwise."""
        return Resources(workers=1, threads=self.threads or cpu_count(), device=self.device)

    def stop(self) -> None:
        """Nothing to give back."""

    def run(self, factory: WorkFactory, items: Sequence[Any], max_attempts: int = MAX_ATTEMPTS) -> Generator[Attempt]:
        """Every attempt at every item, in order; nothing overlaps, so each is told as soon as it is saved."""
        loaded = attempt(factory, self.start())
        if loaded.fatal or loaded.error:
            raise CannotGoOn(f"the worker could not start: {loaded.fatal or loaded.error}")
        work: Work = loaded.value
        for item in items:
            for number in range(1, max_attempts + 1):
                made = attempt(work.make, item)
                reply = made if made.error or made.fatal else attempt(work.save, item, made.value)
                if reply.fatal:
                    raise CannotGoOn(reply.fatal)
                seconds = made.seconds if reply is made else made.seconds + reply.seconds
                if not reply.error:
                    yield Attempt(item, number, seconds, saved=reply.value)
                    break
                yield Attempt(item, number, seconds, error=reply.error, final=number == max_attempts)
