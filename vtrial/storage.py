"""Where a run lives: a local or shared folder, or any URL that pyarrow or fsspec can open (`s3://…`, `gs://…`).

What is promised. Local and shared folders: a file appears under its name only when it is whole and on the disk
(temporary name in the same folder, fsync, rename), lines of a journal are on the disk when `append` returns, and one
driver at a time holds the lock. Object stores: an object appears when its upload is complete, a journal line is one
small object, and there is no lock, so do not start two drivers on one URL. Other URLs: temporary name, then move.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import pyarrow.fs
from pyarrow.lib import ArrowException

from vtrial.records import InputError

PART = ".part"  # unfinished files: `.<name>.<random>.part`, beside the file they are to become
LOCK = ".lock"


class Folder(Protocol):
    """A folder of a run, named by `location`. Names are relative, with forward slashes. Errors are OSError."""

    @property
    def location(self) -> str:
        """The folder's absolute path or URL."""

    def create(self) -> None:
        """Make the folder; InputError if that cannot be or nothing can be written there."""

    def entries(self) -> list[str]:
        """Names directly inside; empty if there is no such folder."""

    def size(self, name: str) -> int | None:
        """Size in bytes, None if there is no such file."""

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files under here by name: one listing, not a question for each."""

    def discard(self) -> None:
        """Remove the folder if it holds nothing but the lock."""

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing."""

    def append(self, name: str, line: str) -> None:
        """Add a line to a journal."""

    def lines(self, name: str) -> list[str]:
        """The lines of a journal, a torn one included; empty if there is none."""

    def sweep(self, name: str) -> int:
        """Remove what interrupted writes left under the folder `name`; says how many."""

    def lock(self) -> Any:
        """A context in which no other driver works here; InputError if one does."""


def printable(text: str) -> str:
    """A text with what is no Unicode, such as names of files in another encoding, told by escapes (`M\\udcfcller`)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def place(location: str, name: str) -> str:
    """Where a file of a folder is, for people; the options of a URL (`?region=…`) stay at its end."""
    path, mark, options = _parts(location)
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def folder_name(location: str) -> str:
    """What a folder is called."""
    return PurePosixPath(_parts(location)[0]).name


def _parts(location: str) -> tuple[str, str, str]:
    """Path, `?` and options of a URL; a path of this machine has no options."""
    return location.partition("?") if "://" in location else (location, "", "")


def write_if_new(folder: Folder, name: str, data: bytes) -> bool:
    """Write a whole file unless it is there with that very content; says whether it was written."""
    if folder.size(name) == len(data) and folder.read(name) == data:
        return False
    folder.write(name, data)
    return True


def open_folder(location: str | Path) -> Folder:
    """The folder at a path (made absolute, as workers may run elsewhere) or URL; InputError for an unknown scheme."""
    text = str(location)
    if text.startswith("file://"):
        return LocalFolder(str(Path(text.removeprefix("file://")).absolute()))
    if "://" in text:
        folder = RemoteFolder(text.rstrip("/"))
        folder.check_scheme()
        return folder
    return LocalFolder(str(Path(text).expanduser().absolute()))


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
    def lock(self) -> Iterator[None]:
        """A context in which no other driver works here; InputError if one does.

        The lock is the operating system's (flock): it dies with its process, so none is ever stale.
        """
        with self.path(LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream into `path`, there whole or not at all, and durably: temporary name beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        with part.open("wb") as file:
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


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under `path` as `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. Travels to workers as its URL and is opened there."""

    location: str
    _counter: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        return RemoteFolder, (self.location,)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            return pyarrow.fs.FileSystem.from_uri(self.location)  # type: ignore[no-any-return]
        except (ArrowException, ValueError):
            import fsspec  # type: ignore[import-untyped]

            opened, root = fsspec.core.url_to_fs(self.location)
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(opened)), root

    def check_scheme(self) -> None:
        """InputError where neither pyarrow nor fsspec can open the URL."""
        try:
            _ = self._opened
        except Exception as error:
            raise InputError(
                f"{self.location}: cannot open this URL ({error}); give a folder, or a URL that pyarrow or an "
                "installed fsspec package can open, such as s3://bucket/run"
            ) from None

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._opened[1]) / name)

    def create(self) -> None:
        """Make the folder; InputError if that cannot be or nothing can be written there."""
        try:
            self._opened[0].create_dir(self._path(""), recursive=True)
        except OSError as error:
            raise InputError(f"{self.location}: cannot write there ({error}); check the URL and your rights") from None

    def _list(self, name: str, *, recursive: bool) -> dict[str, int]:
        """Names under here and sizes of what is under the folder `name`; -1 for folders."""
        system, root = self._opened
        selector = pyarrow.fs.FileSelector(self._path(name), allow_not_found=True, recursive=recursive)
        return {
            PurePosixPath(info.path).relative_to(root).as_posix(): -1 if info.size is None else int(info.size)
            for info in sorted(system.get_file_info(selector), key=lambda info: info.path)
        }

    def entries(self) -> list[str]:
        """Names directly inside; empty if there is no such folder."""
        return list(self._list("", recursive=False))

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files under here by name."""
        return {name: size for name, size in self._list("", recursive=True).items() if size >= 0}

    def discard(self) -> None:
        """Nothing to do: folders of object stores exist through their objects only."""

    def size(self, name: str) -> int | None:
        """Size in bytes, None if there is no such file."""
        info = self._opened[0].get_file_info(self._path(name))
        return int(info.size) if info.type == pyarrow.fs.FileType.File else None

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        with self._opened[0].open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing."""
        system, path = self._opened[0], PurePosixPath(self._path(name))
        whole_at_once = system.type_name in ("s3", "gcs")
        part = path if whole_at_once else path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
        system.create_dir(str(path.parent), recursive=True)
        with system.open_output_stream(str(part)) as stream:
            stream.write(data)
        if not whole_at_once:
            system.move(str(part), str(path))

    def append(self, name: str, line: str) -> None:
        """Add a line to a journal: one object a line, as object stores cannot append."""
        self.write(f"{name}.d/{time.time_ns():020d}-{next(self._counter):06d}.json", line.encode())

    def lines(self, name: str) -> list[str]:
        """The lines of a journal; empty if there is none."""
        names = list(self._list(f"{name}.d", recursive=False))
        with ThreadPoolExecutor(16) as pool:
            return [data.decode() for data in pool.map(self.read, names)]

    def sweep(self, name: str) -> int:
        """Remove what interrupted writes left under the folder `name`; says how many."""
        left = [path for path in self._list(name, recursive=True) if path.endswith(PART)]
        for path in left:
            self._opened[0].delete_file(self._path(path))
        return len(left)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No lock: object stores have none."""
        yield
