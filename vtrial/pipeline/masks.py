"""Whose masks: the exact ones of phantoms, those that are there already, or those of a segmenter yet to run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from vtrial.measurement import TABLE, MadeBy
from vtrial.pipeline.scans import Scans
from vtrial.records import InputError
from vtrial.segmentation import (
    SegmenterPlan,
    SegmentJournal,
    list_segmenters,
    read_segmenter_card,
    segmenter_plan,
)
from vtrial.segmentation.card import CARD, SEGMENTERS, Mode
from vtrial.segmentation.cases import MASKS
from vtrial.segmentation.choice import OFFICIAL
from vtrial.segmentation.journal import FOLDER, Claim

EXACT, UNKNOWN = "exact masks", "masks of unknown origin"
DEFAULT = "phantom-v1"  # for runs; real scans get TotalSegmentator


@dataclass(frozen=True)
class Choice:
    """What the user says of the segmenter. `force`: one for phantoms may be used on real scans."""

    name: str | None = None
    mode: Mode | None = None
    weights: str | None = None
    force: bool = False


USUAL = Choice()


@dataclass(frozen=True)
class Masks:
    """Masks that are there: their folder (None: the exact ones of a run), who drew them, and what they can hold.

    `caution` says why not to trust them, if so; `facts` are the segmenter's.
    """

    segmenter: str
    folder: str | None = None
    organs: tuple[str, ...] | None = None
    caution: str = ""
    phantoms_only: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> str:
        """The file of their measurements: each folder of masks has its own."""
        suffix = "" if self.folder is None else self.folder.removeprefix(MASKS)
        return TABLE.replace(".", f"{suffix}.")

    @property
    def made_by(self) -> MadeBy:
        """What the table says of them."""
        return MadeBy(self.segmenter, self.caution)


def plan_for(scans: Scans, choice: Choice) -> SegmenterPlan:
    """The segmenter that scans get; InputError where it is not there, or is for phantoms and the scans are real."""
    name = choice.name
    if name is None:
        official = scans.real or choice.mode is not None or choice.weights is not None
        name = OFFICIAL if official else DEFAULT
    if name == DEFAULT and name not in list_segmenters() and not (Path(name) / CARD).is_file():
        raise InputError(
            f"the segmenter {DEFAULT} is not in this installation ({SEGMENTERS / DEFAULT / CARD} is missing): give the "
            f"folder of one with --segmenter DIR, or --segmenter {OFFICIAL} for its official weights"
        )
    plan = segmenter_plan(name, mode=choice.mode, weights=choice.weights)
    if plan.phantoms_only and scans.real and not choice.force:
        raise InputError(
            f"{plan.name} was trained on phantoms alone, and {scans.source} holds scans that are none: take "
            f"--segmenter {OFFICIAL}, or add --force to see its masks flagged in every table"
        )
    return plan


def masks_there(scans: Scans, segmenter: str | None = None, beside: Masks | None = None) -> Masks:
    """The masks to go by: the named segmenter's, else that of `beside`, else exact ones, else the only ones.

    InputError where there are none, or several and none is named.
    """
    claims = {claim.segmenter: claim for claim in SegmentJournal(scans.folder).claims}
    if segmenter is not None:
        name = read_segmenter_card(segmenter).name if (Path(segmenter) / CARD).is_file() else segmenter
        if name in claims:
            return _claimed(scans, claims[name])
        known = ", ".join(claims) or "none"
        raise InputError(f"{scans.folder.location}: no masks by {name} ({known}); run vtrial segment first")
    if beside is not None and beside.segmenter in claims:
        return _claimed(scans, claims[beside.segmenter])
    if scans.exact:
        return Masks(EXACT)
    if len(claims) > 1:
        raise InputError(f"{scans.folder.location}: masks by {', '.join(claims)}; choose one with --segmenter")
    if claims:
        return _claimed(scans, next(iter(claims.values())))
    if MASKS in scans.folder.entries():  # the user's own
        return Masks(UNKNOWN, MASKS)
    raise InputError(f"{scans.folder.location}: the scans have no organ masks; run vtrial segment first")


def settle(scans: Scans, choice: Choice, beside: Masks | SegmenterPlan | None = None) -> Masks | SegmenterPlan:
    """Masks that need nothing more, or the segmenter that has work to do: the same as `beside` uses, where it can be.

    Without a choice of the user's: exact masks, then masks that are complete, then the segmenter whose masks are
    there, then the default one. InputError where several have begun, or the one that has cannot be had.
    """
    if choice != replace(USUAL, force=choice.force):
        return plan_for(scans, choice)
    same = None if beside is None or scans.real else beside
    if isinstance(same, SegmenterPlan):
        return same
    if scans.exact and (same is None or same.segmenter == EXACT):
        return Masks(EXACT)
    known = None if same is None or same.segmenter == EXACT else same
    claims, ends = {}, {}
    journal, files = SegmentJournal(scans.folder), scans.folder.sizes()
    for claim in journal.claims:
        if known is None or claim.segmenter == known.segmenter:
            claims[claim.segmenter], ends[claim.segmenter] = claim, _ends(scans, journal, claim.masks, files)
    whole = next((name for name in claims if ends[name] == {"ok"}), None)
    if whole is not None:
        return _claimed(scans, claims[whole])
    usual = OFFICIAL if scans.real else DEFAULT
    if len(claims) > 1 and usual not in claims:
        told = f"masks by {', '.join(claims)}, none of them for all subjects; choose one with --segmenter"
        raise InputError(f"{scans.folder.location}: {told}")
    if claims:
        name = usual if usual in claims else next(iter(claims))
        return _go_on(scans, claims[name], "" not in ends[name], choice.force)
    return plan_for(scans, choice) if known is None else _again(scans, known, choice.force)


def _ends(scans: Scans, journal: SegmentJournal, masks: str, files: Container[str]) -> set[str]:
    """How subjects ended in a folder of masks: ok, failed, or "" where there is a mask to be drawn."""
    ends = (journal.latest(case.subject_id, masks) for case in scans.ct_cases)
    return {"" if end is None or (end.status == "ok" and end.mask not in files) else end.status for end in ends}


def _go_on(scans: Scans, claim: Claim, tried: bool, force: bool) -> Masks | SegmenterPlan:
    """The segmenter of masks, for what it has not drawn yet; the masks alone where all was `tried` and it is not here.

    So too where it is of another version by now: the few that failed are no reason to draw all anew.
    """
    masks = _claimed(scans, claim)
    try:
        plan = _again(scans, masks, force)
    except InputError:
        if tried:
            return masks
        raise
    return masks if tried and plan.sha256 != claim.segmenter_sha256 else plan


def _again(scans: Scans, masks: Masks, force: bool) -> SegmenterPlan:
    """The segmenter that drew masks, by its name and what is known of it; InputError where it cannot be had."""
    modes: dict[str, Mode] = {f"{OFFICIAL}-{mode}": mode for mode in get_args(Mode)}
    mode = modes.get(masks.segmenter)
    name = masks.facts.get(FOLDER, masks.segmenter) if mode is None else OFFICIAL
    told = f"{scans.folder.location}: to be segmented by {masks.segmenter}, as others are"
    try:
        plan = plan_for(scans, Choice(name, mode, force=force))
    except InputError as error:
        raise InputError([f"{told}; where it is not to be had, choose with --segmenter", *error.problems]) from None
    if plan.name != masks.segmenter:
        raise InputError(f"{told}, but {name} holds {plan.name} by now; choose with --segmenter")
    return plan


def masks_of(scans: Scans, plan: SegmenterPlan) -> Masks:
    """The masks that a segmenter has drawn."""
    claims = [claim for claim in SegmentJournal(scans.folder).claims if claim.segmenter == plan.name]
    return _claimed(scans, claims[0])


def _claimed(scans: Scans, claim: Claim) -> Masks:
    organs = claim.facts.get("organs")
    told = f"{claim.segmenter} was trained on phantoms alone: its masks of scans that are none cannot be relied on"
    return Masks(
        segmenter=claim.segmenter,
        folder=claim.masks,
        organs=None if organs is None else tuple(organs),
        caution=told if claim.phantoms_only and scans.real else "",
        phantoms_only=claim.phantoms_only,
        facts=claim.facts,
    )
