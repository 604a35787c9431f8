"""The per-subject statistic: what was measured in each subject, as a matrix of subjects by cells.

A cell is one organ and one metric. What was not measured is NaN and stays so; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vtrial.records import MODEL_SUV, InputError
from vtrial.validation.scale import AVERAGES, NO_ENDS, Array, Ends, Mask, at_ceiling, ct_ends, cut_averages, pet_ends
from vtrial.validation.tables import (
    LIVER_RATIO,
    METRICS,
    missing_notes,
    need,
    numbered,
    people_of,
    refuse,
    subjects_in,
    texts_of,
    usual_names,
    value_problems,
)

Cell = tuple[str, str]  # organ, metric


@dataclass(frozen=True)
class Cohort:
    """Measured subjects.

    `people` has one row a subject, indexed by subject_id, with the columns of `PERSON` that are known. `values` and
    `ceiling` are (subjects, cells): the measurement (NaN: missing), and whether it reached the SUV ceiling, or, of an
    average, would be another one if the PET ended there. `ends` says which of its scans end where a model's do.
    `notes` count what was left out. `segmenter` is "" where unknown.
    """

    name: str
    people: pd.DataFrame
    cells: tuple[Cell, ...]
    values: Array
    ceiling: Mask
    notes: tuple[str, ...] = ()
    segmenter: str = ""
    ends: Ends = NO_ENDS

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


def cohort_of(
    name: str,
    measurements: pd.DataFrame,
    subjects: pd.DataFrame | None = None,
    *,
    suv_ceiling: float = MODEL_SUV,
    segmenter: str = "",
) -> Cohort:
    """A cohort from the tables of a run, or from any long table of measurements.

    `measurements` has one row a subject and organ: subject_id, organ, and metrics; optional `touches_border` (volumes
    of such organs are not whole and count as missing) and `censored`. `subjects` has one row a subject; without it its
    columns are looked for in `measurements`. Subjects whose `status` is not ok, or that have no measurement, are
    left out and counted in the notes. Columns `segmenter` and `caution` tell who drew the masks, if the argument
    does not, and why not to trust them. What ends with the SUV scale (`scale.ENDING`) is set to `suv_ceiling` (g/ml)
    and marked where it reached that.

    InputError, with all problems at once: missing columns, a sex other than F and M, or two of one subject, an organ
    measured twice in a subject, values that are infinite, negative where they cannot be, or beyond any SUV; a
    `suv_ceiling` beyond 25 where all SUVmax end there.
    """
    measurements = numbered(usual_names(measurements))
    need(name, measurements, ("subject_id", "organ"))
    metrics = [m for m in (*METRICS, LIVER_RATIO) if m in measurements.columns]
    if not metrics:
        raise InputError(f"{name}: no column of measurements; it needs one of {', '.join(METRICS)}")
    if subjects is None:
        subjects = subjects_in(name, measurements)
    people, notes = people_of(name, numbered(usual_names(subjects)), set(measurements["subject_id"].astype(str)))
    refuse(value_problems(name, measurements, metrics))

    drawn_by, cautions = (sorted(texts_of(measurements, column)) for column in ("segmenter", "caution"))
    notes += [f"{name}: {caution}" for caution in cautions]
    notes += missing_notes(name, measurements[measurements["subject_id"].astype(str).isin(people.index)])

    organs = [str(o) for o in pd.unique(measurements["organ"])]
    rows = people.index.get_indexer(pd.Index(measurements["subject_id"].astype(str)))
    cols = pd.Index(organs).get_indexer(pd.Index(measurements["organ"].astype(str)))
    at = rows >= 0
    cube = np.full((len(people), len(organs), len(metrics)), np.nan)
    cube[rows[at], cols[at]] = measurements.loc[at, metrics].to_numpy(dtype=float)
    flags = {f: _flag(measurements, f, rows, cols, cube.shape[:2]) for f in ("touches_border", "censored")}
    if "volume_ml" in metrics:
        volumes = cube[:, :, metrics.index("volume_ml")]
        cut = flags["touches_border"] & np.isfinite(volumes)
        volumes[cut] = np.nan
        notes += [f"{name}: {cut.sum()} volumes of organs cut by the field of view are left out"] if cut.any() else []
    measured = {metric: cube[:, :, k] for k, metric in enumerate(metrics)}
    ends = _ends(organs, measured)
    measured, reached = _at_ceiling(name, _with_ratio(organs, measured), flags["censored"], suv_ceiling, organs)
    cells = [(o, m) for o in organs for m in metrics]
    cells += [(o, m) for m in measured if m not in metrics for o in organs if o != "liver"]
    order = [(organs.index(o), m) for o, m in cells]
    values = np.stack([measured[m][:, i] for i, m in order], axis=1)
    ceiling = np.stack([reached[m][:, i] for i, m in order], axis=1)
    drawers = segmenter or ", ".join(drawn_by)
    return _with_numbers(Cohort(name, people, tuple(cells), values, ceiling, tuple(notes), drawers, ends))


def _ends(organs: Sequence[str], measured: dict[str, Array]) -> Ends:
    lungs = [i for i, organ in enumerate(organs) if organ.startswith("lung")]
    ct = "hu_mean" in measured and ct_ends(measured["hu_mean"][:, lungs])
    return Ends(ct, pet_ends(_uptake(measured)))


def _uptake(measured: dict[str, Array]) -> dict[str, Array]:
    return {metric: values for metric, values in measured.items() if metric.startswith("suv")}


def _with_ratio(organs: Sequence[str], measured: dict[str, Array]) -> dict[str, Array]:
    """The measurements, with every organ's SUVmean over the liver's, unless that is among them or cannot be had."""
    if "suv_mean" not in measured or LIVER_RATIO in measured or "liver" not in organs:
        return measured
    liver = measured["suv_mean"][:, [organs.index("liver")]]
    return measured | {LIVER_RATIO: measured["suv_mean"] / np.where(liver > 0, liver, np.nan)}


def _at_ceiling(
    name: str, measured: dict[str, Array], flagged: Mask, suv_ceiling: float, organs: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Mask]]:
    """The measurements up to the ceiling, and where it has a part in them, by metric, (subjects, organs)."""
    uptake = _uptake(measured)
    values, reached = at_ceiling(name, uptake, flagged, suv_ceiling)
    cut = cut_averages(uptake, flagged)
    of_liver = cut[:, [organs.index("liver")]] if "liver" in organs else False
    averages = {m: cut | of_liver if m == LIVER_RATIO else cut for m in AVERAGES}
    nowhere = np.zeros(flagged.shape, dtype=bool)
    return measured | values, {m: reached.get(m, averages.get(m, nowhere)) for m in measured}


def _with_numbers(cohort: Cohort) -> Cohort:
    """The cohort without subjects in whom nothing at all could be measured, and a note of how many those are."""
    there = np.isfinite(cohort.values).any(axis=1)
    if there.all():
        return cohort
    if not there.any():
        raise InputError(f"{cohort.name}: no subject has a single measurement; measure it again")
    note = f"{cohort.name}: nothing could be measured in {(~there).sum()} of {len(cohort)} subjects: left out"
    return replace(cohort.rows(np.flatnonzero(there)), notes=(*cohort.notes, note))


def _flag(
    table: pd.DataFrame, column: str, rows: NDArray[np.intp], cols: NDArray[np.intp], shape: Sequence[int]
) -> Mask:
    """A yes/no column as (subjects, organs); False where there is no such column or cell."""
    flags = np.zeros(tuple(shape), dtype=bool)
    if column in table.columns:
        yes = table[column].astype(str).str.lower().isin(["true", "1", "1.0", "yes"]).to_numpy() & (rows >= 0)
        flags[rows[yes], cols[yes]] = True
    return flags
