"""Real cohorts to compare with: published summaries that come with the package, and any table of the user's.

A summary is n, mean and SD by sex, organ and metric; a table has every subject's measurements. Both may bring
correlations between organs and slopes on body size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pyarrow.lib import ArrowException
from pydantic import BaseModel, Field

from vtrial.cohort.table import Table, column_problems, parse_rows, raise_all, read_table
from vtrial.records import MODEL_SUV, InputError, Sex
from vtrial.validation.inference import Moments
from vtrial.validation.scale import Ends, ct_ends
from vtrial.validation.statistic import Cell, Cohort, cohort_of
from vtrial.validation.tables import METRICS, ROW, usual_names

_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "references"
_ABOUT = ("title", "role", "source", "licence", "segmenter", "note")
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _SummaryRow(BaseModel):
    organ: str
    metric: str
    sex: Sex
    n: Annotated[int, Field(ge=1)]
    mean: Finite
    sd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    note: str | None = None


class _SlopeRow(BaseModel):
    organ: str
    metric: str
    on: str
    adjusted_for: str | None = None
    n: Annotated[int, Field(ge=2)]
    slope: Finite
    se: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    source: str | None = None


class _CorrelationRow(BaseModel):
    organ_a: str
    organ_b: str
    metric: str
    n: Annotated[int, Field(ge=4)]
    r: Annotated[float, Field(ge=-1, le=1)]


@dataclass(frozen=True)
class Summary:
    """A cohort known by n, mean and SD alone. `table` has the columns sex, organ, metric, n, mean, sd, note."""

    name: str
    table: pd.DataFrame
    segmenter: str = ""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Organ and metric of every cell, in the order of the table."""
        return tuple(dict.fromkeys(zip(self.table["organ"], self.table["metric"])))

    @property
    def ends(self) -> Ends:
        """Where its CT ends, by its lungs; of its PET nothing is known."""
        lungs = self.table["organ"].str.startswith("lung") & (self.table["metric"] == "hu_mean")
        return Ends(ct=ct_ends(self.table.loc[lungs, "mean"].to_numpy(dtype=float)))

    def moments(self, sexes: Sequence[str], cells: Sequence[Cell]) -> Moments:
        """Moments of one sex, or of sexes pooled as one group; n is 0 and the rest NaN where a cell is not given."""
        rows = {(r.sex, r.organ, r.metric): r for r in self.table.itertuples()}
        n, mean, sd = np.zeros(len(cells)), np.full(len(cells), np.nan), np.full(len(cells), np.nan)
        for j, (organ, metric) in enumerate(cells):
            found = [rows[key] for s in sexes if (key := (s, organ, metric)) in rows]
            if not found:
                continue
            k, m, s = (np.array([getattr(r, name) for r in found], dtype=float) for name in ("n", "mean", "sd"))
            n[j], mean[j] = k.sum(), (k * m).sum() / k.sum()
            if n[j] > 1:
                sd[j] = np.sqrt((((k - 1) * s**2).sum() + (k * (m - mean[j]) ** 2).sum()) / (n[j] - 1))
        return Moments(n, mean, sd)


@dataclass(frozen=True)
class Reference:
    """A cohort to compare with, and where it comes from.

    `role` is "real", or "synthetic" for published twins. `slopes` has organ, metric, on, adjusted_for, n, slope, se
    (NaN where not published), source; `correlations` organ_a, organ_b, metric, n, r. Both may be empty. `location` is
    the file that it was read from, "" for others.
    """

    name: str
    data: Summary | Cohort
    title: str = ""
    role: str = "real"
    source: str = ""
    licence: str = ""
    segmenter: str = ""
    note: str = ""
    slopes: pd.DataFrame = field(default_factory=pd.DataFrame)
    correlations: pd.DataFrame = field(default_factory=pd.DataFrame)
    location: str = ""

    @property
    def kind(self) -> str:
        """What can be computed from it: "summary" or "subjects"."""
        return "summary" if isinstance(self.data, Summary) else "subjects"

    @property
    def n(self) -> int:
        """Subjects."""
        if isinstance(self.data, Cohort):
            return len(self.data)
        return int(self.data.table.groupby("sex")["n"].max().sum())


def bundled_references() -> dict[str, Path]:
    """Name and file of the references that come with the package."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.csv")) if "." not in path.stem}


def list_references() -> list[Reference]:
    """All bundled references."""
    return [read_reference(name) for name in bundled_references()]


def literature_slopes() -> pd.DataFrame:
    """Published slopes on body size that belong to no bundled cohort, in the form of `Reference.slopes`."""
    return _companion(_FOLDER / "literature.csv", "slopes", _SlopeRow)


def read_reference(
    name_or_path: str | Path, subjects: pd.DataFrame | None = None, *, suv_ceiling: float = MODEL_SUV
) -> Reference:
    """A bundled reference by name, or a table (CSV, Parquet) or measured run folder by path.

    A table is recognised by its columns: organ, metric, sex, n, mean, sd (a summary), or subject_id, organ and metrics
    (subjects). The subjects' sex and further columns are in that table, in `subjects`, or in `subjects.parquet` or
    `subjects.csv` beside it. `#` lines such as "# source: …" of a CSV tell where it comes from.
    InputError: no such name or file, or file, row, column and value of what is wrong in it.
    """
    bundled = bundled_references()
    path = Path(name_or_path)
    if str(name_or_path) in bundled:
        return _from_summary(read_table(bundled[str(name_or_path)]))
    if path.is_dir():
        measured = [path / f"measurements.{kind}" for kind in ("parquet", "csv")]
        found = [p for p in measured if p.is_file()]
        if not found:
            raise InputError(f"{path}: no measurements.parquet in this folder; segment and measure it first")
        path = found[0]
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give a table of measurements, a measured run folder, or one of {', '.join(bundled)}"
        )
    return replace(_from_file(path, subjects, suv_ceiling), location=str(path.resolve()))


def _from_file(path: Path, subjects: pd.DataFrame | None, suv_ceiling: float) -> Reference:
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:  # straight to columns: a large cohort's table has a hundred thousand rows
        try:
            frame, comments = pd.read_parquet(path), tuple[str, ...]()
        except (ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    else:
        table = read_table(path)
        if {"metric", "mean", "n"} <= {c.lower() for c in table.columns}:
            return _from_summary(table)
        frame, comments = _frame(table), table.comments
    columns = set(usual_names(frame).columns)
    if {"metric", "mean", "n"} <= columns:
        return _from_summary(read_table(path))
    if not {"subject_id", "organ"} <= columns:
        raise InputError(
            f"{path}: neither a table of measurements (subject_id, organ, {', '.join(METRICS[:3])}, …) nor a summary "
            f"(organ, metric, sex, n, mean, sd); its columns are {', '.join(map(str, frame.columns))}"
        )
    if subjects is None and "sex" not in columns:
        subjects = _subjects_beside(path)
    about = _about(comments)
    cohort = cohort_of(
        str(path), _numbers(usual_names(frame)), subjects, suv_ceiling=suv_ceiling, segmenter=about.get("segmenter", "")
    )
    name = path.absolute().parent.name if path.stem == "measurements" else path.stem
    return _reference(name, replace(cohort, name=name), about)


def _frame(table: Table) -> pd.DataFrame:
    """A table with the numbers of its rows in the file as index."""
    return pd.DataFrame(list(table.rows), columns=list(table.columns), index=pd.Index(table.numbers, name=ROW))


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Text of a CSV turned into numbers where a whole column is numeric, but for codes, whose zeros count.

    The rest is left to be told as wrong.
    """
    out = frame.copy()
    for column in out.columns:
        if out[column].dtype == object or pd.api.types.is_string_dtype(out[column]):
            number = pd.to_numeric(out[column], errors="coerce")
            if column not in ("subject_id", "diagnosis") and not (number.isna() & out[column].notna()).any():
                out[column] = number
    return out


def _subjects_beside(path: Path) -> pd.DataFrame:
    for name in ("subjects.parquet", "subjects.csv"):
        beside = path.with_name(name)
        if beside.is_file():
            table = read_table(beside)
            return _numbers(usual_names(_frame(table)))
    raise InputError(f"{path}: no column sex, and no subjects.parquet or subjects.csv beside it; add either")


def _about(comments: Sequence[str]) -> dict[str, str]:
    """The `# key: value` lines of a table."""
    pairs = (line.partition(":") for line in comments)
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in _ABOUT}


def _reference(name: str, data: Summary | Cohort, about: dict[str, str]) -> Reference:
    texts = {key: about.get(key, "") for key in _ABOUT}
    return Reference(
        name=name,
        data=data,
        title=texts["title"],
        role=texts["role"] or "real",
        source=texts["source"],
        licence=texts["licence"],
        segmenter=texts["segmenter"],
        note=texts["note"],
    )


def _from_summary(table: Table) -> Reference:
    table = table.rename({c: c.strip().lower() for c in table.columns})
    raise_all(column_problems(table, ("organ", "metric", "sex", "n", "mean", "sd")))
    parsed, problems = parse_rows(table, _SummaryRow)
    seen: dict[tuple[str, str, str], int] = {}
    for i, row in parsed.items():
        first = seen.setdefault((row.sex, row.organ, row.metric), i)
        if first != i:
            where = f"{row.organ} {row.metric} {row.sex} is already in row {table.numbers[first]}"
            problems.append(table.problem(i, "organ", row.organ, f"{where}; keep one"))
    raise_all(problems)
    frame = pd.DataFrame([row.model_dump() for row in parsed.values()])
    frame["sd"] = frame["sd"].astype(float)
    frame["note"] = frame["note"].fillna("")
    about, name = _about(table.comments), table.path.stem
    return replace(
        _reference(name, Summary(name, frame, about.get("segmenter", "")), about),
        slopes=_companion(table.path, "slopes", _SlopeRow),
        correlations=_companion(table.path, "correlations", _CorrelationRow),
    )


def _companion(path: Path, kind: str, model: type[BaseModel]) -> pd.DataFrame:
    """`<name>.slopes.csv` or `<name>.correlations.csv` beside a summary; empty where there is none."""
    beside = path.with_name(f"{path.stem}.{kind}.csv")
    if not beside.is_file():
        return pd.DataFrame(columns=list(model.model_fields))
    table = read_table(beside)
    raise_all(column_problems(table, [name for name, f in model.model_fields.items() if f.is_required()]))
    parsed, problems = parse_rows(table, model)
    raise_all(problems)
    frame = pd.DataFrame([row.model_dump() for row in parsed.values()])
    for column in frame.columns.intersection(["adjusted_for", "source"]):
        frame[column] = frame[column].fillna("")
    return frame.astype({"se": float}) if "se" in frame.columns else frame
