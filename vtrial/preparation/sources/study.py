"""The nouns: a study that can be prepared, one that was left out, and what a collection holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from vtrial.imaging.dicom.people import Person
from vtrial.imaging.volume import Volume

Kind = Literal["dicom", "pairs", "nnunet", "table"]
Fact = str | float
SUV_WEIGHT = "suv_weight_kg"  # the fact of a study whose SUV goes by a table's weight


class Loader(Protocol):
    """Reads a study. It pickles, so that workers elsewhere can call it."""

    def __call__(self) -> tuple[Volume, Volume]:
        """CT (x, y, z) in HU, int16, and PET in SUV, float32 g/ml, each on its own grid with axes to the right, front
        and head; InputError with every reason, none of which names anybody, where they are unfit, and CannotRead where
        they cannot be read now."""


@dataclass(frozen=True, repr=False)
class Origin:
    """What the source calls a study: its place there, its person, its UID. It has no `repr`, lest it be printed."""

    path: str
    patient: str = ""
    study_uid: str = ""


class Numbered:
    """What has an id of the form s0001."""

    subject_id: str

    @property
    def index(self) -> int:
        """The number in the id, by which a journal goes."""
        return int(self.subject_id.removeprefix("s"))


@dataclass(frozen=True, eq=False)
class Study(Numbered):
    """A PET/CT to prepare, not read yet: `load` does.

    `subject_id` is new (s0001, …) and says nothing about the person. `person` has what is known of sex, age, height and
    weight, and in its `doubts` why something is not. `facts` are further columns (diagnosis, …). `fingerprint` changes
    with the files, `stamp` also where they are written again as they were. Studies with one `patient` are of one person
    and must never part; like `origin` it is not to be written.
    """

    subject_id: str
    person: Person
    facts: Mapping[str, Fact]
    notes: tuple[str, ...]
    fingerprint: str
    patient: str = field(repr=False)
    load: Loader = field(repr=False)
    origin: Origin = field(repr=False)
    stamp: str = ""


@dataclass(frozen=True, eq=False)
class LeftOut(Numbered):
    """A study, or files, that cannot be used, and every reason why. It has an id, so that the key can tell which."""

    subject_id: str
    reasons: tuple[str, ...]
    origin: Origin = field(repr=False)


@dataclass(frozen=True, eq=False)
class Collection:
    """What a source holds. `notes` are about the whole: rows of tables that no study has, files of other kinds."""

    kind: Kind
    studies: tuple[Study, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Candidate:
    """What a form of collection offers: a study if it has a loader, something unusable if it has `reasons`.

    `names` are what a table may call this very study, `origin.patient` what it may call the person ("" if unknown).
    `person` and `facts` are what comes with the study itself. `files` are all that the loader reads.
    """

    origin: Origin
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    load: Loader | None = None
    person: Person | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
