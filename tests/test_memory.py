"""Large blocks that are freed are used again, in Ray's workers too, whose threads are not their first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is told")
FAULTS = """
import resource
from concurrent.futures import ThreadPoolExecutor

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray(200_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
HERE = """
from vtrial.memory import keep_freed_memory
first = faults()
assert keep_freed_memory()
faults()
print(first, faults())
"""
ON_RAY = """
import ray
from vtrial.cluster.session import connect
from vtrial.memory import keep_freed_memory
connect(None, 1, lambda said: None)

@ray.remote
def work():
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(faults).result()
        assert threads.submit(keep_freed_memory).result()
        threads.submit(faults).result()
        return first, threads.submit(faults).result()

print(*ray.get(work.remote()))
"""


@pytest.mark.parametrize("script", [HERE, ON_RAY])
def test_large_blocks_are_mapped_once(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS + script], capture_output=True, text=True, cwd=tmp_path, timeout=180
    )
    assert done.returncode == 0, done.stderr
    first, later = map(int, done.stdout.split()[-2:])
    assert first > 1000 and later < first / 20
