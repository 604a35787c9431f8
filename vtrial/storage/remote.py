"""Folders behind URLs, such as those of object stores: no lock, and an object for each line of a journal."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs
from pyarrow.lib import ArrowException

from vtrial.records import InputError
from vtrial.storage.local import PART


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
        system, probe = self._opened[0], f".{uuid.uuid4().hex[:8]}{PART}"
        try:
            system.create_dir(self._path(""), recursive=True)
            self.write(probe, b"")
            system.delete_file(self._path(probe))
        except (OSError, NotImplementedError, ValueError) as error:
            reason = str(error) or "this protocol is for reading"  # http's NotImplementedError has no words
            raise InputError(f"{self.location}: cannot write there ({reason}); check the URL and your rights") from None

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
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """No lock: object stores have none."""
        yield
