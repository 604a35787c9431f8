"""Segmenting many subjects: each goes into a journal as it ends, any end can be resumed, no foreign mask is touched.

`segmentations.jsonl` says which segmenter has which folder of masks, and has a line for each subject segmented or given
up, on the disk before the next. A subject is done if its CT, the segmenter and the mask are by hash those of the
journal.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from vtrial.execution import Attempt, CannotGoOn, Executor, LocalExecutor, Progress, Report
from vtrial.records import InputError
from vtrial.runs import now
from vtrial.segmentation.cases import CtCase
from vtrial.segmentation.home import end_session, new_session
from vtrial.segmentation.journal import SegmentedEntry, SegmentJournal
from vtrial.segmentation.segmenter import SegmenterPlan
from vtrial.segmentation.work import SegmentWorkFactory
from vtrial.storage import Folder, open_folder, printable


@dataclass(frozen=True)
class SegmentSummary:
    """How segmenting ended: `done` have masks, `new` of them of this call, `failures` says what is wrong, by subject.

    `masks` is the folder of the masks inside `location`.
    """

    location: str
    masks: str
    total: int
    done: int
    new: int
    seconds: float
    failures: dict[str, str]


def segment_cohort(
    cases: Sequence[CtCase],
    folder: Folder,
    segmenter: SegmenterPlan,
    *,
    source: str | None = None,
    executor: Executor | None = None,
    report: Report = lambda _: None,
) -> SegmentSummary:
    """Segment what is not yet segmented; masks go into `segmentations/` of `folder`, or beside it.

    `segmentations/` is the segmenter's unless it holds exact masks or another segmenter's; then it has
    `segmentations-<its name>/`. CTs are named relative to `source` (by default the folder itself). A subject that
    cannot be segmented is told with its reason and tried again by the next call. The caller holds the folder's lock.
    Raises InputError before anything is written, CannotGoOn when the storage or the workers give up; what is
    segmented stays.
    """
    started = time.monotonic()
    _check(cases, folder)
    journal = SegmentJournal(folder)
    masks = journal.masks_of(segmenter.name)
    todo = [case for case in cases if not _is_done(journal, case, segmenter, masks, source or folder.location)]
    if todo:
        folder.create()
        work = SegmentWorkFactory(segmenter.load, source or folder.location, folder.location, masks)
        try:
            _work(journal, todo, work, segmenter, executor or LocalExecutor(), report)
        except OSError as error:
            told = f"{folder.location}: cannot write ({error}); what is segmented is safe, try again"
            raise CannotGoOn(told) from error
    failures = {case.subject_id: journal.failure(case.subject_id, masks) for case in todo}
    failures = {subject_id: reason for subject_id, reason in failures.items() if reason}
    ended = sum(journal.has_ended(case.subject_id, masks) for case in todo)
    new = ended - len(failures)
    return SegmentSummary(
        location=folder.location,
        masks=masks,
        total=len(cases),
        done=len(cases) - len(todo) + new,
        new=new,
        seconds=time.monotonic() - started,
        failures=failures,
    )


def _check(cases: Sequence[CtCase], folder: Folder) -> None:
    if not cases:
        raise InputError(f"{folder.location}: no subjects to segment; generate some first")
    for what, names in (("subject", [c.subject_id for c in cases]), ("mask", [c.mask for c in cases])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError([f"{what} {name} is there more than once; give each its own id" for name in twice])


def _is_done(journal: SegmentJournal, case: CtCase, segmenter: SegmenterPlan, masks: str, source: str) -> bool:
    """Whether the very mask of the very CT by the very segmenter is there; cheap questions first."""
    entry = journal.latest(case.subject_id, masks)
    if entry is None or entry.status != "ok" or entry.segmenter_sha256 != segmenter.sha256:
        return False
    name = f"{masks}/{case.mask}"
    if entry.mask != name or entry.ct != printable(case.ct):
        return False
    try:
        if hashlib.sha256(journal.folder.read(name)).hexdigest() != entry.mask_sha256:
            return False
        found = case.voxel_sha256 or hashlib.sha256(open_folder(source).read(case.ct)).hexdigest()
    except OSError:
        return False
    return found == entry.ct_sha256


def _work(
    journal: SegmentJournal,
    todo: Sequence[CtCase],
    factory: SegmentWorkFactory,
    segmenter: SegmenterPlan,
    executor: Executor,
    report: Report,
) -> None:
    """One session over `todo`: every subject is in the journal before the next is reported."""
    session = new_session()
    executor.start()
    done = failed = 0
    try:
        journal.claim(factory.masks, segmenter)
        report(Progress(0, 0, len(todo)))
        with closing(executor.run(replace(factory, load=factory.load.in_session(session)), todo)) as attempts:
            for attempt in (a for a in attempts if a.final):
                entry = _entry(attempt, segmenter, factory.masks)
                journal.record(entry)
                if entry.error:
                    attempt = replace(attempt, saved=None, error=entry.error)
                done, failed = done + (not entry.error), failed + bool(entry.error)
                report(Progress(done, failed, len(todo), attempt))
    finally:
        executor.stop()
        end_session(session)


def _entry(attempt: Attempt, segmenter: SegmenterPlan, masks: str) -> SegmentedEntry:
    row = attempt.saved.row if attempt.saved else {}
    error = printable(row.get("problem", "") or attempt.error)
    case: CtCase = attempt.item
    return SegmentedEntry(
        time=now(),
        status="failed" if error else "ok",
        subject_id=case.subject_id,
        segmenter=segmenter.name,
        segmenter_sha256=segmenter.sha256,
        masks=masks,
        ct=printable(case.ct),
        mask=f"{masks}/{case.mask}",
        seconds=round(attempt.seconds, 3),
        error=error,
        **{key: row[key] for key in ("ct_sha256", "mask_sha256", "labels", "device", "threads") if key in row},
    )
