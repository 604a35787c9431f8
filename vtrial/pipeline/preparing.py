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
from vtrial.execution import CannotGoOn, Executor, Progress, Report
from vtrial.imaging.dicom.suv import Tracer
from vtrial.pipeline.masks import USUAL, Choice
from vtrial.preparation.dataset import Prepared, TrainingSet, finish_training_set, person_problems
from vtrial.preparation.sheet import sheet_scans
from vtrial.preparation.sources import Collection, LeftOut, Study, check_key, find_studies, write_key
from vtrial.preparation.sources.study import SUV_WEIGHT
from vtrial.preparation.work import ALLOWED, REASONS, STAMP, PrepareWorkFactory
from vtrial.production import record_attempt, session_of
from vtrial.records import InputError
from vtrial.reporting.preview import preview_png
from vtrial.runs import Manifest, Run, Session, now, open_run, read_manifest
from vtrial.segmentation import SegmenterPlan, segmenter_plan
from vtrial.segmentation.choice import OFFICIAL
from vtrial.segmentation.home import end_session, new_session
from vtrial.storage import open_folder

SHEET = "sheet.png"
NO_SEGMENTER = "none"
_GO_ON = "what is made is safe: mend it and give the same command again to go on"
PARTIAL = (
    "no field of view is known to be whole: extents were fitted on partial ones, with the paper's slope on height; "
    "twins of a model trained on this are as long as these are"
)
AWAY = (
    "are not in the source now, cannot be read there, or have other files: they are out of the tables; with the files "
    "they had they come back in their splits"
)
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


def prepare(
    wanted: Wanted, out: str, executor: Executor, report: Report, *, command: Sequence[str] = ()
) -> PrepareSummary:
    """Make a training set of a collection in the folder or URL `out`; the same call again does what is left.

    InputError before any work where nothing is found, the segmenter is not there or `out` is something else; after it,
    where no study can be trained on. CannotGoOn where storage or workers give up: the same call goes on.
    """
    started = time.monotonic()
    if wanted.key is not None:
        check_key(wanted.key, wanted.source, wanted.demographics, out)
    plan = _segmenter(wanted)
    collection = find_studies(wanted.source, wanted.demographics, tracer=wanted.tracer)
    folder = open_folder(out)
    with open_run(folder, _manifest(wanted, plan, len(collection.studies), read_manifest(folder))) as run:
        _allow(run, wanted.allow_partial)
        collection = _kept_names(collection, run)
        studies = collection.studies
        if wanted.key is not None:
            write_key(wanted.key, collection)
        nameless = {s.subject_id: problems for s in studies if (problems := person_problems(s.person))}
        todo = [s for s in studies if s.subject_id not in nameless and not _is_done(run, s, wanted.allow_partial)]
        try:
            if session := _begin(run, executor, _told_command(command, wanted), len(studies), todo):
                _work(run, plan, wanted.allow_partial, todo, session, executor, report)
            done = _finish(run, collection, nameless, wanted.seed)
            if todo or SHEET not in run.sizes:
                folder.write(SHEET, preview_png(sheet_scans(folder, done.table)))
            if session:
                session.finished, session.seconds = now(), round(time.monotonic() - started, 3)
            run.write_manifest()
        except OSError as error:
            raise CannotGoOn(f"{folder.location}: cannot write ({error}); {_GO_ON}") from error
        finally:
            executor.stop()
    notes = [*collection.notes]
    if done.facts.get("extent_of_partial"):
        notes.append(PARTIAL)
    if away := done.facts["away"]:
        notes.append(f"{away} studies of the set {AWAY}")
    return _summary(done, run, studies, todo, tuple(notes), time.monotonic() - started)


def _told_command(command: Sequence[str], wanted: Wanted) -> list[str]:
    """The command as the manifest tells it: without the paths of what identifies people, as these may do it too."""
    words = {Path(wanted.source): "SRC"}
    words |= {path: word for path, word in ((wanted.demographics, "TABLE"), (wanted.key, "KEY")) if path is not None}

    def told(part: str) -> str:
        option, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
        return words.get(Path(part)) or f"{option}{equals}{words.get(Path(value), value)}"

    return [told(part) for part in command]


def _begin(run: Run, executor: Executor, command: Sequence[str], n: int, todo: Sequence[Study]) -> Session | None:
    """A new session in the manifest, with the executor's machines; None where the last one left nothing to do."""
    if not todo and run.has_views:
        return None
    if run.refusal is not None:
        raise run.refusal
    session = session_of(executor, command, n)
    run.manifest.sessions.append(session)
    run.write_manifest()
    return session


def _work(
    run: Run,
    plan: SegmenterPlan | None,
    allow_partial: bool,
    todo: Sequence[Study],
    session: Session,
    executor: Executor,
    report: Report,
) -> None:
    """Every attempt into the journal; CannotGoOn, with what is safe, where storage or workers give up."""
    if not todo:
        return
    homes = new_session()  # the workers' temporary ones
    load = plan.load.in_session(homes) if plan else None
    factory = PrepareWorkFactory(load, run.folder.location, allow_partial)
    report(Progress(0, 0, len(todo)))
    try:
        with closing(executor.run(factory, todo)) as attempts:
            for attempt in attempts:
                entry = record_attempt(run, attempt, {"fingerprint": attempt.item.fingerprint})
                left_out = "; ".join(entry.row.get(REASONS, ()))
                session.done += entry.status == "ok" and not left_out
                session.failed += entry.status == "failed" or bool(left_out)
                told = replace(attempt, saved=None, error=f"left out: {left_out}") if left_out else attempt
                report(Progress(session.done, session.failed, len(todo), told))
    except (CannotGoOn, OSError) as error:
        made = f"stopped with {session.done} of {len(todo)} studies made by this call"
        raise CannotGoOn(f"{error}\n{made}; {_GO_ON}") from error
    finally:
        end_session(homes)


def _finish(run: Run, collection: Collection, nameless: dict[str, tuple[str, ...]], seed: int) -> TrainingSet:
    """The tables of all that the journal has, and what the manifest says of the whole."""
    studies = collection.studies
    rows = {s.subject_id: entry.row for s in studies if (entry := run.latest.get(s.index)) and entry.status == "ok"}
    reasons = {name: tuple(row[REASONS]) for name, row in rows.items() if REASONS in row} | nameless
    left_out = [LeftOut(s.subject_id, reasons[s.subject_id], s.origin) for s in studies if s.subject_id in reasons]
    prepared = [Prepared(s, rows[s.subject_id]) for s in studies if s.subject_id in rows.keys() - reasons]
    failed = [e.error for s in studies if (e := run.latest.get(s.index)) and e.status == "failed"]
    if failed and not prepared:
        told = f"{run.folder.location}: {len(failed)} of {len(studies)} studies could not be worked on and none is made"
        raise CannotGoOn(f"{told}; the first because: {failed[0]}\n{_GO_ON}")
    done = finish_training_set(run.folder, prepared, [*collection.left_out, *left_out], seed=seed, others=studies)
    run.manifest.facts |= done.facts
    return done


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


def _manifest(wanted: Wanted, plan: SegmenterPlan | None, n: int, known: Manifest | None) -> Manifest:
    identity: dict[str, str | int | float | None] = {
        "segmenter": None if plan is None else f"{plan.name} {plan.sha256[:16]}",
        "tracer": wanted.tracer,
        "seed": wanted.seed,
    }
    if known is not None and ALLOWED in known.identity:  # of a set that was begun when this could not come later
        identity[ALLOWED] = known.identity[ALLOWED]
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
    names = {entry.subject_id for entry in run.latest.values()}
    # Older journals have entries without a fingerprint, of files that could not be read: they are nobody's.
    known = {digest: entry.subject_id for entry in run.latest.values() if (digest := entry.row.get("fingerprint"))}
    everyone: tuple[Study | LeftOut, ...] = (*found.studies, *found.left_out)
    new = [each for each in everyone if not (isinstance(each, Study) and each.fingerprint in known)]
    clashing = {each.subject_id for each in new} & names
    taken = {*names, *(each.subject_id for each in new if each.subject_id not in clashing)}
    free = (name for i in count(1) if (name := f"s{i:04d}") not in taken)
    fresh = {each.subject_id: next(free) for each in new if each.subject_id in clashing}

    def named(each: Entry) -> Entry:
        if isinstance(each, Study) and each.fingerprint in known:
            return replace(each, subject_id=known[each.fingerprint])
        return replace(each, subject_id=fresh.get(each.subject_id, each.subject_id))

    return replace(found, studies=tuple(map(named, found.studies)), left_out=tuple(map(named, found.left_out)))


def _allow(run: Run, allow_partial: bool) -> None:
    """Partial studies may be allowed later, and then those that were left out are looked at again; once in the set they
    stay, so InputError where they no longer are."""
    allowed = run.manifest.facts.get(ALLOWED, run.manifest.identity.get(ALLOWED))
    if allowed and not allow_partial:
        raise InputError(
            f"{run.folder.location}: was made with --allow-partial; give it again, or choose another --out"
        )
    if allow_partial and not allowed:
        run.manifest.facts[ALLOWED] = True


def _is_done(run: Run, study: Study, allow_partial: bool) -> bool:
    """Whether a study is made and its arrays are there, or was left out and its files are what they were, and what is
    allowed; in either case by the weight that it goes by now."""
    entry = run.latest.get(study.index)
    if entry is None or entry.status != "ok" or entry.row.get(SUV_WEIGHT) != study.facts.get(SUV_WEIGHT):
        return False
    if REASONS in entry.row:
        allowed = entry.row.get(ALLOWED, run.manifest.identity.get(ALLOWED))
        return bool(entry.row.get(STAMP) == study.stamp and (allowed or not allow_partial))
    return all(run.sizes.get(name) == size for name, size in entry.files.items())


def _summary(
    done: TrainingSet,
    run: Run,
    studies: Sequence[Study],
    todo: Sequence[Study],
    notes: tuple[str, ...],
    seconds: float,
) -> PrepareSummary:
    made = set(done.table["subject_id"])
    ends = {s.subject_id: run.latest.get(s.index) for s in studies}
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
