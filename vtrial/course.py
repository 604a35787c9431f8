"""The course of a training, whatever is trained: its metrics, checkpoints and time budget."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from vtrial.execution import CannotGoOn
from vtrial.storage import whole_file, write_atomic

Line = dict[str, object]
MOST_SKIPPED = 20  # steps in a row: a few come of unlucky batches


class _Plan(Protocol):
    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_steps(self) -> int: ...
    @property
    def metric_steps(self) -> int: ...


class _State(Protocol):
    step: int
    seconds: float


class _Learner(Protocol):
    step: int
    skipped: int


class _Report(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def skipped(self) -> bool: ...


R = TypeVar("R", bound=_Report)


class Journal:
    """Lines of JSON in a file, each of a step; with no `path` they are dropped.

    Lines of steps after `step`, which the checkpoint does not hold, are forgotten: these will be made again.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path = path
        if path is not None and path.exists():
            kept = [text for text in path.read_text().splitlines() if _step_of(text) <= step]
            write_atomic(path, "".join(f"{text}\n" for text in kept).encode())

    def add(self, line: Line) -> None:
        """Append a line."""
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


class Metrics(Generic[R]):
    """Collects the reports of steps and writes a line into `path` (if any) at every multiple of `metric_steps`.

    `describe` makes the line from the reports and the seconds they took; `step` is that of the checkpoint.
    """

    def __init__(
        self, path: Path | None, plan: _Plan, step: int, describe: Callable[[Sequence[R], float], Line]
    ) -> None:
        self._journal, self._plan, self._describe = Journal(path, step), plan, describe
        self._reports: list[R] = []
        self._since = time.perf_counter()

    def add(self, report: R) -> Line | None:
        """Take a report; the line where one is due."""
        self._reports.append(report)
        due = report.step % self._plan.metric_steps == 0 or report.step >= self._plan.steps
        return self.flush() if due else None

    def flush(self) -> Line | None:
        """The line of what was reported since the last one; None where that is nothing."""
        if not self._reports:
            return None
        line = self._describe(self._reports, time.perf_counter() - self._since)
        self._journal.add(line)
        self._reports, self._since = [], time.perf_counter()
        return line


def read_lines(path: Path, after: int = 0) -> list[Line]:
    """The lines of a file of metrics of steps past `after`; none where there is no file."""
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if after < _step_of(text) < math.inf]


def _step_of(text: str) -> float:
    try:
        return float(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by an interruption


def follow(
    reports: Iterable[R],
    plan: _Plan,
    state: _State,
    metrics: Metrics[R],
    save: Callable[[], object],
    max_seconds: float | None,
    progress: Callable[[Line], None] | None,
    any_of: Callable[[bool], bool] = bool,
) -> None:
    """Run the steps behind `reports`, which change `state`, to their end or for `max_seconds`; `save` checkpoints.

    A checkpoint that is due is left out where all steps since the last one were skipped: else trainings that skip every
    step would creep on, call by call, and end untrained. When time is up, and at the end, there is one in any case.
    `progress` gets every line of metrics. Where several workers go step in step, `any_of` says whether one of them
    finds that time is up: clocks differ, and all must end with the same step.
    """
    begun, before, saved, learned = time.monotonic(), state.seconds, state.step, False
    for report in reports:
        state.seconds = before + time.monotonic() - begun
        line = metrics.add(report)
        late = max_seconds is not None and any_of(time.monotonic() - begun >= max_seconds)
        if late and line is None:
            line = metrics.flush()
        if line is not None and progress is not None:
            progress(line)
        learned = learned or not report.skipped
        if late or (learned and report.step % plan.checkpoint_steps == 0):
            save()
            saved, learned = state.step, False
        if late:
            break
    if saved != state.step:
        save()


def unless_all_skipped(reports: Iterable[R], state: _Learner, remedy: str) -> Iterator[R]:
    """The reports of steps, as they come; CannotGoOn with a `remedy` where `MOST_SKIPPED` in a row were skipped, or
    all of a shorter training. A `state` that has only skipped steps brings them along."""
    last = state.step
    skipped = last if state.skipped == last else 0
    for report in reports:
        yield report
        skipped, last = skipped + 1 if report.skipped else 0, report.step
        if skipped >= MOST_SKIPPED:
            break
    if skipped >= MOST_SKIPPED or 0 < skipped == last:
        told = f"step {last}: the last {skipped} steps were skipped, as their gradients were not finite"
        raise CannotGoOn(f"{told}; {remedy}")


def save_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a state as torch saves it, whole or not at all. OSError if it cannot be."""
    with whole_file(path) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's word for bytes that were not taken
            raise OSError(errno.ENOSPC, "no more could be written", stream.name) from error
