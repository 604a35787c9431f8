"""Measuring many subjects: every one goes into a journal as it ends, and the journal into one Parquet table.

`measurements.jsonl` has a line for each subject measured or given up, on the disk before the next. A subject is done if
the journal holds it under the same key, which names its files' content, the organs asked for and the definitions;
another key, or a failure, is tried again. `measurements.parquet` is a view of the journal, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from vtrial.execution import Attempt, CannotGoOn, Executor, LocalExecutor, Progress, Report, Resources, Saved
from vtrial.measurement.cases import Case, Reader
from vtrial.measurement.subject import COLUMNS, VERSION, Measurement, known_organs, measure, not_measured
from vtrial.memory import keep_freed_memory
from vtrial.records import InputError
from vtrial.runs import journal_lines, now
from vtrial.storage import Folder, place, printable

JOURNAL, TABLE = "measurements.jsonl", "measurements.parquet"
SUBJECTS_PER_ROW_GROUP = 500
NOT_MEASURED = "not measured: "  # in `missing`, before the reason why a subject as a whole could not be
_KEY = b"vtrial.measured"  # in the table's metadata: of what journal it is the view
_TYPES = {"organ": pa.string(), "missing": pa.string(), "touches_border": pa.bool_(), "censored": pa.bool_()}
SCHEMA = pa.schema(
    [("subject_id", pa.string())]
    + [(name, _TYPES.get(name, pa.float64())) for name in COLUMNS]
    + [("segmenter", pa.string()), ("caution", pa.string())]
)


Columns = dict[str, list[str | bool | float | None]]


class MeasuredEntry(BaseModel):
    """How one subject was measured, or why not. `columns` has a value for each row; null is not a number."""

    model_config = ConfigDict(extra="forbid")
    time: str
    status: Literal["ok", "failed"]
    subject_id: str
    key: str
    seconds: float
    error: str = ""
    columns: Columns = {}


@dataclass(frozen=True)
class _Product:
    columns: Columns = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class MeasureWork:
    """The work on one case for an executor. What is wrong with a subject is its result, and stops no other."""

    read: Reader
    organs: tuple[str, ...]

    def make(self, case: Case) -> _Product:
        """Read and measure a subject."""
        try:
            return _Product(_columns(measure(self.read(case), self.organs)))
        except InputError as error:
            return _Product(problem="; ".join(error.problems))
        except OSError as error:
            return _Product(problem=f"{error.filename or case.subject_id}: cannot be read ({error.strerror or error})")

    def save(self, case: Case, product: _Product) -> Saved:
        """Nothing is written here: the rows travel to the driver, which keeps the journal."""
        return Saved({}, {"columns": product.columns, "problem": product.problem})


@dataclass(frozen=True)
class MeasureWorkFactory:
    """Builds the work in a worker."""

    read: Reader
    organs: tuple[str, ...]

    def __call__(self, resources: Resources) -> MeasureWork:
        """The work; measuring uses one core, whatever there is."""
        keep_freed_memory()  # reading a subject takes half the time
        return MeasureWork(self.read, self.organs)


@dataclass(frozen=True)
class MadeBy:
    """What the table says of the masks in every row: who drew them, and why not to trust that, if so."""

    segmenter: str = ""
    caution: str = ""


@dataclass(frozen=True)
class MeasureSummary:
    """How measuring ended: `done` have numbers, `new` of them in this call, `failures` says what is wrong, by subject.

    `location` is that of the table.
    """

    location: str
    total: int
    done: int
    new: int
    seconds: float
    failures: dict[str, str]


def measure_cohort(
    cases: Sequence[Case],
    folder: Folder,
    read: Reader,
    *,
    organs: Collection[str] | None = None,
    masks: MadeBy = MadeBy(),
    table: str = TABLE,
    executor: Executor | None = None,
    report: Report = lambda _: None,
) -> MeasureSummary:
    """Measure what is not yet measured and write the table of all `cases`, in their order, into `folder`.

    `organs` as in `measure`; `table` is the name of its file. A subject that cannot be measured has rows with the
    reason and is tried again by the next call; a finished cohort is left as it is. The caller holds the folder's lock
    where others may work in it. Raises InputError before anything is written, CannotGoOn when the storage or the
    workers give up; what is measured stays.
    """
    started = time.monotonic()
    asked = tuple(sorted(known_organs(organs)))
    _check(cases, folder)
    keys = {case.subject_id: _key(case, asked) for case in cases}
    journal = _Journal(folder, keys, table, masks)
    todo = [case for case in cases if not journal.is_done(case.subject_id)]
    if todo:
        folder.create()
    try:
        if todo:
            _work(journal, todo, MeasureWorkFactory(read, asked), executor or LocalExecutor(), report)
    except OSError as error:
        raise CannotGoOn(f"{folder.location}: cannot write ({error}); what is measured is safe, try again") from error
    finally:
        journal.write_table([case.subject_id for case in cases], asked)
    done = sum(journal.is_done(case.subject_id) for case in cases)
    return MeasureSummary(
        location=place(folder.location, table),
        total=len(cases),
        done=done,
        new=done - (len(cases) - len(todo)),
        seconds=time.monotonic() - started,
        failures=journal.failures(),
    )


def _check(cases: Sequence[Case], folder: Folder) -> None:
    if not cases:
        raise InputError(f"{folder.location}: no subjects to measure; generate or segment some first")
    counts = Counter(case.subject_id for case in cases)
    twice = [subject_id for subject_id, count in counts.items() if count > 1]
    if twice:
        raise InputError(
            [f"subject {subject_id} is there more than once; give each its own id" for subject_id in twice]
        )


def _key(case: Case, organs: Sequence[str]) -> str:
    named = json.dumps([VERSION, list(organs), case.fingerprint])
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _work(
    journal: _Journal,
    todo: Sequence[Case],
    factory: MeasureWorkFactory,
    executor: Executor,
    report: Report,
) -> None:
    """One session over `todo`: every subject is in the journal before the next is reported."""
    executor.start()
    done = failed = 0
    report(Progress(0, 0, len(todo)))
    try:
        with closing(executor.run(factory, todo)) as attempts:
            for attempt in (a for a in attempts if a.final):
                if error := journal.record(attempt):
                    attempt = replace(attempt, saved=None, error=error)
                done, failed = done + (not error), failed + bool(error)
                report(Progress(done, failed, len(todo), attempt))
    finally:
        executor.stop()


class _Journal:
    """The journal of a folder for subjects of known keys. Lines stay text until the table needs them."""

    def __init__(self, folder: Folder, keys: dict[str, str], table: str, masks: MadeBy) -> None:
        self.folder, self.keys, self.table, self.masks = folder, keys, table, masks
        self._lines: dict[str, tuple[str, bool]] = {}  # the latest line of a subject and whether it was measured
        self._errors: dict[str, str] = {}
        for line, entry in journal_lines(folder, JOURNAL, MeasuredEntry.model_validate_json):
            self._keep(entry, line)

    def _keep(self, entry: MeasuredEntry, line: str) -> None:
        if entry.key == self.keys.get(entry.subject_id):
            self._lines[entry.subject_id] = line, entry.status == "ok"
            self._errors[entry.subject_id] = entry.error

    def is_done(self, subject_id: str) -> bool:
        """Whether the subject was measured from these very files."""
        return self._lines.get(subject_id, ("", False))[1]

    def failures(self) -> dict[str, str]:
        """Why subjects were given up."""
        return {subject_id: self._errors[subject_id] for subject_id, (_, ok) in self._lines.items() if not ok}

    def record(self, attempt: Attempt) -> str:
        """Put a subject on the disk and tell what was wrong with it, if anything; OSError if that cannot be."""
        row = attempt.saved.row if attempt.saved else {}
        error = printable(row.get("problem", "") or attempt.error)
        entry = MeasuredEntry(
            time=now(),
            status="failed" if error else "ok",
            subject_id=attempt.item.subject_id,
            key=self.keys[attempt.item.subject_id],
            seconds=round(attempt.seconds, 3),
            error=error,
            columns=row.get("columns", {}),
        )
        line = entry.model_dump_json()
        self.folder.append(JOURNAL, line)
        self._keep(entry, line)
        return error

    def write_table(self, subject_ids: Sequence[str], organs: Sequence[str]) -> None:
        """Write the table of these subjects, as far as they were tried, unless it is there; CannotGoOn if not."""
        tried = [subject_id for subject_id in subject_ids if subject_id in self._lines]
        state = [self.masks.segmenter, self.masks.caution, *((i, self.keys[i], self._errors[i]) for i in tried)]
        digest = hashlib.sha256(json.dumps(state).encode()).hexdigest().encode()
        try:
            if not tried or _table_key(self.folder, self.table) == digest:
                return
            buffer = io.BytesIO()
            with pq.ParquetWriter(buffer, SCHEMA.with_metadata({_KEY: digest})) as writer:
                for start in range(0, len(tried), SUBJECTS_PER_ROW_GROUP):
                    some = tried[start : start + SUBJECTS_PER_ROW_GROUP]
                    writer.write_table(pa.concat_tables([self._rows(subject_id, organs) for subject_id in some]))
            self.folder.write(self.table, buffer.getvalue())
        except OSError as error:
            told = f"{self.folder.location}: cannot write {self.table} ({error}); what is measured is safe"
            raise CannotGoOn(told) from error

    def _rows(self, subject_id: str, organs: Sequence[str]) -> pa.Table:
        line, ok = self._lines[subject_id]
        if ok:
            columns = MeasuredEntry.model_validate_json(line).columns
        else:
            columns = _columns(not_measured(f"{NOT_MEASURED}{self._errors[subject_id]}", organs))
        same = {"subject_id": subject_id, "segmenter": self.masks.segmenter, "caution": self.masks.caution}
        known = {**{name: [value] * len(columns["organ"]) for name, value in same.items()}, **columns}
        return pa.table({name: known[name] for name in SCHEMA.names}, schema=SCHEMA)


def _columns(rows: Sequence[Measurement]) -> Columns:
    """Column to values. A number that is missing has no place in JSON, and in the table it is empty."""
    cells = [row.to_dict() for row in rows]
    return {name: [None if _is_nan(row[name]) else row[name] for row in cells] for name in COLUMNS}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _table_key(folder: Folder, table: str) -> bytes | None:
    """Of which journal a table in the folder is the view; None if there is none that can be read."""
    if folder.size(table) is None:
        return None
    try:
        metadata = pq.read_schema(io.BytesIO(folder.read(table))).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    key: bytes | None = metadata.get(_KEY)
    return key
