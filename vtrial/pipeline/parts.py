"""Progress of steps that have no subjects: a bar moves with every part, and a line is told every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from vtrial.execution import Attempt, Progress, Report, Saved

Steps = Callable[[str], AbstractContextManager[Report]]  # a progress bar for each step, by its name
EVERY_S = 3.0  # between lines: what is quicker needs none


@dataclass(frozen=True)
class Part:
    """What has been done, in the place of a subject."""

    subject_id: str


@dataclass
class Parts:
    """Counts the parts of a step and tells `report` of them."""

    report: Report
    total: int
    _done: int = 0
    _failed: int = 0
    _told: float = field(default_factory=lambda: time.monotonic())

    def ended(self, name: str, error: str = "") -> None:
        """One more part is done, or could not be."""
        self._failed += bool(error)
        self._done += not error
        since = time.monotonic() - self._told
        attempt = None
        if error or since >= EVERY_S:
            self._told = time.monotonic()
            attempt = Attempt(Part(name), 1, since, None if error else Saved({}), error)
        self.report(Progress(self._done, self._failed, self.total, attempt))


def silent(step: str) -> AbstractContextManager[Report]:
    """Steps that nobody is told of."""
    return nullcontext(lambda progress: None)
