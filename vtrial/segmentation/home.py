"""A home folder for TotalSegmentator, one for each worker: it rewrites its `config.json` at every call, without a lock.

Homes of one session lie in one folder, which the driver removes at the end: workers are ended by a signal and cannot.
What killed drivers and other machines leave is swept by the next worker there: a session at work is locked by those in
it, and the lock goes with them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vtrial.segmentation.official import HOME_VARIABLE, WEIGHTS_VARIABLE

_PREFIX, _LOCK = "vtrial-segment-", "lock"
_YOUNG_S = 600.0  # a session may be made and not yet locked
# What TotalSegmentator and nnU-Net read or write in the environment.
_MODELS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_THREADS = "nnUNet_def_n_proc"  # read once, when nnU-Net is imported
_VARIABLES = (HOME_VARIABLE, WEIGHTS_VARIABLE, *_MODELS, _THREADS)


def sessions_folder() -> Path:
    """Where sessions are on this machine."""
    return Path(tempfile.gettempdir())


def new_session() -> str:
    """A name for the homes of one session."""
    return f"{_PREFIX}{uuid.uuid4().hex[:12]}"


def end_session(session: str) -> None:
    """Remove the homes of a session on this machine."""
    shutil.rmtree(sessions_folder() / session, ignore_errors=True)


def sweep_sessions() -> None:
    """Remove the sessions on this machine in which nobody is at work any more."""
    for folder in sessions_folder().glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Home:
    """A worker's home folder, for weights in the folder `weights`. The open `lock` keeps it from being swept."""

    folder: Path
    weights: Path
    threads: int
    lock: IO[str]

    @contextmanager
    def entered(self) -> Iterator[Path]:
        """Let TotalSegmentator and nnU-Net live here, and put the environment back afterwards."""
        before = {name: os.environ.get(name) for name in _VARIABLES}
        weights = str(self.weights)
        os.environ.update({HOME_VARIABLE: str(self.folder), WEIGHTS_VARIABLE: weights, _THREADS: str(self.threads)})
        os.environ.update(dict.fromkeys(_MODELS, weights))
        try:
            yield self.folder
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    @contextmanager
    def temporary_files(self) -> Iterator[None]:
        """Have temporary volumes here, so that those of a worker that is killed go with its home.

        Not for code that starts processes: `multiprocessing` keeps the place for good and wants its name short.
        """
        before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def make_home(session: str, weights: Path, threads: int) -> Home:
    """A home in a session, with a configuration that reports nothing to anyone."""
    sweep_sessions()
    root = sessions_folder() / session
    root.mkdir(mode=0o700, exist_ok=True)
    lock = (root / _LOCK).open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    folder = Path(tempfile.mkdtemp(dir=root, prefix="home-"))
    config = {
        "totalseg_id": "vtrial",
        "send_usage_stats": False,
        "prediction_counter": 0,
        "statistics_disclaimer_shown": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    home = Home(folder, weights, threads, lock)
    weakref.finalize(home, lock.close)
    return home
