"""What lies in a folder of DICOM: every image of it, and paths in words that name nobody.

Symbolic links are followed, each folder and file once; names and endings do not matter; hidden files are passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from vtrial.imaging.dicom.fields import discreetly, plain
from vtrial.imaging.dicom.headers import Image, Other, header_of
from vtrial.records import InputError

_UID = re.compile(r"\d+(?:\.\d+){4,}")
_SAYS_NOTHING = frozenset(  # of anybody, where a file's or folder's name has it
    {"pet", "ct", "pt", "fdg", "anon", "anonymous", "patient", "subject", "case", "study", "series", "test"}
)
_READERS = 8  # threads: while one waits for a network's file system, another parses
_AT_ONCE = 1024  # files that are given to them
_SHORTEST = 3  # letters of an ASCII word that hides every name in which it occurs; a shorter one must be the whole


@dataclass(frozen=True, repr=False)
class FolderContent:
    """The images under a folder, how many files were something else, by kind, and the files that could not be read."""

    images: tuple[Image, ...]
    others: dict[str, int]
    broken: tuple[tuple[Path, str], ...]
    words: frozenset[str] = field(repr=False)  # of all headers: what no shown name may hold


def read_folder(root: Path) -> FolderContent:
    """The headers of all DICOM files under a folder, in the order of their names; InputError if there is no folder."""
    if not root.is_dir():
        raise InputError(f"{root}: no folder is there; name one that holds DICOM files")
    images: list[Image] = []
    broken: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()
    words: set[str] = set()
    for path, header in _headers(_files(root, broken)):
        if isinstance(header, str):
            broken.append((path, header))
        elif header is None:
            others["files that are no DICOM"] += 1
        else:
            words |= header.identity.words
            if isinstance(header, Other):
                others[header.what] += 1
            else:
                images.append(header)
    return FolderContent(tuple(images), dict(sorted(others.items())), tuple(broken), frozenset(words))


def _headers(paths: Iterator[Path]) -> Iterator[tuple[Path, Image | Other | str | None]]:
    """Each file with its header, or why it cannot be read, in their order."""
    with discreetly(), ThreadPoolExecutor(_READERS) as readers:
        while some := list(islice(paths, _AT_ONCE)):
            yield from zip(some, readers.map(_header, some), strict=True)


def _header(path: Path) -> Image | Other | str | None:
    try:
        return header_of(path)
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _files(root: Path, broken: list[tuple[Path, str]]) -> Iterator[Path]:
    """All plain files under a folder by name, links followed, none twice; folders that cannot be listed are noted."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if place.is_file():
                yield place
            elif place.is_dir():
                entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
                waiting.extend(sorted(entries, reverse=True))
        except OSError as error:  # a dangling link, a circle of links, a folder without leave
            broken.append((place, f"cannot be read ({error.strerror})"))


class Shown:
    """Paths under a root as they may be shown: a name that holds part of a patient's name, an id, a date or a UID is
    replaced by `#n`, the n-th entry of its folder by name."""

    def __init__(self, root: Path, words: Iterable[str]) -> None:
        self._root = root
        known = {word for word in words if word} - _SAYS_NOTHING
        self._inside = {word for word in known if len(word) >= _SHORTEST or not word.isascii()}
        self._whole = known - self._inside
        self._numbers: dict[Path, dict[str, int]] = {}
        self._names: dict[str, bool] = {}

    def __call__(self, path: Path) -> str:
        """A path below the root, relative to it."""
        here, told = self._root, []
        for name in path.relative_to(self._root).parts:
            told.append(f"#{self._number(here, name)}" if self._identifies(name) else _printable(name))
            here = here / name
        return "/".join(told) or "."

    def _identifies(self, name: str) -> bool:
        if name not in self._names:
            bare = plain(name)
            parts = {plain(part) for part in re.split(r"[\W_]+", name)} | {bare, plain(Path(name).stem)}
            # All pieces of the name against the words: a collection has many more words than a name has letters.
            pieces = {bare[i:j] for i in range(len(bare)) for j in range(i + 1, len(bare) + 1)}
            found = not pieces.isdisjoint(self._inside) or not parts.isdisjoint(self._whole)
            self._names[name] = found or bool(_UID.search(name))
        return self._names[name]

    def _number(self, folder: Path, name: str) -> int:
        if folder not in self._numbers:
            names = sorted(entry.name for entry in folder.iterdir())
            self._numbers[folder] = {entry: i for i, entry in enumerate(names, start=1)}
        return self._numbers[folder].get(name, 0)


def _printable(name: str) -> str:
    """A name without line breaks, control characters or bytes that are no text."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
