"""The run folder: whole files or none, a journal that survives a kill, one driver at a time, one identity."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vtrial.execution import Attempt
from vtrial.production import record_attempt
from vtrial.records import InputError, Subject
from vtrial.runs import JOURNAL, JournalEntry, Manifest, now, open_run, read_journal
from vtrial.storage import LocalFolder, RemoteFolder, folder_name, open_folder, place

OPTIONS = "?endpoint_override=http://localhost:9000"
SUBJECT = Subject("A0", 0, 7, "F", 50.0, 165.0, 70.0)


def manifest(n: int = 2, seed: int = 0) -> Manifest:
    return Manifest(kind="generate", identity={"seed": seed, "model": "m"}, geometry={}, n=n, sharded=False)


def entry(status: str = "ok", **changes: object) -> JournalEntry:
    fields = {"time": now(), "status": status, "subject_id": "A0", "index": 0, "attempt": 1, "seconds": 1.0}
    return JournalEntry.model_validate(fields | {"files": {"scans/A0/x": 3}} | changes)


@pytest.fixture(params=["local", "file-url", "fsspec"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> LocalFolder | RemoteFolder:
    location = {
        "local": str(tmp_path / "run"),
        "file-url": f"file://{tmp_path}/run",
        "fsspec": f"memory://{tmp_path.name}/run",
    }[request.param]
    opened = open_folder(location)
    opened.create()
    return opened


def test_folder_keeps_files_and_journal(folder: LocalFolder | RemoteFolder) -> None:
    folder.write("a/b.bin", b"123")
    folder.append("j", "one")
    folder.append("j", "two")
    assert folder.read("a/b.bin") == b"123"
    assert folder.size("a/b.bin") == 3
    assert folder.size("a/c.bin") is None
    assert folder.lines("j") == ["one", "two"]
    assert folder.lines("k") == []
    assert folder.sizes()["a/b.bin"] == 3
    assert not any(name.endswith(".part") for name in folder.sizes())


def test_a_journal_keeps_whatever_text_there_is(folder: LocalFolder | RemoteFolder) -> None:
    error = "a\u2028b\x85c " + os.fsdecode(b"M\xfcller")
    with open_run(folder, manifest()) as run:
        record_attempt(run, Attempt(SUBJECT, 1, 1.0, error=error))
    (known,) = read_journal(folder)
    assert known.error == "a\u2028b\x85c M\\udcfcller"


@pytest.mark.parametrize(
    ("location", "picture", "name"),
    [
        ("/runs/a?b", "/runs/a?b/x.png", "a?b"),
        ("s3://bucket/run", "s3://bucket/run/x.png", "run"),
        (f"s3://bucket/run{OPTIONS}", f"s3://bucket/run/x.png{OPTIONS}", "run"),
    ],
)
def test_a_place_in_a_folder_is_told_so_that_it_can_be_opened(location: str, picture: str, name: str) -> None:
    assert place(location, "x.png") == picture
    assert folder_name(location) == name


def test_sweep_removes_leftovers_only(folder: LocalFolder | RemoteFolder) -> None:
    folder.write("scans/A0/SUV.nii.gz", b"123")
    folder.write("scans/A0/.SUV.nii.gz.0123abcd.part", b"1")
    assert folder.sweep("") == 1
    assert list(folder.sizes()) == ["scans/A0/SUV.nii.gz"]


def test_unknown_scheme_is_bad_input() -> None:
    with pytest.raises(InputError, match="nosuchscheme"):
        open_folder("nosuchscheme://bucket/run")


def test_a_protocol_for_reading_is_no_place_for_a_run(folder: LocalFolder | RemoteFolder) -> None:
    assert folder.entries() == [], "a folder that can be written holds nothing of the trial"
    with pytest.raises(InputError, match=r"http://localhost:1/run: cannot write there \(this protocol is for reading"):
        open_folder("http://localhost:1/run").create()


def test_a_file_in_place_of_the_folder_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="cannot write there"):
        open_folder(tmp_path / "run").create()
    with pytest.raises(InputError, match="cannot write there"):
        open_folder(tmp_path / "run" / "below").create()


def test_torn_line_is_skipped_and_closed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.append(JOURNAL, entry().model_dump_json())
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"time": "2026')
    assert len(read_journal(folder)) == 1
    folder.append(JOURNAL, entry(index=1).model_dump_json())
    assert [e.index for e in read_journal(folder)] == [0, 1]


def test_done_needs_the_journal_and_the_files(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run")
    with open_run(folder, manifest()) as run:
        run.write_manifest()
        folder.write("scans/A0/x", b"123")
        assert not run.is_done(SUBJECT)
        run.record(entry())
    with open_run(folder, manifest()) as run:
        assert run.is_done(SUBJECT)
        assert not run.is_done(SUBJECT, verify=lambda e: False)
        with pytest.raises(InputError, match="A0 there and B0 here"):
            run.is_done(Subject("B0", 0, 7, "F", 50.0, 165.0, 70.0))
    (tmp_path / "run/scans/A0/x").write_bytes(b"12")
    with open_run(folder, manifest()) as run:
        assert not run.is_done(SUBJECT)


def test_another_identity_is_refused_and_named(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run")
    with open_run(folder, manifest()) as run:
        run.write_manifest()
    with pytest.raises(InputError) as caught, open_run(folder, manifest(seed=1)):
        pass
    assert "seed is 0 there and 1 here" in str(caught.value)
    assert "model" not in str(caught.value)


def test_a_strange_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"), open_run(open_folder(tmp_path), manifest()):
        pass


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_run(open_folder(tmp_path / "run"), manifest()):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_one_driver_at_a_time_and_no_stale_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom vtrial.storage import open_folder\n"
            f"with open_folder({str(tmp_path)!r}).lock():\n print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=str(holder.pid)), open_folder(tmp_path).lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with open_folder(tmp_path).lock():
        pass
