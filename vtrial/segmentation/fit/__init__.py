"""Training a segmenter of our own on phantoms: `data.py` stores them, `loop.py` trains, `finish.py` scores and writes.

`grid.py` resamples as TotalSegmentator does, `batches.py` varies the examples, `network.py` has the network,
`judge.py` scores it through TotalSegmentator at full size.
"""

from vtrial.segmentation.fit.config import SegmenterConfig, read_segmenter_config
from vtrial.segmentation.fit.data import prepare_phantoms
from vtrial.segmentation.fit.export import export_segmenter, trained_on
from vtrial.segmentation.fit.finish import finish_segmenter
from vtrial.segmentation.fit.judge import Judgement, held_out, judge
from vtrial.segmentation.fit.loop import FitState, train_segmenter

__all__ = [
    "FitState",
    "Judgement",
    "SegmenterConfig",
    "export_segmenter",
    "finish_segmenter",
    "held_out",
    "judge",
    "prepare_phantoms",
    "read_segmenter_config",
    "train_segmenter",
    "trained_on",
]
