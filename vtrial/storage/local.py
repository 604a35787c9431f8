"""Folders of this machine or of a shared file system: whole files or none, journals on the disk, a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vtrial.records import InputError

PART = ".part"  # unfinished files: `.<name>.<random>.part`, beside the file they are to become
LOCK = ".lock"


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine or of a file system that all machines share."""

    location: str

    def path(self, name: str = "") -> Path:
        """Absolute path of a file inside."""
        return Path(self.location) / name

    def create(self) -> None:
        """Make the folder; InputError if that cannot be or nothing can be written there."""
        probe = self.path(f".{uuid.uuid4().hex[:8]}{PART}")
        try:
            self.path().mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            remedy = "free space there, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
            raise InputError(
                f"{self.location}: cannot write there ({error.strerror}); {remedy} another --out"
            ) from None

    def entries(self) -> list[str]:
        """Names directly inside; empty if there is no such folder."""
        return sorted(p.name for p in self.path().iterdir()) if self.path().is_dir() else []

    def size(self, name: str) -> int | None:
        """Size in bytes, None if there is no such file."""
        try:
            return self.path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files under here by name."""
        root, found = self.path(), {}
        for path in root.rglob("*"):
            with suppress(FileNotFoundError):  # a worker that outlives its driver for a moment still renames files
                if path.is_file():
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
        return found

    def discard(self) -> None:
        """Remove the folder if it holds nothing but the lock."""
        if self.entries() == [LOCK]:
            self.path(LOCK).unlink()
            self.path().rmdir()

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        return self.path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing."""
        write_atomic(self.path(name), data)

    def append(self, name: str, line: str) -> None:
        """Add a line to a journal; a torn last line is closed first."""
        path = self.path(name)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            data = (("\n" if torn else "") + line + "\n").encode()
            while data:  # a nearly full disk takes a part and refuses the rest
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lines(self, name: str) -> list[str]:
        """The lines of a journal, a torn one included; empty if there is none."""
        path = self.path(name)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return text.removesuffix("\n").split("\n") if text else []  # not at U+2028 and its like, which entries may hold

    def sweep(self, name: str) -> int:
        """Remove what interrupted writes left under the folder `name`; says how many."""
        left = list(self.path(name).rglob(f".*{PART}"))
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    @contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """A context in which no other driver works here; InputError if one does, unless this is to `wait` for it.

        The lock is the operating system's (flock): it dies with its process, so none is ever stale.
        """
        with self.path(LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise InputError(
                    f"{self.location}: another vtrial (process {holder}) works in this folder; wait for it or stop it"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
            with suppress(OSError):  # a full disk: the number is for people, the lock holds without it
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield


@contextmanager
def whole_file(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A stream into `path`, there whole or not at all, and durably: temporary name beside it, fsync, rename.

    `mode` is who may read and write it, from the start; the umask takes from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write `data` under `path` as `whole_file`."""
    with whole_file(path, mode=mode) as file:
        file.write(data)
