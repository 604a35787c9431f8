"""From a PET/CT and its organ mask to numbers: `subject.py` measures one subject, `cohort.py` many.

`scan.py` refuses what cannot be measured, `peak.py` finds SUVpeak, `cases.py` lists and reads files.
"""

from vtrial.measurement.cases import Case, FolderReader, Reader, files_fingerprint, run_cases
from vtrial.measurement.cohort import TABLE, MadeBy, MeasureSummary, measure_cohort
from vtrial.measurement.scan import LabelledScan, Volume, check_scan, labelled_scan
from vtrial.measurement.subject import COLUMNS, Measurement, measure, not_measured

__all__ = [
    "COLUMNS",
    "TABLE",
    "Case",
    "FolderReader",
    "LabelledScan",
    "MadeBy",
    "MeasureSummary",
    "Measurement",
    "Reader",
    "Volume",
    "check_scan",
    "files_fingerprint",
    "labelled_scan",
    "measure",
    "measure_cohort",
    "not_measured",
    "run_cases",
]
