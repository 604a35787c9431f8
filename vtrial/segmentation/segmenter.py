"""What segments a CT, and what is to be known of it before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from vtrial.execution import Resources


class Segmenter(Protocol):
    """CT → mask, both as bytes of NIfTI files on one grid; the mask is uint8 with TotalSegmentator's class ids."""

    def __call__(self, ct: bytes, /) -> bytes:
        """The mask of one CT in HU. Any exception is that case's failure, but InputError ends the run."""


class LoadSegmenter(Protocol):
    """Loads a segmenter in a worker; it must pickle."""

    def __call__(self, resources: Resources, /) -> Segmenter:
        """The segmenter with these resources."""

    def in_session(self, session: str, /) -> LoadSegmenter:
        """The same, with its temporary files under the name of a session."""


@dataclass(frozen=True)
class SegmenterPlan:
    """A checked choice of segmenter.

    `name` goes into names of folders; `sha256` changes with anything that changes masks; `facts` are for manifests and
    reports. `organs` are those it draws (None: all that TotalSegmentator has). `phantoms_only`: trained on phantoms
    alone, so masks of real scans must be asked for and flagged. `folder` is where one's own lies, "" for others.
    """

    name: str
    sha256: str
    load: LoadSegmenter
    phantoms_only: bool
    organs: tuple[str, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
