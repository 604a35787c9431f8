"""PET/CT studies in folders of DICOM: found, paired and judged by their headers, then read as volumes.

A study is one PET and one CT of the same StudyInstanceUID and frame of reference whose fields of view overlap. Of
several PETs the attenuation-corrected one is taken, and the notes say so. What cannot be used is left out with every
reason, and never stops the rest. Nothing that is shown (reasons, notes, `repr`) holds a name, id, date or UID.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vtrial.imaging.dicom.folder import FolderContent, Shown, read_folder
from vtrial.imaging.dicom.headers import Identity, Image
from vtrial.imaging.dicom.pairing import Labelled, choose_ct, choose_pet
from vtrial.imaging.dicom.people import Person, agreed_person
from vtrial.imaging.dicom.series import Series, read_ct, read_pet, stacks
from vtrial.imaging.dicom.suv import SuvConversion, Tracer
from vtrial.imaging.volume import LEAST_COVERAGE, Volume
from vtrial.records import InputError

_NOBODY = Identity("", "", frozenset())


@dataclass(frozen=True, eq=False)
class DicomStudy:
    """A PET with its CT, not read yet: `read_study` does.

    `patient` numbers the persons of the collection, so that studies of one person stay together. `coverage` is the
    part of the PET's length that the CT covers. `where` is the study's folder as it may be shown. `identity` is what
    the header calls the person and the study, for a key that the user asks for; it is never shown.
    """

    patient: int
    where: str
    person: Person
    conversion: SuvConversion
    coverage: float
    notes: tuple[str, ...]
    ct: Series = field(repr=False)
    pet: Series = field(repr=False)
    identity: Identity = field(repr=False)


@dataclass(frozen=True)
class LeftOut:
    """A study, or files, that cannot be used, and every reason why.

    `where` is its folder as it may be shown. `place` is the study's folder, or the first of the files, and `identity`
    what the headers call person and study, for a key that the user asks for; they are never shown.
    """

    where: str
    reasons: tuple[str, ...]
    place: Path = field(repr=False)
    identity: Identity = field(repr=False)


@dataclass(frozen=True)
class DicomCollection:
    """What a folder holds: the usable studies, what was left out, and how many files were something else, by kind."""

    studies: tuple[DicomStudy, ...]
    left_out: tuple[LeftOut, ...]
    others: Mapping[str, int]


def find_studies(
    root: Path, *, tracer: Tracer = "fdg", least_coverage: float = LEAST_COVERAGE, weightless: bool = False
) -> DicomCollection:
    """All PET/CT studies under a folder, by their headers alone; InputError where no CT or PET image is there, with
    what is.

    A CT that covers less than `least_coverage` of the PET's length is refused. Folders may be nested in any way.
    `weightless` takes PETs that lack a weight alone too: their conversion wants one (`SuvConversion.lacks_weight`).
    """
    root = Path(root).absolute()  # workers may read from elsewhere
    content = read_folder(root)
    shown = Shown(root, content.words)
    if not content.images:
        there = ", ".join(f"{count} {what}" for what, count in content.others.items()) or "nothing else"
        told = f"{root}: no CT or PET image is there ({there}); name a folder of DICOM files"
        raise InputError(
            [told, *(f"{left.where}, {reason}" for left in _broken(content, shown) for reason in left.reasons)]
        )
    by_study: dict[str, list[Image]] = {}
    for image in content.images:
        by_study.setdefault(image.identity.study_uid, []).append(image)
    numbers: dict[str, int] = {}
    studies, left_out = [], _broken(content, shown)
    for images in by_study.values():
        place = _common(images)
        where = shown(place)
        number = numbers.setdefault(images[0].identity.patient or images[0].identity.study_uid, len(numbers) + 1)
        try:
            studies.append(_study(images, number, where, tracer, least_coverage, weightless))
        except InputError as error:
            left_out.append(LeftOut(where, error.problems, place, _common_identity(images)))
        except Exception as error:  # a header may hold anything; the error's words may quote it
            reason = f"its headers hold what was not foreseen ({type(error).__name__}): export the study again"
            left_out.append(LeftOut(where, (reason,), place, _common_identity(images)))
    return DicomCollection(tuple(studies), tuple(left_out), content.others)


def read_study(study: DicomStudy) -> tuple[Volume, Volume]:
    """The CT in HU (int16) and the PET in SUV (float32, g/ml), each on its grid; InputError where pixels are unfit,
    CannotRead where files cannot be read now."""
    return read_ct(study.ct), read_suv(study)


def read_suv(study: DicomStudy) -> Volume:
    """The PET as body-weight SUV (float32, g/ml); InputError where pixels are unfit."""
    return read_pet(study.pet, study.conversion.factors)


def _broken(content: FolderContent, shown: Shown) -> list[LeftOut]:
    """Files that cannot be read, those of a folder together by their reason."""
    together: dict[tuple[Path, str], list[Path]] = {}
    for path, reason in content.broken:
        together.setdefault((path.parent, reason), []).append(path)
    return [
        LeftOut(shown(folder), (f"{len(paths)} files: {reason}",), paths[0], _NOBODY)
        for (folder, reason), paths in together.items()
    ]


def _common(images: Iterable[Image]) -> Path:
    return Path(os.path.commonpath([image.path.parent for image in images]))


def _common_identity(images: Iterable[Image]) -> Identity:
    """What the images of a study call it; without its person where they name several."""
    identities = [image.identity for image in images]
    patients = {identity.patient for identity in identities}
    return identities[0] if len(patients) == 1 else replace(identities[0], patient="")


def _study(
    images: list[Image], patient: int, where: str, tracer: Tracer, least_coverage: float, weightless: bool
) -> DicomStudy:
    identity = images[0].identity
    if not identity.study_uid:
        raise InputError("StudyInstanceUID is missing: what belongs together is not known")
    if len({image.identity.patient for image in images}) > 1:
        raise InputError("one StudyInstanceUID with several PatientIDs: whose images these are is not known")
    labelled = _labelled(stacks(images))
    pets = [(label, stack) for label, stack in labelled if stack[0].kind == "PT"]
    cts = [(label, stack) for label, stack in labelled if stack[0].kind == "CT"]
    missing = [name for name, some in (("PET", pets), ("CT", cts)) if not some]
    if missing:
        raise InputError(f"the study has no {' and no '.join(missing)} series")
    pet, conversion, pet_notes = choose_pet(pets, tracer, weightless)
    ct, covered, ct_notes = choose_ct(cts, pet, least_coverage)
    person = agreed_person([image.person for image in (*pet.images, *ct.images)])
    told = [f"{series.where}: {note}" for series in (pet, ct) for note in series.notes]
    notes = (*pet_notes, *ct_notes, *told, *conversion.notes, *person.doubts)
    return DicomStudy(patient, where, person, conversion, covered, notes, ct, pet, identity)


def _labelled(found: list[list[Image]]) -> list[Labelled]:
    """Each stack by its kind and size, and a number where there are several of a kind; folders may name somebody."""
    kinds = ["PET" if stack[0].kind == "PT" else "CT" for stack in found]
    labelled = []
    for i, (kind, stack) in enumerate(zip(kinds, found, strict=True)):
        number = f" {kinds[: i + 1].count(kind)}" if kinds.count(kind) > 1 else ""
        labelled.append((f"the {kind} series{number} of {len(stack)} images", stack))
    return labelled
