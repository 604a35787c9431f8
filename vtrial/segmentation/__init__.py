"""From a CT to an organ mask: `choice.py` checks the segmenter, `cohort.py` segments many subjects.

`adapter.py` runs the real TotalSegmentator offline, `resident.py` keeps its models in memory, `official.py` finds its
weights. `card.py` is the form of segmenters of our own, `nnunet.py` builds from them what TotalSegmentator loads.
"""

from vtrial.segmentation.card import (
    Architecture,
    Head,
    Intensity,
    Mode,
    SegmenterCard,
    list_segmenters,
    read_segmenter_card,
    write_segmenter,
)
from vtrial.segmentation.cases import CtCase, run_ct_cases
from vtrial.segmentation.choice import segmenter_plan
from vtrial.segmentation.cohort import SegmentSummary, segment_cohort
from vtrial.segmentation.journal import SegmentJournal
from vtrial.segmentation.segmenter import LoadSegmenter, Segmenter, SegmenterPlan

__all__ = [
    "Architecture",
    "CtCase",
    "Head",
    "Intensity",
    "LoadSegmenter",
    "Mode",
    "SegmentJournal",
    "SegmentSummary",
    "Segmenter",
    "SegmenterCard",
    "SegmenterPlan",
    "list_segmenters",
    "read_segmenter_card",
    "run_ct_cases",
    "segment_cohort",
    "segmenter_plan",
    "write_segmenter",
]
