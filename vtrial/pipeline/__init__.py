"""The trial as a story: recruit, generate, segment, measure, compare, report.

`cohorts.py` says who, `making.py` makes them, `judging.py` judges them: on scans (`scans.py`) with masks (`masks.py`),
by a verdict (`verdicts.py`) with its evidence (`evidence.py`). `training.py` and `segmenters.py` are about models,
`preparing.py` makes training sets of real PET/CT.
Nothing is written before all input has been checked. Progress goes to the caller's `report`, machines come from the
caller's `Executor`.
"""

from vtrial.pipeline.cohorts import Cohort, read_cohort, recruit
from vtrial.pipeline.judging import Machines, Question, measure, references, report, segment, validate
from vtrial.pipeline.making import generate, phantom, write_preview
from vtrial.pipeline.masks import Choice
from vtrial.pipeline.preparing import PrepareSummary, Wanted, prepare
from vtrial.pipeline.segmenters import segmenters
from vtrial.pipeline.training import models, train
from vtrial.pipeline.verdicts import Verdict

__all__ = [
    "Choice",
    "Cohort",
    "Machines",
    "PrepareSummary",
    "Question",
    "Verdict",
    "Wanted",
    "generate",
    "measure",
    "models",
    "phantom",
    "prepare",
    "read_cohort",
    "recruit",
    "references",
    "report",
    "segment",
    "segmenters",
    "train",
    "validate",
    "write_preview",
]
