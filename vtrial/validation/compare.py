"""A synthetic cohort against a reference: every cell of every stratum, adjusted over the family, and judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from vtrial.records import InputError
from vtrial.validation.cells import CENSORED, SUMMARY, Side, compare_cells
from vtrial.validation.diversity import spread_of_moments, spread_of_values
from vtrial.validation.inference import Moments
from vtrial.validation.joint import Family, NullDraws, shuffled
from vtrial.validation.references import Reference, Summary
from vtrial.validation.scale import ENDING
from vtrial.validation.settings import AnalysisSettings
from vtrial.validation.sides import find_strata, off_scale, pick
from vtrial.validation.statistic import Cell, Cohort
from vtrial.validation.strata import unknown_counts
from vtrial.validation.verdict import adjust_family, headline, judge

Known = Cohort | Summary | Reference


@dataclass(frozen=True)
class Comparison:
    """What came out. `table` has one row a stratum, organ and metric (see `cells.compare_cells` and `verdict.judge`);
    `spread` one row a stratum: spread over all its cells below the ceiling, and whether that is an alarm. `verdict` is
    one word for the whole, `headline` one line, `notes` count what was left out and say what to keep in mind.
    """

    synthetic: str
    reference: str
    table: pd.DataFrame
    spread: pd.DataFrame
    verdict: str
    headline: str
    notes: tuple[str, ...]
    settings: AnalysisSettings

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN and infinite become None."""
        return {
            "synthetic": self.synthetic,
            "reference": self.reference,
            "verdict": self.verdict,
            "headline": self.headline,
            "notes": list(self.notes),
            "settings": self.settings.model_dump(mode="json"),
            "cells": _records(self.table),
            "spread": _records(self.spread),
        }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(k): None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        for row in table.to_dict("records")
    ]


def compare(
    synthetic: Known,
    reference: Known,
    *,
    by: str | Sequence[str] = "sex",
    settings: AnalysisSettings | None = None,
    paired: bool = False,
    tell: Callable[[str, int], None] = lambda stratum, of: None,
) -> Comparison:
    """Compare two cohorts; either may be a published summary, which then limits what can be told and is marked so.

    `by`: groupings, "sex,age_group" one after the other, "sex*age_group" crossed, "all" for everybody. `paired`: row i
    of both are a pair (`match.pair`). `tell` hears of each stratum that is done, and of how many there are.
    InputError for unknown variables, and for pairs that cannot be.
    """
    settings = settings or AnalysisSettings()
    a, b = (side.data if isinstance(side, Reference) else side for side in (synthetic, reference))
    if paired and not (isinstance(a, Cohort) and isinstance(b, Cohort) and len(a) == len(b)):
        raise InputError("paired comparison: both cohorts must be tables of as many subjects; pair them by match.pair")
    cells, notes = _cells(a, b, settings)
    people = [side.people for side in (a, b) if isinstance(side, Cohort)]
    strata = find_strata(people, by, settings)
    for side in (a, b):
        notes += _side_notes(side, by, settings)
    if not same_segmenter(a.segmenter, b.segmenter):
        told = " and ".join(f"{s.name}: {s.segmenter or 'unknown'}" for s in (a, b))
        notes.append(f"segmenters differ ({told}): a part of every difference may be theirs")
    rng = np.random.default_rng(settings.seed)
    tables: list[pd.DataFrame] = []
    spreads: list[dict[str, object]] = []
    family = Family()
    for stratum in strata:
        sides = pick(a, b, stratum, cells, settings, paired=paired)
        table = compare_cells(*sides, cells, settings, rng, paired=paired, off_scale=off_scale(sides, cells))
        table.insert(0, "stratum", stratum.name)
        if settings.adjustment == "joint" and table["basis"].iloc[0] != SUMMARY and table["judged"].any():
            family.add(
                tuple(v for v, _ in stratum.levels), len(tables), _null_draws(*sides, table, settings, rng, paired)
            )
        tables.append(table)
        # Bonferroni over the strata: one alarm anywhere is an alarm for the whole.
        level = 1.0 - settings.alpha / len(strata)
        spreads.append({"stratum": stratum.name} | _stratum_spread(*sides, table, settings, level))
        tell(stratum.name, len(strata))
    for table, joint in zip(tables, family.adjusted(len(tables), 2 * len(cells))):
        table["p_location_joint"], table["p_spread_joint"] = np.split(joint, 2)
    table = judge(adjust_family(pd.concat(tables, ignore_index=True)), settings)
    spread = pd.DataFrame(spreads)
    verdict, line = headline(table, spread, (a.name, b.name))
    return Comparison(a.name, b.name, table, spread, verdict, line, tuple(notes), settings)


def same_segmenter(a: str, b: str) -> bool:
    """Whether two names are one segmenter's; publications name TotalSegmentator and its mode in words of their own."""
    words = [set(re.findall(r"totalsegmentator|fastest|fast", name.lower())) for name in (a, b)]
    return a == b or ("totalsegmentator" in words[0] and words[0] == words[1])


def _cells(a: Cohort | Summary, b: Cohort | Summary, settings: AnalysisSettings) -> tuple[list[Cell], list[str]]:
    """Which cells: metrics of the settings for the organs that the reference has, and a summary's own metrics."""
    theirs = list(dict.fromkeys(organ for organ, _ in b.cells))
    organs = theirs if isinstance(b, Summary) else [o for o in settings.organs if o in theirs]
    absent = [o for o in settings.organs if o not in theirs]
    notes = [f"{b.name} has no {', '.join(absent)}: not compared"] if absent else []
    if not organs:
        raise InputError(
            f"{b.name}: has none of the organs {', '.join(settings.organs)}; name others in the analysis settings"
        )
    known = {*a.cells, *b.cells}
    cells = []
    for organ in organs:
        metrics = list(settings.metrics)
        if isinstance(b, Summary):
            metrics += [m for o, m in b.cells if o == organ and m not in metrics]
        cells += [(organ, m) for m in metrics if (organ, m) in known]
    if not cells:
        there = sorted({metric for _, metric in known})
        raise InputError(
            f"{a.name} and {b.name}: neither has {', '.join(settings.metrics)} of {', '.join(organs)}; name other "
            f"metrics in the analysis settings (there are: {', '.join(there)})"
        )
    return cells, notes


def _side_notes(side: Cohort | Summary, by: str | Sequence[str], settings: AnalysisSettings) -> list[str]:
    if isinstance(side, Cohort):
        return [*side.notes, *unknown_counts(side.name, side.people, by, settings.strata)]
    noted = side.table[side.table["note"] != ""]
    return [f"{side.name}: {r.organ} {r.metric} {r.sex}: {r.note}" for r in noted.itertuples() if len(str(r.note)) > 20]


def _null_draws(
    a: Side, b: Side, table: pd.DataFrame, settings: AnalysisSettings, rng: np.random.Generator, paired: bool
) -> NullDraws:
    """Shuffled statistics of a stratum's judged cells; those of the others are NaN."""
    assert a.values is not None and b.values is not None
    judged = table["judged"].to_numpy(dtype=bool)
    ranked = (table["basis"] == CENSORED).to_numpy(dtype=bool)
    draws = shuffled(a.values[:, judged], b.values[:, judged], ranked[judged], settings.shufflings, rng, paired=paired)
    return draws.placed(np.flatnonzero(np.tile(judged, 2)))


def _stratum_spread(
    a: Side, b: Side, table: pd.DataFrame, settings: AnalysisSettings, level: float
) -> dict[str, object]:
    """Spread over the cells that enough subjects have, but for those whose spread the end of the scale takes."""
    below = settings.collapse.spread_ratio
    use = (a.moments.n >= settings.min_subjects) & (b.moments.n >= settings.min_subjects)
    use &= ~table["off_scale"].to_numpy(dtype=bool)
    ending = table["metric"].isin(ENDING).to_numpy()
    for side in (a, b):
        if side.ceiling is not None:
            use &= ~(ending & side.ceiling.any(axis=0))
    if a.values is not None and b.values is not None:
        found, basis = spread_of_values(a.values[:, use], b.values[:, use], level=level, alarm_below=below), "subjects"
    else:
        take = [Moments(m.n[use], m.mean[use], m.sd[use]) for m in (a.moments, b.moments)]
        found, basis = spread_of_moments(*take, level=level, alarm_below=below), "summary"
    named = (table["organ"] + " " + table["metric"]).to_numpy()
    names = list(named[use][list(found.identical)])
    return asdict(found) | {"identical": len(names), "identical_cells": names, "basis": basis}
