"""Who is compared: sides that have scans, and all parties to a comparison."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from vtrial.measurement import MeasureSummary
from vtrial.measurement.cohort import NOT_MEASURED
from vtrial.pipeline.masks import Masks
from vtrial.pipeline.originals import TrainingSet
from vtrial.pipeline.scans import Scans, read_table
from vtrial.segmentation import SegmentSummary
from vtrial.validation import AnalysisSettings, Cohort, Reference, cohort_of


@dataclass(frozen=True)
class Side:
    """Scans, whose masks were measured, and how the steps of this call ended."""

    scans: Scans
    masks: Masks
    segmented: SegmentSummary | None = None
    measured: MeasureSummary | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Why subjects have no numbers: a mask that could not be drawn cannot be measured either."""
        measured = self.measured.failures if self.measured else {}
        return measured | (self.segmented.failures if self.segmented else {})

    def table(self) -> pd.DataFrame:
        """Its measurements."""
        return read_table(self.scans.folder, self.masks.table, "delete it and give vtrial measure again")

    def unmeasured(self) -> dict[str, str]:
        """Why subjects have no measurement at all."""
        told = self.table().drop_duplicates("subject_id").set_index("subject_id")["missing"]
        return {
            str(i): reason.removeprefix(NOT_MEASURED) for i, reason in told.items() if reason.startswith(NOT_MEASURED)
        }

    def cohort(self, settings: AnalysisSettings) -> Cohort:
        """Its measured subjects; InputError with what is wrong with the table."""
        return cohort_of(
            self.scans.name,
            self.table(),
            self.scans.people,
            suv_ceiling=settings.suv_ceiling,
            segmenter=self.masks.segmenter,
        )


@dataclass(frozen=True)
class Parties:
    """Who is compared: twins with `real`, both with `also` by analysis of variance, and twins with `training` alone."""

    twins: Side
    real: Side | Reference
    also: tuple[Side | Reference, ...] = ()
    training: TrainingSet | None = None

    @property
    def sides(self) -> list[Side]:
        """All that have scans."""
        return [side for side in (self.twins, self.real, *self.also) if isinstance(side, Side)]
