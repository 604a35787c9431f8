"""The figures of a report: distributions, intervals against their margins, slopes, correlation matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vtrial.reporting.svg import Drawing, Point, Scale, nice_ticks, tick_label
from vtrial.reporting.words import STYLES, fixed, known, organ_label

Curve = Mapping[str, Any]
_ROW = 18.0
_REACH = 2.6  # SDs of a normal curve that are drawn


def ecdf(synthetic: Curve | None, reference: Curve | None, title: str, alt: str, *, signed: bool = False) -> Markup:
    """Cumulative distributions of both sides in one small panel; a normal curve (of mean and SD alone) is dotted.

    `signed`: values may be negative, so that a normal curve is not cut at zero.
    """
    left, right, top, bottom, width, height = 24.0, 14.0, 18.0, 20.0, 204.0, 140.0
    ends = [v for c in (synthetic, reference) if c for v in _ends(c, signed)]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    x = Scale((low - pad, high + pad), (left, width - right))
    y = Scale((0.0, 1.0), (height - bottom, top))
    d = Drawing(width, height, alt)
    d.text(left, 11, title, "name")
    for part, text in ((0.0, "0"), (0.5, "½"), (1.0, "1")):
        d.line((left, y(part)), (width - right, y(part)), "grid")
        d.text(left - 4, y(part) + 3.5, text, "tick", "end")
    ticks = nice_ticks(*x.domain, 4)
    for tick in ticks:
        d.line((x(tick), y(0)), (x(tick), y(0) + 4), "axis")
        d.text(x(tick), height - 5, tick_label(tick, ticks), "tick", "middle")
    for curve, style in ((reference, "reference"), (synthetic, "synthetic")):
        if curve and curve["kind"] == "steps":
            rises = [(x(v), y(p)) for v, p in zip(curve["x"], curve["p"])]
            d.steps([(x(x.domain[0]), y(0.0)), *rises, (x(x.domain[1]), y(1.0))], f"curve {style} steps")
        elif curve:
            d.path(_normal(curve, x, y), f"curve {style} normal")
    return d.markup()


def _ends(curve: Curve, signed: bool) -> Point:
    if curve["kind"] == "steps":
        return curve["x"][0], curve["x"][-1]
    low, high = (curve["mean"] + side * _REACH * curve["sd"] for side in (-1.0, 1.0))
    return (low if signed else max(low, 0.0)), high


def _normal(curve: Curve, x: Scale, y: Scale) -> list[Point]:
    low, high = x.domain
    grid = [low + (high - low) * i / 60.0 for i in range(61)]
    part = [0.5 + 0.5 * math.erf((v - curve["mean"]) / (curve["sd"] * math.sqrt(2.0))) for v in grid]
    return [(x(v), y(p)) for v, p in zip(grid, part)]


@dataclass(frozen=True)
class Interval:
    """A row of a forest plot; `inner` is the narrower interval that equivalence goes by."""

    label: str
    sublabel: str
    centre: float | None
    outer: tuple[float | None, float | None]
    inner: tuple[float | None, float | None]
    verdict: str
    text: str


@dataclass(frozen=True)
class Axis:
    """Of a forest plot: its name, the margin that is shaded, and where nothing differs."""

    name: str
    band: Point
    neutral: float
    limits: Point
    log: bool = False


def forest(rows: Sequence[Interval], axis: Axis, alt: str) -> Markup:
    """Centres with intervals, one row each, over the shaded margin; what leaves the axis ends in an arrow."""
    width, plot = 620.0, (176.0, 416.0)
    height = _ROW * len(rows) + 52.0
    base = height - 36.0
    scale = Scale(axis.limits, plot, log=axis.log)
    d = Drawing(width, height, alt)
    d.box(scale(axis.band[0]), 8, scale(axis.band[1]) - scale(axis.band[0]), base - 8, "band")
    if axis.log:
        ticks = [t for t in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0) if scale.inside(t)]
    else:
        ticks = nice_ticks(*axis.limits, 5)
    for tick in ticks:
        d.line((scale(tick), 8), (scale(tick), base), "zero" if tick == axis.neutral else "grid")
        d.text(scale(tick), base + 14, f"{tick:g}" if axis.log else tick_label(tick, ticks), "tick", "middle")
    d.text(sum(plot) / 2, base + 30, axis.name, "axis-name", "middle")
    for i, row in enumerate(rows):
        y = 8 + _ROW * (i + 0.5)
        if row.label:
            if i:
                d.line((0, y - _ROW / 2), (width, y - _ROW / 2), "rule")
            d.text(0, y + 4, row.label, "name")
        d.text(plot[0] - 8, y + 4, row.sublabel, "tick", "end")
        d.text(plot[1] + 10, y + 4, row.text, f"value {STYLES.get(row.verdict, 'none')}")
        if known(row.centre):
            _interval(d, scale, y, row)
    return d.markup()


def _interval(d: Drawing, scale: Scale, y: float, row: Interval) -> None:
    style = STYLES.get(row.verdict, "none")
    for (low, high), weight in ((row.outer, "outer"), (row.inner, "inner")):
        if low is not None and high is not None:
            d.line((scale(low), y), (scale(high), y), f"{weight} {style}")
    low, high = row.outer
    for end, side in ((low, -1.0), (high, 1.0)):
        if end is not None and not scale.inside(end) and (end < scale.domain[0]) == (side < 0):
            tip = scale(end)
            d.path([(tip + 5 * side, y), (tip, y - 4), (tip, y + 4)], f"arrow {style}", closed=True)
    if row.centre is not None and scale.inside(row.centre):
        d.mark(scale(row.centre), y, style, f"{row.label} {row.sublabel}: {row.text}")


def symmetric_limits(values: Sequence[float | None], margin: float, cap: float) -> Point:
    """Limits about zero that show the values and the margin, but no more than `cap` margins."""
    far = max((abs(v) for v in values if v is not None), default=0.0)
    end = min(max(1.05 * far, 1.5 * margin), cap * margin)
    return -end, end


def ratio_limits(values: Sequence[float | None], margin: float) -> Point:
    """Limits about one, by factors of two, at most 8."""
    far = max((max(v, 1.0 / v) for v in values if v is not None and v > 0), default=1.0)
    end = next((k for k in (2.0, 4.0) if k >= max(far, 1.1 * margin)), 8.0)
    return 1.0 / end, end


@dataclass(frozen=True)
class SlopePair:
    """Both slopes of one question, each as (centre, low, high), None where unknown."""

    label: str
    sublabel: str
    synthetic: tuple[float | None, float | None, float | None]
    reference: tuple[float | None, float | None, float | None]
    verdict: str
    text: str


def slopes(pairs: Sequence[SlopePair], axis_name: str, alt: str) -> Markup:
    """Slopes with intervals, reference above synthetic; every row has its own scale, with a line at zero."""
    row, width, plot = 30.0, 620.0, (160.0, 376.0)
    d = Drawing(width, row * len(pairs) + 24.0, alt)
    for i, pair in enumerate(pairs):
        top = row * i
        if i:
            d.line((0, top), (width, top), "rule")
        numbers = [v for v in (*pair.synthetic, *pair.reference, 0.0) if v is not None]
        low, high = min(numbers), max(numbers)
        pad = 0.06 * (high - low) or 1.0
        scale = Scale((low - pad, high + pad), plot)
        d.line((scale(0.0), top + 3), (scale(0.0), top + row - 3), "zero")
        d.text(0, top + (13 if pair.sublabel else 19), pair.label, "name")
        d.text(0, top + 26, pair.sublabel, "tick")
        d.text(plot[1] + 12, top + 19, pair.text, f"value {STYLES.get(pair.verdict, 'none')}")
        for side, y, style in ((pair.reference, top + 10, "reference"), (pair.synthetic, top + 21, "synthetic")):
            centre, a, b = side
            if a is not None and b is not None:
                d.line((scale(a), y), (scale(b), y), f"bar {style}")
            if centre is not None:
                d.add("circle", f"dot {style}", cx=scale(centre), cy=y, r=3.5)
    d.text(sum(plot) / 2, row * len(pairs) + 16, axis_name, "axis-name", "middle")
    return d.markup()


def matrix(organs: Sequence[str], r: Sequence[Sequence[float | None]], alt: str) -> Markup:
    """A correlation matrix: blue for positive, orange for negative, numbers in the fields; unknown ones are dashed."""
    left, side = 112.0, 300.0
    step = side / max(len(organs), 1)
    size = min(11.0, 0.38 * step)
    d = Drawing(left + side + 4, side + 96.0, alt)
    for i, organ in enumerate(organs):
        middle = step * (i + 0.5)
        d.text(left - 5, middle + 4, organ_label(organ), "tick", "end")
        x = left + middle + 3
        d.text(x, side + 12, organ_label(organ), "tick", "end", transform=f"rotate(-50 {x:.1f} {side + 12:.1f})")
        for j, value in enumerate(r[i]):
            x, y = left + step * j, step * i
            hint = f"{organ_label(organ)}, {organ_label(organs[j])}: {fixed(value, 2)}"
            if value is None:
                d.box(x, y, step, step, "unknown", hint)
                continue
            strength = 0.85 * min(abs(value), 1.0)
            d.box(x, y, step, step, "plus" if value >= 0 else "minus", hint, fill_opacity=f"{strength:.2f}")
            shown = fixed(value, 2).replace("0.", ".")
            ink = "ink light" if value > 0.9 else "ink"  # dark ink on anything paler has more contrast
            d.text(x + step / 2, y + step / 2 + 0.35 * size, shown, ink, "middle", font_size=size)
    return d.markup()
