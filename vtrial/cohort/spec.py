"""What a cohort spec says: strata with their distributions, or subjects one by one.

A strata row gives mean, SD, lowest and highest value of age (years), height (cm) and weight (kg) or, in its place,
BMI (kg/m²), and the three correlations between them. Mean and SD are those of the people, after truncation. Beside
`weight_*` the columns `bmi_min, bmi_max` (and beside `bmi_*` the columns `weight_min, weight_max`) bound the two
jointly: who falls outside is drawn again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vtrial.cohort.rows import BmiRow, StratumRow, SubjectRow, WeightRow
from vtrial.cohort.table import Table, column_problems, parse_rows, raise_all, read_table, repeated
from vtrial.records import InputError, Sex, Subject

# What a run writes itself, or works out again: read past, so that a run's own table is a spec.
RUN_COLUMNS = frozenset(
    [
        "index",
        "seed",
        "bmi",
        "extrapolated",
        "status",
        "attempts",
        "seconds",
        "error",
        "spacing_z_mm",
        "device",
        "threads",
    ]
    + [f"{kind}_{what}" for kind in ("ct", "suv", "segmentation") for what in ("path", "sha256")]
)

_MATCH_NAMES = {  # of real tables and DICOM headers
    "sex": ("sex", "gender", "patientsex", "patient_sex"),
    "age_years": ("age_years", "age", "patientage", "patient_age"),
    "height_cm": ("height_cm", "height", "patientsize_cm"),
    "height_m": ("height_m", "patientsize", "patient_size"),
    "weight_kg": ("weight_kg", "weight", "patientweight", "patient_weight"),
    "subject_id": ("subject_id", "subject id", "patient_id", "patient id", "patientid"),
}


@dataclass(frozen=True)
class Marginal:
    """Mean and SD after truncation to [min, max], in the variable's own unit."""

    mean: float
    sd: float
    min: float
    max: float


@dataclass(frozen=True)
class Stratum:
    """A kind of people: `share` of the cohort (relative to the other shares), and how their bodies are distributed.

    `size` is the weight in kg or the BMI in kg/m², as `size_is` says. `correlations` (Pearson) are those of
    age–height, age–size and height–size. `weight_limits` and `bmi_limits` hold jointly.
    """

    name: str
    share: float
    sex: Sex
    age: Marginal
    height: Marginal
    size: Marginal
    size_is: Literal["weight", "bmi"]
    correlations: tuple[float, float, float]
    weight_limits: tuple[float, float] | None = None
    bmi_limits: tuple[float, float] | None = None
    diagnosis: str = ""
    source: str = ""


@dataclass(frozen=True)
class StrataSpec:
    """A cohort told by its strata. `sources` are the comment lines of the file."""

    path: Path
    sha256: str
    strata: tuple[Stratum, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubjectsSpec:
    """A cohort told one by one. `matched`: to be followed row by row, never resampled.

    `ignored` names the columns that a run writes itself and that are read past.
    """

    path: Path
    sha256: str
    subjects: tuple[Subject, ...]
    matched: bool = False
    sources: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


CohortSpec = StrataSpec | SubjectsSpec


def read_spec(path: str | Path) -> CohortSpec:
    """Read a strata or subjects spec, CSV or Parquet, told apart by its columns.

    Raises InputError with all problems of the file: row, column, value, remedy.
    """
    table = read_table(path)
    columns = set(table.columns)
    if "subject_id" in columns or {"age_years", "height_cm"} & columns:
        return _subjects(table, matched=False)
    if {"share", "age_mean", "height_mean"} & columns:
        return _strata(table)
    raise InputError(
        f"{table.path}: neither strata (stratum, share, sex, age_mean, …) nor subjects (subject_id, sex, age_years, "
        f"height_cm, weight_kg); it has the columns {', '.join(table.columns)}; see `cohorts/` for examples"
    )


def match_table(path: str | Path) -> SubjectsSpec:
    """A real cohort, to be matched row by row.

    Columns by their usual names: sex (F, M, female, male), age or age_years (also DICOM's `060Y`), height or height_cm
    (height_m and DICOM's PatientSize are metres), weight or weight_kg; PatientSex, PatientAge, PatientWeight. Without
    a column subject_id or PatientID the rows are called VT000000, VT000001, …. Raises InputError like `read_spec`.
    """
    return _subjects(usual_people(read_table(path)), matched=True)


def usual_people(table: Table) -> Table:
    """A table of real people under our column names, sexes, ages in years and heights in cm; see `match_table`."""
    lower = {column.lower(): column for column in reversed(table.columns)}
    names: dict[str, str] = {}
    for name, aliases in _MATCH_NAMES.items():
        found = name if name in table.columns else next((lower[alias] for alias in aliases if alias in lower), None)
        if found is not None and not (name == "height_m" and "height_cm" in names.values()):
            names[found] = name
    told = {name: (found, found) for found, name in names.items()}
    if "height_m" in told:
        found, _ = told.pop("height_m")
        told["height_cm"] = (found, f"{found} (taken as metres)")
    written = tuple({name: (title, row[found]) for name, (found, title) in told.items()} for row in table.rows)
    table = table.rename(names)
    rows = []
    for i, cells in enumerate(table.rows):
        row: dict[str, Any] = {"subject_id": f"VT{i:06d}", **cells}
        row["sex"], row["age_years"] = _real_sex(row.get("sex")), _real_age(row.get("age_years"))
        if "height_m" in names.values():
            row["height_cm"] = _centimetres(row.pop("height_m"))
        rows.append(row)
    columns = tuple(rows[0])
    known = {c: None for c in columns if c in table.columns or c in ("subject_id", "height_cm")}
    return replace(table, columns=tuple(known), rows=tuple(rows), written=written)


def _real_sex(cell: object) -> object:
    return {"female": "F", "male": "M", "f": "F", "m": "M"}.get(str(cell).strip().lower(), cell)


def _real_age(cell: object) -> object:
    dicom = re.fullmatch(r"(\d{3})([YMWD])", str(cell).strip())
    if dicom is None:
        return cell
    return int(dicom[1]) / {"Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}[dicom[2]]


def _centimetres(metres: object) -> object:
    try:
        return round(float(str(metres)) * 100.0, 4)
    except ValueError:
        return metres


def _strata(table: Table) -> StrataSpec:
    bmi = "bmi_mean" in table.columns and "weight_mean" not in table.columns
    model: type[StratumRow] = BmiRow if bmi else WeightRow
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    optional = [name for name, field in model.model_fields.items() if not field.is_required()]
    problems = column_problems(table, required, optional)
    if {"bmi_mean", "weight_mean"} <= set(table.columns):
        problems.insert(
            0, f"{table.path}: both weight_mean and bmi_mean; give one of them (the other as _min and _max alone)"
        )
    raise_all(problems)
    rows, problems = parse_rows(table, model)
    problems += repeated(table, "stratum")
    raise_all(problems)
    return StrataSpec(table.path, table.sha256, tuple(_stratum(row) for row in rows.values()), table.comments)


def _stratum(row: StratumRow) -> Stratum:
    cells = row.model_dump()
    size: Literal["weight", "bmi"] = "bmi" if isinstance(row, BmiRow) else "weight"

    def marginal(name: str) -> Marginal:
        return Marginal(*(cells[f"{name}_{part}"] for part in ("mean", "sd", "min", "max")))

    def limits(name: str) -> tuple[float, float] | None:
        return None if name == size or cells[f"{name}_min"] is None else (cells[f"{name}_min"], cells[f"{name}_max"])

    return Stratum(
        name=row.stratum, share=row.share, sex=row.sex, age=marginal("age"), height=marginal("height"),
        size=marginal(size), size_is=size,
        correlations=(cells["r_age_height"], cells[f"r_age_{size}"], cells[f"r_height_{size}"]),
        weight_limits=limits("weight"), bmi_limits=limits("bmi"), diagnosis=row.diagnosis, source=row.source,
    )  # fmt: skip


def _subjects(table: Table, *, matched: bool) -> SubjectsSpec:
    raise_all(column_problems(table, SubjectRow.model_fields))
    rows, problems = parse_rows(table, SubjectRow)
    problems += repeated(table, "subject_id")  # also by case alone: their files would meet on some disks
    raise_all(problems)
    own = {*SubjectRow.model_fields, "stratum"}
    further = [c for c in table.columns if c not in own]
    # By any case: beside the run's own `bmi` a `BMI` would be told apart by few who read the run's table.
    ignored = tuple(c for c in further if c.lower() in RUN_COLUMNS)
    carried = [c for c in further if c not in ignored]
    numeric = {c for c in carried if all(_is_number(row[c]) for row in table.rows)}
    subjects = tuple(
        Subject(
            index=i,
            seed=0,
            stratum=str(table.rows[i].get("stratum") or ""),
            extra={c: _carry(table.rows[i][c], c in numeric) for c in carried},
            **row.model_dump(),
        )
        for i, row in rows.items()
    )
    return SubjectsSpec(table.path, table.sha256, subjects, matched, table.comments, ignored)


def _is_number(cell: object) -> bool:
    """Whether a carried CSV cell reads as a number: codes such as `007` do not, nor do typed cells of Parquet.

    Nor do 16 digits or more: beside an empty cell a table keeps whole numbers as floats, which would lose some.
    """
    if cell is None:
        return True
    return isinstance(cell, str) and re.fullmatch(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d+)?", cell) is not None


def _carry(cell: Any, numeric: bool) -> Any:
    if cell is None or not numeric:
        return cell
    return int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell)
