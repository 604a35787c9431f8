"""Small drawings as inline SVG: text stays text, colours come from the page's style sheet, everything is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

Point = tuple[float, float]


class Drawing:
    """An SVG under construction. `alt` is read to those who cannot see it; sizes are in pixels of its own grid."""

    def __init__(self, width: float, height: float, alt: str) -> None:
        head = '<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">'
        self._parts = [Markup(head).format(_n(width), _n(height), _n(width), _n(height), alt)]

    def add(self, tag: str, style: str, text: str = "", hint: str = "", **attributes: Any) -> None:
        """An element of a style (class); `hint` shows under the pointer. Numbers are rounded to a tenth."""
        pairs = {"class": style} | {k.replace("_", "-"): v for k, v in attributes.items()}
        told = Markup("").join(
            Markup(' {}="{}"').format(k, _n(v) if isinstance(v, (int, float)) else v)
            for k, v in pairs.items()
            if v != ""
        )
        inner = escape(text) + (Markup("<title>{}</title>").format(hint) if hint else "")
        self._parts.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), told, inner))

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start", **more: Any) -> None:
        """A line of text whose baseline starts, ends or is centred (anchor: start, end, middle) at a point."""
        self.add("text", style, text, x=x, y=y, text_anchor="" if anchor == "start" else anchor, **more)

    def line(self, a: Point, b: Point, style: str) -> None:
        """A straight line."""
        self.add("line", style, x1=a[0], y1=a[1], x2=b[0], y2=b[1])

    def box(self, x: float, y: float, width: float, height: float, style: str, hint: str = "", **more: Any) -> None:
        """A rectangle."""
        self.add("rect", style, hint=hint, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **more)

    def path(self, points: Iterable[Point], style: str, *, closed: bool = False, hint: str = "") -> None:
        """A line through points."""
        d = "M" + " ".join(f"{_n(x)},{_n(y)}" for x, y in points) + ("Z" if closed else "")
        self.add("path", style, hint=hint, d=d)

    def steps(self, points: Iterable[Point], style: str) -> None:
        """A line from point to point that goes across first and then up or down."""
        (x0, y0), *others = points
        self.add("path", style, d=f"M{_n(x0)},{_n(y0)}" + "".join(f"H{_n(x)}V{_n(y)}" for x, y in others))

    def mark(self, x: float, y: float, verdict_style: str, hint: str = "") -> None:
        """A mark whose shape tells a verdict too: disc same, diamond apart, open ring for the rest."""
        r = 4.0
        if verdict_style == "apart":
            corners = [(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)]
            self.path(corners, f"mark {verdict_style}", closed=True, hint=hint)
        else:
            self.add("circle", f"mark {verdict_style}", hint=hint, cx=x, cy=y, r=r)

    def markup(self) -> Markup:
        """The finished element."""
        return Markup("").join([*self._parts, Markup("</svg>")])


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


class Scale:
    """Values to pixels, linear or logarithmic; `inside` says whether a value is in the domain."""

    def __init__(self, domain: Point, pixels: Point, *, log: bool = False) -> None:
        self.domain, self.pixels, self._log = domain, pixels, log
        self._low, self._high = (self._of(v) for v in domain)

    def _of(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self._log else value

    def __call__(self, value: float) -> float:
        """Pixels of a value; one outside the domain is put on its nearer end."""
        part = (self._of(value) - self._low) / ((self._high - self._low) or 1.0)
        return self.pixels[0] + min(max(part, 0.0), 1.0) * (self.pixels[1] - self.pixels[0])

    def inside(self, value: float) -> bool:
        """Whether a value is in the domain."""
        return self.domain[0] <= value <= self.domain[1]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5) within a range, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    ten = 10.0 ** math.floor(math.log10(raw))
    step = ten * next(k for k in (1.0, 2.0, 5.0, 10.0) if raw <= k * ten * 1.0000001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick's text, with as many decimals as its axis needs."""
    step = min((b - a for a, b in pairwise(ticks)), default=abs(value) or 1.0)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:,.{places}f}"
    return (text if float(text.replace(",", "")) else f"{0:.{places}f}").replace("-", "−")
