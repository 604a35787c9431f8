"""Producing the scans of a run: what is not done is made, every attempt goes into the journal, any end can be resumed.

Progress goes to the caller's `report`, machines come from the caller's `Executor`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from vtrial import geometry
from vtrial.diffusion.weights import ExtentFit
from vtrial.execution import Attempt, CannotGoOn, Executor, Progress, Report
from vtrial.imaging.files import nifti_from_bytes, spacing_of, voxel_sha256
from vtrial.imaging.scans import Layout, LoadRenderer, ScanWorkFactory
from vtrial.records import InputError, PetCt, Subject
from vtrial.runs import SHARD_ABOVE, Identity, JournalEntry, Manifest, Run, Session, now, open_run
from vtrial.storage import Folder, open_folder, printable

TABLES_EVERY_S = 30.0
ARRIVAL_S = 30.0  # network file systems show new files of other machines with a delay
_PACKAGES = ("vtrial", "torch", "numpy", "ray", "nibabel", "isal", "pandas", "pyarrow")


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    `done` counts subjects with files, `new` those of this session, `failures` says what went wrong, by subject, and
    `finished` has the done ones with what the journal says of them. `preview` is the picture's place, if there is one.
    """

    location: str
    total: int
    done: int
    new: int
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)
    outside_support: int = 0
    finished: tuple[tuple[Subject, JournalEntry], ...] = ()
    layout: Layout = "scans"
    preview: str | None = None


@dataclass(frozen=True)
class Plan:
    """A checked request: all that a run is. `extent` is the fit of body length on height that its scans follow."""

    kind: str
    location: str
    identity: Identity
    facts: dict[str, Any]
    subjects: Sequence[Subject]
    n: int
    load: LoadRenderer
    command: Sequence[str]
    flags: dict[int, bool] = field(default_factory=dict)
    layout: Layout = "scans"
    verify: bool = False
    extent: ExtentFit = field(default_factory=ExtentFit)


def carry_out(plan: Plan, executor: Executor, report: Report) -> RunSummary:
    """Make what is not yet made of a run; a finished one is left as it is.

    Raises InputError before anything is written, CannotGoOn when the storage or the workers give up: what is done
    stays, and the same call goes on from there.
    """
    started = time.monotonic()
    fresh = Manifest(
        kind=plan.kind,
        identity=plan.identity,
        geometry={
            "shape": list(geometry.SHAPE),
            "in_plane_mm": geometry.IN_PLANE_MM,
            "orientation": "RAS+, origin in the middle of the grid",
            "extent_slices_per_m": plan.extent.slices_per_m,
            "extent_slices_at_0": plan.extent.slices_at_0,
        },
        facts=plan.facts,
        n=plan.n,
        sharded=plan.n > SHARD_ABOVE,
    )
    with open_run(open_folder(plan.location), fresh) as run:
        verify = _verifier(run) if plan.verify else None
        todo = [s for s in plan.subjects[: plan.n] if not run.is_done(s, verify)]
        if todo or not run.has_views:
            if run.refusal is not None:
                raise run.refusal
            _work(run, plan, todo, executor, report)
        asked = [(s, run.latest.get(s.index)) for s in plan.subjects[: plan.n]]
        finished = tuple((s, e) for s, e in asked if e is not None and e.status == "ok")
        return RunSummary(
            location=run.folder.location,
            total=plan.n,
            done=len(finished),
            new=len(finished) - (plan.n - len(todo)),
            seconds=time.monotonic() - started,
            failures={s.subject_id: e.error for s, e in asked if e is not None and e.status == "failed"},
            outside_support=sum(plan.flags.get(s.index, False) for s in plan.subjects[: plan.n]),
            finished=finished,
            layout=plan.layout,
        )


def _work(run: Run, plan: Plan, todo: Sequence[Subject], executor: Executor, report: Report) -> None:
    """One session: work through `todo`, journal every attempt, and leave tables and manifest whole whatever happens."""
    session = session_of(executor, plan.command, plan.n)
    run.manifest.sessions.append(session)
    started = time.monotonic()
    try:
        run.write_manifest()
        run.write_tables(plan.subjects, plan.flags)  # who is to come; and what no table can hold fails before the work
        if todo:
            factory = ScanWorkFactory(plan.load, run.folder.location, run.manifest.sharded, plan.layout)
            with closing(executor.run(factory, todo)) as attempts:  # workers go before the machines are given back
                _drive(run, plan, attempts, len(todo), session, report)
        session.finished, session.seconds = now(), round(time.monotonic() - started, 3)
        _close(run, plan)
    except (CannotGoOn, OSError) as error:
        reason = str(error) if isinstance(error, CannotGoOn) else f"{run.folder.location}: cannot write ({error})"
        with suppress(OSError):
            run.write_tables(plan.subjects, plan.flags)
        raise CannotGoOn(
            f"{reason}\nstopped with {session.done} of {len(todo)} subjects made in this session; what is made "
            "is safe. Mend it and give the same command again to go on"
        ) from error
    except KeyboardInterrupt:
        with suppress(OSError):
            run.reread()
            run.write_tables(plan.subjects, plan.flags)
        raise
    finally:
        executor.stop()


def _drive(run: Run, plan: Plan, attempts: Iterable[Attempt], total: int, session: Session, report: Report) -> None:
    report(Progress(0, 0, total))
    tables_due = time.monotonic() + TABLES_EVERY_S
    for attempt in attempts:
        entry = record_attempt(run, attempt)
        session.done += entry.status == "ok"
        session.failed += entry.status == "failed"
        report(Progress(session.done, session.failed, total, attempt))
        if time.monotonic() > tables_due:
            run.write_tables(plan.subjects, plan.flags)
            tables_due = time.monotonic() + TABLES_EVERY_S


def session_of(executor: Executor, command: Sequence[str], n: int) -> Session:
    """A session that begins now with the executor's machines, which it takes; InputError where they lack something."""
    resources = executor.start()
    return Session(
        command=[printable(word) for word in command],
        started=now(),
        n=n,
        executor=executor.name,
        workers=resources.workers,
        threads_per_subject=resources.threads,
        gpus_per_worker=resources.gpus,
        device=resources.device,
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    )


def record_attempt(run: Run, attempt: Attempt, known: Mapping[str, Any] | None = None) -> JournalEntry:
    """Put an attempt into the journal once all that it wrote is there; `known` is the row of one that wrote nothing.

    The item has `subject_id` and `index`. CannotGoOn if its files do not arrive, OSError if the journal is not taken.
    """
    _check_arrived(run.folder, attempt)
    entry = JournalEntry(
        time=now(),
        status="ok" if attempt.saved else "failed" if attempt.final else "attempt",
        subject_id=attempt.item.subject_id,
        index=attempt.item.index,
        attempt=attempt.number,
        seconds=round(attempt.seconds, 3),
        error=printable(attempt.error),
        files=attempt.saved.files if attempt.saved else {},
        row=attempt.saved.row if attempt.saved else dict(known or {}),
    )
    run.record(entry)
    return entry


def _check_arrived(folder: Folder, attempt: Attempt) -> None:
    """CannotGoOn if what a worker wrote cannot be seen from here: its machine has another disk under that name."""
    deadline = time.monotonic() + ARRIVAL_S
    for name, size in (attempt.saved.files if attempt.saved else {}).items():
        while folder.size(name) != size:
            if time.monotonic() > deadline:
                raise CannotGoOn(
                    f"{folder.location}: a worker wrote {name} but it is not here; on several machines give an --out "
                    "that all of them share, or a URL such as s3://bucket/run"
                )
            time.sleep(0.2)


def _close(run: Run, plan: Plan) -> None:
    """The views of a run that has come to its end; the manifest last, as it says that the others are there."""
    run.write_tables(plan.subjects, plan.flags)
    run.write_truth()
    run.write_manifest()


def read_scan(folder: Folder, entry: JournalEntry) -> PetCt:
    """The PET/CT of a finished subject."""
    ct_hu, affine = nifti_from_bytes(folder.read(entry.row["ct_path"]), entry.row["ct_path"])
    suv, _ = nifti_from_bytes(folder.read(entry.row["suv_path"]), entry.row["suv_path"])
    return PetCt(ct_hu=ct_hu, suv=suv, spacing_mm=spacing_of(affine))


def _verifier(run: Run) -> Callable[[JournalEntry], bool]:
    """Whether a finished subject's voxels still have the hashes written down; slow, as all is read."""

    def whole(entry: JournalEntry) -> bool:
        for kind in ("ct", "suv", "segmentation"):
            name, digest = entry.row.get(f"{kind}_path"), entry.row.get(f"{kind}_sha256")
            if name is None or digest is None:
                continue
            try:
                array, affine = nifti_from_bytes(run.folder.read(name), name)
            except (InputError, OSError):
                return False
            if voxel_sha256(array, affine) != digest:
                return False
        return True

    return whole
