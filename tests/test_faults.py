"""What a run must withstand from outside: kill -9 of the driver, Ctrl-C, a full disk, a read-only or blocked output.

Each time the same command again completes: nobody lost, nobody twice, finished files untouched, no half-written file
under a final name.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
from engine import FAULTS, PEOPLE, SIDE, LoadFake, plant, ray_cluster  # noqa: F401

from vtrial.imaging.files import centred_affine, read_nifti, voxel_sha256
from vtrial.records import Subject
from vtrial.runs import read_journal
from vtrial.storage import open_folder

ENGINE = Path(__file__).parent / "engine.py"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "people.csv").write_text(PEOPLE)
    return tmp_path


def command(out: Path, executor: str) -> list[str]:
    spec = (
        str(out.parent / "people.csv") if (out.parent / "people.csv").exists() else str(out.parents[1] / "people.csv")
    )
    return [sys.executable, str(ENGINE), "generate", spec, "--out", str(out), "--executor", executor]


def start(
    out: Path, executor: str, faults: Path | None = None, options: Sequence[str] = (), **more: str
) -> subprocess.Popen[str]:
    environment = {**os.environ, FAULTS: str(faults or ""), **more}
    return subprocess.Popen(
        [*command(out, executor), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` has it ignored
    )


def finish(out: Path, executor: str = "local", **more: str) -> tuple[int, str, str]:
    process = start(out, executor, **more)
    answer, errors = process.communicate(timeout=180)
    return process.returncode, answer, errors


def wait_for_done(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240  # a busy machine starts Ray slowly
    while sum(e.status == "ok" for e in read_journal(open_folder(out))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_complete(out: Path, before: dict[Path, int]) -> None:
    """All five are there once, whole, as an uninterrupted run has them; what was finished has not been touched."""
    table = pd.read_parquet(out / "subjects.parquet")
    assert table.subject_id.tolist() == ["A0", "A1", "A2", "A3", "A4"]
    assert table.status.tolist() == ["ok"] * 5
    for row in table.itertuples(index=False):
        suv, affine = read_nifti(out / row.suv_path)
        assert voxel_sha256(*read_nifti(out / row.ct_path)) == row.ct_sha256
        assert voxel_sha256(suv, affine) == row.suv_sha256
        person = Subject(row.subject_id, row.index, 0, row.sex, row.age_years, row.height_cm, row.weight_kg)
        twin = LoadFake(side=suv.shape[0]).render(person).pet_ct
        expected = centred_affine(twin.suv.shape, twin.spacing_mm)
        assert voxel_sha256(twin.ct_hu, expected) == row.ct_sha256
        assert voxel_sha256(twin.suv, expected) == row.suv_sha256
    oks = [e.subject_id for e in read_journal(open_folder(out)) if e.status == "ok"]
    assert sorted(oks) == sorted(set(oks))
    assert not list(out.rglob("*.part"))
    assert {p: p.stat().st_mtime_ns for p in before} == before


def check_whole(out: Path) -> None:
    """Whatever stands under a final name can be read to its end, journalled or not."""
    for path in out.glob("scans/*/*.nii.gz"):
        if not path.name.startswith("."):
            read_nifti(path)


def finished_files(out: Path) -> dict[Path, int]:
    entries = [e for e in read_journal(open_folder(out)) if e.status == "ok"]
    return {out / name: (out / name).stat().st_mtime_ns for e in entries for name in e.files}


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_kill_9_of_the_driver(here: Path, executor: str) -> None:
    out = here / "run"
    plant(here / "faults", "slow", 3, 60)
    process = start(out, executor, here / "faults")
    wait_for_done(out, 3, process)
    process.kill()
    process.communicate()
    before = finished_files(out)
    assert len(before) == 6
    check_whole(out)
    (out / "scans" / "A3").mkdir(exist_ok=True)
    (out / "scans" / "A3" / ".SUV.nii.gz.0123abcd.part").write_bytes(b"half")  # as a kill in a write leaves it
    code, answer, errors = finish(out, executor)
    assert code == 0, errors
    assert "2 made now" in answer
    check_complete(out, before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_control_c_and_a_batch_systems_end(here: Path, executor: str, how: signal.Signals) -> None:
    out = here / "run"
    plant(here / "faults", "slow", 2, 60)
    process = start(out, executor, here / "faults")
    wait_for_done(out, 2, process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal tells the driver and all that it started
    else:
        process.terminate()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors and "SIGTERM" not in errors
    assert pd.read_parquet(out / "subjects.parquet").status.tolist() == ["ok", "ok", "pending", "pending", "pending"]
    before = finished_files(out)
    code, _, errors = finish(out)
    assert code == 0, errors
    check_complete(out, before)


@pytest.fixture
def mount(here: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    place = here / "small"
    place.mkdir()
    done = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not done or done.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_full_disk(here: Path, mount: Path, executor: str) -> None:
    """Room for two subjects of about 210 kB, not for three: stops and says so; with room again it completes."""
    out = mount / "run"
    code, _, errors = finish(out, executor, **{SIDE: "40"})
    assert code == 1, errors
    assert "No space left" in errors
    assert "same command again" in errors
    assert "Traceback" not in errors
    before = finished_files(out)
    assert 2 <= len(before) < 10
    check_whole(out)
    subprocess.run(["mount", "-o", "remount,size=20m", str(mount)], check=True)
    code, _, errors = finish(out, **{SIDE: "40"})
    assert code == 0, errors
    check_complete(out, before)


def test_read_only_output(here: Path, mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    code, _, errors = finish(mount / "run")
    assert code == 2
    assert "cannot write there (Read-only file system)" in errors
    assert "Traceback" not in errors
    subprocess.run(["mount", "-o", "remount,rw,size=20m", str(mount)], check=True)
    assert finish(mount / "run")[0] == 0
    check_complete(mount / "run", {})


def test_a_finished_run_on_a_read_only_disk_is_left_as_it_is(here: Path, mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(mount)], check=True)
    assert finish(mount / "run")[0] == 0
    before = finished_files(mount / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    code, _, errors = finish(mount / "run")
    assert code == 0, errors
    assert finished_files(mount / "run") == before


def test_output_that_becomes_blocked_meanwhile(here: Path) -> None:
    """A file in the place of the next subject's folder: root ignores modes, and a busy mount stays writable."""
    out = here / "run"
    plant(here / "faults", "slow", 2, 6)
    process = start(out, "local", here / "faults")
    wait_for_done(out, 2, process)
    before = finished_files(out)
    (out / "scans" / "A2").write_text("in the way")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "cannot write" in errors
    assert "Traceback" not in errors
    (out / "scans" / "A2").unlink()
    assert finish(out)[0] == 0
    check_complete(out, before)


def test_two_drivers_do_not_share_a_run(here: Path) -> None:
    out = here / "run"
    plant(here / "faults", "slow", 1, 60)
    first = start(out, "local", here / "faults")
    wait_for_done(out, 1, first)
    code, _, errors = finish(out)
    assert code == 2
    assert f"process {first.pid}" in errors
    first.kill()
    first.communicate()
    assert finish(out)[0] == 0
    check_complete(out, {})


def test_a_worker_killed_from_outside(here: Path) -> None:
    """Kill -9 of an actor, by its process id, in the middle of a subject."""
    out = here / "run"
    plant(here / "faults", "slow", 1, 60)
    process = start(out, "ray", here / "faults")
    wait_for_done(out, 1, process)
    before = finished_files(out)
    (worker,) = _actors_of(process.pid)
    plant(here / "faults", "slow", 1, 0)
    (here / "faults" / "slow-1").unlink()
    os.kill(worker, signal.SIGKILL)
    answer, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "A1: attempt 1: the worker died" in errors
    assert "5 of 5 subjects are done" in answer
    check_complete(out, before)


def test_a_running_cluster_is_joined_and_left_running(here: Path, ray_cluster: None) -> None:  # noqa: F811
    import ray

    address = ray.get_runtime_context().gcs_address
    process = start(here / "run", "ray", options=["--address", address, "--workers", "2"])
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert f"Joining the Ray cluster at {address}" in errors
    check_complete(here / "run", {})
    assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7


def _actors_of(driver: int) -> list[int]:
    """Processes below the driver that Ray has named after our actor."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if b"ray::Worker" in name and driver in _ancestors(int(folder.name)):
            found.append(int(folder.name))
    return found


def _ancestors(pid: int) -> list[int]:
    line = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        line.append(pid)
    return line
