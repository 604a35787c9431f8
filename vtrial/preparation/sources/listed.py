"""Collections told by a table: a row for each study, with the paths of its CT and its SUV and whose they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vtrial.cohort.spec import usual_people
from vtrial.cohort.table import Table
from vtrial.imaging.dicom.fields import plain
from vtrial.preparation.sources.niftis import pair_candidate
from vtrial.preparation.sources.people import person_of
from vtrial.preparation.sources.study import Candidate, Origin
from vtrial.preparation.sources.tables import (
    CT_COLUMNS,
    PATIENT_COLUMNS,
    SUV_COLUMNS,
    Row,
    cell_of,
    facts_of,
    read_people,
    told_header,
)
from vtrial.records import InputError
from vtrial.storage import expanded


def listed_candidates(path: Path) -> list[Candidate]:
    """The studies of a table in its order; InputError where it has no columns of paths.

    Paths are relative to the table's folder, or absolute. Rows with one PatientID (or subject_id) are of one person.
    """
    table = read_people(path)
    _check_columns(table)
    people = usual_people(table).rows
    return [_candidate(raw, row, path.parent) for raw, row in zip(table.rows, people, strict=True)]


def _check_columns(table: Table) -> None:
    names = {plain(column) for column in table.columns}
    problems = [
        f"{table.path}: no column with the paths of the {what} files; name it {what.lower()}_path"
        for what, known in (("CT", CT_COLUMNS), ("SUV", SUV_COLUMNS))
        if names.isdisjoint(known)
    ]
    if problems:
        raise InputError([*problems, f"{table.path}: {told_header(table)}"])


def _candidate(raw: Row, row: Row, folder: Path) -> Candidate:
    ct, suv = cell_of(raw, CT_COLUMNS), cell_of(raw, SUV_COLUMNS)
    origin = Origin(ct or suv, cell_of(raw, PATIENT_COLUMNS))
    if ct and suv:
        ct_file, suv_file = (folder / expanded(cell) for cell in (ct, suv))
        candidate = pair_candidate(origin, (), ct_file, suv_file)
    else:
        pathless = tuple(f"the row has no path of the {what}" for what, cell in (("CT", ct), ("SUV", suv)) if not cell)
        candidate = Candidate(origin, reasons=pathless)
    return replace(candidate, person=person_of([row]), facts=facts_of([row]))
