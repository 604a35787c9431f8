"""`report.html` and `report.json` of a comparison. It shows what others computed; writing the files is the caller's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vtrial.reporting.content import Content, Portrait
from vtrial.reporting.document import document
from vtrial.reporting.page import render

GALLERY_BYTES = 750_000  # of PNGs: with their encoding one of the three megabytes that a page may have


@dataclass(frozen=True)
class Report:
    """Both files as text: `html` is self-contained, `json` strict and with the same numbers."""

    html: str
    json: str


def build_report(content: Content) -> Report:
    """The report of a comparison, with as many portraits as a page can carry; the others are counted in the notes."""
    shown = _fitting(content.portraits)
    tree = document(replace(content, portraits=shown))
    left = len(content.portraits) - len(shown)
    if left:
        tree["notes"].append(f"{left} of {len(content.portraits)} portraits are not shown, to keep the page small")
    text = json.dumps(tree, ensure_ascii=False, allow_nan=False)
    return Report(render(tree, shown), text + "\n")


def _fitting(portraits: Sequence[Portrait]) -> tuple[Portrait, ...]:
    kept, total = [], 0
    for portrait in portraits:
        total += sum(len(picture.png) for picture in portrait.pictures)
        if total > GALLERY_BYTES:
            break
        kept.append(portrait)
    return tuple(kept)
