"""The folder of a training: one training at a time, and a disk that takes no more is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtrial.execution import CannotGoOn
from vtrial.storage import open_folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder to train in, made, locked and swept of what a killed training, or worker, left; InputError where it
    cannot be written or another training is at work."""
    place = open_folder(folder)
    place.create()
    with place.lock():
        place.sweep("")
        try:
            yield
            place.sweep("")
        finally:
            place.discard()


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits while another process does what is done in turn in `folder`, which is made."""
    place = open_folder(folder)
    place.create()
    with place.lock(wait=True):
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a write into `folder` that fails, of a full disk for one, into CannotGoOn."""
    try:
        yield
    except OSError as error:
        raise CannotGoOn(
            f"{folder}: {error.strerror or error}; the last checkpoint is safe: the same command goes on"
        ) from None
