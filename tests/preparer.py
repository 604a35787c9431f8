"""`vtrial` as a script in which `prepare` makes volumes of a thirty-second of the voxels, and can be held up.

`python tests/preparer.py prepare …`. A file `s0002` in the folder $VTRIAL_TEST_SLOW holds how many seconds the study of
that id takes longer, each time; workers of Ray import this file by its name.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vtrial.execution import Resources
from vtrial.preparation import volume
from vtrial.preparation.sources import Study
from vtrial.preparation.volume import TrainingVolume
from vtrial.preparation.work import PrepareWork, PrepareWorkFactory

SLOW = "VTRIAL_TEST_SLOW"
SHAPE, IN_PLANE_MM = (56, 56, 192), 8.0  # the field of view of the method


@dataclass(frozen=True)
class CoarseWork(PrepareWork):
    """The work on the coarse grid."""

    def make(self, study: Study) -> TrainingVolume | tuple[str, ...]:
        wait = Path(os.environ.get(SLOW, "/nowhere")) / study.subject_id
        if wait.is_file():
            time.sleep(float(wait.read_text()))
        return super().make(study)


class CoarseFactory(PrepareWorkFactory):
    """Makes the grid coarse in the worker's process."""

    def __call__(self, resources: Resources) -> PrepareWork:
        volume.SHAPE, volume.IN_PLANE_MM = SHAPE, IN_PLANE_MM  # type: ignore[misc]
        return CoarseWork(**vars(super().__call__(resources)))


def main() -> None:
    import vtrial.pipeline
    from vtrial.cli import main as cli

    vtrial.pipeline.preparing.PrepareWorkFactory = CoarseFactory  # type: ignore[misc]
    cli()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import preparer  # workers must find the classes under an importable name, not __main__

    preparer.main()
