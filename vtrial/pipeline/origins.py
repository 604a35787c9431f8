"""Where a report comes from: who was left out, which models had a part, and what limits trust in it."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd

from vtrial import __version__
from vtrial.diffusion.weights import list_models
from vtrial.pipeline.sides import Parties, Side
from vtrial.reporting.content import Exclusion, ModelNote, Provenance
from vtrial.runs import Manifest, now
from vtrial.segmentation import SegmentJournal
from vtrial.storage import printable
from vtrial.validation import Comparison, Reference
from vtrial.validation.compare import same_segmenter
from vtrial.validation.nearest import NO_SIGN

_REASONS = 8  # of one step that are listed


def exclusions(side: Side) -> Iterator[Exclusion]:
    """Who is not in the comparison, step by step, from the journals: reasons do not depend on the call."""
    scans, people = side.scans, side.scans.people
    lost = people[people["status"] != "ok"]
    errors = lost["error"].fillna("").astype(str) if "error" in lost.columns else pd.Series("", index=lost.index)
    reasons = (error or f"{status}, not made yet" for error, status in zip(errors, lost["status"]))
    yield from _counted(scans.name, "find" if scans.real else "make", zip(lost["subject_id"], reasons), len(people))
    journal, undrawn = SegmentJournal(scans.folder), {}
    for case in scans.ct_cases:
        end = None if side.masks.folder is None else journal.latest(case.subject_id, side.masks.folder)
        if end is not None and end.status == "failed":
            undrawn[case.subject_id] = end.error
    yield from _counted(scans.name, "segment", undrawn.items(), len(scans.ct_cases))
    unmeasured = side.unmeasured()
    rest = ((subject, reason) for subject, reason in unmeasured.items() if subject not in undrawn)
    yield from _counted(scans.name, "measure", rest, len(scans.ct_cases))


def _counted(cohort: str, step: str, reasons: Iterable[tuple[str, str]], of: int) -> Iterator[Exclusion]:
    """Reasons that differ in the subject's name alone are one: as a file's or a folder's, or before a colon."""
    names = r"(?<![^\s/]){}(?=[/:]|(?:_000[01])?\.nii)"  # whole: subject 1 has no part in 1.5 mm
    counts = Counter(re.sub(names.format(re.escape(str(subject))), "…", reason) for subject, reason in reasons)
    for reason, count in counts.most_common(_REASONS):
        yield Exclusion(cohort, step, reason, count, of)
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(_REASONS))
    if rest:
        yield Exclusion(cohort, step, "other reasons", rest, of)


def provenance(
    comparison: Comparison,
    parties: Parties,
    references: Sequence[Reference],
    copies: pd.DataFrame | None,
    command: Sequence[str],
) -> Provenance:
    """Commands, models, versions and seeds behind a comparison, and its flags; `references` as for the evidence."""
    reference, manifest = references[0], parties.twins.scans.manifest
    made = manifest.sessions[-1].versions if manifest is not None and manifest.sessions else {}
    versions = {f"{name} (making)": number for name, number in made.items()}
    versions |= {"vtrial": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("numpy", "scipy", "totalsegmentator")}
    sides, seeds = _named_sides(parties, references), dict[str, int | str]()
    for name, side in sides.items():
        if drawn_by := side.masks.facts.get("totalsegmentator"):
            versions[f"totalsegmentator (masks of {name})"] = str(drawn_by)
        if side.scans.manifest is not None:
            seeds["run" if side is parties.twins else f"run {name}"] = str(side.scans.manifest.identity.get("seed", ""))
    seeds["analysis"] = comparison.settings.seed
    facts = ("title", "role", "source", "licence", "note")
    origin = {fact: printable(getattr(reference, fact)) for fact in facts}
    origin |= {"segmenter": reference.data.segmenter, "n": str(reference.n)}
    origin |= {f"analysis of variance with {r.name}": r.title or r.source or "a table" for r in references[1:]}
    flags = [*_flags(parties, references)]
    if copies is not None and copies.attrs["verdict"] != NO_SIGN:
        flags.append(f"Copies: twins are {copies.attrs['verdict']}.")
    return Provenance(
        command=printable(" ".join(command)),
        models=tuple(_models(sides)),
        versions=versions,
        seeds=seeds,
        reference=origin,
        flags=tuple(flags),
        created=now(),
    )


def _named_sides(parties: Parties, references: Sequence[Reference]) -> dict[str, Side]:
    """All sides that have scans by the names that the report has for them, the twins first."""
    others = zip((parties.real, *parties.also), references, strict=True)
    named = {reference.name: side for side, reference in others if isinstance(side, Side)}
    return {parties.twins.scans.name: parties.twins, **named}


def _models(sides: Mapping[str, Side]) -> Iterator[ModelNote]:
    """What made the twins, what made other sides, and every segmenter once."""
    for i, (name, side) in enumerate(sides.items()):
        if side.scans.manifest is not None:
            yield _generator(f"generator of {name}" if i else "generator", side.scans.manifest)
    for masks in {side.masks.segmenter: side.masks for side in sides.values() if side.masks.facts}.values():
        trained_on = str(masks.facts.get("training_data", "CT of patients (TotalSegmentator's own training set)"))
        note = "For phantoms and twins of models trained on them, not for patients" if masks.phantoms_only else ""
        yield ModelNote("segmenter", masks.segmenter, trained_on, str(masks.facts.get("weights_sha256", "")), note)


def _generator(role: str, manifest: Manifest) -> ModelNote:
    if manifest.kind == "phantom":
        return ModelNote(role, "vtrial phantom", "no scans at all: it draws bodies after published anatomy")
    known: Mapping[str, Any] = manifest.identity
    trained_on = str(manifest.facts.get("model_data") or "data that its card does not name")
    return ModelNote(role, str(known.get("model", "unknown")), trained_on, str(known.get("model_sha256", "")))


def _flags(parties: Parties, references: Sequence[Reference]) -> Iterator[str]:
    """What limits trust in the comparison."""
    yield from dict.fromkeys(side.masks.caution for side in parties.sides if side.masks.caution)
    ours = parties.twins.masks.segmenter
    for reference in references:
        theirs = reference.data.segmenter
        if same_segmenter(ours, theirs):
            continue
        what, which = "The two sides", "reference"
        if reference is not references[0]:
            what, which = "The cohorts of the analysis of variance", reference.name
        yield (
            f"{what} were not segmented alike ({ours}; {which}: {theirs or 'not known'}): a part of every "
            "difference may be the segmenters'."
        )
    for side in parties.sides:
        people, name = side.scans.people, side.scans.name
        if "extrapolated" in people.columns and (outside := int(people["extrapolated"].sum())):
            yield f"{name}: {outside} of {len(people)} subjects lie outside what the model was trained on."
        if side.scans.so_far:
            yield f"{side.scans.so_far}."
        manifest = side.scans.manifest
        model = "" if manifest is None or manifest.kind != "generate" else str(manifest.facts.get("model"))
        if model and side.masks.phantoms_only and model not in list_models():
            yield (
                f"{name}: {side.masks.segmenter} was trained on phantoms alone. Where the model of these scans was "
                "trained on patients, its masks cannot be relied on: take --segmenter totalsegmentator."
            )
    for reference in references:
        if reference.role == "stand-in":
            yield f"{reference.name} is no cohort of patients but {reference.title}."
        elif reference.role == "synthetic":
            yield f"{reference.name} is itself synthetic."
