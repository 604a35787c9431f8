"""How FDG-PET-CT-Lesions names its files and people: a collection of ours for tools that know that data set.

    PETCT_<10 hex digits>/<MM-DD-YYYY>-NA-<description>-<5 digits>/{CTres,SUV,SEG}.nii.gz
    fdg_metadata.csv    one row a series (CT, PT, SEG), age as DICOM writes it (`060Y`)
    demographics.csv    one row a study, with the height and weight that the data set's own table does not have

Gatidis et al. 2022, doi 10.1038/s41597-022-01718-3, and the columns of the NBIA's metadata tables. Names, dates and
UIDs are made from a hash of the subject, so the same subjects give the same collection; no such study took place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from vtrial.geometry import SHAPE
from vtrial.records import Subject
from vtrial.storage import Folder

COLLECTION = "FDG-PET-CT-Lesions"
SEG_NAME = "SEG.nii.gz"
METADATA, DEMOGRAPHICS = "fdg_metadata.csv", "demographics.csv"
_DESCRIPTION = "PET-CT synthetic, vtrial"
_FIRST_DAY, _DAYS = date(2001, 1, 1), 3650  # the data set's shifted dates lie in these years
_SERIES = (  # modality, number, images, description, name and UID of the class
    ("CT", 2, SHAPE[2], "CTres", "CT Image Storage", "1.2.840.10008.5.1.4.1.1.2"),
    ("PT", 3, SHAPE[2], "SUV", "Positron Emission Tomography Image Storage", "1.2.840.10008.5.1.4.1.1.128"),
    ("SEG", 4, 1, "Segmentation", "Segmentation Storage", "1.2.840.10008.5.1.4.1.1.66.4"),
)
_COLUMNS = (
    *("Series UID", "Collection", "3rd Party Analysis", "Data Description URI", "Subject ID", "Study UID"),
    *("Study Description", "Study Date", "Series Description", "Manufacturer", "Modality", "SOP Class Name"),
    *("SOP Class UID", "Number of Images", "File Size", "File Location", "Download Timestamp"),
    *("diagnosis", "age", "sex"),
)


@dataclass(frozen=True)
class StudyName:
    """What the collection calls a subject: `patient`/`study` is its folder."""

    patient: str
    study: str
    day: date
    digest: bytes

    @property
    def folder(self) -> str:
        """Folder of the study under the collection."""
        return f"{self.patient}/{self.study}"

    def uid(self, what: str) -> str:
        """A valid UID (2.25, PS3.5 annex B.2) for the study or one of its series."""
        return f"2.25.{uuid.UUID(bytes=hashlib.sha256(self.digest + what.encode()).digest()[:16]).int}"


def study_name(subject: Subject) -> StudyName:
    """The name of a subject's study: by who it is, so that another body is never taken for it."""
    who = (int(subject.seed), int(subject.index), subject.subject_id, subject.sex)
    body = (subject.age_years, subject.height_cm, subject.weight_kg)
    digest = hashlib.sha256(repr((*who, *map(float, body))).encode()).digest()
    day = _FIRST_DAY + timedelta(days=int.from_bytes(digest[8:12]) % _DAYS)
    number = int.from_bytes(digest[12:16]) % 100_000
    return StudyName(f"PETCT_{digest.hex()[:10]}", f"{day:%m-%d-%Y}-NA-{_DESCRIPTION}-{number:05d}", day, digest)


def write_tables(folder: Folder, subjects: Sequence[Subject]) -> None:
    """Write the data set's own table and the one of demographics; OSError if that cannot be."""
    folder.write(METADATA, _csv(_COLUMNS, (row for subject in subjects for row in _metadata(subject))))
    columns = ("study", "subject_id", "sex", "age_years", "height_cm", "weight_kg", "diagnosis")
    folder.write(DEMOGRAPHICS, _csv(columns, map(_demographics, subjects)))


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


def _metadata(subject: Subject) -> Iterable[Sequence[object]]:
    """A row for each series. File Location has the patient and the study as its third and fourth part."""
    name = study_name(subject)
    for modality, number, images, description, sop_name, sop_uid in _SERIES:
        series = f"{number}.000000-{description}-{int.from_bytes(name.digest[16:20]) % 100_000:05d}"
        yield (
            *(name.uid(modality), COLLECTION, "NO", "", name.patient, name.uid("study")),
            *(_DESCRIPTION, f"{name.day.month}/{name.day.day}/{name.day.year}", description, "vtrial", modality),
            *(sop_name, sop_uid, images, "", f"./{COLLECTION}/{name.folder}/{series}", ""),
            *(_diagnosis(subject), f"{int(subject.age_years):03d}Y", subject.sex),
        )


def _demographics(subject: Subject) -> Sequence[object]:
    name = study_name(subject)
    body = (subject.sex, subject.age_years, subject.height_cm, subject.weight_kg)
    return name.folder, name.patient, *body, _diagnosis(subject)


def _diagnosis(subject: Subject) -> str:
    """As the data set codes it: `LUNG_CANCER`; NEGATIVE where nothing is known."""
    return re.sub(r"\W+", "_", str(subject.extra.get("diagnosis") or "NEGATIVE")).upper()
