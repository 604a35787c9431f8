"""Tables from the disk, with the row numbers that the reader sees in the file."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pyarrow.lib import ArrowException
from pydantic import BaseModel, ValidationError

from vtrial.records import InputError

MAX_PROBLEMS = 50  # of one file; more are counted, not listed

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Table:
    """A CSV or Parquet table before it is understood.

    `rows` maps column to cell (text from CSV, any type from Parquet, None where empty); `numbers` are the line numbers
    of a CSV file (comments and header counted) or the record numbers of a Parquet file, from 1. `comments` are the
    lines of a CSV file that begin with `#`. Where a column is not as in the file, `written` has, for each row, what
    column and cell there are instead.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    numbers: tuple[int, ...]
    comments: tuple[str, ...] = ()
    written: tuple[dict[str, tuple[str, Any]], ...] = ()

    def problem(self, row: int, column: str, value: object, what: str) -> str:
        """One problem of one cell, `row` counted from 0 over the records, told as the file has it."""
        if self.written:
            column, value = self.written[row].get(column, (column, value))
        told = "empty cell" if value is None else repr(value)
        return f"{self.path}, row {self.numbers[row]}, column {column}: {told}: {what}"

    def rename(self, names: dict[str, str]) -> Table:
        """The same table under other column names; names that are not there are passed over."""
        rows = tuple({names.get(key, key): value for key, value in row.items()} for row in self.rows)
        return replace(self, columns=tuple(names.get(c, c) for c in self.columns), rows=rows)


def raise_all(problems: Sequence[str]) -> None:
    """InputError with every problem; past `MAX_PROBLEMS` they are counted."""
    if len(problems) > MAX_PROBLEMS:
        more = len(problems) - MAX_PROBLEMS
        raise InputError([*problems[:MAX_PROBLEMS], f"… and {more} more problems of these kinds"])
    if problems:
        raise InputError(problems)


def read_table(path: str | Path) -> Table:
    """Read a CSV (UTF-8, commas, `#` comment lines) or Parquet file; InputError if that cannot be."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable CSV or Parquet file") from None
    digest = hashlib.sha256(data).hexdigest()
    table = _read_parquet(path, data, digest) if data[:4] == b"PAR1" else _read_csv(path, data, digest)
    if not table.rows:
        raise InputError(f"{path}: the table is empty; it needs a header and at least one row")
    return table


def _read_parquet(path: Path, data: bytes, digest: str) -> Table:
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    if named := [name for name in frame.index.names if name is not None and name not in frame.columns]:
        frame = frame.reset_index(level=named)  # a table may be indexed by its subjects
    frame.columns = [str(c) for c in frame.columns]
    frame = frame.astype(object).where(frame.notna(), None)
    rows = tuple({str(k): v for k, v in row.items()} for row in frame.to_dict("records"))
    return Table(path, digest, tuple(frame.columns), rows, tuple(range(1, len(rows) + 1)))


def _read_csv(path: Path, data: bytes, digest: str) -> Table:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, row {line}: not UTF-8 text; save the table as CSV in UTF-8, or as Parquet") from None
    if any("\0" in line for line in lines):
        raise InputError(f"{path}: not a text file; save the table as CSV in UTF-8, or as Parquet")
    comments = tuple(line.lstrip("# ").rstrip(", ") for line in lines if line.startswith("#"))
    # A comment or blank line becomes an empty record, so that the reader's line numbers stay those of the file.
    reader = csv.reader(("" if line.startswith("#") else line) + "\n" for line in lines)
    try:
        records = [(reader.line_num, [cell.strip() for cell in record]) for record in reader if any(record)]
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: not a CSV table ({error}); check the quotes") from None
    if not records:
        return Table(path, digest, (), (), ())
    header = tuple(records[0][1])
    _check_header(path, records[0][0], header)
    raise_all(
        [
            f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; check commas and quotes"
            for number, cells in records[1:]
            if len(cells) != len(header)
        ]
    )
    rows = tuple(dict(zip(header, (cell or None for cell in cells))) for _, cells in records[1:])
    return Table(path, digest, header, rows, tuple(number for number, _ in records[1:]), comments)


def _check_header(path: Path, number: int, header: tuple[str, ...]) -> None:
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise InputError(f"{path}, row {number}: columns are separated by ';' or tabs; save it with commas")
    problems = [
        f"{path}, row {number}: column {i} has no name; name it or remove it" for i, c in enumerate(header, 1) if not c
    ]
    twice = sorted({c for c in header if c and header.count(c) > 1})
    problems += [f"{path}, row {number}: column {c} appears {header.count(c)} times; keep one" for c in twice]
    raise_all(problems)


def column_problems(table: Table, required: Iterable[str], optional: Iterable[str] | None = None) -> list[str]:
    """Missing columns and, where `optional` is given, unknown ones, each with the nearest right name."""
    required = list(required)
    known = [*required, *(optional or ())]
    missing = [c for c in required if c not in table.columns]
    problems = []
    if optional is not None:
        for column in (c for c in table.columns if c not in known):
            near = difflib.get_close_matches(column, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"remove it; known columns: {', '.join(known)}"
            problems.append(f"{table.path}: unknown column {column}; {remedy}")
    for column in missing:
        spare = [c for c in table.columns if c not in known]
        near = [c for c in spare if c.lower() == column.split("_")[0]] or difflib.get_close_matches(column, spare, n=1)
        remedy = f"rename {near[0]}" if near else "add it"
        problems.append(f"{table.path}: column {column} is missing; {remedy} (needed: {', '.join(required)})")
    return problems


def parse_rows(table: Table, model: type[Row]) -> tuple[dict[int, Row], list[str]]:
    """Each row as a `model`, by position, and the problems of all the rows that are none."""
    parsed: dict[int, Row] = {}
    problems: list[str] = []
    for i, row in enumerate(table.rows):
        cells = {name: row.get(name) for name in model.model_fields if name in row}
        try:
            parsed[i] = model.model_validate(cells)
        except ValidationError as error:
            for item in error.errors():
                column = str(item["loc"][0])
                cause = item.get("ctx", {}).get("error")
                problems.append(table.problem(i, column, row.get(column), str(cause or item["msg"])))
    return parsed, problems


def repeated(table: Table, column: str) -> list[str]:
    """A problem for every cell of a column that names something already named, by another case or not."""
    first: dict[str, int] = {}
    problems = []
    for i, cell in enumerate(row.get(column) for row in table.rows):
        if cell is None:
            continue
        number = first.setdefault(str(cell).casefold(), table.numbers[i])
        if number != table.numbers[i]:
            problems.append(table.problem(i, column, cell, f"already in row {number}; give each its own"))
    return problems
