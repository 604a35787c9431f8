"""Forks of a process that runs Ray, which SIGTERM ends all the same.

nnU-Net's own path ends its pools of forked processes with SIGTERM. Of Ray they inherit a handler that takes locks,
which may be held for ever in a fork: such a pool was seen to hang. So forks made here begin with the usual action.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Here(threading.local):
    """What this thread's next fork is to do. `mask` is what was held back before a fork that is on its way."""

    plain = False
    mask: set[int | signal.Signals] | None = None


_here = _Here()


@contextmanager
def forks_end_plainly() -> Iterator[None]:
    """A context in which processes forked by this thread have the usual action for SIGTERM."""
    before, _here.plain = _here.plain, True
    try:
        yield
    finally:
        _here.plain = before


def _hold() -> None:
    # until the fork has its own action, so that none comes before
    if _here.plain:
        _here.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    if _here.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _here.mask)
        _here.mask = None


def _begin() -> None:
    if _here.mask is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_begin)
