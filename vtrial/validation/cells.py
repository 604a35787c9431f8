"""One stratum of two cohorts: every number of every cell, before multiplicity and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import special

from vtrial.validation.bootstrap import bootstrap_intervals
from vtrial.validation.inference import (
    Array,
    Moments,
    cohens_d,
    difference_interval,
    equivalence_interval,
    moments,
    ratio_interval,
    tost_difference,
    tost_ratio,
    welch,
)
from vtrial.validation.ranks import median_ratio, rank_result
from vtrial.validation.scale import ENDING, NO_ENDS, Ends, Mask, ceiling_of
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.spread import (
    brown_forsythe,
    log_variance_se,
    tost_spread,
    variance_ratio_bonett,
    variance_ratio_f,
)
from vtrial.validation.statistic import Cell

_FROM_SUBJECTS = (  # NaN where a summary does not allow them
    *("p_rank", "ks", "p_ks", "wasserstein", "wasserstein_sd", "ceiling_synthetic", "ceiling_reference"),
    *("boot_percent_low", "boot_percent_high", "boot_sd_ratio_low", "boot_sd_ratio_high", "boot_d_low", "boot_d_high"),
    *("median_difference_percent", "median_difference_percent_low", "median_difference_percent_high"),
)
SUMMARY, SUBJECTS, PAIRED, CENSORED = "summary", "subjects", "paired", "censored"


@dataclass(frozen=True)
class Side:
    """One cohort in one stratum: moments of the cells, and values and ceilings (subjects, cells) where they are known.

    `lacking` is a message for each cell that is not there at all, "" elsewhere; `ends` as in `Cohort`.
    """

    name: str
    moments: Moments
    values: Array | None
    ceiling: Mask | None
    lacking: tuple[str, ...]
    ends: Ends = NO_ENDS

    def take(self, j: int) -> Array:
        """The values of a cell that are there, (n,)."""
        assert self.values is not None
        column = self.values[:, j]
        return column[np.isfinite(column)]


def compare_cells(
    a: Side,
    b: Side,
    cells: list[Cell],
    settings: AnalysisSettings,
    rng: np.random.Generator,
    *,
    paired: bool = False,
    off_scale: Sequence[str] = (),
) -> pd.DataFrame:
    """One row a cell, the synthetic side a against the reference b; columns are named for what they hold.

    Intervals hold 1 - alpha, `equivalence_*` 1 - 2 alpha (inside the margin exactly where p_tost < alpha). Cells with a
    reason in `off_scale` (`sides.off_scale`) are described and not judged.
    """
    level = 1.0 - settings.alpha
    covariance = None
    if paired:
        a, b, covariance = _pairs(a, b)
    ma, mb = a.moments, b.moments
    table = pd.DataFrame(cells, columns=["organ", "metric"])
    for end, m in (("synthetic", ma), ("reference", mb)):
        table[f"n_{end}"], table[f"mean_{end}"], table[f"sd_{end}"] = m.n.astype(int), m.mean, m.sd
    subjects = a.values is not None and b.values is not None
    table["basis"] = (PAIRED if paired else SUBJECTS) if subjects else SUMMARY
    _means(table, ma, mb, settings, covariance)
    table["cohens_d"], table["d_low"], table["d_high"] = cohens_d(ma, mb, level, covariance)
    for column in _FROM_SUBJECTS:
        table[column] = np.nan
    _spread(table, a, b, settings, paired)
    for end, side in (("synthetic", a), ("reference", b)):
        if side.ceiling is not None:
            with np.errstate(all="ignore"):
                table[f"ceiling_{end}"] = side.ceiling.sum(axis=0) / side.moments.n
    if subjects:
        _ranks(table, a, b, paired)
        _by_order(table, settings)
        _bootstrap(table, a, b, settings, rng, paired)
        _censored(table, a, b, settings)
    enough = (ma.n >= settings.min_subjects) & (mb.n >= settings.min_subjects)
    reasons = list(off_scale) or [""] * len(cells)
    table["off_scale"] = [bool(reason) for reason in reasons]
    told = np.isfinite(table["p_location"]) | np.isfinite(table["p_spread"])
    table["judged"] = enough & told & ~table["off_scale"]
    table["message"] = _messages(table, a, b, settings, reasons)
    return table


def _pairs(a: Side, b: Side) -> tuple[Side, Side, Array]:
    """Both sides with the values of whole pairs only, and the covariance of the pairs, (cells,)."""
    assert a.values is not None and b.values is not None
    whole = np.isfinite(a.values) & np.isfinite(b.values)
    va, vb = np.where(whole, a.values, np.nan), np.where(whole, b.values, np.nan)
    ma, mb = moments(va), moments(vb)
    with np.errstate(all="ignore"):
        product = np.where(whole, (va - ma.mean) * (vb - mb.mean), 0.0).sum(axis=0)
        covariance = product / (ma.n - 1)
    reached = [None if side.ceiling is None else side.ceiling & whole for side in (a, b)]
    return (
        replace(a, moments=ma, values=va, ceiling=reached[0]),
        replace(b, moments=mb, values=vb, ceiling=reached[1]),
        covariance,
    )


def _means(table: pd.DataFrame, ma: Moments, mb: Moments, settings: AnalysisSettings, covariance: Array | None) -> None:
    """Differences of means, their intervals, and equivalence."""
    level, inner = 1.0 - settings.alpha, 1.0 - 2.0 * settings.alpha
    margins = settings.margins
    percent = np.array([margins.relative(m) for m in table["metric"]])
    absolute = np.array([margins.absolute(m) for m in table["metric"]])
    with np.errstate(all="ignore"):
        table["difference"] = ma.mean - mb.mean
        table["difference_low"], table["difference_high"] = difference_interval(ma, mb, level, covariance)
        low, high = ratio_interval(ma, mb, level, covariance)
        # Percent of |reference|: + is always more. In Hounsfield units, where zero means nothing, no percent is given.
        sign = np.where(np.isfinite(percent), np.sign(mb.mean), np.nan)
        table["difference_percent"] = 100.0 * sign * (ma.mean / mb.mean - 1.0)
        ends = np.sort(100.0 * sign * (np.stack([low, high]) - 1.0), axis=0)
        table["difference_percent_low"], table["difference_percent_high"] = ends
        table["t"], table["df"], table["p_welch"] = welch(ma, mb)
        table["p_location"], table["location_test"] = table["p_welch"], "Welch t"
        if covariance is not None:
            variance = ma.variance_of_mean + mb.variance_of_mean - 2.0 * covariance / ma.n
            t = (ma.mean - mb.mean) / np.sqrt(np.where(variance > 1e-18 * mb.mean**2, variance, np.nan))
            table["t"], table["df"], table["location_test"] = t, ma.n - 1, "paired t"
            table["p_location"] = 2.0 * special.stdtr(ma.n - 1, -np.abs(t))
        table["margin_percent"], table["margin_absolute"] = percent, absolute
        relative = np.isfinite(percent)
        table["p_tost"] = np.where(
            relative,
            tost_ratio(ma, mb, percent / 100.0, covariance),
            tost_difference(ma, mb, absolute, covariance),
        )
        low, high = equivalence_interval(ma, mb, inner, covariance)
        ends = np.sort(100.0 * sign * (np.stack([low, high]) - 1.0), axis=0)
        plain = difference_interval(ma, mb, inner, covariance)
        table["equivalence_low"] = np.where(relative, ends[0], plain[0])
        table["equivalence_high"] = np.where(relative, ends[1], plain[1])


def _spread(table: pd.DataFrame, a: Side, b: Side, settings: AnalysisSettings, paired: bool) -> None:
    """Variance and SD ratios, their intervals, test and equivalence."""
    level = 1.0 - settings.alpha
    ma, mb = a.moments, b.moments
    with np.errstate(all="ignore"):
        if a.values is not None and b.values is not None:
            ratio, low, high = variance_ratio_bonett(a.values, b.values, level)
            p, test = brown_forsythe(a.values, b.values, paired=paired), "Brown–Forsythe"
            se = log_variance_se(a.values, b.values)
        else:
            ratio, low, high, p = variance_ratio_f(ma, mb, level)
            test, se = "F (normal values)", np.sqrt(2.0 / (ma.n - 1) + 2.0 / (mb.n - 1))
        table["variance_ratio"], table["variance_ratio_low"], table["variance_ratio_high"] = ratio, low, high
        for end in ("", "_low", "_high"):
            table[f"sd_ratio{end}"] = np.sqrt(table[f"variance_ratio{end}"])
        table["p_spread"], table["spread_test"] = p, test
        table["p_tost_spread"] = tost_spread(ratio, se, settings.margins.sd_ratio)


def _ranks(table: pd.DataFrame, a: Side, b: Side, paired: bool) -> None:
    results = [rank_result(a.take(j), b.take(j), paired=paired) for j in range(len(table))]
    for name in ("p_rank", "ks", "p_ks", "wasserstein"):
        table[name] = [getattr(r, name) for r in results]
    table["wasserstein_sd"] = table["wasserstein"] / table["sd_reference"].where(table["sd_reference"] > 0)


def _by_order(table: pd.DataFrame, settings: AnalysisSettings) -> None:
    """Where no value varies, or no difference of a pair, means have no error to be held against: ranks tell."""
    enough = (table[["n_synthetic", "n_reference"]] >= settings.min_subjects).all(axis=1)
    flat = enough & table["p_location"].isna() & table["p_rank"].notna()
    table.loc[flat, "p_location"] = table.loc[flat, "p_rank"]
    table.loc[flat, "location_test"] = _rank_test(table)


def _rank_test(table: pd.DataFrame) -> str:
    return "Wilcoxon" if table["basis"].iloc[0] == PAIRED else "Mann–Whitney"


def _bootstrap(
    table: pd.DataFrame, a: Side, b: Side, settings: AnalysisSettings, rng: np.random.Generator, paired: bool
) -> None:
    """Intervals over resampled subjects, where both sides have enough of them."""
    assert a.values is not None and b.values is not None
    enough = min(len(a.values), len(b.values)) >= settings.min_subjects
    if not settings.bootstraps or not enough:
        return
    use = np.flatnonzero((a.moments.n >= settings.min_subjects) & (b.moments.n >= settings.min_subjects))
    if not len(use):
        return
    level = 1.0 - settings.alpha
    found = bootstrap_intervals(a.values[:, use], b.values[:, use], settings.bootstraps, level, rng, paired=paired)
    relative = table["margin_percent"].notna().to_numpy()[use]
    sign = np.where(relative, np.sign(b.moments.mean[use]), np.nan)
    ends = np.sort(100.0 * sign * (np.stack([found.ratio_low, found.ratio_high]) - 1.0), axis=0)
    rows = table.index[use]
    for name, values in (("percent", ends), ("sd_ratio", None), ("d", None)):
        low, high = (getattr(found, f"{name}_{end}") for end in ("low", "high")) if values is None else values
        table.loc[rows, f"boot_{name}_low"], table.loc[rows, f"boot_{name}_high"] = low, high


def _censored(table: pd.DataFrame, a: Side, b: Side, settings: AnalysisSettings) -> None:
    """Where values reached the ceiling, means say too little: location is told by ranks, equivalence by medians."""
    reached = (table["ceiling_synthetic"].fillna(0) + table["ceiling_reference"].fillna(0)) > 0
    reached &= table["metric"].isin(ENDING)
    rank_test = _rank_test(table)
    table.loc[reached, "p_location"] = table.loc[reached, "p_rank"]
    for j in map(int, np.flatnonzero(reached)):
        metric = str(table.at[j, "metric"])
        margin, ceiling = settings.margins.relative(metric) / 100.0, ceiling_of(metric, settings.suv_ceiling)
        inner = median_ratio(a.take(j), b.take(j), ceiling, margin, 1.0 - 2.0 * settings.alpha)
        m = median_ratio(a.take(j), b.take(j), ceiling, margin, 1.0 - settings.alpha)
        table.loc[j, "equivalence_low"] = 100.0 * (inner.low - 1.0)
        table.loc[j, "equivalence_high"] = 100.0 * (inner.high - 1.0)
        table.loc[j, "median_difference_percent"] = 100.0 * (m.ratio - 1.0)
        table.loc[j, "median_difference_percent_low"] = 100.0 * (m.low - 1.0)
        table.loc[j, "median_difference_percent_high"] = 100.0 * (m.high - 1.0)
        table.loc[j, "p_tost"] = m.p_tost
        table.loc[j, "location_test"] = rank_test
        table.loc[j, "basis"] = CENSORED


def _messages(table: pd.DataFrame, a: Side, b: Side, settings: AnalysisSettings, off_scale: Sequence[str]) -> list[str]:
    """What the reader of a cell must know besides its numbers."""
    messages = []
    for j, row in enumerate(table.to_dict("records")):
        said = [side.lacking[j] for side in (a, b) if side.lacking[j]]
        for end, side in (("synthetic", a), ("reference", b)):
            n = row[f"n_{end}"]
            if not n and not side.lacking[j]:
                said.append(f"{side.name}: {row['organ']} was measured in nobody of this stratum")
            elif 0 < n < settings.min_subjects:
                said.append(f"{side.name}: only {n} measured, described and not judged")
            elif n and row[f"sd_{end}"] == 0:
                said.append(f"{side.name}: all {n} values are identical")
            elif n and np.isnan(row[f"sd_{end}"]):
                said.append(f"{side.name}: no SD is given")
        both = row["n_synthetic"] and row["n_reference"]
        said += [off_scale[j]] if both and off_scale[j] else []
        no_percent = np.isfinite(row["margin_percent"]) and np.isnan(row["difference_percent_low"])
        if both and no_percent and row["judged"] and row["sd_reference"] > 0:
            said.append("the reference mean cannot be told from zero: no interval in percent")
        if both and row["basis"] == CENSORED:
            shares = [f"{100.0 * row[f'ceiling_{end}']:.3g} % of {s.name}" for end, s in _ends(a, b)]
            ceiling = ceiling_of(str(row["metric"]), settings.suv_ceiling)
            said.append(f"{' and '.join(shares)} reach {ceiling:g}: by ranks and medians")
            if np.isnan(row["median_difference_percent"]):
                needed = "at least five values, all above 0, and those about the median below the ceiling"
                said.append(f"equivalence cannot be told: medians need {needed}")
        elif both and row["basis"] == SUMMARY:
            said.append("from means and SDs alone")
            if row["metric"] in ENDING and (row["ceiling_synthetic"] > 0 or row["ceiling_reference"] > 0):
                said.append(f"values that reach {ceiling_of(str(row['metric']), settings.suv_ceiling):g} count as that")
        messages.append("; ".join(said))
    return messages


def _ends(a: Side, b: Side) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("synthetic", a), ("reference", b)
