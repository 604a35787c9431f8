"""`vtrial bench`: what a user gets.

Subjects are measured from outside: whole ones, all processes and both files included. Segmenting is measured beside
stock TotalSegmentator, case by case in turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vtrial.execution import CannotGoOn, Resources, cpu_count
from vtrial.records import InputError
from vtrial.runs import read_journal, read_manifest
from vtrial.storage import open_folder

SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True)
class BenchResult:
    """`seconds_a_subject`: steady state, from the first subjects' ends to the last's; None with too few subjects.

    `peak_memory_gb` counts memory shared by processes once (proportional set size).
    """

    command: str
    subjects: int
    workers: int
    threads_per_subject: int
    device: str
    seconds_a_subject: float | None
    seconds_in_all: float
    peak_memory_gb: float
    megabytes_a_subject: float


def measure(what: str, spec: str, n: int, options: Sequence[str] = ()) -> BenchResult:
    """Run `vtrial <what> <spec> --n <n>` into a temporary folder and watch it; CannotGoOn if it fails."""
    with tempfile.TemporaryDirectory(prefix="vtrial-bench-") as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "vtrial.cli", what, spec, "--n", str(n), "--out", str(out), "--json", *options]
        started = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            watch = _MemoryWatch(process.pid)
            watch.start()
            answer, errors = process.communicate()
            peak = watch.stop()
        seconds = time.monotonic() - started
        if process.returncode != 0:
            raise CannotGoOn(f"the command measured failed with code {process.returncode}:\n{answer}{errors[-2000:]}")
        run = json.loads(answer)["run"]
        folder = open_folder(run)
        manifest = read_manifest(folder)
        assert manifest is not None
        session = manifest.sessions[-1]
        entries = [entry for entry in read_journal(folder) if entry.status == "ok"]
        ends = sorted(datetime.fromisoformat(entry.time).timestamp() for entry in entries)
        return BenchResult(
            command=f"vtrial {what} {spec} --n {n} {' '.join(options)}".strip(),
            subjects=len(ends),
            workers=session.workers,
            threads_per_subject=session.threads_per_subject,
            device=session.device,
            seconds_a_subject=_steady(ends, session.workers),
            seconds_in_all=round(seconds, 1),
            peak_memory_gb=round(peak / 1e9, 2),
            megabytes_a_subject=round(sum(sum(e.files.values()) for e in entries) / max(1, len(entries)) / 1e6, 1),
        )


@dataclass(frozen=True)
class SegmentBench:
    """Medians of seconds a case with the models kept in memory (`resident`) and by the stock API, which loads them for
    every case; `faster` is the second over the first, `identical` says whether all masks were, voxel by voxel.
    """

    segmenter: str
    cases: int
    threads: int
    resident_seconds: float
    stock_seconds: float
    faster: float
    identical: bool


def measure_segmenter(segmenter: str, spec: str, n: int) -> SegmentBench:
    """Segment the CT of `n` phantoms of a cohort both ways, in turn; the first case, which loads, is not timed.

    InputError for fewer than two cases, an unknown segmenter or spec.
    """
    from vtrial.cohort.recruit import recruit
    from vtrial.cohort.registry import find_spec
    from vtrial.cohort.spec import read_spec
    from vtrial.imaging.files import nifti_bytes
    from vtrial.phantom.population import make_phantom
    from vtrial.segmentation import segmenter_plan

    if n < 2:
        raise InputError(f"--n {n}: the first case loads the models and is not timed; give 2 or more")
    people = recruit(read_spec(find_spec(Path(spec))), n, seed=0)
    plan, resources = segmenter_plan(segmenter), Resources(threads=cpu_count())
    kinds = {"resident": plan.load(resources), "stock": segmenter_plan(segmenter, resident=False).load(resources)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    identical = True
    for person in people:
        pet_ct = make_phantom(person).pet_ct
        ct, _ = nifti_bytes(pet_ct.ct_hu, pet_ct.spacing_mm)
        masks = set()
        for kind, segment in kinds.items():
            begun = time.perf_counter()
            masks.add(segment(ct))
            seconds[kind].append(time.perf_counter() - begun)
        identical = identical and len(masks) == 1
    resident, stock = (statistics.median(seconds[kind][1:]) for kind in kinds)
    return SegmentBench(
        plan.name, n - 1, resources.threads, round(resident, 2), round(stock, 2), round(stock / resident, 2), identical
    )


def _steady(ends: Sequence[float], workers: int) -> float | None:
    """Seconds a subject once every worker has ended its first one: loading and warming up are over by then."""
    later = len(ends) - workers
    return round((ends[-1] - ends[workers - 1]) / later, 2) if later > 0 else None


class _MemoryWatch(threading.Thread):
    """Samples the memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._peak, self._over = pid, 0, threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._over.wait(SAMPLE_EVERY_S):
            self._peak = max(self._peak, sum(_bytes_of(pid) for pid in _family(self._pid)))

    def stop(self) -> int:
        """The peak in bytes."""
        self._over.set()
        self.join()
        return self._peak


def _family(pid: int) -> set[int]:
    """A process and its descendants, from the parents that /proc tells."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return family


def _bytes_of(pid: int) -> int:
    """Proportional set size; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0
