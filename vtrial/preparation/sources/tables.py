"""Tables of demographics, joined to the studies that they are about.

A row is joined by what it calls a study (a path such as FDG-PET-CT-Lesions' `File Location`, a study folder, a case, a
StudyInstanceUID) or, where it calls none that is there, by what it calls the person. Names are compared without regard
to case and to the way accents are coded, and a name that could be two studies' is no study's.
"""

from __future__ import annotations

import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtrial.cohort.spec import usual_people
from vtrial.cohort.table import Table, read_table
from vtrial.imaging.dicom.fields import plain
from vtrial.preparation.sources.people import PERSON_COLUMNS
from vtrial.preparation.sources.study import Candidate, Fact
from vtrial.records import InputError

CT_COLUMNS = ("ct", "ctpath", "ctfile", "ctres", "ctrespath")  # as `plain` writes them
SUV_COLUMNS = ("suv", "suvpath", "suvfile", "pet", "petpath", "petfile", "petsuv")
PATIENT_COLUMNS = ("patientid", "patient", "subjectid", "subject", "participantid")
STUDY_COLUMNS = (
    *("filelocation", "path", "file", "filename", *CT_COLUMNS, *SUV_COLUMNS),
    *("study", "studyid", "studyfolder", "folder", "studyuid", "studyinstanceuid"),
    *("case", "caseid", "casename", "scan", "scanid", "subjectid"),
)
_NUMBER_COLUMNS = {
    *("age", "ageyears", "patientage", "weight", "weightkg", "patientweight"),
    *("height", "heightcm", "heightm", "patientsize", "patientsizecm"),
}
# What may be told of a table.
_KNOWN_COLUMNS = {*STUDY_COLUMNS, *PATIENT_COLUMNS, *_NUMBER_COLUMNS, "diagnosis", "sex", "gender", "patientsex"}
_DECIMAL_COMMA = re.compile(r"^(\d+),(\d+)$")
_ENDING = re.compile(r"(?:_\d{4})?(?:\.nii(?:\.gz)?|\.dcm)$", re.IGNORECASE)

_TRACER_COLUMNS = ("tracer", "radiopharmaceutical")
_DIAGNOSIS = re.compile(
    r"(?!.*\d{4})[\w .,+/()-]{1,40}"
)  # a code or a word; longer text, or a date in it, may name somebody

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Joined:
    """What a table says of studies, by their position: rows under our column names, and how it calls the person.

    `strangers` counts the rows that are about no study.
    """

    rows: Mapping[int, Sequence[Row]]
    patients: Mapping[int, str]
    strangers: int


def folded(text: object) -> str:
    """A name or path as it is compared: one way of coding accents, no case, forward slashes."""
    plain_text = unicodedata.normalize("NFC", str(text)).casefold().replace("\\", "/")
    return plain_text.strip().removeprefix("./").strip("/")


def read_people(path: Path) -> Table:
    """A table as its file has it; InputError if it cannot be read.

    More is forgiven in a CSV than in a cohort spec, as FDG-PET-CT-Lesions' own has columns without a name: comma,
    semicolon or tab separates (beside the latter two a comma is a decimal point), Windows' Western letters are read
    where it is no UTF-8, and short rows end in empty cells.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable CSV or Parquet file") from None
    if data[:4] == b"PAR1":
        return read_table(path)
    if b"\0" in data:
        raise InputError(f"{path}: not a text file; save the table as CSV in UTF-8, or as Parquet")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    lines = [line for line in re.split(r"\r\n?|\n", text) if line.strip() and not line.startswith("#")]
    separator = max(",;\t", key=(lines or [""])[0].count)
    try:
        records = [[cell.strip() for cell in record] for record in csv.reader(lines, delimiter=separator)]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table ({error}); check the quotes") from None
    if len(records) < 2:
        raise InputError(f"{path}: the table is empty; it needs a header and at least one row")
    header: dict[str, int] = {}
    for i, name in enumerate(records[0]):
        header.setdefault(name or f"column {i + 1}", i)
    points = {c for c in header if separator != "," and plain(c) in _NUMBER_COLUMNS}

    def cell(record: Sequence[str], column: str) -> str | None:
        text = record[header[column]] if header[column] < len(record) else ""
        return (_DECIMAL_COMMA.sub(r"\1.\2", text) if column in points else text) or None

    rows = tuple({column: cell(record, column) for column in header} for record in records[1:])
    return Table(path, hashlib.sha256(data).hexdigest(), tuple(header), rows, tuple(range(1, len(rows) + 1)))


def cell_of(row: Row, columns: Iterable[str]) -> str:
    """The first cell that is there of columns by their plain names, in the order of these; "" if there is none."""
    texts = [(plain(str(column)), _text(cell)) for column, cell in row.items()]
    return next((text for wanted in columns for column, text in texts if column == wanted and text), "")


def _text(cell: object) -> str:
    """A cell as a name: a number that was made floating point, as happens to identifiers with gaps, is whole again."""
    return "" if cell is None or cell != cell else re.sub(r"^(\d+)\.0$", r"\1", str(cell).strip())


def facts_of(rows: Sequence[Row]) -> dict[str, Fact]:
    """What rows say beside demographics, where they agree: the diagnosis, if it is a code or a word."""
    told = {cell_of(row, ("diagnosis",)) for row in rows} - {""}
    return {"diagnosis": next(iter(told))} if len(told) == 1 and all(map(_DIAGNOSIS.fullmatch, told)) else {}


def other_tracer(rows: Sequence[Row]) -> bool:
    """Whether rows name a tracer, and it is not FDG."""
    told = {plain(cell_of(row, _TRACER_COLUMNS)) for row in rows} - {""}
    return any("fdg" not in name and "fluorodeoxyglucose" not in name for name in told)


def told_columns(table: Table) -> list[str]:
    """Which columns of demographics a table has, under our names; none if no column says whom a row is about."""
    keys = {plain(column) for column in table.columns} & {*STUDY_COLUMNS, *PATIENT_COLUMNS}
    people = usual_people(table)
    return [c for c in PERSON_COLUMNS if keys and any(row.get(c) is not None for row in people.rows)]


def told_header(table: Table) -> str:
    """The header in words that name nobody, as the first line of a table without one is somebody's."""
    known = [column for column in table.columns if plain(column) in _KNOWN_COLUMNS]
    return f"its first line has {len(table.columns)} columns, of which are known: {', '.join(known) or 'none'}"


def tables_beside(root: Path) -> list[Table]:
    """Tables of demographics in a folder of NIfTI files, or its parent where data sets put them; the fullest first."""
    places = [root, root.parent] if root.name.startswith("images") or root.name == "FDG-PET-CT-Lesions" else [root]
    tables = []
    for path in sorted(path for place in places for ending in ("*.csv", "*.parquet") for path in place.glob(ending)):
        try:
            table = read_people(path)
        except InputError:  # any table may lie there
            continue
        if told_columns(table):
            tables.append(table)
    return sorted(tables, key=lambda table: -len(told_columns(table)))


def join(table: Table, candidates: Sequence[Candidate]) -> Joined:
    """The rows of a table by the study that they are about: about the very study, else about its person.

    A row that names somebody who is here is about a study of theirs, and never about another's.
    """
    known = _Names.of(candidates)
    exact: dict[int, list[Row]] = {}
    general: dict[int, list[Row]] = {}
    called: dict[int, str] = {}
    strangers = 0
    for raw, row in zip(table.rows, usual_people(table).rows, strict=True):
        patient = cell_of(raw, PATIENT_COLUMNS)
        study = known.study_of(raw, folded(patient))
        if study is not None:
            exact.setdefault(study, []).append(row)
            if patient:
                called[study] = patient
            continue
        of_person = known.patients.get(folded(patient), ())
        strangers += not of_person
        for i in of_person:
            general.setdefault(i, []).append(row)
    return Joined({**general, **exact}, called, strangers)


@dataclass(frozen=True)
class _Names:
    """What candidates may be called: names of studies, of patients, and of folders that may be a patient's."""

    studies: Mapping[str, AbstractSet[int]]
    patients: Mapping[str, AbstractSet[int]]
    folders: Mapping[str, AbstractSet[int]]

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> _Names:
        studies: dict[str, set[int]] = {}
        patients: dict[str, set[int]] = {}
        folders: dict[str, set[int]] = {}
        usable = {folded(candidate.origin.path) for candidate in candidates if not candidate.reasons}
        for i, candidate in enumerate(candidates):
            if candidate.origin.patient:
                patients.setdefault(folded(candidate.origin.patient), set()).add(i)
            for name in filter(None, map(folded, (candidate.origin.path, *candidate.names))):
                if not (candidate.reasons and name in usable):  # what is left out may lie in a usable study's folder
                    studies.setdefault(name, set()).add(i)
            parts = folded(candidate.origin.path).split("/")
            for name in parts[:-1] or parts:
                folders.setdefault(name, set()).add(i)
        if len(candidates) == 1:  # which of the folders above it is the patient's cannot be told
            patients |= {name: {0} for name in folded(candidates[0].origin.path).split("/")}
        return cls(studies, patients, folders)

    def study_of(self, row: Row, patient: str) -> int | None:
        """The one study that a row is about, among those of its patient where that is anybody here."""
        theirs = self.patients.get(patient, frozenset()) | self.folders.get(patient, frozenset())
        for key in _study_keys(row, patient if theirs else ""):
            found = self.studies.get(key, frozenset())
            if theirs:
                found = found & theirs
            # A folder `2` may be a patient's, and the second study of patient `1`: then it is the patient's.
            elif self.patients.get(key, found) != found:
                continue
            if len(found) == 1:
                return next(iter(found))
        return None


def _study_keys(row: Row, patient: str) -> Iterator[str]:
    """What a row may call its study, the longest part of a path first; not what is the patient's name."""
    for column, cell in row.items():
        name = plain(str(column))
        if name not in STUDY_COLUMNS or not (text := _text(cell)):
            continue
        whole = folded(text)
        if name in PATIENT_COLUMNS and whole == patient:
            continue
        for name in dict.fromkeys((whole, _ENDING.sub("", whole))):
            parts = name.split("/")
            spans = [(i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1) if j - i > 1]
            yield name
            yield from ("/".join(parts[i:j]) for i, j in sorted(spans, key=lambda span: span[0] - span[1]))
            yield parts[-1]
