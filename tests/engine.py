"""A small real engine for tests: 16³ scans drawn from the subject's seed, and faults that can be planted.

As a script it is `vtrial` with these scans in place of a model: `python tests/engine.py generate … `. Faults are files
in the folder $VTRIAL_TEST_FAULTS: `<what>-<index>` holding how often it still happens. `kill` kills the worker with
signal 9, `raise` raises, `nan` renders nonsense, `slow` sleeps that many seconds (each time).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from vtrial.execution import Resources
from vtrial.imaging.scans import Scan
from vtrial.randomness import Purpose, subject_rng
from vtrial.records import PetCt, Subject

if TYPE_CHECKING:
    from vtrial.generation import CascadePlan

PEOPLE = """subject_id,sex,age_years,height_cm,weight_kg
A0,F,50,165,70
A1,M,60,178,84
A2,F,45,160,66
A3,M,71,170,90
A4,F,33,172,61
"""
FAULTS = "VTRIAL_TEST_FAULTS"
SIDE = "VTRIAL_TEST_SIDE"


def plant(faults: Path, what: str, index: int, times: int) -> None:
    faults.mkdir(parents=True, exist_ok=True)
    (faults / f"{what}-{index}").write_text(str(times))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray for all tests; its workers can import this file."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class LoadFake:
    """A renderer from the seed alone; what it does wrong is planted in `faults`."""

    faults: str = ""
    side: int = 16

    def __call__(self, resources: Resources) -> Callable[[Subject], Scan]:
        return self.render

    def _strikes(self, what: str, index: int) -> bool:
        path = Path(self.faults) / f"{what}-{index}"
        if not self.faults or not path.is_file() or int(path.read_text()) == 0:
            return False
        if what != "slow":
            path.write_text(str(int(path.read_text()) - 1))
        return True

    def render(self, subject: Subject) -> Scan:
        if self._strikes("slow", subject.index):
            time.sleep(int((Path(self.faults) / f"slow-{subject.index}").read_text()))
        if self._strikes("kill", subject.index):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._strikes("raise", subject.index):
            raise ArithmeticError("planted failure")
        rng = subject_rng(subject.seed, subject.index, Purpose.GLOBAL)
        shape = (self.side, self.side, self.side)
        ct_hu = rng.integers(-500, 501, shape, dtype=np.int16)
        suv = rng.random(shape, dtype=np.float32) * 10
        return Scan(PetCt(ct_hu, suv, (2.0, 2.0, subject.height_cm / 100)))


def fake_plan(load: LoadFake) -> Callable[..., CascadePlan]:
    """In the place of `cascade_plan`: these scans instead of a model's."""
    from vtrial.generation import CascadePlan
    from vtrial.records import Support  # here, as every worker imports this file and needs no torch

    everyone = Support((18, 90), (140, 210), (40, 200), (15, 60))

    def plan(model: str, sampler: str | None, *others: str | int | None) -> CascadePlan:
        identity = {"model": model, "sampler": sampler}
        return CascadePlan(load, identity, {}, everyone, standard={sampler, *others} == {None})

    return plan


def main() -> None:
    import vtrial.pipeline
    from vtrial.cli import main as cli

    load = LoadFake(os.environ.get(FAULTS, ""), int(os.environ.get(SIDE, "16")))
    vtrial.pipeline.making.cascade_plan = fake_plan(load)
    cli()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import engine  # workers must find the classes under an importable name, not __main__

    engine.main()
