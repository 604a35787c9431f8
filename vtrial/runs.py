"""The run folder: what it is of, what is done, and how to go on after anything.

`manifest.json` says what the run is of; its `identity` decides whether the same folder may go on. `journal.jsonl` has a
line for each attempt, on the disk before the next step. A subject is done if the journal says so and its files are
there with the sizes written down. `subjects.parquet` and `.csv` are views of the journal and the recruited subjects.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from vtrial.records import InputError, Subject
from vtrial.storage import Folder, place, write_if_new

T = TypeVar("T")
MANIFEST, JOURNAL, TABLE = "manifest.json", "journal.jsonl", "subjects"
SHARD_ABOVE = 10_000  # subjects; more folders than this in one folder are slow on many file systems

Identity = dict[str, str | int | float | None]


class Session(BaseModel):
    """One call of the command that worked on the run."""

    model_config = ConfigDict(extra="forbid")
    command: list[str]
    started: str
    finished: str | None = None
    seconds: float | None = None
    n: int
    executor: str
    workers: int
    threads_per_subject: int
    gpus_per_worker: float
    device: str
    versions: dict[str, str]
    done: int = 0
    failed: int = 0


class Manifest(BaseModel):
    """What a run is of. `identity` never changes; `n` grows; every session adds to `sessions`."""

    model_config = ConfigDict(extra="forbid")
    format_version: Literal[1] = 1
    kind: str
    note: str = "Synthetic subjects made by vtrial: no such people exist. Not for diagnosis."
    identity: dict[str, str | int | float | None]
    geometry: dict[str, Any]
    facts: dict[str, Any] = {}
    n: int
    sharded: bool
    sessions: list[Session] = []


class JournalEntry(BaseModel):
    """One attempt at one subject."""

    model_config = ConfigDict(extra="forbid")
    time: str
    status: Literal["ok", "attempt", "failed"]  # done; failed but tried again; given up
    subject_id: str
    index: int
    attempt: int
    seconds: float
    error: str = ""
    files: dict[str, int] = {}
    row: dict[str, Any] = {}


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def identity_hash(identity: Identity) -> str:
    """A short name for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a run; None if the folder is new or empty; InputError if it is something else."""
    try:
        if folder.size(MANIFEST) is not None:
            return Manifest.model_validate_json(folder.read(MANIFEST))
        strange = [name for name in folder.entries() if not name.startswith((".", JOURNAL))]
    except (ValidationError, OSError) as error:
        detail = str(error).splitlines()[0]
        raise InputError(
            f"{place(folder.location, MANIFEST)}: cannot be read ({detail}); choose another --out"
        ) from None
    if strange:
        raise InputError(
            f"{folder.location}: not a run folder but not empty ({', '.join(strange[:3])}, …); choose another --out"
        )
    return None


def check_identity(folder: Folder, kind: str, identity: Identity) -> Manifest | None:
    """The manifest if the folder holds this very run, None if it is new; InputError that tells what differs."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    there, here = {"kind": manifest.kind, **manifest.identity}, {"kind": kind, **identity}
    differing = [
        f"{folder.location}: belongs to another run: {key} is {there.get(key)} there and {here.get(key)} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise InputError([*differing, "choose another --out, or give the options the folder was made with"])
    return manifest


def read_journal(folder: Folder) -> list[JournalEntry]:
    """All whole entries in order."""
    return [entry for _, entry in journal_lines(folder, JOURNAL, JournalEntry.model_validate_json)]


def journal_lines(folder: Folder, name: str, parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Each whole line of a journal and what it says."""
    for line in folder.lines(name):
        try:
            entry = parse(line)
        except ValidationError:  # a torn line is what a kill leaves: its subject is simply not done
            continue
        yield line, entry


@dataclass
class Run:
    """An open run: the one driver that holds its lock adds entries and keeps the tables."""

    folder: Folder
    manifest: Manifest
    latest: dict[int, JournalEntry] = field(default_factory=dict)  # by subject index
    sizes: dict[str, int] = field(default_factory=dict)  # of the files that were there when the run was opened
    refusal: InputError | None = None  # why nothing can be written: a run on a read-only disk may be whole all the same

    def is_done(self, subject: Subject, verify: Callable[[JournalEntry], bool] | None = None) -> bool:
        """Whether the subject's files are there as the journal says; InputError if the journal knows another one."""
        entry = self.latest.get(subject.index)
        if entry is None:
            return False
        if entry.subject_id != subject.subject_id:
            raise InputError(
                f"{self.folder.location}: subject {subject.index} is {entry.subject_id} there and "
                f"{subject.subject_id} here; choose another --out"
            )
        if entry.status != "ok" or any(self.sizes.get(name) != size for name, size in entry.files.items()):
            return False
        return verify is None or verify(entry)

    def record(self, entry: JournalEntry) -> None:
        """Put an entry on the disk; OSError if that cannot be."""
        self.folder.append(JOURNAL, entry.model_dump_json())
        self.latest[entry.index] = entry

    def reread(self) -> None:
        """Take `latest` from the journal again: an interrupted `record` may have reached the disk alone."""
        self.latest = _latest(self.folder)

    @property
    def has_views(self) -> bool:
        """Whether the last session came to its end and the tables it wrote are there."""
        sessions = self.manifest.sessions
        closed = bool(sessions) and sessions[-1].finished is not None
        return closed and all(f"{TABLE}.{ending}" in self.sizes for ending in ("parquet", "csv"))

    def write_truth(self) -> None:
        """Write `truth.parquet`, the numbers behind each subject, where there are any."""
        known = {e.subject_id: e.row["truth"] for _, e in sorted(self.latest.items()) if "truth" in e.row}
        if known:
            buffer = io.BytesIO()
            pd.DataFrame([{"subject_id": key, **truth} for key, truth in known.items()]).to_parquet(buffer, index=False)
            self.folder.write("truth.parquet", buffer.getvalue())

    def write_manifest(self) -> None:
        """Put the manifest on the disk, unless it is there as it is."""
        write_if_new(self.folder, MANIFEST, (self.manifest.model_dump_json(indent=2) + "\n").encode())

    def write_tables(self, subjects: Sequence[Subject], flags: Mapping[int, bool]) -> pd.DataFrame:
        """Write and give `subjects.parquet` and `.csv`; `flags` marks the indices outside the model's support."""
        table = subjects_table(subjects, self.latest, flags)
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        self.folder.write(f"{TABLE}.parquet", buffer.getvalue())
        self.folder.write(f"{TABLE}.csv", table.to_csv(index=False).encode())
        return table


def subjects_table(
    subjects: Sequence[Subject], latest: Mapping[int, JournalEntry], flags: Mapping[int, bool]
) -> pd.DataFrame:
    """One row for each subject: who, how it went (`pending` if not tried to the end), where its files are."""
    rows = []
    for subject in subjects:
        entry = latest.get(subject.index)
        row: dict[str, Any] = {
            "subject_id": subject.subject_id,
            "index": subject.index,
            "seed": subject.seed,
            "stratum": subject.stratum,
            "sex": subject.sex,
            "age_years": subject.age_years,
            "height_cm": subject.height_cm,
            "weight_kg": subject.weight_kg,
            "bmi": subject.bmi,
            **subject.extra,
            "extrapolated": flags.get(subject.index, False),
            "status": "pending" if entry is None or entry.status == "attempt" else entry.status,
            "attempts": entry.attempt if entry else 0,
            "seconds": round(entry.seconds, 3) if entry else None,
            **({key: value for key, value in entry.row.items() if not isinstance(value, dict)} if entry else {}),
            "error": entry.error if entry else "",
        }
        rows.append(row)
    return pd.DataFrame(rows)


@contextmanager
def open_run(folder: Folder, fresh: Manifest) -> Iterator[Run]:
    """Create or take up the run of `fresh.identity` and hold its lock; sweeps what interrupted writes left.

    A run that is there but cannot be written is given with its `refusal`, without a lock. Raises InputError if the
    folder is another run's, is at work, or is new and cannot be written.
    """
    known = check_identity(folder, fresh.kind, fresh.identity)
    try:
        folder.create()
    except InputError as refusal:
        if known is None:
            raise
        yield _run(folder, known, refusal)
        return
    with folder.lock():
        known = check_identity(folder, fresh.kind, fresh.identity)
        manifest = fresh if known is None else known
        manifest.n = max(manifest.n, fresh.n)
        folder.sweep("")
        try:
            yield _run(folder, manifest)
        finally:
            folder.discard()


def _run(folder: Folder, manifest: Manifest, refusal: InputError | None = None) -> Run:
    return Run(folder, manifest, _latest(folder), folder.sizes(), refusal)


def _latest(folder: Folder) -> dict[int, JournalEntry]:
    """The last entry of each subject by its index."""
    return {entry.index: entry for entry in read_journal(folder)}
