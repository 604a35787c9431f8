"""Real PET/CT into a training set: studies found, each made a training volume by the workers, the whole split and told.

The folder is a run of its own kind: the same call goes on from its journal, which knows studies by their fingerprint,
so a collection may grow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TypeVar

from vtrial import geometry
from vtrial.execution import Attempt, CannotGoOn, Executor, Progress, Report
from vtrial.imaging.dicom.suv import Tracer
from vtrial.pipeline.masks import USUAL, Choice
from vtrial.preparation.dataset import Prepared, TrainingSet, finish_training_set, person_problems
from vtrial.preparation.sheet import sheet_scans
from vtrial.preparation.sources import Collection, LeftOut, Study, find_studies, write_key
from vtrial.preparation.work import REASONS, PrepareWorkFactory
from vtrial.records import InputError
from vtrial.reporting.preview import preview_png
from vtrial.runs import JournalEntry, Manifest, Run, now, open_run
from vtrial.segmentation import SegmenterPlan, segmenter_plan
from vtrial.segmentation.choice import OFFICIAL
from vtrial.segmentation.home import end_session, new_session
from vtrial.storage import open_folder

SHEET = "sheet.png"
NO_SEGMENTER = "none"
Entry = TypeVar("Entry", Study, LeftOut)
NOTE = (
    "Volumes of real PET/CT studies, without names, dates or identifiers. Bodies remain recognisable: keep them safe."
)


@dataclass(frozen=True)
class Wanted:
    """What `vtrial prepare` is asked: where studies and demographics are, and how to treat them."""

    source: str
    demographics: Path | None = None
    tracer: Tracer = "fdg"
    choice: Choice = USUAL
    allow_partial: bool = False
    seed: int = 0
    key: Path | None = None


@dataclass(frozen=True)
class PrepareSummary:
    """How it ended: `done` of `total` studies are training volumes, `new` by this call; `left_out` says why others are
    not, `failures` which could not be worked on and will be tried again."""

    location: str
    total: int
    done: int
    new: int
    seconds: float
    splits: dict[str, int]
    flags: dict[str, int]
    left_out: dict[str, str]
    failures: dict[str, str]
    notes: tuple[str, ...]


def prepare(wanted: Wanted, out: str, executor: Executor, report: Report) -> PrepareSummary:
    """Make a training set of a collection in the folder or URL `out`; the same call again does what is left.

    InputError before any work where nothing is found, the segmenter is not there or `out` is something else; after it,
    where no study can be trained on.
    """
    started = time.monotonic()
    plan = _segmenter(wanted)
    collection = find_studies(wanted.source, wanted.demographics, tracer=wanted.tracer)
    folder = open_folder(out)
    with open_run(folder, _manifest(wanted, plan, len(collection.studies))) as run:
        if run.refusal is not None:
            raise run.refusal
        collection = _kept_names(collection, run)
        studies = collection.studies
        if wanted.key is not None:
            write_key(wanted.key, collection)
        run.write_manifest()
        nameless = {s.subject_id: person_problems(s.person) for s in studies}
        todo = [s for s in studies if not nameless[s.subject_id] and not _is_done(run, s)]
        if todo:
            session = new_session()  # of the workers' temporary homes
            load = plan.load.in_session(session) if plan else None
            try:
                _drive(run, PrepareWorkFactory(load, folder.location, wanted.allow_partial), todo, executor, report)
            finally:
                end_session(session)
        ended = {s.subject_id: entry for s in studies if (entry := run.latest.get(_index(s))) and entry.status == "ok"}
        reasons = {name: tuple(entry.row[REASONS]) for name, entry in ended.items() if REASONS in entry.row}
        left_out = [*collection.left_out, *(_left_out(s, reasons) for s in studies if s.subject_id in reasons)]
        prepared = [Prepared(s, ended[s.subject_id].row) for s in studies if s.subject_id in ended.keys() - reasons]
        left_out += [_left_out(s, nameless) for s in studies if nameless[s.subject_id]]
        done = finish_training_set(folder, prepared, left_out, seed=wanted.seed)
        run.manifest.facts |= done.facts
        run.write_manifest()
        if todo:
            folder.write(SHEET, preview_png(sheet_scans(folder, done.table)))
    return _summary(done, run, studies, todo, collection.notes, time.monotonic() - started)


def _segmenter(wanted: Wanted) -> SegmenterPlan | None:
    """The segmenter asked for, by default TotalSegmentator with its official weights; InputError if it is not there."""
    choice = wanted.choice
    if choice.name == NO_SEGMENTER:
        if not wanted.allow_partial:
            raise InputError(
                "--segmenter none: without organ masks nothing tells where clavicles and sacrum are; add "
                "--allow-partial to take each study as long as it is"
            )
        return None
    plan = segmenter_plan(choice.name or OFFICIAL, mode=choice.mode, weights=choice.weights)
    if plan.phantoms_only and not choice.force:
        raise InputError(
            f"--segmenter {choice.name}: {plan.name} was trained on phantoms alone; take {OFFICIAL}, or add --force if "
            "the collection is of phantoms"
        )
    return plan


def _manifest(wanted: Wanted, plan: SegmenterPlan | None, n: int) -> Manifest:
    identity: dict[str, str | int | float | None] = {
        "segmenter": None if plan is None else f"{plan.name} {plan.sha256[:16]}",
        "allow_partial": int(wanted.allow_partial),
        "tracer": wanted.tracer,
        "seed": wanted.seed,
    }
    return Manifest(
        kind="prepare",
        note=NOTE,
        identity=identity,
        geometry={"shape": list(geometry.SHAPE), "in_plane_mm": geometry.IN_PLANE_MM, "orientation": "RAS+"},
        facts={"segmenter": plan.facts} if plan else {},
        n=n,
        sharded=False,
    )


def _kept_names(found: Collection, run: Run) -> Collection:
    """The collection under the ids that the journal has for its studies; no other study or left-out one gets these.

    Ids count the studies of a source, so they move when it grows.
    """
    known = {str(entry.row.get("fingerprint")): entry.subject_id for entry in run.latest.values()}
    everyone: tuple[Study | LeftOut, ...] = (*found.studies, *found.left_out)
    new = [each for each in everyone if not (isinstance(each, Study) and each.fingerprint in known)]
    clashing = {each.subject_id for each in new} & set(known.values())
    taken = {*known.values(), *(each.subject_id for each in new if each.subject_id not in clashing)}
    free = (name for i in count(1) if (name := f"s{i:04d}") not in taken)
    fresh = {each.subject_id: next(free) for each in new if each.subject_id in clashing}

    def named(each: Entry) -> Entry:
        if isinstance(each, Study) and each.fingerprint in known:
            return replace(each, subject_id=known[each.fingerprint])
        return replace(each, subject_id=fresh.get(each.subject_id, each.subject_id))

    return replace(found, studies=tuple(map(named, found.studies)), left_out=tuple(map(named, found.left_out)))


def _index(each: Study | LeftOut) -> int:
    return int(each.subject_id.removeprefix("s"))


def _is_done(run: Run, study: Study) -> bool:
    entry = run.latest.get(_index(study))
    return (
        entry is not None
        and entry.status == "ok"
        and all(run.sizes.get(name) == size for name, size in entry.files.items())
    )


def _left_out(study: Study, reasons: dict[str, tuple[str, ...]]) -> LeftOut:
    return LeftOut(study.subject_id, reasons[study.subject_id], study.origin)


def _drive(run: Run, factory: PrepareWorkFactory, todo: Sequence[Study], executor: Executor, report: Report) -> None:
    """Every attempt into the journal; CannotGoOn, with what is safe, where storage or workers give up."""
    done = failed = 0
    report(Progress(0, 0, len(todo)))
    executor.start()
    try:
        with closing(executor.run(factory, todo)) as attempts:
            for attempt in attempts:
                entry = _entry(attempt)
                run.record(entry)
                left_out = "; ".join(entry.row.get(REASONS, ()))
                done, failed = (
                    done + (entry.status == "ok" and not left_out),
                    failed + bool(left_out) + (entry.status == "failed"),
                )
                told = replace(attempt, saved=None, error=f"left out: {left_out}") if left_out else attempt
                report(Progress(done, failed, len(todo), told))
    except (CannotGoOn, OSError) as error:
        raise CannotGoOn(
            f"{error}\nstopped with {done} of {len(todo)} studies made by this call; what is made is safe. Mend it and "
            "give the same command again to go on"
        ) from error
    finally:
        executor.stop()


def _entry(attempt: Attempt) -> JournalEntry:
    study: Study = attempt.item
    saved = attempt.saved
    return JournalEntry(
        time=now(),
        status="ok" if saved else "failed" if attempt.final else "attempt",
        subject_id=study.subject_id,
        index=_index(study),
        attempt=attempt.number,
        seconds=round(attempt.seconds, 3),
        error=attempt.error,
        files=saved.files if saved else {},
        row=saved.row if saved else {"fingerprint": study.fingerprint},
    )


def _summary(
    done: TrainingSet,
    run: Run,
    studies: Sequence[Study],
    todo: Sequence[Study],
    notes: tuple[str, ...],
    seconds: float,
) -> PrepareSummary:
    made = set(done.table["subject_id"])
    ends = {s.subject_id: run.latest.get(_index(s)) for s in studies}
    return PrepareSummary(
        location=run.folder.location,
        total=len(studies) + len(set(done.left_out["subject_id"]) - ends.keys()),
        done=len(made),
        new=sum(s.subject_id in made for s in todo),
        seconds=seconds,
        splits=done.facts["splits"],
        flags=done.facts["flags"],
        left_out=dict(zip(done.left_out["subject_id"], done.left_out["reasons"], strict=True)),
        failures={name: entry.error for name, entry in ends.items() if entry and entry.status == "failed"},
        notes=notes,
    )
