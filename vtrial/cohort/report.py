"""What recruiting gave, held against what the spec asked: and the subjects as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vtrial.cohort.copula import outside
from vtrial.cohort.recruit import fit_stratum
from vtrial.cohort.spec import CohortSpec, StrataSpec, Stratum
from vtrial.records import InputError, Subject
from vtrial.storage import write_atomic

VARIABLES = ("age_years", "height_cm", "weight_kg", "bmi")
PAIRS = (("age_years", "height_cm"), ("age_years", "weight_kg"), ("height_cm", "weight_kg"))
_MAX_GROUPS = 16  # on one screen


@dataclass(frozen=True)
class Realised:
    """Mean and SD (ddof 1; None for one person) of one variable in a group."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class People:
    """Recruited people of one kind: by `VARIABLES` and, in the order of `PAIRS`, their Pearson correlations.

    A correlation is None for fewer than three people or where a variable does not vary.
    """

    name: str
    n: int
    values: dict[str, Realised]
    correlations: tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Truncation:
    """What the limits of a stratum did to one variable.

    `mean, sd` are stated, `mean_met, sd_met` what truncation allows of them; `outside` is the part of the uncut normal
    that lies beyond the limits.
    """

    stratum: str
    variable: str
    mean: float
    sd: float
    mean_met: float
    sd_met: float
    outside: float


@dataclass(frozen=True)
class Dependence:
    """A correlation that a stratum states, and the one that its marginals allow."""

    stratum: str
    pair: str
    stated: float
    met: float


@dataclass(frozen=True)
class RecruitReport:
    """Recruited people by sex and by stratum, beside what the spec states and truncation allows.

    `shares` are those stated, made to add up to 1; `redrawn` is, by stratum, the part of draws refused by joint limits.
    """

    spec: str
    n: int
    by_sex: tuple[People, ...]
    by_stratum: tuple[People, ...]
    shares: dict[str, float]
    truncation: tuple[Truncation, ...] = ()
    dependence: tuple[Dependence, ...] = ()
    redrawn: tuple[tuple[str, float], ...] = ()
    ignored_columns: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarize(subjects: Sequence[Subject], spec: CohortSpec) -> RecruitReport:
    """Count and measure the recruited; InputError for nobody."""
    if not subjects:
        raise InputError(f"{spec.path}: nobody was recruited; give n of 1 or more")
    frame = subjects_frame(subjects)
    strata = spec.strata if isinstance(spec, StrataSpec) else ()
    total = sum(s.share for s in strata)
    names = [s.name for s in strata] or sorted(set(frame["stratum"]) - {""})
    return RecruitReport(
        spec=str(spec.path),
        n=len(subjects),
        by_sex=tuple(_measured(sex, frame[frame["sex"] == sex]) for sex in sorted(set(frame["sex"]))),
        by_stratum=tuple(_measured(name, frame[frame["stratum"] == name]) for name in names),
        shares={s.name: s.share / total for s in strata},
        truncation=tuple(row for s in strata for row in _truncation(s)),
        dependence=tuple(row for s in strata for row in _dependence(s)),
        redrawn=tuple((s.name, fit_stratum(s).refused) for s in strata if s.weight_limits or s.bmi_limits),
        ignored_columns=() if isinstance(spec, StrataSpec) else spec.ignored,
    )


def _measured(name: str, people: pd.DataFrame) -> People:
    n = len(people)
    values = {v: Realised(float(people[v].mean()), float(people[v].std()) if n > 1 else None) for v in VARIABLES if n}
    correlations = [_pearson(people[a].to_numpy(float), people[b].to_numpy(float)) for a, b in PAIRS]
    return People(name, n, values, (correlations[0], correlations[1], correlations[2]))


def _pearson(
    first: np.ndarray[Any, np.dtype[np.float64]], second: np.ndarray[Any, np.dtype[np.float64]]
) -> float | None:
    if len(first) < 3 or np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _names(stratum: Stratum) -> tuple[str, str, str]:
    return "age_years", "height_cm", "weight_kg" if stratum.size_is == "weight" else "bmi"


def _truncation(stratum: Stratum) -> list[Truncation]:
    fitted = fit_stratum(stratum)
    stated = (stratum.age, stratum.height, stratum.size)
    return [
        Truncation(stratum.name, name, m.mean, m.sd, mean, sd, outside(m))
        for name, m, mean, sd in zip(_names(stratum), stated, fitted.means, fitted.sds)
    ]


def _dependence(stratum: Stratum) -> list[Dependence]:
    age, height, size = (name.split("_")[0] for name in _names(stratum))
    pairs = (f"{age}–{height}", f"{age}–{size}", f"{height}–{size}")
    met = fit_stratum(stratum).correlations
    constant = [m.sd == 0.0 for m in (stratum.age, stratum.height, stratum.size)]
    varying = [not (constant[i] or constant[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    rows = zip(varying, pairs, stratum.correlations, met)
    return [Dependence(stratum.name, pair, stated, had) for varies, pair, stated, had in rows if varies]


def render(report: RecruitReport) -> RenderableType:
    """One screen of 80 columns: the people by sex and stratum, then what truncation kept from being met."""
    table = Table(title=f"{report.n} recruited by {report.spec}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")  # the one column that may be narrowed
    for column in ("n", "age", "height", "weight", "BMI", "r a–h  a–w  h–w"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in (*report.by_sex, *report.by_stratum[:_MAX_GROUPS]):
        cells = [_plus_minus(group.values.get(v)) for v in VARIABLES]
        correlations = " ".join("  – " if r is None else f"{r:+.2f}".replace("0.", ".") for r in group.correlations)
        table.add_row(group.name, str(group.n), *cells, correlations)
    hidden = len(report.by_stratum) - _MAX_GROUPS
    notes = [f"… and {hidden} more strata"] if hidden > 0 else []
    notes.append("years, cm, kg, kg/m²: mean±SD; r of age–height, age–weight, height–weight")
    if report.shares:
        off = {group.name: group.n / report.n - report.shares[group.name] for group in report.by_stratum}
        name = max(off, key=lambda key: abs(off[key]))
        notes.append(f"shares: furthest from the spec is {name}, by {100 * off[name]:+.1f} points")
    notes += truncation_notes(report)
    if report.ignored_columns:
        notes.append(f"columns that a run writes itself, read past: {', '.join(report.ignored_columns)}")
    return Group(table, *(Text(note) for note in notes))


def _plus_minus(value: Realised | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.1f}" if value.sd is None else f"{value.mean:.1f}±{value.sd:.1f}"


def truncation_notes(report: RecruitReport) -> list[str]:
    """What the limits did, in words: the most cut variable, and every stated SD or correlation that cannot be met."""
    if not report.truncation:
        return []
    most = max(report.truncation, key=lambda row: row.outside)
    missed = [
        row
        for row in report.truncation
        if abs(row.sd_met - row.sd) > 0.005 * row.sd or abs(row.mean_met - row.mean) > 0.01 * row.sd
    ]
    unmet = [row for row in report.dependence if abs(row.met - row.stated) > 0.01]
    notes = [
        f"truncation: at most {most.outside:.1%} of a plain normal would lie beyond the limits ({most.variable} of "
        f"{most.stratum}); means and SDs are met after truncation" + (", except:" if missed else "")
    ]
    notes += [
        f"  {row.stratum}, {row.variable}: {row.mean:g}±{row.sd:g} cannot be had within the limits; it is "
        f"{row.mean_met:.2f}±{row.sd_met:.2f}"
        for row in missed
    ]
    notes += [f"  {row.stratum}: r {row.pair} {row.stated:g} cannot be had; it is {row.met:.2f}" for row in unmet]
    if report.redrawn:
        name, part = max(report.redrawn, key=lambda row: row[1])
        notes.append(f"joint limits of weight and BMI: at most {part:.1%} of draws are drawn again ({name})")
    return notes


def subjects_frame(subjects: Sequence[Subject]) -> pd.DataFrame:
    """One row for each subject: who, body (years, cm, kg, kg/m²), then the carried columns."""
    columns = ["subject_id", "index", "seed", "stratum", "sex", "age_years", "height_cm", "weight_kg", "bmi"]
    frame = pd.DataFrame([[getattr(s, c) for c in columns] for s in subjects], columns=columns)
    extra = pd.DataFrame([dict(s.extra) for s in subjects], index=frame.index)
    return pd.concat([frame, extra], axis=1)


def write_subjects(subjects: Sequence[Subject], path: str | Path) -> None:
    """Write `subjects_frame` as `.csv` or `.parquet`, whole or not at all; InputError where that cannot be."""
    path = Path(path)
    frame = subjects_frame(subjects)
    if path.suffix == ".csv":
        data = frame.to_csv(index=False).encode()
    elif path.suffix == ".parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        data = buffer.getvalue()
    else:
        raise InputError(f"{path}: subjects are written as .csv or .parquet; give the file one of these endings")
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
