"""Places and names as people read them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath


def printable(text: str) -> str:
    """A text with what is no Unicode, such as names of files in another encoding, told by escapes (`M\\udcfcller`)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def place(location: str, name: str) -> str:
    """Where a file of a folder is, for people; the options of a URL (`?region=…`) stay at its end."""
    path, mark, options = _parts(location)
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def expanded(path: str | Path) -> Path:
    """A path with its `~` as the shell takes it: that of nobody known here stays as it is."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def folder_name(location: str) -> str:
    """What a folder is called."""
    return PurePosixPath(_parts(location)[0]).name


def _parts(location: str) -> tuple[str, str, str]:
    """Path, `?` and options of a URL; a path of this machine has no options."""
    return location.partition("?") if "://" in location else (location, "", "")
