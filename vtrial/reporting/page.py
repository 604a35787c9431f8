"""The report as one HTML page: a function of its document, so that page and JSON cannot tell different things."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vtrial.reporting import plots, words
from vtrial.reporting.content import Portrait
from vtrial.reporting.plots import Figure
from vtrial.reporting.words import MARKS, NOT_COMPARED, NOTHING, STYLES, decimals, fixed, known

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "report"
_ABREAST = 3  # strata side by side in the first table
_DETAILED = 200  # cells, up to which the page has all statistics of each; beyond, report.json
Row = Mapping[str, Any]


def render(document: Mapping[str, Any], portraits: Sequence[Portrait] = ()) -> str:
    """The page; `portraits` are those that the document's gallery lists. It needs no network and runs no script."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "organ": words.organ_label,
        "metric": words.with_unit,
        "stratum": words.stratum_label,
        "predictor": words.predictor_label,
        "slug": words.slug,
    }
    settings = document["settings"]
    alpha = settings.get("alpha", 0.05)
    level = f"{100.0 * (1.0 - alpha):g} %"
    cells = document["cells"]
    figures = {
        "differences": plots.difference_figures(cells, level),
        "spreads": plots.spread_figures(cells, level, settings.get("margins", {}).get("sd_ratio", 1.25)),
        "distributions": plots.distribution_figures(document["distributions"]),
        "slopes": plots.slope_figures(document["slopes"] or [], level),
        "correlations": plots.correlation_figures(
            document["correlations"], document["synthetic"], document["reference"]
        ),
    }
    return environment.get_template("report.html.j2").render(
        report=document,
        css=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),  # our own file: nothing of a user's in it
        datum=datum,
        decimals=decimals,
        pair=pair,
        spanned=spanned,
        pvalue=pvalue,
        verdict=verdict,
        mark=mark,
        adjusted=lambda row, aspect: adjusted(row, aspect, settings.get("adjustment", "holm")),
        settings_text=json.dumps(settings, indent=1, ensure_ascii=False),
        marks=MARKS,
        styles=STYLES,
        alpha=alpha,
        level=level,
        inner_level=f"{100.0 * (1.0 - 2.0 * alpha):g} %",
        blocks=first_table(cells, alpha),
        demographics=_demographics(document["demographics"]),
        described=described,
        detailed=sum(map(described, cells)) <= _DETAILED,
        numbered=list(enumerate(cells)),
        lacking=[(i, r) for i, r in enumerate(cells) if not described(r)],
        by_stratum=[(s, [(i, r) for i, r in enumerate(cells) if r["stratum"] == s]) for s in document["counts"]],
        curves={c["kind"] for d in document["distributions"] for c in (d["synthetic"], d["reference"]) if c},
        pictures=[[data_uri(picture.png) for picture in p.pictures] for p in portraits],
        **_distinct(figures),
    )


def _distinct(groups: Mapping[str, list[Figure]]) -> dict[str, list[Figure]]:
    """The same figures, no two with one id: odd names may differ in nothing that an id can hold."""
    seen: set[str] = set()
    found: dict[str, list[Figure]] = {}
    for group, figures in groups.items():
        found[group] = []
        for figure in figures:
            name = figure.id
            while name in seen:
                name += "-x"
            seen.add(name)
            found[group].append(replace(figure, id=name))
    return found


def data_uri(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def datum(row: Row, key: str, text: str | None = None, *, places: int | None = None, plus: bool = False) -> Markup:
    """A number of a row: as read, with the exact value beside it for machines."""
    value = row.get(key)
    if value is None or (isinstance(value, float) and not known(value)):
        return Markup(NOTHING)
    shown = text or (fixed(value, decimals(value) if places is None else places, plus=plus) if known(value) else value)
    return Markup('<data data-k="{}" value="{}">{}</data>').format(key, value, shown)


def pair(row: Row, end: str, star: str = "") -> Markup:
    """Mean ± SD of one side, to the same decimals."""
    mean, sd = row.get(f"mean_{end}"), row.get(f"sd_{end}")
    if not known(mean):
        return Markup(NOTHING)
    places = decimals(mean, sd)
    text = datum(row, f"mean_{end}", places=places)
    if known(sd):
        text += Markup(" ± ") + datum(row, f"sd_{end}", places=places)
    return text + Markup("{}").format(star)


def spanned(
    row: Row, key: str, places: int | None = None, *, plus: bool = False, unit: str = "", low: str = "", high: str = ""
) -> Markup:
    """A number with its interval (keys `key_low`, `key_high`, or as given)."""
    value = row.get(key)
    if not known(value):
        return Markup(NOTHING)
    places = decimals(value) if places is None else places
    text = datum(row, key, places=places, plus=plus) + unit
    ends = [low or f"{key}_low", high or f"{key}_high"]
    if all(known(row.get(end)) for end in ends):
        a, b = (datum(row, end, places=places, plus=plus) for end in ends)
        text += Markup(' <span class="ends">{} to {}</span>').format(a, b)
    return text


def adjusted(row: Row, aspect: str, adjustment: str) -> Markup:
    """The adjusted p that a verdict went by: Holm's where the one of the settings is not there, none if not judged."""
    chosen = f"p_{aspect}_{adjustment}"
    key = chosen if known(row.get(chosen)) or adjustment != "joint" else f"p_{aspect}_holm"
    return pvalue(row, key)


def pvalue(row: Row, key: str) -> Markup:
    """A p value to three decimals."""
    return datum(row, key, words.p_value(row.get(key)))


def verdict(word: str) -> Markup:
    """A verdict as a word, with its mark."""
    style, mark = STYLES.get(word, "none"), MARKS.get(word, "")
    return Markup('<span class="verdict {}"><span aria-hidden="true">{}</span> {}</span>').format(style, mark, word)


def mark(word: str) -> Markup:
    """A verdict's mark alone, the word under the pointer and for screen readers."""
    style = STYLES.get(word, "none")
    return Markup('<span class="verdict {}" role="img" title="{}">{}</span>').format(style, word, MARKS.get(word, ""))


def described(row: Row) -> bool:
    """Whether a cell has numbers on both sides to show: all that are judged, and those that a model's scale decides."""
    return bool(row["verdict"] != NOT_COMPARED or row.get("off_scale"))


def first_table(cells: Sequence[Row], alpha: float) -> list[dict[str, Any]]:
    """The paper's table: blocks of up to three strata of one grouping, organ by organ, metric by metric.

    A cell is its number in the document and its star (unadjusted p under `alpha`, as in the paper), or None.
    """
    place = {(r["stratum"], r["organ"], r["metric"]): i for i, r in enumerate(cells)}
    compared = [r for r in cells if described(r)]
    groupings: dict[str, list[str]] = {}
    for row in compared:
        strata = groupings.setdefault(words.grouping_of(row["stratum"]), [])
        if row["stratum"] not in strata:
            strata.append(row["stratum"])
    blocks = []
    for strata in groupings.values():
        for start in range(0, len(strata), _ABREAST):
            abreast = strata[start : start + _ABREAST]
            rows = [r for r in compared if r["stratum"] in abreast]
            organs = []
            for organ in dict.fromkeys(r["organ"] for r in rows):
                lines = [
                    {"metric": m, "cells": [_starred(cells, place.get((s, organ, m)), alpha) for s in abreast]}
                    for m in dict.fromkeys(r["metric"] for r in rows if r["organ"] == organ)
                ]
                organs.append({"organ": organ, "lines": lines})
            blocks.append({"strata": [_heading(s, rows) for s in abreast], "organs": organs})
    return blocks


def _starred(cells: Sequence[Row], number: int | None, alpha: float) -> dict[str, Any] | None:
    if number is None or not described(cells[number]):
        return None
    row = cells[number]
    p = None if row["verdict"] == NOT_COMPARED else row.get("p_welch")
    return {"number": number, "row": row, "star": "*" if p is not None and p < alpha else ""}


def _heading(stratum: str, rows: Sequence[Row]) -> dict[str, Any]:
    mine = [r for r in rows if r["stratum"] == stratum]
    return {"name": stratum, **{end: max(r[f"n_{end}"] for r in mine) for end in ("reference", "synthetic")}}


def _demographics(rows: Sequence[Row]) -> dict[str, Any]:
    """Variables down, cohorts and strata across, each with the n of the variable that most of its people have."""
    most: dict[tuple[str, str], int] = {}
    for r in rows:
        column = r["cohort"], r["stratum"]
        most[column] = max(most.get(column, 0), r["n"])
    place = {(r["cohort"], r["stratum"], r["variable"]): i for i, r in enumerate(rows)}
    variables = list(dict.fromkeys(r["variable"] for r in rows))
    columns = [(cohort, stratum, n) for (cohort, stratum), n in most.items()]
    lines = [(v, [(place.get((c, s, v)), n) for c, s, n in columns]) for v in variables]
    return {"columns": columns, "lines": lines}
