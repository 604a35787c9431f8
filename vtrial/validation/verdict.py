"""From p values to words: equivalent, different, too few to tell; for each cell, and for the whole.

Equivalent comes first: a difference that is certain but lies within the margin does not matter. Different is told by p
values adjusted over the family (both tests of every judged cell). Equivalence is not adjusted: each claim stands for
itself, and "all are equivalent" needs every one of them (intersection-union).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from vtrial.validation.inference import Array
from vtrial.validation.multiplicity import benjamini_hochberg, holm
from vtrial.validation.settings import AnalysisSettings

EQUIVALENT, DIFFERENT, TOO_FEW, NOT_COMPARED = "equivalent", "different", "too few to tell", "not compared"

_NAMED = 3  # cells that a headline names
_UNITS = {"volume_ml": " ml", "hu_mean": " HU"}  # of the others: SUV


def adjust_family(table: pd.DataFrame) -> pd.DataFrame:
    """The table with Holm's and Benjamini and Hochberg's p of location and spread, one family.

    Cells that are not judged stay outside (NaN). The joint p, where there is one, comes from `compare`.
    """
    judged = table["judged"].to_numpy(dtype=bool)
    pairs = np.stack([np.where(judged, table[c].to_numpy(dtype=float), np.nan) for c in ("p_location", "p_spread")])
    out = table.copy()
    for suffix, method in (("holm", holm), ("bh", benjamini_hochberg)):
        adjusted = method(pairs.ravel()).reshape(pairs.shape)
        out[f"p_location_{suffix}"], out[f"p_spread_{suffix}"] = adjusted
    return out


def judge(table: pd.DataFrame, settings: AnalysisSettings) -> pd.DataFrame:
    """The table of `adjust_family` with mean_verdict, spread_verdict, verdict and why."""
    out = table.copy()
    judged = out["judged"].to_numpy(dtype=bool)
    compared = ((out["n_synthetic"] > 0) & (out["n_reference"] > 0) & ~out["off_scale"]).to_numpy(dtype=bool)
    words = {}
    for aspect, tost in (("location", "p_tost"), ("spread", "p_tost_spread")):
        equal = judged & (out[tost] < settings.alpha).to_numpy()
        apart = judged & (adjusted_p(out, aspect, settings) < settings.alpha)
        words[aspect] = np.select([~compared, equal, apart], [NOT_COMPARED, EQUIVALENT, DIFFERENT], TOO_FEW)
    out["mean_verdict"], out["spread_verdict"] = words["location"], words["spread"]
    apart = (words["location"] == DIFFERENT) | (words["spread"] == DIFFERENT)
    out["verdict"] = np.select(
        [~compared, apart, words["location"] == EQUIVALENT], [NOT_COMPARED, DIFFERENT, EQUIVALENT], TOO_FEW
    )
    out["why"] = [_why(row, settings) for row in out.to_dict("records")]
    return out


def adjusted_p(table: pd.DataFrame, aspect: str, settings: AnalysisSettings) -> Array:
    """The p that counts, (rows,): by the adjustment of the settings, Holm's where a joint one cannot be had."""
    chosen, fallback = table[f"p_{aspect}_{settings.adjustment}"], table[f"p_{aspect}_holm"]
    return (chosen.fillna(fallback) if settings.adjustment == "joint" else chosen).to_numpy(dtype=float)


def _why(row: dict[object, object], settings: AnalysisSettings) -> str:
    """One cell in a sentence."""
    if row["verdict"] == NOT_COMPARED or not row["judged"]:
        return str(row["message"])
    percent = np.isfinite(_number(row["margin_percent"]))
    key, unit = ("difference_percent", " %") if percent else ("difference", _UNITS.get(str(row["metric"]), " g/ml"))
    margin = _number(row["margin_percent" if percent else "margin_absolute"])
    place = {
        EQUIVALENT: "equivalent, inside",
        DIFFERENT: "different, beyond chance and not shown inside",
        TOO_FEW: "too few to tell whether inside",
    }
    censored = row["basis"] == "censored"
    what, key = ("median", "median_difference_percent") if censored else ("mean", key)
    centre, low, high = (_number(row[key + end]) for end in ("", "_low", "_high"))
    parts = []
    if np.isfinite(centre):
        span = f" ({low:+.3g} to {high:+.3g})" if np.isfinite(low + high) else ""
        parts.append(f"{what} {centre:+.3g}{unit}{span}, {place[str(row['mean_verdict'])]} ±{margin:g}{unit}")
    ratio, low, high = (_number(row[f"sd_ratio{end}"]) for end in ("", "_low", "_high"))
    if np.isfinite(ratio):
        span = f" ({low:.2f} to {high:.2f})" if np.isfinite(low + high) else ""
        parts.append(f"SD ratio {ratio:.2f}{span}, spread: {row['spread_verdict']}")
    message = str(row["message"])
    return "; ".join([*parts, message] if message else parts)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float, np.floating)) else float("nan")


def headline(table: pd.DataFrame, spread: pd.DataFrame, names: tuple[str, str]) -> tuple[str, str]:
    """One word for the whole, and one line: counts, the largest difference, and alarms of lost spread."""
    counts = table["verdict"].value_counts()
    different, equivalent, few, none = (int(counts.get(w, 0)) for w in (DIFFERENT, EQUIVALENT, TOO_FEW, NOT_COMPARED))
    told = different + equivalent + few
    alarms = spread[spread["alarm"]] if len(spread) else spread
    if not told:
        return NOT_COMPARED, f"{names[0]} against {names[1]}: nothing could be compared"
    whole = DIFFERENT if different or len(alarms) else (EQUIVALENT if equivalent == told else TOO_FEW)
    line = f"{names[0]} against {names[1]}: {whole}: of {told} cells {equivalent} equivalent, {different} different"
    beyond = int((table["off_scale"] & (table["n_synthetic"] > 0) & (table["n_reference"] > 0)).sum())
    line += f", {few} too few to tell"
    line += f"; {none - beyond} more not compared, as a side lacks them" if none > beyond else ""
    line += f"; {beyond} more not judged, as a model's scale ends within them" if beyond else ""
    size = table["difference_percent"].where(table["judged"]).abs()
    if size.notna().any():
        row = table.iloc[int(np.nanargmax(size.to_numpy()))]
        line += (
            f"; largest difference of means {row['difference_percent']:+.1f} % "
            f"({row['organ']} {row['metric']}, {row['stratum']})"
        )
    for alarm in alarms.to_dict("records"):
        line += f"; SPREAD LOST in {alarm['stratum']}: {_lost(alarm)}"
    return whole, line


def _lost(alarm: dict[Hashable, Any]) -> str:
    """What raised an alarm: the ratio over all cells where it is certainly below 1, and cells without any spread."""
    told = [f"{alarm['spread_ratio']:.2f} of the reference's"] if alarm["high"] < 1 else []
    if alarm["identical"]:
        named = ", ".join(alarm["identical_cells"][:_NAMED])
        more = f" and {alarm['identical'] - _NAMED} more" if alarm["identical"] > _NAMED else ""
        told.append(f"all values are identical in {named}{more}")
    return ", ".join(told)
