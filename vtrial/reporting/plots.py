"""Which figures a report has: from the rows of its document to drawings with captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vtrial.reporting import figures
from vtrial.reporting.figures import Axis, Interval, SlopePair
from vtrial.reporting.words import (
    MARKS,
    NOT_COMPARED,
    decimals,
    fixed,
    grouping_of,
    known,
    metric_label,
    metric_unit,
    number,
    organ_label,
    predictor_label,
    slope_unit,
    slug,
    span,
    stratum_label,
    with_unit,
)

MAIN_METRICS = ("volume_ml", "suv_mean", "suv_max")  # those of the paper's table
_SLOPES = ("slope_synthetic", "slope_reference")
_SOURCE = 24  # letters beside a slope
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of the page: its id, heading, drawings and caption. `folded`: behind a fold, as there are many."""

    id: str
    heading: str
    drawings: tuple[Markup, ...]
    caption: str = ""
    folded: bool = False


def distribution_figures(rows: Sequence[Row]) -> list[Figure]:
    """One figure an organ with a panel for each stratum and metric; the paper's metrics first, the others folded."""
    metrics = [m for m in dict.fromkeys(r["metric"] for r in rows) if m not in MAIN_METRICS]
    found = []
    for kind, wanted in (("", [*MAIN_METRICS]), ("more", metrics)):
        for organ in dict.fromkeys(r["organ"] for r in rows):
            mine = [r for r in rows if r["organ"] == organ and r["metric"] in wanted]
            mine.sort(key=lambda r: (r["stratum"], wanted.index(r["metric"])))
            if mine:
                name = "-".join(part for part in ("fig-distribution", kind, slug(organ)) if part)
                found.append(Figure(name, organ_label(organ), tuple(map(_panel, mine)), folded=bool(kind)))
    return found


def _panel(row: Row) -> Markup:
    title = f"{stratum_label(row['stratum'])} · {with_unit(row['metric'])}"
    told = [_told(end, row[end]) for end in ("synthetic", "reference") if row[end]]
    alt = f"Cumulative distribution of {organ_label(row['organ'])} {title}: {' and '.join(told)}"
    return figures.ecdf(row["synthetic"], row["reference"], title, alt, signed=row["metric"] == "hu_mean")


def _told(end: str, curve: Row) -> str:
    if curve["kind"] == "steps":
        return f"{curve['n']} {end} values"
    return f"the normal curve of the {end} mean and SD, {number(curve['mean'])} and {number(curve['sd'])}"


def difference_figures(cells: Sequence[Row], level: str) -> list[Figure]:
    """Forest plots of differences of means, one a metric and grouping."""
    found = []
    for metric, grouping, rows, folded in _groups(cells):
        absolute = known(rows[0]["margin_absolute"])
        margin = rows[0]["margin_absolute" if absolute else "margin_percent"]
        unit = metric_unit(metric) if absolute else "%"
        intervals = [_difference(r, label, absolute) for label, r in _labelled(rows)]
        ends = [v for i in intervals for v in (*i.outer, i.centre)]
        limits = figures.symmetric_limits(ends, margin, 5.0)
        axis = Axis(f"difference, {unit}; shaded: ±{margin:g} {unit}", (-margin, margin), 0.0, limits)
        alt = (
            f"Differences of {metric_label(metric)} by {grouping}, synthetic less reference: {len(rows)} means with "
            f"{level} intervals beside the margin of ±{margin:g} {unit}. All numbers are in the table of all cells."
        )
        name = f"fig-difference-{slug(metric)}-{slug(grouping)}"
        found.append(Figure(name, _heading(metric, grouping), (figures.forest(intervals, axis, alt),), "", folded))
    return found


def _difference(row: Row, label: str, absolute: bool) -> Interval:
    """Censored cells go by their medians, as their verdicts do."""
    censored = row["basis"] == "censored"
    key = "difference" if absolute else ("median_difference_percent" if censored else "difference_percent")
    centre, low, high = (row.get(key + end) for end in ("", "_low", "_high"))
    text = span(centre, low, high, 1, plus=True)
    if known(centre):
        text = f"{MARKS.get(row['mean_verdict'], '')} {text}" + (" med." if censored else "")
    inner = (row.get("equivalence_low"), row.get("equivalence_high"))
    return Interval(label, stratum_label(row["stratum"]), centre, (low, high), inner, row["mean_verdict"], text)


def spread_figures(cells: Sequence[Row], level: str, sd_margin: float) -> list[Figure]:
    """Forest plots of variance ratios, one a metric and grouping."""
    margin, found = sd_margin**2, []
    for metric, grouping, rows, folded in _groups(cells):
        intervals = [_ratio(r, label) for label, r in _labelled(rows)]
        ends = [v for i in intervals for v in (*i.outer, i.centre)]
        band = (1.0 / margin, margin)
        name = f"variance ratio; shaded: SD ratio {1.0 / sd_margin:.2f} to {sd_margin:g}"
        axis = Axis(name, band, 1.0, figures.ratio_limits(ends, margin), log=True)
        alt = (
            f"Variance ratios of {metric_label(metric)} by {grouping}, synthetic over reference: {len(rows)} ratios "
            f"with {level} intervals. All numbers are in the table of all cells."
        )
        drawing = figures.forest(intervals, axis, alt)
        found.append(
            Figure(f"fig-spread-{slug(metric)}-{slug(grouping)}", _heading(metric, grouping), (drawing,), "", folded)
        )
    return found


def _ratio(row: Row, label: str) -> Interval:
    centre, low, high = (row.get(f"variance_ratio{end}") for end in ("", "_low", "_high"))
    text = f"{MARKS.get(row['spread_verdict'], '')} {span(centre, low, high, 2)}"
    stratum = stratum_label(row["stratum"])
    return Interval(label, stratum, centre, (low, high), (None, None), row["spread_verdict"], text)


def _groups(cells: Sequence[Row]) -> Iterable[tuple[str, str, list[Row], bool]]:
    """Compared cells by metric and grouping; those of the second and later groupings are folded."""
    compared = [r for r in cells if r["verdict"] != NOT_COMPARED]
    groupings = list(dict.fromkeys(grouping_of(r["stratum"]) for r in compared))
    for grouping in groupings:
        for metric in dict.fromkeys(r["metric"] for r in compared):
            rows = [r for r in compared if r["metric"] == metric and grouping_of(r["stratum"]) == grouping]
            if rows:
                yield metric, grouping, rows, grouping != groupings[0]


def _labelled(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Rows organ by organ, the organ's name beside its first one."""
    ordered = [(organ, r) for organ in dict.fromkeys(r["organ"] for r in rows) for r in rows if r["organ"] == organ]
    names = [organ_label(organ) for organ, _ in ordered]
    return [("" if i and names[i - 1] == name else name, r) for i, (name, (_, r)) in enumerate(zip(names, ordered))]


def _heading(metric: str, grouping: str) -> str:
    return with_unit(metric) if grouping in ("sex", "all") else f"{with_unit(metric)}, by {grouping.replace('_', ' ')}"


def slope_figures(rows: Sequence[Row], level: str) -> list[Figure]:
    """One figure a metric and predictor."""
    found = []
    for metric, on in dict.fromkeys((r["metric"], r["on"]) for r in rows):
        mine = [r for r in rows if (r["metric"], r["on"]) == (metric, on)]
        sources = {r["source"] for r in mine}
        pairs = [_slope(r, several=len(sources) > 1) for r in mine]
        what = f"{metric_label(metric)} on {predictor_label(on)}"
        alt = (
            f"Slopes of {what} with {level} intervals, synthetic under reference, for "
            f"{', '.join(organ_label(r['organ']) for r in mine)}. The numbers are in the table of slopes."
        )
        drawing = figures.slopes(pairs, slope_unit(metric, on) + "; each row on its own scale, line at zero", alt)
        found.append(Figure(f"fig-slopes-{slug(metric)}-{slug(on)}", what, (drawing,)))
    return found


def _slope(row: Row, *, several: bool) -> SlopePair:
    ours, theirs = ((row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in _SLOPES)
    places = decimals(ours[0], theirs[0])
    text = f"{MARKS.get(row['verdict'], '')} {fixed(ours[0], places)} against {fixed(theirs[0], places)}"
    source = row["source"].partition(":")[0] if several else ""
    short = source if len(source) <= _SOURCE else source[: _SOURCE - 1] + "…"
    return SlopePair(organ_label(row["organ"]), short, ours, theirs, row["verdict"], text)


def correlation_figures(found: Row | None, synthetic: str, reference: str) -> list[Figure]:
    """Both matrices."""
    if not found:
        return []
    what = metric_label(found["metric"])
    sides = (("synthetic", synthetic), ("reference", reference))
    return [
        Figure(
            f"fig-correlations-{end}",
            f"{end}: {name}",
            (
                figures.matrix(
                    found["organs"],
                    found[end],
                    f"Correlations of {what} between {len(found['organs'])} organs in {name}",
                ),
            ),
        )
        for end, name in sides
    ]
