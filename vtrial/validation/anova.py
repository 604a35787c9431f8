"""One-way analysis of variance over several cohorts, from subjects or from printed n, mean and SD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from vtrial.records import InputError
from vtrial.validation.cells import Side
from vtrial.validation.inference import Moments, classical_anova, welch_anova
from vtrial.validation.multiplicity import benjamini_hochberg, holm
from vtrial.validation.references import Reference, Summary
from vtrial.validation.scale import ENDING, ceiling_of
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.sides import find_strata, off_scale, sides_of
from vtrial.validation.statistic import Cell, Cohort


def anova(
    cohorts: Mapping[str, Cohort | Summary | Reference],
    *,
    by: str | Sequence[str] = "sex",
    cells: Sequence[Cell] | None = None,
    settings: AnalysisSettings | None = None,
) -> pd.DataFrame:
    """Whether the means of several cohorts differ, cell by cell (all that two cohorts have, or those of `cells`).

    Welch's test (1951) is the one to go by, as cohorts differ in variance; the classical F (Fisher 1925), which trusts
    in one variance for all, stands beside it. Both need n, mean and SD alone, so that a summary gives what its subjects
    would. Cells that a model's scale decides (`sides.off_scale`) are described and not tested.

    One row a stratum and cell: stratum, organ, metric, groups (cohorts with `min_subjects` and some spread); Welch's f,
    df1, df2, p, with p_holm and p_bh over the family of all rows; f_equal, df2_equal, p_equal of the classical one;
    message; and n_1, mean_1, sd_1, n_2, … of the cohorts, whose names are in `attrs["cohorts"]`.
    InputError for fewer than two cohorts, or none with such strata.
    """
    settings = settings or AnalysisSettings()
    if len(cohorts) < 2:
        raise InputError(f"analysis of variance: {len(cohorts)} cohorts given; it needs two or more")
    data = [known.data if isinstance(known, Reference) else known for known in cohorts.values()]
    counts = Counter(cell for known in data for cell in known.cells)
    shared = [cell for cell in (counts if cells is None else cells) if counts[cell] > 1]
    people = [known.people for known in data if isinstance(known, Cohort)]
    rows = []
    for stratum in find_strata(people, by, settings):
        sides = sides_of(data, stratum, shared, settings)
        for j, ((organ, metric), reason) in enumerate(zip(shared, off_scale(sides, shared))):
            row = {"stratum": stratum.name, "organ": organ, "metric": metric}
            rows.append(row | _row(list(cohorts), sides, j, metric, settings, reason))
    table = pd.DataFrame(rows)
    if rows:
        p = table["p"].to_numpy(dtype=float)
        table["p_holm"], table["p_bh"] = holm(p), benjamini_hochberg(p)
    table.attrs = {"cohorts": list(cohorts)}
    return table


def _row(
    names: Sequence[str], sides: Sequence[Side], j: int, metric: str, settings: AnalysisSettings, off_scale: str
) -> dict[str, object]:
    """One cell of a stratum. Cohorts without spread have no weight in Welch's test, and are left out of both.

    A cell that is `off_scale` is described and not tested.
    """
    parts = [Moments(side.moments.n[[j]], side.moments.mean[[j]], side.moments.sd[[j]]) for side in sides]
    fit = [bool(m.n[0] >= settings.min_subjects and m.sd[0] > 0) for m in parts]
    used = [] if off_scale else [m for m, fits in zip(parts, fit) if fits]
    nothing = (np.full(1, np.nan),) * 4
    welch, equal = (f(used) if len(used) > 1 else nothing for f in (welch_anova, classical_anova))
    row: dict[str, object] = {"groups": len(used)}
    row |= {key: float(value[0]) for key, value in zip(("f", "df1", "df2", "p"), welch)}
    row |= {key: float(value[0]) for key, value in zip(("f_equal", "df2_equal", "p_equal"), (equal[0], *equal[2:]))}
    row |= {"p_holm": np.nan, "p_bh": np.nan, "message": off_scale or _message(names, sides, fit, j, metric, settings)}
    for i, m in enumerate(parts, 1):
        row |= {f"n_{i}": int(m.n[0]), f"mean_{i}": float(m.mean[0]), f"sd_{i}": float(m.sd[0])}
    return row


def _message(
    names: Sequence[str], sides: Sequence[Side], fit: Sequence[bool], j: int, metric: str, settings: AnalysisSettings
) -> str:
    said = []
    for name, side, fits in zip(names, sides, fit):
        n, sd = int(side.moments.n[j]), side.moments.sd[j]
        if side.lacking[j]:
            said.append(side.lacking[j])
        elif n < settings.min_subjects:
            said.append(f"{name}: only {n} measured, left out")
        elif not fits:
            said.append(f"{name}: {'no SD is given' if np.isnan(sd) else 'no spread'}, left out")
        elif metric in ENDING and side.ceiling is not None and side.ceiling[:, j].any():
            said.append(f"{name}: values that reach {ceiling_of(metric, settings.suv_ceiling):g} count as that")
    return "; ".join(said)
