"""The content of a report as one tree of plain values: what `report.json` holds, and all that the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from vtrial.reporting.content import SEXES, Array, Content, ModelNote, Sample
from vtrial.reporting.words import MARKS

FORMAT_VERSION = 1
_STEPS = 200  # of a drawn curve: more cannot be seen
_PAIRS = 10  # of a twin and its nearest training subject that the page lists
Row = Mapping[str, Any]


def document(content: Content) -> dict[str, Any]:
    """Everything in JSON's own types; NaN and infinite become None. KeyError where `comparison` lacks a part."""
    c = content.comparison
    cells: list[dict[str, Any]] = plain(c["cells"])
    return {
        "format": "vtrial-report",
        "format_version": FORMAT_VERSION,
        "title": plain(content.title),
        "synthetic": plain(c["synthetic"]),
        "reference": plain(c["reference"]),
        "verdict": plain(c["verdict"]),
        "headline": plain(c["headline"]),
        "not_patients": plain(statement(content.provenance.models)),
        "counts": _counts(cells),
        "notes": plain(c["notes"]),
        "settings": plain(c["settings"]),
        "demographics": [plain(asdict(d)) for d in content.demographics],
        "cells": cells,
        "spread": plain(c["spread"]),
        "distributions": _distributions(content.samples, cells),
        "slopes": plain(content.slopes),
        "correlations": _correlations(content),
        "anova": plain(content.anova),
        "anova_cohorts": [] if content.anova is None else plain(content.anova.attrs["cohorts"]),
        "likeness": plain(content.likeness),
        "copies": _copies(content.copies),
        "closest_pairs": _closest(content.copies),
        "gallery": [
            plain({"title": p.title, "caption": p.caption, "pictures": [x.label for x in p.pictures]})
            for p in content.portraits
        ],
        "exclusions": [plain(asdict(e)) for e in content.exclusions],
        "absent": plain(content.absent),
        "provenance": plain(asdict(content.provenance)),
    }


def statement(models: Sequence[ModelNote]) -> str:
    """That these are not patients, and what the models behind them were trained on: the first sentence of that, as the
    provenance has it all."""
    made = [m for m in models if m.role == "generator"]
    text = "The synthetic subjects are not patients: nobody was scanned, and they must not guide anyone's care."
    for model in made:
        text += f" They come from the model {model.name}, trained on {_in_short(model.trained_on)}."
    if not made:
        text += " Which model made them, and what it was trained on, is not recorded."
    for model in models:
        if model.role == "segmenter":
            text += f" Organs were found by {model.name}, trained on {_in_short(model.trained_on)}."
    return text


def _in_short(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def plain(value: Any) -> Any:
    """A value, table (a list of rows) or tree in JSON's own types: ten significant digits, NaN and infinite None."""
    if isinstance(value, pd.DataFrame):
        return [plain(row) for row in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    if isinstance(value, (bool, int)):
        return value
    return str(value).encode("utf-8", "replace").decode()  # names of files may hold what no encoding can


def _counts(cells: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many cells have each verdict, by stratum."""
    counts: dict[str, dict[str, int]] = {}
    for row in cells:
        words = counts.setdefault(row["stratum"], dict.fromkeys(MARKS, 0))
        words[row["verdict"]] = words.get(row["verdict"], 0) + 1
    return counts


def _distributions(samples: Sequence[Sample], cells: Sequence[Row]) -> list[dict[str, Any]]:
    """A curve a side: steps of the values, else a normal one of mean and SD where no more is known, else None."""
    rows = {(r["stratum"], r["organ"], r["metric"]): r for r in cells}
    if not samples:  # two summaries
        samples = [Sample(*key, None, None) for key in rows if key[0] in SEXES]
    found = []
    for s in samples:
        row = rows.get((s.stratum, s.organ, s.metric), {})
        sides = {
            end: _curve(values, row, end) for end, values in (("synthetic", s.synthetic), ("reference", s.reference))
        }
        if any(sides.values()):
            found.append({"stratum": s.stratum, "organ": s.organ, "metric": s.metric} | sides)
    return found


def _curve(values: Array | None, row: Row, end: str) -> dict[str, Any] | None:
    if values is not None:
        x = np.sort(values[np.isfinite(values)])
        if not len(x):
            return None
        rank = np.arange(1, len(x) + 1)
        if len(x) > _STEPS:
            rank = np.unique(np.linspace(1, len(x), _STEPS).round().astype(int))
        return {
            "kind": "steps",
            "n": len(x),
            "x": [float(f"{v:.6g}") for v in x[rank - 1]],
            "p": [round(r / len(x), 6) for r in rank.tolist()],
        }
    mean, sd = row.get(f"mean_{end}"), row.get(f"sd_{end}")
    return None if not (mean is not None and sd) else {"kind": "normal", "n": row[f"n_{end}"], "mean": mean, "sd": sd}


def _correlations(content: Content) -> dict[str, Any] | None:
    found = content.correlations
    if found is None:
        return None
    return {
        "metric": content.correlation_metric,
        "organs": [str(organ) for organ in found.synthetic.index],
        "synthetic": plain(found.synthetic.to_numpy(dtype=float)),
        "reference": plain(found.reference.to_numpy(dtype=float)),
        "pairs": plain(found.pairs),
        "rms": plain(found.rms),
        "rms_expected": plain(found.rms_expected),
    }


def _copies(table: pd.DataFrame | None) -> dict[str, Any] | None:
    return None if table is None else {"twins": plain(table), **{str(k): plain(v) for k, v in table.attrs.items()}}


def _closest(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The twins that lie nearest to a training subject, the nearest first."""
    return [] if table is None else list(plain(table.sort_values("distance", kind="stable")[:_PAIRS]))
