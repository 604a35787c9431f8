"""What `vtrial prepare` must withstand from outside: kill -9, a full disk; and that workers change nothing.

Each time the same command again completes: no study lost, none made twice, finished files untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.patients import write_collection
from tests.preparer import SLOW
from vtrial.runs import JournalEntry, read_journal
from vtrial.storage import open_folder

PREPARER = Path(__file__).parent / "preparer.py"
NAMES = ["s0001", "s0002", "s0003"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("collection"))


def start(source: Path, out: Path, *options: str, slow: Path | None = None) -> subprocess.Popen[str]:
    usual = ["--segmenter", "none", "--allow-partial", "--executor", "local"]
    return subprocess.Popen(
        [sys.executable, str(PREPARER), "prepare", str(source), "--out", str(out), *usual, *options],
        env={**os.environ, SLOW: str(slow or "/nowhere"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(source: Path, out: Path, *options: str) -> tuple[int, str, str]:
    process = start(source, out, *options)
    answer, errors = process.communicate(timeout=300)
    return process.returncode, answer, errors


def made(out: Path) -> list[JournalEntry]:
    return [entry for entry in read_journal(open_folder(out)) if entry.status == "ok"]


def hashes(out: Path) -> dict[str, str]:
    """Of the arrays, and of all tables."""
    files = [*out.glob("*/*.npy"), *out.glob("*.csv"), out / "sheet.png"]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted call makes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    code, answer, errors = finish(source, out)
    assert code == 0, errors
    assert "3 of 3 studies are training volumes" in answer
    found = hashes(out)
    assert {f"{kind}/{name}.npy" for kind in ("ct", "suv") for name in NAMES} < set(found)
    return found


def check_complete(out: Path, whole: dict[str, str], before: dict[Path, int]) -> None:
    """All is there as an uninterrupted call has it, made once, and what was finished has not been touched."""
    assert hashes(out) == whole
    assert sorted(entry.subject_id for entry in made(out)) == NAMES
    assert pd.read_parquet(out / "subjects.parquet")["subject_id"].tolist() == NAMES
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(out.rglob("*.part"))


def finished_files(out: Path) -> dict[Path, int]:
    return {out / name: (out / name).stat().st_mtime_ns for entry in made(out) for name in entry.files}


@pytest.mark.parametrize(("executor", "workers"), [("local", 1), ("ray", 2)])
def test_kill_9(source: Path, whole: dict[str, str], tmp_path: Path, executor: str, workers: int) -> None:
    how = ["--executor", executor, *(["--workers", str(workers)] if executor == "ray" else [])]
    out, slow = tmp_path / "data", tmp_path / "slow"
    slow.mkdir()
    (slow / "s0002").write_text("300")
    process = start(source, out, *how, slow=slow)
    deadline = time.monotonic() + 240
    while len(made(out)) < workers:  # one at a time, or all but the slow one
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = finished_files(out)
    assert len(before) == 2 * workers and not (out / "subjects.parquet").exists()
    (out / "ct" / ".s0002.npy.0123abcd.part").write_bytes(b"half")  # as a kill in a write leaves it
    code, answer, errors = finish(source, out, *how)
    assert code == 0, errors
    assert f"{3 - workers} made now" in answer
    check_complete(out, whole, before)
    killed, gone_on = json.loads((out / "manifest.json").read_text())["sessions"]
    assert (killed["finished"], killed["done"], gone_on["done"]) == (None, 0, 3 - workers)
    assert (gone_on["executor"], gone_on["workers"]) == (executor, workers)
    assert gone_on["finished"] > killed["started"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB: a coarse volume is 2.4 MB."""
    place = tmp_path / "small"
    place.mkdir()
    done = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not done or done.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(source: Path, whole: dict[str, str], small: Path) -> None:
    """Room for one volume: stops and says so; with room again the same command completes."""
    out = small / "data"
    code, _, errors = finish(source, out)
    assert code == 1, errors
    assert "No space left" in errors and "same command again" in errors and "Traceback" not in errors
    before = finished_files(out)
    assert len(before) == 2
    subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
    code, _, errors = finish(source, out)
    assert code == 0, errors
    check_complete(out, whole, before)


def test_a_finished_set_on_a_read_only_disk_is_left_as_it_is(source: Path, whole: dict[str, str], small: Path) -> None:
    out = small / "data"
    subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
    assert finish(source, out)[0] == 0
    everything = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    code, answer, errors = finish(source, out)
    assert code == 0, errors
    assert "0 made now" in answer
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    code, _, errors = finish(source, out)
    assert code == 0, errors
    assert {path: path.stat().st_mtime_ns for path in everything} == everything
    check_complete(out, whole, {})
