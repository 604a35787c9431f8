"""What a folder of a run can do, wherever it is, and how one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vtrial.storage.local import LocalFolder
from vtrial.storage.names import expanded
from vtrial.storage.remote import RemoteFolder


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

    def lock(self, *, wait: bool = False) -> Any:
        """A context in which no other driver works here; InputError if one does, unless this is to `wait` for it."""


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
    return LocalFolder(str(expanded(text).absolute()))
