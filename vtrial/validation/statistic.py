"""The per-subject statistic: what was measured in each subject, as a matrix of subjects by cells.

A cell is one organ and one metric. What was not measured is NaN and stays so; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vtrial.records import InputError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Cell = tuple[str, str]  # organ, metric

LIVER_RATIO = "suv_liver_ratio"  # organ SUVmean over liver SUVmean of the same subject: free of dose and timing
METRICS = ("volume_ml", "hu_mean", "suv_mean", "suv_sd", "suv_max", "suv_peak", "suv_p95")
BEYOND_ANY_SUV = 1000.0  # g/ml; a PET left in Bq/ml is in the thousands
LOWEST_SUV = -50.0  # as in `vtrial.measurement.scan`: reconstructions may dip below zero, but not so far
CENSORED_AT_SUV = 25.0  # what a flag `censored` says was reached, and where the PET of twins ends
_LOWEST = {"hu_mean": -np.inf, "volume_ml": 0.0, "suv_sd": 0.0}  # of the others: LOWEST_SUV
PERSON = ("sex", "age_years", "height_cm", "weight_kg", "bmi", "diagnosis", "stratum", "index")
_NAMES = {"age": "age_years", "height": "height_cm", "weight": "weight_kg", "subject": "subject_id", "id": "subject_id"}
MAX_PROBLEMS = 50
_REASONS = 8  # reasons, and organs for each, that a note lists


@dataclass(frozen=True)
class Cohort:
    """Measured subjects.

    `people` has one row a subject, indexed by subject_id, with the columns of `PERSON` that are known. `values` and
    `ceiling` are (subjects, cells): the measurement (NaN: missing), and whether it reached the SUV ceiling. `notes`
    count what was left out. `segmenter` is "" where unknown.
    """

    name: str
    people: pd.DataFrame
    cells: tuple[Cell, ...]
    values: Array
    ceiling: Mask
    notes: tuple[str, ...] = ()
    segmenter: str = ""

    def __len__(self) -> int:
        return len(self.people)

    def column(self, cell: Cell) -> Array:
        """Values of one cell, (subjects,); all NaN where the cohort lacks it."""
        return self.values[:, self.cells.index(cell)] if cell in self.cells else np.full(len(self), np.nan)

    def select(self, cells: Sequence[Cell]) -> tuple[Array, Mask]:
        """Values and ceilings of some cells, (subjects, cells); NaN and False where the cohort lacks one."""
        values, ceiling = np.full((len(self), len(cells)), np.nan), np.zeros((len(self), len(cells)), dtype=bool)
        place = {cell: i for i, cell in enumerate(self.cells)}
        for j, cell in enumerate(cells):
            if cell in place:
                values[:, j], ceiling[:, j] = self.values[:, place[cell]], self.ceiling[:, place[cell]]
        return values, ceiling

    def rows(self, positions: Sequence[int] | NDArray[np.intp]) -> Cohort:
        """The cohort with the subjects at these positions, in this order."""
        at = np.asarray(positions, dtype=np.intp)
        return replace(self, people=self.people.iloc[at], values=self.values[at], ceiling=self.ceiling[at])


def usual_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with vtrial's column names: lower case, `age` for `age_years` and so on.

    Of columns that would get one name the one that has it stays, else the one that has it but for case, else the first.
    """
    lower = [str(c).strip().lower() for c in frame.columns]
    usual = [_NAMES.get(name, name) for name in lower]
    chosen: dict[str, int] = {}
    for i in sorted(range(len(usual)), key=lambda i: (frame.columns[i] != usual[i], lower[i] != usual[i])):
        chosen.setdefault(usual[i], i)
    kept = sorted(chosen.values())
    return frame.iloc[:, kept].set_axis([usual[i] for i in kept], axis=1)


def cohort_of(
    name: str,
    measurements: pd.DataFrame,
    subjects: pd.DataFrame | None = None,
    *,
    suv_ceiling: float = 25.0,
    segmenter: str = "",
) -> Cohort:
    """A cohort from the tables of a run, or from any long table of measurements.

    `measurements` has one row a subject and organ: subject_id, organ, and metrics; optional `touches_border` (volumes
    of such organs are not whole and count as missing) and `censored`. `subjects` has one row a subject; without it its
    columns are looked for in `measurements`. Subjects whose `status` is not ok, or that have no measurement, are
    left out and counted in the notes. Columns `segmenter` and `caution` tell who drew the masks, if the argument
    does not, and why not to trust them. SUVmax at or beyond `suv_ceiling` (g/ml) is set to it and marked.

    InputError, with all problems at once: missing columns, a sex other than F and M, an organ measured twice in a
    subject, values that are infinite, negative where they cannot be, or beyond any SUV; a `suv_ceiling` beyond 25 where
    all SUVmax end there.
    """
    measurements = usual_names(measurements)
    _need(name, measurements, ("subject_id", "organ"))
    metrics = [m for m in (*METRICS, LIVER_RATIO) if m in measurements.columns]
    if not metrics:
        raise InputError(f"{name}: no column of measurements; it needs one of {', '.join(METRICS)}")
    if subjects is None:
        known = [c for c in (*PERSON, "status") if c in measurements.columns]
        subjects = measurements[["subject_id", *known]].drop_duplicates("subject_id")
    people, notes = _people(name, usual_names(subjects), set(measurements["subject_id"].astype(str)))
    _refuse(_value_problems(name, measurements, metrics))

    drawn_by, cautions = (sorted(_texts(measurements, column)) for column in ("segmenter", "caution"))
    notes += [f"{name}: {caution}" for caution in cautions]
    notes += _missing_notes(name, measurements[measurements["subject_id"].astype(str).isin(people.index)])

    organs = [str(o) for o in pd.unique(measurements["organ"])]
    rows = people.index.get_indexer(pd.Index(measurements["subject_id"].astype(str)))
    cols = pd.Index(organs).get_indexer(pd.Index(measurements["organ"].astype(str)))
    at = rows >= 0
    cube = np.full((len(people), len(organs), len(metrics)), np.nan)
    cube[rows[at], cols[at]] = measurements.loc[at, metrics].to_numpy(dtype=float)
    flags = {f: _flag(measurements, f, rows, cols, cube.shape[:2]) for f in ("touches_border", "censored")}
    reached = np.zeros(cube.shape, dtype=bool)
    if "volume_ml" in metrics:
        volumes = cube[:, :, metrics.index("volume_ml")]
        cut = flags["touches_border"] & np.isfinite(volumes)
        volumes[cut] = np.nan
        notes += [f"{name}: {cut.sum()} volumes of organs cut by the field of view are left out"] if cut.any() else []
    if "suv_max" in metrics:
        k = metrics.index("suv_max")
        cube[:, :, k], reached[:, :, k] = _at_ceiling(name, cube[:, :, k], flags["censored"], suv_ceiling)
    cells = [(o, m) for o in organs for m in metrics]
    values, ceiling = cube.reshape(len(people), -1), reached.reshape(len(people), -1)
    if "suv_mean" in metrics and LIVER_RATIO not in metrics and "liver" in organs:
        suv = cube[:, :, metrics.index("suv_mean")]
        others = [i for i, o in enumerate(organs) if o != "liver"]
        liver = suv[:, [organs.index("liver")]]
        values = np.hstack([values, suv[:, others] / np.where(liver > 0, liver, np.nan)])
        ceiling = np.hstack([ceiling, np.zeros((len(people), len(others)), dtype=bool)])
        cells += [(organs[i], LIVER_RATIO) for i in others]
    drawers = segmenter or ", ".join(drawn_by)
    return _with_numbers(Cohort(name, people, tuple(cells), values, ceiling, tuple(notes), drawers))


def _at_ceiling(name: str, suv_max: Array, flagged: Mask, ceiling: float) -> tuple[Array, Mask]:
    """SUVmax up to the ceiling, and where it reached that; a flag tells nothing of a ceiling above its own."""
    reached = suv_max >= ceiling
    if ceiling <= CENSORED_AT_SUV:
        reached |= flagged
    elif flagged.any() and not (suv_max > CENSORED_AT_SUV * (1.0 + 1e-4)).any():
        raise InputError(
            f"{name}: all SUVmax end at {CENSORED_AT_SUV:g}, so that nothing is known up to a suv_ceiling of "
            f"{ceiling:g}; set that to {CENSORED_AT_SUV:g} or less"
        )
    return np.where(reached, ceiling, suv_max), reached


def _with_numbers(cohort: Cohort) -> Cohort:
    """The cohort without subjects in whom nothing at all could be measured, and a note of how many those are."""
    there = np.isfinite(cohort.values).any(axis=1)
    if there.all():
        return cohort
    if not there.any():
        raise InputError(f"{cohort.name}: no subject has a single measurement; measure it again")
    note = f"{cohort.name}: nothing could be measured in {(~there).sum()} of {len(cohort)} subjects: left out"
    return replace(cohort.rows(np.flatnonzero(there)), notes=(*cohort.notes, note))


def _texts(table: pd.DataFrame, column: str) -> set[str]:
    """What a column of text says, but for empty cells."""
    return set(table[column].dropna().astype(str)) - {""} if column in table.columns else set()


def _need(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    have = ", ".join(map(str, frame.columns))
    _refuse([f"{name}: column {c} is missing; add it (there are: {have})" for c in columns if c not in frame.columns])


def _refuse(problems: list[str]) -> None:
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"… and {len(problems) - MAX_PROBLEMS} more problems of these kinds"]
    if problems:
        raise InputError(problems)


def _people(name: str, subjects: pd.DataFrame, measured: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """Subjects that are ok and measured, and what was left out."""
    _need(name, subjects, ("subject_id", "sex"))
    people = subjects[["subject_id", *(c for c in (*PERSON, "status") if c in subjects.columns)]].copy()
    people["subject_id"] = people["subject_id"].astype(str)
    if "index" not in people.columns:  # the row of the table, by which twins made from it are paired
        people["index"] = np.arange(len(people))
    # "F" or "female", "M" or "male", by any case: what tables of the wild hold.
    people["sex"] = people["sex"].astype(str).str.strip().str.upper().str[:1]
    problems = [
        f"{name}, subject {row.subject_id}, column sex: {row.sex!r} is neither F nor M; mend it or drop the subject"
        for row in people[~people["sex"].isin(["F", "M"])].itertuples()
    ]
    twice = people.loc[people["subject_id"].duplicated(), "subject_id"].unique()
    problems += [f"{name}, subject {s}: appears twice among the subjects; keep one row" for s in twice]
    for column in ("age_years", "height_cm", "weight_kg", "bmi"):
        if column in people.columns:
            number = pd.to_numeric(people[column], errors="coerce").astype(float)
            wrong = people[column].notna() & (~np.isfinite(number) | (number < 0))
            problems += [
                f"{name}, subject {s}, column {column}: {v!r} is no such number; mend it or leave it empty"
                for s, v in people.loc[wrong, ["subject_id", column]].itertuples(index=False)
            ]
            people[column] = number
    _refuse(problems)
    notes = []
    if "status" in people.columns:
        failed = people["status"] != "ok"
        notes += (
            [f"{name}: {failed.sum()} of {len(people)} subjects are not finished: left out"] if failed.any() else []
        )
        people = people[~failed].drop(columns="status")
    unmeasured = ~people["subject_id"].isin(measured)
    if unmeasured.any():
        notes.append(f"{name}: {unmeasured.sum()} of {len(people)} subjects have no measurements yet: left out")
    if "bmi" not in people.columns and {"height_cm", "weight_kg"} <= set(people.columns):
        people["bmi"] = people["weight_kg"] / (people["height_cm"] / 100.0) ** 2
    people = people[~unmeasured].set_index("subject_id")
    if people.empty:
        raise InputError(f"{name}: no subject is both ok and measured; measure the run first")
    return people, notes


def _missing_notes(name: str, table: pd.DataFrame) -> list[str]:
    """Organs without numbers, counted by the reason that the measurement gave; the rarest reasons together."""
    if "missing" not in table.columns:
        return []
    reasons = table["missing"].astype(object).fillna("").astype(str)
    counts = reasons[reasons != ""].value_counts()
    notes = []
    for reason, count in counts.head(_REASONS).items():
        organs = table.loc[reasons == reason, "organ"].value_counts()
        told = ", ".join(f"{organ} {n}" for organ, n in organs.head(_REASONS).items())
        notes.append(
            f"{name}: {count} organs not measured ({reason}): {told}" + (", …" if len(organs) > _REASONS else "")
        )
    rest = int(counts.iloc[_REASONS:].sum())
    return [*notes, f"{name}: {rest} organs not measured for other reasons"] if rest else notes


def _value_problems(name: str, table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """What cannot be a measurement; told by subject and organ, which outlive sorting and filtering of a file."""
    where = table["subject_id"].astype(str) + ", organ " + table["organ"].astype(str)
    problems = [
        f"{name}, subject {w}: measured twice; keep one row" for w in where[table.duplicated(["subject_id", "organ"])]
    ]
    for metric in metrics:
        number = pd.to_numeric(table[metric], errors="coerce").astype(float)
        text = table[metric].notna() & number.isna()
        suv, lowest = metric.startswith("suv"), _LOWEST.get(metric, LOWEST_SUV)
        checks: list[tuple[pd.Series[bool], str]] = [
            (text, "not a number; mend it, or leave the cell empty"),
            (number.abs() == np.inf, "infinite; measure this subject again or leave the cell empty"),
            (number < lowest, f"below {lowest:g}; leave the cell empty if it was not measured"),
            ((number > BEYOND_ANY_SUV) & (number < np.inf) & suv, "beyond any SUV, perhaps Bq/ml; convert to g/ml"),
        ]
        for wrong, what in checks:
            pairs = zip(where[wrong], table.loc[wrong, metric])
            problems += [f"{name}, subject {w}, column {metric}: {v!r}: {what}" for w, v in pairs]
        if not text.any():
            table[metric] = number
    return problems


def _flag(
    table: pd.DataFrame, column: str, rows: NDArray[np.intp], cols: NDArray[np.intp], shape: Sequence[int]
) -> Mask:
    """A yes/no column as (subjects, organs); False where there is no such column or cell."""
    flags = np.zeros(tuple(shape), dtype=bool)
    if column in table.columns:
        yes = table[column].astype(str).str.lower().isin(["true", "1", "1.0", "yes"]).to_numpy() & (rows >= 0)
        flags[rows[yes], cols[yes]] = True
    return flags
