"""The report: all its figures, the numbers of its JSON, nothing from outside, whatever names its users choose."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vtrial.records import PetCt
from vtrial.reporting.content import (
    Content,
    Demographic,
    Exclusion,
    ModelNote,
    Picture,
    Portrait,
    Provenance,
    samples_by_sex,
)
from vtrial.reporting.figures import forest, symmetric_limits
from vtrial.reporting.page import pair
from vtrial.reporting.portraits import portrait
from vtrial.reporting.report import GALLERY_BYTES, Report, build_report
from vtrial.reporting.svg import nice_ticks, tick_label
from vtrial.reporting.words import fixed, grouping_of, number, p_value
from vtrial.validation import AnalysisSettings, Cohort, anova, cohort_of, compare, read_reference
from vtrial.validation.conditional import compare_correlations, compare_slopes
from vtrial.validation.diversity import pairwise_likeness
from vtrial.validation.nearest import copies
from vtrial.validation.strata import VARIABLES, strata_of

ORGANS = ("liver", "spleen", "kidneys")
QUICK = AnalysisSettings(bootstraps=200, shufflings=200, organs=ORGANS)
WHERE = Provenance(
    command="vtrial validate runs/a --real b",
    models=(
        ModelNote("generator", "phantom-v1", "drawn phantoms, no patients", "sha256:0123"),
        ModelNote("segmenter", "phantom-v1", "the same phantoms"),
    ),
    versions={"vtrial": "0.1.0"},
    seeds={"run": 7},
    reference={"title": "held out", "licence": "none"},
    flags=("both sides are phantoms",),
)
VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "embed"}
EVIL = "<script>alert('x')</script>\"&"


def cohort(name: str, n: int, seed: int, *, spread: float = 1.0, organs: tuple[str, ...] = ORGANS) -> Cohort:
    """A made-up cohort in which volumes follow weight and a few organs are missing."""
    rng = np.random.default_rng(seed)
    subjects = pd.DataFrame({"subject_id": [f"{name}{i}" for i in range(n)], "status": "ok"})
    subjects["sex"] = np.where(np.arange(n) % 2, "M", "F")
    subjects["age_years"], subjects["height_cm"] = rng.uniform(20, 90, n), rng.normal(171, 9, n)
    subjects["weight_kg"] = rng.normal(78, 14, n)
    rows = []
    for k, organ in enumerate(organs):
        suv = np.exp(0.8 - 0.2 * k + spread * rng.normal(0, 0.15, n))
        volume = 1500 / (k + 1) * (subjects["weight_kg"] / 78 + spread * rng.normal(0, 0.2, n))
        hottest = suv * np.exp(1.6 + 0.3 * rng.normal(0, 1, n))
        columns = {"volume_ml": volume, "hu_mean": rng.normal(50, 8, n), "suv_mean": suv, "suv_max": hottest}
        rows.append(pd.DataFrame({"subject_id": subjects["subject_id"], "organ": organ, "missing": ""} | columns))
    table = pd.concat(rows, ignore_index=True)
    lost = rng.random(len(table)) < 0.03
    table.loc[lost, ["volume_ml", "hu_mean", "suv_mean", "suv_max"]] = np.nan
    table.loc[lost, "missing"] = "not found in the mask"
    return cohort_of(name, table, subjects, segmenter="phantom-v1")


def body(seed: int) -> PetCt:
    rng = np.random.default_rng(seed)
    ct = rng.normal(40, 30, (48, 48, 80)).astype(np.int16)
    ct[:8] = ct[-8:] = -1000
    return PetCt(ct, rng.gamma(2.0, 1.0, ct.shape).astype(np.float32), (8.0, 8.0, 9.0))


def full_content(a: Cohort, b: Cohort, by: str = "sex") -> Content:
    rng = np.random.default_rng(0)
    training, held_out = rng.normal(size=(20, 30)), rng.normal(size=(10, 30))
    vectors = rng.normal(size=(12, 9))
    like = pairwise_likeness(vectors)
    numbers = {"n": like.n, "mean": like.mean, "low": like.low, "high": like.high, "highest": like.highest}
    compared = compare(a, b, by=by, settings=QUICK)
    cells = list(dict.fromkeys(zip(compared.table["organ"], compared.table["metric"])))
    return Content(
        comparison=compared.to_dict(),
        provenance=WHERE,
        samples=samples_by_sex(a, b, cells),
        demographics=[Demographic(a.name, "sex=F", "age (years)", 20, 55.5, 17.25)],
        slopes=compare_slopes(a, b, QUICK),
        correlations=compare_correlations(a, b, QUICK),
        anova=anova({a.name: a, b.name: b, "a third": cohort("third", 30, 9)}, by=by, cells=cells, settings=QUICK),
        likeness=[{"cohort": a.name, **numbers}],
        copies=copies(np.vstack([rng.normal(size=(5, 30)), training[:1]]), training, held_out),
        portraits=[portrait(f"twin {i}", "woman, 61 years", body(i)) for i in range(2)],
        exclusions=[Exclusion(a.name, "generate", "failed: out of memory", 2, 42)],
    )


@pytest.fixture(scope="module")
def content() -> Content:
    return full_content(cohort("twins", 40, 1, spread=0.6), cohort("people", 44, 2))


@pytest.fixture(scope="module")
def report(content: Content) -> Report:
    return build_report(content)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    ancestors: tuple[Element, ...] = field(repr=False)
    text: str = field(default="", repr=False)


@dataclass(repr=False)
class Page(HTMLParser):
    """All elements of a page in order, with their own and inner text."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Element] = []
        self.feed(self.source)
        assert not self._open, f"never closed: {[e.tag for e in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs}, tuple(self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {[e.tag for e in self._open[-3:]]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag]

    def ids(self) -> list[str]:
        return [e.attributes["id"] for e in self.elements if "id" in e.attributes]


def strict(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    tree: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return tree


def assert_self_contained(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {e.tag for e in page.elements}
    for e in page.elements:
        for name, value in e.attributes.items():
            assert not name.startswith("on"), f"{name} on {e.tag}"
            if name in ("src", "srcset", "xlink:href", "poster", "background", "action"):
                assert value.startswith("data:image/png;base64,"), value[:80]
            if name == "href":
                assert value.startswith("#") and value[1:] in page.ids(), value
    style = "".join(e.text for e in page.all("style"))
    assert style and "@import" not in style and "url(" not in style
    (policy,) = [e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def assert_same_numbers(page: Page, tree: dict[str, Any]) -> int:
    """Every number in the page: exactly that of the JSON beside it, and a true rounding of it to read."""
    numbers = page.all("data")
    for e in numbers:
        where = next(a.attributes["data-row"] for a in reversed(e.ancestors) if "data-row" in a.attributes)
        at: Any = tree
        for step in where.split("/", 1):
            at = at[int(step) if step.isdigit() else step]
        value = at[e.attributes["data-k"]]
        assert float(e.attributes["value"]) == value, (where, e)
        if e.text == "<0.001":
            assert value < 0.001
            continue
        shown = e.text.replace("−", "-").replace("+", "")
        unit = 10.0 ** -len(shown.partition(".")[2])
        assert abs(float(shown) - value) <= 0.5 * unit * (1 + 1e-6), (where, e.attributes, e.text)
    return len(numbers)


def test_it_needs_nothing_from_outside(report: Report) -> None:
    assert_self_contained(Page(report.html))
    assert len(report.html.encode()) < 3_000_000


def test_the_page_shows_the_numbers_of_the_json(report: Report) -> None:
    page, tree = Page(report.html), strict(report.json)
    assert assert_same_numbers(page, tree) > 1000
    rows = {e.attributes["data-row"].split("/")[0] for e in page.elements if "data-row" in e.attributes}
    assert rows >= {"cells", "spread", "slopes", "likeness", "copies", "closest_pairs", "anova", "exclusions", "counts"}
    assert "demographics" in rows
    assert tree["headline"] in page.all("header")[0].text


def test_every_cell_is_told(report: Report, content: Content) -> None:
    page, tree = Page(report.html), strict(report.json)
    assert len(tree["cells"]) == len(content.comparison["cells"]) == 24
    main = {
        e.attributes["data-row"]: e.text
        for e in page.all("tr")
        if e.attributes.get("data-row", "").startswith("cells/") and not any(a.tag == "details" for a in e.ancestors)
    }
    for i, row in enumerate(tree["cells"]):
        assert row["verdict"] in main[f"cells/{i}"]


def test_every_figure_is_there(report: Report) -> None:
    page = Page(report.html)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    metrics = ("volume-ml", "hu-mean", "suv-mean", "suv-max")
    expected = {f"fig-{kind}-{metric}-sex" for kind in ("difference", "spread") for metric in metrics}
    expected |= {f"fig-distribution-{organ}" for organ in ORGANS} | {f"fig-distribution-more-{o}" for o in ORGANS}
    expected |= {f"fig-slopes-volume-ml-{on}" for on in ("bsa-m2", "height-cm", "weight-kg")}
    expected |= {"fig-slopes-suv-mean-bmi", "fig-correlations-synthetic", "fig-correlations-reference"}
    expected |= {"fig-portrait-1", "fig-portrait-2"}
    assert {e.attributes["id"] for e in page.all("figure")} == expected
    for e in page.all("svg"):
        assert e.attributes["aria-label"] and e.attributes["role"] == "img"
    assert all(e.attributes["alt"] for e in page.all("img")) and len(page.all("img")) == 6
    panels = [e for e in page.all("svg") if e.ancestors[-2].attributes.get("id") == "fig-distribution-liver"]
    assert len(panels) == 6  # three metrics, two sexes


def test_curves_are_the_values(report: Report, content: Content) -> None:
    tree = strict(report.json)
    sample, curve = content.samples[0], tree["distributions"][0]["synthetic"]
    assert sample.synthetic is not None
    there = np.sort(sample.synthetic[np.isfinite(sample.synthetic)])
    assert curve["n"] == len(there)
    assert np.allclose(curve["x"], there, rtol=1e-5)
    assert np.allclose(curve["p"], np.arange(1, len(there) + 1) / len(there), atol=1e-6)


def test_a_variable_that_is_partly_unknown_has_its_own_n(content: Content) -> None:
    known = [
        Demographic(name, stratum, variable, n, 60.0, 9.5)
        for name in (content.comparison["synthetic"], content.comparison["reference"])
        for stratum in ("sex=F", "sex=M")
        for variable, n in (("age (years)", 100), ("height (cm)", 87), ("weight (kg)", 100))
    ]
    report = build_report(replace(content, demographics=known))
    page = Page(report.html)
    table = next(e for e in page.all("table") if "Who was compared" in e.text)
    headings = [e for e in page.all("th") if table in e.ancestors and e.attributes.get("class") == "name"]
    assert len(headings) == 4 and all("n = 100" in e.text for e in headings)
    cells = {e.attributes["data-row"]: e.text for e in page.all("td") if table in e.ancestors}
    assert (
        len(cells) == 12 and cells["demographics/1"] == "60.0 ± 9.5 (n = 87)" and cells["demographics/0"][-3:] == "9.5"
    )
    assert_same_numbers(page, strict(report.json))


def test_diagnoses_may_hold_commas_and_equals_signs() -> None:
    subjects = {name: cohort(name, 60, seed) for name, seed in (("twins", 1), ("people", 2))}
    for each in subjects.values():
        each.people["diagnosis"] = np.resize(["NSCLC, stage II", "C34.1 = lung", "melanoma"], 60)
    found = compare(*subjects.values(), by="sex*diagnosis", settings=QUICK)
    page = Page(build_report(Content(found.to_dict(), WHERE)).html)
    titles = {e.text.partition("(n")[0].strip() for e in page.all("th") if e.attributes.get("scope") == "colgroup"}
    told = ("diagnosis NSCLC, stage II", "diagnosis C34.1 = lung", "diagnosis melanoma")
    assert titles == {f"{sex}, {diagnosis}" for sex in ("women", "men") for diagnosis in told}
    figures = [e.attributes["id"] for e in page.all("figure") if "difference-suv-mean" in e.attributes["id"]]
    assert figures == ["fig-difference-suv-mean-sex-diagnosis"]


def test_names_of_strata_come_apart_as_they_were_put_together() -> None:
    people = cohort("people", 60, 2).people.assign(diagnosis="a, b = c")
    strata = strata_of([people], [*VARIABLES, "*".join(VARIABLES[1:])], QUICK.strata)
    for stratum in strata:
        assert grouping_of(stratum.name) == " × ".join(variable for variable, _ in stratum.levels)


def test_many_values_are_thinned_to_true_steps() -> None:
    a, b = cohort("a", 1200, 3), cohort("b", 40, 4)
    tree = strict(build_report(full_content(a, b)).json)
    curve = tree["distributions"][0]["synthetic"]
    values = a.column(("liver", "volume_ml"))[(a.people["sex"] == "F").to_numpy()]
    values = values[np.isfinite(values)]
    assert curve["n"] == len(values) and len(curve["x"]) <= 200
    for x, p in list(zip(curve["x"], curve["p"]))[::20]:
        assert (values <= x * (1 + 1e-5)).mean() == pytest.approx(p, abs=2e-3)


def test_it_says_that_these_are_not_patients(report: Report) -> None:
    for place in ("header", "footer"):
        (text,) = [e.text for e in Page(report.html).all(place)]
        assert "not patients" in text
        assert "phantom-v1, trained on drawn phantoms, no patients" in text
    assert "not patients" in strict(report.json)["not_patients"]


def test_left_out_and_provenance_are_told(report: Report, content: Content) -> None:
    page = Page(report.html)
    sections = {e.attributes["id"]: e.text for e in page.all("section")}
    assert "2 of 42" in sections["left-out"] and "failed: out of memory" in sections["left-out"]
    assert content.comparison["notes"]
    for note in content.comparison["notes"]:
        assert note in sections["left-out"]
    for told in ("vtrial validate runs/a --real b", "sha256:0123", "vtrial 0.1.0", "run 7", "held out"):
        assert told in sections["provenance"]
    (header,) = page.all("header")
    assert "both sides are phantoms" in header.text


def summary_content(name: str) -> Content:
    a, b = read_reference(name), read_reference("autopet-2025")
    return Content(compare(a, b, settings=QUICK).to_dict(), replace(WHERE, models=()))


def test_two_summaries_make_a_report() -> None:
    report = build_report(summary_content("yoon2025-flow"))
    page, tree = Page(report.html), strict(report.json)
    assert_self_contained(page)
    assert_same_numbers(page, tree)
    assert {c["kind"] for d in tree["distributions"] for c in (d["synthetic"], d["reference"])} == {"normal"}
    sections = {e.attributes["id"]: e.text for e in page.all("section")}
    assert "is no data" in sections["distributions"]
    assert "Not shown" in sections["slopes"] and "Not shown" in sections["correlations"]
    assert "not recorded" in tree["not_patients"]


def test_a_summary_against_subjects_has_one_curve_of_each_kind() -> None:
    a, b = cohort("twins", 40, 1), read_reference("autopet-2025")
    compared = compare(a, b, settings=QUICK)
    cells = list(dict.fromkeys(zip(compared.table["organ"], compared.table["metric"])))
    found = Content(
        compared.to_dict(), WHERE, samples=samples_by_sex(a, None, cells), slopes=compare_slopes(a, b, QUICK)
    )
    report = build_report(found)
    page, tree = Page(report.html), strict(report.json)
    liver = next(d for d in tree["distributions"] if (d["organ"], d["metric"]) == ("liver", "suv_mean"))
    assert (liver["synthetic"]["kind"], liver["reference"]["kind"]) == ("steps", "normal")
    assert (liver["reference"]["mean"], liver["reference"]["sd"]) == (2.34, 0.33)
    folded = next(e for e in page.all("details") if e.attributes.get("id") == "not-compared")
    assert "autopet-2025 has no hu_mean of liver" in folded.text
    for e in page.all("tr"):  # what a side lacks stays behind the fold
        if not any(a.tag == "details" for a in e.ancestors):
            assert "has no" not in e.text


@pytest.mark.parametrize("name", ["yoon2025-flow", "yoon2025-diffusion"])
def test_stars_are_those_of_welch(name: str) -> None:
    report = build_report(summary_content(name))
    page, tree = Page(report.html), strict(report.json)
    starred = {
        int(e.attributes["data-row"].split("/")[1])
        for e in page.all("td")
        if e.text.endswith("*") and e.attributes.get("data-row")
    }
    assert starred == {i for i, r in enumerate(tree["cells"]) if (r["p_welch"] or 1.0) < 0.05}
    assert len(starred) == {"yoon2025-flow": 13, "yoon2025-diffusion": 3}[name]


def test_names_cannot_do_harm() -> None:
    a, b = cohort(EVIL, 30, 1), cohort("people", 30, 2)
    found = full_content(a, b)
    comparison = json.loads(json.dumps(found.comparison))
    for row in comparison["cells"]:
        row["organ"] = row["organ"].replace("liver", EVIL)
        row["message"] = EVIL
    comparison["notes"].append(EVIL + "\udcff")
    where = replace(
        WHERE, command=EVIL, versions={EVIL: EVIL}, seeds={EVIL: 1}, flags=(EVIL,), reference={EVIL: EVIL},
        models=(ModelNote(EVIL, EVIL, EVIL, EVIL, EVIL), ModelNote("generator", EVIL, EVIL)),
    )  # fmt: skip
    samples = [replace(s, organ=EVIL, stratum=EVIL) if s.organ == "liver" else s for s in found.samples]
    pictures = (Picture(EVIL, found.portraits[0].pictures[0].png),)
    slopes = found.slopes.assign(source=[EVIL + str(i) for i in range(len(found.slopes))])
    found = replace(
        found, comparison=comparison, provenance=where, samples=samples, title=EVIL, slopes=slopes,
        portraits=[Portrait(EVIL, EVIL, pictures)], exclusions=[Exclusion(EVIL, EVIL, EVIL, 1)],
        demographics=[Demographic(EVIL, EVIL, EVIL, 1, 1.0, 1.0)], absent={EVIL: EVIL},
    )  # fmt: skip
    report = build_report(found)
    page = Page(report.html)
    assert_self_contained(page)
    assert_same_numbers(page, strict(report.json))
    report.html.encode()
    assert page.all("h1")[0].text == EVIL
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)


def test_nothing_to_compare_is_a_report_too() -> None:
    comparison = compare(cohort("a", 30, 1), cohort("b", 30, 2), settings=QUICK).to_dict()
    empty = comparison | {"cells": [], "spread": [], "verdict": "not compared", "headline": "nothing", "notes": []}
    report = build_report(Content(empty, Provenance("")))
    assert_self_contained(Page(report.html))
    assert "Nothing could be compared" in report.html
    strict(report.json)


def test_few_subjects_and_identical_values() -> None:
    a, b = cohort("a", 3, 1), cohort("b", 30, 2)
    a.values[:, :2] = 7.0
    compared = compare(a, b, settings=QUICK)
    cells = list(dict.fromkeys(zip(compared.table["organ"], compared.table["metric"])))
    report = build_report(Content(compared.to_dict(), WHERE, samples=samples_by_sex(a, b, cells)))
    assert_same_numbers(Page(report.html), strict(report.json))
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"base64,[^\"]*", "", report.html))


def test_several_groupings_fold_after_the_first() -> None:
    found = full_content(cohort("a", 60, 1), cohort("b", 60, 2), by="sex,age_group")
    page = Page(build_report(found).html)
    figures = {e.attributes["id"]: e for e in page.all("figure")}
    assert not any(a.tag == "details" for a in figures["fig-difference-volume-ml-sex"].ancestors)
    assert any(a.tag == "details" for a in figures["fig-difference-volume-ml-age-group"].ancestors)


def test_a_gallery_too_large_is_cut_and_counted() -> None:
    found = summary_content("yoon2025-flow")
    noise = np.random.default_rng(0).integers(0, 255, (400, 400)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    many = [Portrait(f"twin {i}", "", (Picture("CT", buffer.getvalue()),)) for i in range(20)]
    report = build_report(replace(found, portraits=many))
    shown = len(Page(report.html).all("img"))
    assert shown == GALLERY_BYTES // len(buffer.getvalue()) < 20
    assert f"{20 - shown} of 20 portraits are not shown" in report.html
    assert len(report.html) < 3_000_000


def test_a_portrait_keeps_proportions() -> None:
    made = portrait("a", "", body(0), height_px=180)
    assert [p.label for p in made.pictures] == ["coronal CT", "coronal PET", "PET projection"]
    for picture in made.pictures:
        image = Image.open(io.BytesIO(picture.png))
        assert image.size == (96, 180)  # 48 × 8 mm wide, 80 × 9 mm high
        assert len(picture.png) < 20_000


def test_numbers_read_well() -> None:
    row = {"mean_a": 1763.4, "sd_a": 441.2, "mean_b": 2.2649, "sd_b": 0.4212}
    told = [re.sub("<[^>]*>", "", pair(row, end)) for end in ("a", "b", "c")]
    assert told == ["1763 ± 441", "2.26 ± 0.42", "–"]
    assert fixed(-0.04, 1, plus=True) == "0.0" and fixed(-3.94, 1, plus=True) == "−3.9"
    assert (number(None), number(float("nan")), number(0.0123), number(0)) == ("–", "–", "0.0123", "0.00")
    assert (p_value(0.0004), p_value(0.0456)) == ("<0.001", "0.046")


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((-12.0, 47.0), (0.003, 0.0091), (1500.0, 1501.0), (-0.2, 0.2)):
        ticks = nice_ticks(low, high, 5)
        assert 2 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high + 1e-9
        assert len({tick_label(t, ticks) for t in ticks}) == len(ticks)
    assert tick_label(-0.0, [-0.5, -0.0, 0.5]) == "0.0"


def test_a_forest_without_rows_or_numbers_draws() -> None:
    from vtrial.reporting.figures import Axis, Interval

    limits = symmetric_limits([None], 10.0, 5.0)
    axis = Axis("x", (-10.0, 10.0), 0.0, limits)
    row = Interval("a", "b", None, (None, None), (None, None), "not compared", "–")
    assert "svg" in forest([], axis, "none") and "svg" in forest([row], axis, "one")


def browser() -> str:
    """A Chromium on this machine, or a skip."""
    known = ["chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((path for name in known if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


PROBE = """<pre id="probe"></pre><script>
for (const d of document.querySelectorAll("details")) d.open = true;
const out = {wide: document.documentElement.scrollWidth, figures: {}, texts: [], tables: []};
for (const f of document.querySelectorAll("figure")) {
  const r = f.getBoundingClientRect(), drawings = [...f.querySelectorAll("svg, img")];
  const drawn = drawings.length && drawings.every(x => { const b = x.getBoundingClientRect();
    return b.width > 60 && b.height > 20 && (x.tagName != "IMG" || x.naturalWidth > 20); });
  out.figures[f.id] = drawn && r.width > 200 && r.height > 60 && getComputedStyle(f).visibility == "visible";
}
for (const s of document.querySelectorAll("svg")) { const b = s.getBoundingClientRect();
  for (const t of s.querySelectorAll("text")) { const r = t.getBoundingClientRect();
    if (r.left < b.left - 2 || r.right > b.right + 2 || r.top < b.top - 2 || r.bottom > b.bottom + 2)
      out.texts.push(t.textContent); } }
for (const t of document.querySelectorAll("table"))
  if (t.getBoundingClientRect().right > document.body.getBoundingClientRect().right + 1)
    out.tables.push([t.closest(".wide") ? "wide" : "", t.innerText.slice(0, 60)]);
document.getElementById("probe").textContent = JSON.stringify(out);
</script>"""


def run_browser(folder: Path, page: Path, *options: str) -> str:
    """What the browser prints; nothing may be said on its console."""
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    home = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=home)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def probe(folder: Path, text: str, width_px: int) -> dict[str, Any]:
    """What a script sees on the page at a width; the page itself forbids scripts, this copy does not."""
    path = folder / f"probed-{width_px}.html"
    free = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", PROBE + "</body>")
    path.write_text(free, encoding="utf-8")
    seen = run_browser(folder, path, f"--window-size={width_px},900", "--hide-scrollbars", "--dump-dom")
    found: dict[str, Any] = json.loads(html.unescape(seen.partition('<pre id="probe">')[2].partition("</pre>")[0]))
    return found


@pytest.mark.parametrize("which", ["subjects", "summary"])
def test_in_a_browser(tmp_path: Path, report: Report, which: str) -> None:
    """At laptop width no complaint, every figure is drawn, no text or table is cut off."""
    shown = report if which == "subjects" else build_report(summary_content("yoon2025-flow"))
    path = tmp_path / "report.html"
    path.write_text(shown.html, encoding="utf-8")
    assert Page(run_browser(tmp_path, path, "--dump-dom")).all("h1")
    found = probe(tmp_path, shown.html, 1280)
    assert found["wide"] <= 1280
    assert found["figures"] == {e.attributes["id"]: True for e in Page(shown.html).all("figure")}
    assert found["texts"] == []
    assert found["tables"] == []


def test_it_prints(tmp_path: Path, report: Report) -> None:
    """Under the rules for paper nothing is cut off at the width of A4, upright or for wide parts flat."""
    path = tmp_path / "report.html"
    path.write_text(report.html, encoding="utf-8")
    run_browser(tmp_path, path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    paper = report.html.replace("@media print", "@media all").replace("@media screen", "@media speech")
    upright, flat = (probe(tmp_path, paper, round(mm / 25.4 * 96)) for mm in (210 - 2 * 12, 297 - 2 * 12))
    assert all(upright["figures"].values()) and all(flat["figures"].values())
    assert upright["texts"] == [] and flat["texts"] == []
    assert [text for place, text in upright["tables"] if place != "wide"] == []
    assert flat["tables"] == []
