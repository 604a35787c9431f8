"""A cohort's tables as they come: the names of their columns, who is in them, and what cannot be a measurement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vtrial.records import HIGHEST_SUV, LOWEST_SUV, InputError

LIVER_RATIO = "suv_liver_ratio"  # organ SUVmean over liver SUVmean of the same subject: free of dose and timing
METRICS = ("volume_ml", "hu_mean", "suv_mean", "suv_sd", "suv_max", "suv_peak", "suv_p95")
PERSON = ("sex", "age_years", "height_cm", "weight_kg", "bmi", "diagnosis", "stratum", "index")
ROW = "row"  # name of an index that holds row numbers
MAX_PROBLEMS = 50
_IN_BECQUEREL = 1000.0  # a PET left in Bq/ml has nothing below this; one hot voxel of a PET in SUV may be above
_LOWEST = {"hu_mean": -np.inf, "volume_ml": 0.0, "suv_sd": 0.0}  # of the others: LOWEST_SUV
_NAMES = {"age": "age_years", "height": "height_cm", "weight": "weight_kg", "subject": "subject_id", "id": "subject_id"}
_SEXES = {"F": ("f", "female", "w", "woman", "women"), "M": ("m", "male", "man", "men")}
_SEX = {word: sex for sex, words in _SEXES.items() for word in words}
_REASONS = 8  # reasons, and organs for each, that a note lists


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


def numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with the numbers of its rows as index, from 1, unless it has those of the file that it came from."""
    return frame if frame.index.name == ROW else frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name=ROW))


def texts_of(table: pd.DataFrame, column: str) -> set[str]:
    """What a column of text says, but for empty cells."""
    return set(table[column].dropna().astype(str)) - {""} if column in table.columns else set()


def need(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """InputError where columns are missing."""
    have = ", ".join(map(str, frame.columns))
    refuse([f"{name}: column {c} is missing; add it (there are: {have})" for c in columns if c not in frame.columns])


def refuse(problems: list[str]) -> None:
    """InputError with these problems, if there are any, and of very many the first."""
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"… and {len(problems) - MAX_PROBLEMS} more problems of these kinds"]
    if problems:
        raise InputError(problems)


def subjects_in(name: str, measurements: pd.DataFrame) -> pd.DataFrame:
    """The subjects of a table of measurements, one row each; InputError for one with two sexes."""
    known = [c for c in (*PERSON, "status") if c in measurements.columns]
    if "sex" in known:
        first: dict[str, tuple[int, str]] = {}
        problems: dict[str, str] = {}
        rows = zip(measurements.index, measurements["subject_id"].astype(str), _written(measurements["sex"]))
        for row, subject, text in rows:
            earlier, said = first.setdefault(subject, (row, text))
            if _SEX.get(text.lower()) != _SEX.get(said.lower()):
                told = f"{text!r} in row {row}, but {said!r} in row {earlier}"
                problems.setdefault(subject, f"{name}, subject {subject}, column sex: {told}; mend it")
        refuse(list(problems.values()))
    return measurements[["subject_id", *known]].drop_duplicates("subject_id")


def _written(sexes: pd.Series[str]) -> pd.Series[str]:
    return sexes.astype(str).str.strip()


def people_of(name: str, subjects: pd.DataFrame, measured: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """Subjects that are ok and measured, and what was left out. The index has the number of each row."""
    need(name, subjects, ("subject_id", "sex"))
    people = subjects[["subject_id", *(c for c in (*PERSON, "status") if c in subjects.columns)]].copy()
    people["subject_id"] = people["subject_id"].astype(str)
    if "index" not in people.columns:  # the row of the table, by which twins made from it are paired
        people["index"] = np.arange(len(people))
    written = _written(people["sex"])
    people["sex"] = written.str.lower().map(_SEX)
    asked = people["status"] == "ok" if "status" in people.columns else pd.Series(True, index=people.index)
    words = "; ".join(f"{sex}: {', '.join(known)}" for sex, known in _SEXES.items())
    problems = [
        f"{name}, row {row}, subject {subject}, column sex: {text!r} is neither F nor M ({words}); mend it or drop the "
        "subject"
        for row, subject, text in zip(people.index, people["subject_id"], written)
        if asked[row] and text.lower() not in _SEX
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
    refuse(problems)
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


def missing_notes(name: str, table: pd.DataFrame) -> list[str]:
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


def value_problems(name: str, table: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """What cannot be a measurement; told by subject and organ, which outlive sorting and filtering of a file."""
    where = table["subject_id"].astype(str) + ", organ " + table["organ"].astype(str)
    problems = [
        f"{name}, subject {w}: measured twice; keep one row" for w in where[table.duplicated(["subject_id", "organ"])]
    ]
    for metric in metrics:
        number = pd.to_numeric(table[metric], errors="coerce").astype(float)
        text = table[metric].notna() & number.isna()
        suv, lowest = metric.startswith("suv"), _LOWEST.get(metric, LOWEST_SUV)
        beyond, all_high = number > HIGHEST_SUV, number.groupby(table["subject_id"]).transform("min") > _IN_BECQUEREL
        checks: list[tuple[pd.Series[bool], str]] = [
            (text, "not a number; mend it, or leave the cell empty"),
            (number.abs() == np.inf, "infinite; measure this subject again or leave the cell empty"),
            (number < lowest, f"below {lowest:g}; leave the cell empty if it was not measured"),
            (suv & (beyond | all_high) & (number < np.inf), "beyond any SUV, perhaps Bq/ml; convert to g/ml"),
        ]
        for wrong, what in checks:
            pairs = zip(where[wrong], table.loc[wrong, metric])
            problems += [f"{name}, subject {w}, column {metric}: {v!r}: {what}" for w, v in pairs]
        if not text.any():
            table[metric] = number
    return problems
