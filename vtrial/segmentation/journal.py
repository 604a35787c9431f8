"""The journal of masks: which segmenter has which folder, and how each subject ended."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from vtrial.records import InputError
from vtrial.runs import journal_lines, now
from vtrial.segmentation.cases import MASKS, has_truth
from vtrial.segmentation.segmenter import SegmenterPlan
from vtrial.storage import Folder, place, printable

JOURNAL = "segmentations.jsonl"
FOLDER = "folder"  # in a claim's facts: where a segmenter of one's own lies


class Claim(BaseModel):
    """A folder of masks is a segmenter's from now on, and what the segmenter is: one's own with its `folder`."""

    model_config = ConfigDict(extra="forbid")
    time: str
    status: Literal["claim"] = "claim"
    masks: str
    segmenter: str
    segmenter_sha256: str
    phantoms_only: bool
    facts: dict[str, Any] = {}


class SegmentedEntry(BaseModel):
    """How one subject was segmented and by what, or why not. `labels` are the class ids found."""

    model_config = ConfigDict(extra="forbid")
    time: str
    status: Literal["ok", "failed"]
    subject_id: str
    segmenter: str
    segmenter_sha256: str
    masks: str
    ct: str
    mask: str
    seconds: float
    error: str = ""
    ct_sha256: str = ""
    mask_sha256: str = ""
    labels: list[int] = []
    device: str = ""
    threads: int = 0


_LINE: TypeAdapter[Claim | SegmentedEntry] = TypeAdapter(Claim | SegmentedEntry)


class SegmentJournal:
    """The journal of a folder. A torn line is what a killed driver leaves: its subject is simply not done."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._claims: dict[str, Claim] = {}  # the latest of each folder of masks
        self._latest: dict[tuple[str, str], SegmentedEntry] = {}  # by folder of masks and subject
        self._ended: set[tuple[str, str]] = set()  # since the journal was opened
        for _, entry in journal_lines(folder, JOURNAL, _LINE.validate_json):
            self._keep(entry)

    def _keep(self, line: Claim | SegmentedEntry) -> None:
        if isinstance(line, Claim):
            self._claims[line.masks] = line
        else:
            self._latest[line.masks, line.subject_id] = line

    @property
    def claims(self) -> list[Claim]:
        """Which folders of masks there are, and whose."""
        return list(self._claims.values())

    def masks_of(self, segmenter: str) -> str:
        """The folder of a segmenter's masks: its own, or `segmentations`, or, where that is not free, one beside it.

        InputError where that is not free either.
        """
        for claim in self._claims.values():
            if claim.segmenter == segmenter:
                return claim.masks
        beside = f"{MASKS}-{segmenter}"
        if not has_truth(self.folder) and self._is_free(MASKS):
            return MASKS
        if self._is_free(beside):
            return beside
        raise InputError(
            f"{place(self.folder.location, beside)}: holds files that no segmenter here has written; move them away"
        )

    def _is_free(self, masks: str) -> bool:
        if masks in self._claims or masks not in self.folder.entries():
            return masks not in self._claims
        return not any(name.startswith(f"{masks}/") for name in self.folder.sizes())

    def claim(self, masks: str, plan: SegmenterPlan) -> None:
        """Write down that a folder is a segmenter's, before its first mask; OSError if that cannot be."""
        known = self._claims.get(masks)
        facts = plan.facts | ({FOLDER: printable(plan.folder)} if plan.folder else {})
        if known and known.segmenter_sha256 == plan.sha256 and known.facts.get(FOLDER) == facts.get(FOLDER):
            return
        claim = Claim(
            time=now(),
            masks=masks,
            segmenter=plan.name,
            segmenter_sha256=plan.sha256,
            phantoms_only=plan.phantoms_only,
            facts=facts,
        )
        self.folder.append(JOURNAL, claim.model_dump_json())
        self._keep(claim)

    def record(self, entry: SegmentedEntry) -> None:
        """Put a subject on the disk; OSError if that cannot be."""
        self.folder.append(JOURNAL, entry.model_dump_json())
        self._keep(entry)
        self._ended.add((entry.masks, entry.subject_id))

    def latest(self, subject_id: str, masks: str) -> SegmentedEntry | None:
        """How a subject ended last, in a folder of masks."""
        return self._latest.get((masks, subject_id))

    def has_ended(self, subject_id: str, masks: str) -> bool:
        """Whether a subject was segmented or given up since the journal was opened."""
        return (masks, subject_id) in self._ended

    def failure(self, subject_id: str, masks: str) -> str:
        """Why a subject was given up since the journal was opened; "" if it was not."""
        return self._latest[masks, subject_id].error if self.has_ended(subject_id, masks) else ""
