"""Whether two studies are one by their files, and whether files were written again, without reading all of them."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Sequence
from pathlib import Path

_FILES = 16  # of a study
_BLOCKS, _BLOCK = 16, 1 << 16  # of a file: 1 MiB of it


def fingerprint(files: Sequence[Path]) -> str:
    """A short digest of the files' sizes and of samples of their content; "" if one cannot be read."""
    digest = hashlib.sha256()
    try:
        sizes = [file.stat().st_size for file in files]
        digest.update(repr(sizes).encode())
        every = -(-len(files) // _FILES)
        for file, size in list(zip(files, sizes, strict=True))[::every]:
            with file.open("rb") as stream:
                for block in range(_BLOCKS):
                    stream.seek(block * max(size - _BLOCK, 0) // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
    except OSError:
        return ""
    return digest.hexdigest()[:16]


def stamp(files: Sequence[Path]) -> str:
    """A short digest of when files were written and changed, and of their sizes: a file copied again has another."""
    try:
        states = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in map(Path.stat, files)]
    except OSError:
        return ""
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def twins_of(prints: Sequence[str], files: Sequence[Sequence[Path]]) -> dict[int, int]:
    """Position of each study that has the very files of an earlier one, to that one's. Equal prints are looked into."""
    first: dict[str, int] = {}
    twins = {}
    for i, digest in enumerate(prints):
        if not digest:
            continue
        j = first.setdefault(digest, i)
        if j != i and all(a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a, b in zip(files[i], files[j])):
            twins[i] = j
    return twins
