"""Collections of DICOM: what `vtrial.imaging.dicom` finds, under the names of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vtrial.imaging.dicom.studies import DicomStudy, LeftOut, find_studies, read_study
from vtrial.imaging.dicom.suv import Tracer
from vtrial.imaging.volume import Volume
from vtrial.preparation.sources.study import Candidate, Fact, Origin
from vtrial.records import InputError


@dataclass(frozen=True, repr=False)
class DicomPair:
    """A loader of a DICOM study."""

    study: DicomStudy

    def __call__(self) -> tuple[Volume, Volume]:
        """CT in HU (int16) and PET in SUV (float32, g/ml), each on its own grid; InputError with the reason,
        CannotRead where files cannot be read now."""
        return read_study(self.study)


def dicom_candidates(root: Path, tracer: Tracer) -> tuple[list[Candidate], Mapping[str, int], tuple[str, ...]]:
    """The studies under a folder, those that cannot be used with their reasons; the files of other kinds; and what is
    there in place of images, where there are none."""
    try:
        found = find_studies(root, tracer=tracer, weightless=True)
    except InputError as error:
        return [], {}, error.problems
    unusable = [_unusable(root, left) for left in found.left_out]
    return [*(_candidate(root, study) for study in found.studies), *unusable], found.others, ()


def _unusable(root: Path, left: LeftOut) -> Candidate:
    """A left-out study with the names that a table may call it, so that its rows are no strangers."""
    path, uid = left.place.relative_to(root).as_posix(), left.identity.study_uid
    names = (uid, left.place.name) if uid else ()
    return Candidate(Origin(path, left.identity.patient, uid), names, reasons=left.reasons)


def _candidate(root: Path, study: DicomStudy) -> Candidate:
    files = [image.path for series in (study.ct, study.pet) for place in series.places for image in place]
    place = Path(os.path.commonpath([file.parent for file in files]))
    path = place.relative_to(root).as_posix()
    facts: dict[str, Fact] = {"suv_from": study.conversion.method, "ct_coverage": round(study.coverage, 3)}
    if study.conversion.uptake_s is not None:
        facts["uptake_min"] = round(study.conversion.uptake_s / 60.0, 1)
    return Candidate(
        origin=Origin(path, study.identity.patient, study.identity.study_uid),
        names=(study.identity.study_uid, place.name),
        files=tuple(sorted(files)),
        load=DicomPair(study),
        person=study.person,
        facts=facts,
        notes=tuple(note for note in study.notes if note not in study.person.doubts),
    )
