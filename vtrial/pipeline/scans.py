"""Scans on disk, whoever made them: a run of ours, or real PET/CT with a place for the work on it.

Real PET/CT is a folder of files, or a training set: then its people of the split "test", written at that place.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from pyarrow.lib import ArrowException

from vtrial.execution import CannotGoOn, Report
from vtrial.imaging.discovery import FoundScan, find_scans, read_upright
from vtrial.imaging.files import SUV_NAME
from vtrial.measurement import Case, files_fingerprint, run_cases
from vtrial.pipeline.parts import Parts
from vtrial.preparation.held_out import SCANS, SPLIT, HeldOut, held_out
from vtrial.preparation.sources import NOBODY, PERSON_COLUMNS, scanned_people
from vtrial.records import InputError, PetCt
from vtrial.runs import MANIFEST, Manifest, read_manifest
from vtrial.runs import TABLE as SUBJECTS
from vtrial.segmentation import CtCase, run_ct_cases
from vtrial.segmentation.cases import has_truth
from vtrial.storage import Folder, folder_name, open_folder, place, printable, write_if_new

RUNS = "runs"
SOURCE = "source.json"  # in a folder for work on real scans: where they are
_PREPARED = "prepare"  # kind of a run that is a training set of real scans


@dataclass(frozen=True)
class Scans:
    """Subjects with CT and PET.

    `source` is where the names of CT and PET begin, `folder` where masks, tables and reports go: the run itself, but
    for real scans (`found`) a folder of its own. `people` has one row a subject, as in a run's table of subjects.
    `exact` says that the run came with exact masks. Those `of_training` are there once `write` has been called.
    """

    name: str
    source: str
    folder: Folder
    ct_cases: tuple[CtCase, ...]
    people: pd.DataFrame
    manifest: Manifest | None = None
    found: tuple[FoundScan, ...] = ()
    exact: bool = False
    of_training: HeldOut | None = None

    @property
    def real(self) -> bool:
        """Whether these are scans that nobody here has made."""
        return self.manifest is None

    @property
    def so_far(self) -> str:
        """How many subjects of a run are made, "" where all are."""
        made, n = len(self.ct_cases), len(self.ct_cases) if self.manifest is None else self.manifest.n
        return f"{self.name}: the run is not complete, {made} of {n} subjects are made" if made < n else ""

    @property
    def title(self) -> str:
        """What they are, for the report."""
        if self.of_training is not None:
            return f'PET/CT of the split "{SPLIT}" of a training set'
        return "PET/CT of a folder" if self.manifest is None else f"a run of vtrial ({self.manifest.kind})"

    def write(self, report: Report) -> None:
        """Write the scans that are `of_training` and not there yet; for others there is nothing to do.

        InputError where those that are there were made of other volumes, CannotGoOn where the storage gives up.
        """
        if self.of_training is None:
            return
        with self.held():
            try:
                self.of_training.write(self.folder, Parts(report, len(self.found)).ended)
            except OSError as error:
                told = f"{self.folder.location}: cannot write ({error}); what is written is safe, try again"
                raise CannotGoOn(told) from error

    def cases(self, masks: str | None) -> list[Case]:
        """What is to be measured with the masks in a folder of `folder`; None: the exact ones."""
        if not self.real:
            return run_cases(self.folder, masks)
        source, cases = open_folder(self.source), []
        for scan, ct_case in zip(self.found, self.ct_cases, strict=True):
            labels = f"{masks}/{ct_case.mask}"
            contents = (files_fingerprint(source, [scan.ct, scan.suv]), files_fingerprint(self.folder, [labels]))
            cases.append(Case(scan.subject_id, scan.ct, scan.suv, labels, " ".join(contents)))
        return cases

    def read(self, subject_id: str) -> PetCt:
        """A subject's PET/CT, upright; InputError or OSError where it cannot be read."""
        ct = next(case.ct for case in self.ct_cases if case.subject_id == subject_id)
        found = {scan.subject_id: scan.suv for scan in self.found}
        return read_upright(
            open_folder(self.source), ct, found.get(subject_id, str(PurePosixPath(ct).with_name(SUV_NAME)))
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder for work, there and ours alone; InputError where another works in it.

        A folder that cannot be written is given without a lock: finished work is left as it is, and other fails.
        """
        with ExitStack() as stack:
            if self.real and self.folder.size(SOURCE) is None:
                self.folder.create()
            try:
                stack.enter_context(self.folder.lock())
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise CannotGoOn(f"{self.folder.location}: cannot write there ({error})") from None
            if self.real:
                source = self.of_training.folder.location if self.of_training else self.source
                write_if_new(self.folder, SOURCE, json.dumps({"source": source}).encode())
                write_if_new(self.folder, f"{SUBJECTS}.parquet", parquet_bytes(self.people))
            yield


def open_scans(location: str, out: str | None = None) -> Scans:
    """The scans of a run, of a folder of real ones, of a training set of such, or of the folder for work on these.

    Work on real scans goes to `out`, by default `runs/real-<name of the folder>`. InputError where there are no scans,
    or the work folder is another's.
    """
    folder = open_folder(location)
    name = folder_name(folder.location)
    if folder.size(MANIFEST) is not None and not _is_prepared(folder):
        if out is not None:
            raise InputError(f"--out {out}: {location} is a run, and keeps its own masks and tables; leave out --out")
        return _of_run(folder, printable(name))
    if folder.size(SOURCE) is not None:
        return _of_real(open_folder(_source(folder)), folder)
    work = open_folder(out or str(Path(RUNS) / f"real-{plain_name(name)}"))
    return _of_real(folder, work)


def _of_run(folder: Folder, name: str) -> Scans:
    if folder.size(f"{SUBJECTS}.parquet") is None:
        raise InputError(f"{folder.location}: no {SUBJECTS}.parquet; give the command that made the run again")
    ct_cases = tuple(run_ct_cases(folder))
    if not ct_cases:
        raise InputError(f"{folder.location}: no subject is finished; give the command that made the run again")
    people = read_table(folder, f"{SUBJECTS}.parquet", "give the command that made the run again")
    finished = people["subject_id"].isin([case.subject_id for case in ct_cases])
    people.loc[finished, "status"] = "ok"  # a killed run's table is behind its journal
    manifest = read_manifest(folder)
    return Scans(name, folder.location, folder, ct_cases, people, manifest, exact=has_truth(folder))


def _of_real(source: Folder, work: Folder) -> Scans:
    of_training = held_out(source) if _is_prepared(source) else None
    found = tuple(find_scans(source)) if of_training is None else of_training.found
    known = _source(work) if work.size(SOURCE) is not None else source.location
    if known != source.location:
        raise InputError(f"{work.location}: holds the work on {known}, not on {source.location}; {_elsewhere(source)}")
    foreign = [n for n in (f"{SUBJECTS}.parquet", "measurements.parquet") if work.size(n) is not None]
    if foreign and work.size(SOURCE) is None:
        raise InputError(f"{work.location}: has a {foreign[0]} that is not of this work; {_elsewhere(source)}")
    name = printable(folder_name(source.location))
    return Scans(
        name=name if of_training is None else f"{name} ({SPLIT})",
        source=source.location if of_training is None else place(work.location, SCANS),
        folder=work,
        ct_cases=tuple(CtCase(scan.subject_id, scan.ct, f"{scan.subject_id}.nii.gz") for scan in found),
        people=_people(found, source) if of_training is None else _known_people(of_training),
        found=found,
        of_training=of_training,
    )


def _is_prepared(folder: Folder) -> bool:
    """Whether a folder is a training set of real scans."""
    manifest = read_manifest(folder) if folder.size(MANIFEST) is not None else None
    return manifest is not None and manifest.kind == _PREPARED


def _source(work: Folder) -> str:
    try:
        return str(json.loads(work.read(SOURCE))["source"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{place(work.location, SOURCE)}: cannot be read; work in another folder") from None


def _elsewhere(source: Folder) -> str:
    return f"give another folder: vtrial segment {source.location} --out FOLDER, then --real FOLDER"


def _people(found: tuple[FoundScan, ...], source: Folder) -> pd.DataFrame:
    """Who was scanned, by the tables beside the scans; without a known sex nobody can be compared, and that is told."""
    local = "://" not in source.location  # tables behind a URL are not looked for
    told = scanned_people(Path(source.location), found) if local else [None] * len(found)
    rows: list[dict[str, Any]] = []
    for i, (scan, each) in enumerate(zip(found, told, strict=True)):
        person = (each.person if each else None) or NOBODY
        state = {"status": "ok", "error": ""} if person.sex else {"status": "failed", "error": "sex is not known"}
        body = {c: float("nan") if (v := getattr(person, c)) is None else v for c in PERSON_COLUMNS[1:]}
        body["bmi"] = body["weight_kg"] / (body["height_cm"] / 100.0) ** 2
        texts = {"sex": person.sex or "", "diagnosis": each.facts.get("diagnosis") if each else None}
        rows.append({"subject_id": scan.subject_id, "index": i, **texts, **body, **state})
    return pd.DataFrame(rows)


def _known_people(of_training: HeldOut) -> pd.DataFrame:
    """The same of a training set's people, who are all known."""
    people = of_training.people
    return people.assign(index=range(len(people)), status="ok", error="")


def newest_run() -> str:
    """The run under `runs/` that was worked on last; InputError where there is none."""
    started: dict[str, str] = {}
    for path in Path(RUNS).glob(f"*/{MANIFEST}"):
        try:
            manifest = read_manifest(open_folder(path.parent))
        except InputError:
            continue
        if manifest is None or manifest.kind == _PREPARED or manifest.identity.get("layout") == "training":
            continue
        if manifest.sessions:
            started[str(path.parent)] = manifest.sessions[-1].started
    if not started:
        raise InputError(f"no run under {RUNS}/; name one, or make one: vtrial generate cohorts/oncology.csv --n 100")
    return max(started, key=lambda run: started[run])


def plain_name(text: str) -> str:
    """A text as the name of a folder: letters and digits of any script, the rest as hyphens."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-._") or "unnamed"


def read_table(folder: Folder, name: str, remedy: str) -> pd.DataFrame:
    """A Parquet table of ours; InputError where it is spoilt, with what makes it anew."""
    data = folder.read(name)
    try:
        return pd.read_parquet(io.BytesIO(data))
    except (ArrowException, OSError, ValueError) as error:
        told = f"{place(folder.location, name)}: not a readable Parquet file ({error})"
        raise InputError(f"{told}; it is spoilt: {remedy}") from None


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
