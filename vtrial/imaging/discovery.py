"""Real PET/CTs in a folder, found by the names that data sets give them, and read onto axes that are ours.

Known are pairs `CTres` and `SUV` in folders of any depth (FDG-PET-CT-Lesions), and `<case>_0000` (CT) with
`<case>_0001` (SUV) in any folder (nnU-Net raw), each as `.nii` or `.nii.gz`. Nothing is written here.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from vtrial.imaging.files import nifti_from_bytes
from vtrial.imaging.volume import upright
from vtrial.records import InputError, PetCt
from vtrial.storage import Folder

_PAIR = re.compile(r"(?:CTres|SUV)\.nii(?:\.gz)?")
_CHANNEL = re.compile(r"(.+)_000[01](\.nii(?:\.gz)?)")
_PATIENT = re.compile(r"(?:PETCT|fdg)_([0-9a-f]+)(?:_|$)", re.IGNORECASE)  # of FDG-PET-CT-Lesions, and of AutoPET
_LONGEST = 64  # characters of an id, as it names files


@dataclass(frozen=True)
class FoundScan:
    """A CT and its PET by name in the folder; either may turn out not to be there.

    `subject_id` can name files and is the scan's own; `patient` is what the data set calls the person.
    """

    subject_id: str
    patient: str
    ct: str
    suv: str


def find_scans(folder: Folder) -> list[FoundScan]:
    """The PET/CTs under a folder, by name; InputError where there are none."""
    found = [*_pairs(folder), *_channels(folder)] if folder.entries() else []
    if not found:
        raise InputError(
            f"{folder.location}: no run is there, and no PET/CT: name the folder of a run, or one with CTres.nii.gz "
            "and SUV.nii.gz for each scan, or with <case>_0000.nii.gz (CT) and <case>_0001.nii.gz (SUV)"
        )
    often = Counter(scan.subject_id.casefold() for scan in found)
    apart = (
        replace(scan, subject_id=_hashed(scan.subject_id, scan.ct)) if often[scan.subject_id.casefold()] > 1 else scan
        for scan in found
    )
    return sorted(apart, key=lambda scan: scan.subject_id)


def _names(folder: Folder) -> Iterable[PurePosixPath]:
    paths = (PurePosixPath(name) for name in sorted(folder.sizes()))
    return (path for path in paths if not any(part.startswith(".") for part in path.parts))


def _pairs(folder: Folder) -> list[FoundScan]:
    """A folder for each scan. A name that is not there is the usual one: reading it tells."""
    places: dict[PurePosixPath, dict[str, str]] = {}
    for path in _names(folder):
        if _PAIR.fullmatch(path.name):
            places.setdefault(path.parent, {})[path.name.partition(".")[0]] = str(path)
    shared = _shared([place.parts for place in places])
    patients = {place: _patient(place, shared, folder.location) for place in places}
    scans_of = Counter(patients.values())
    found = []
    for place, names in places.items():
        patient = patients[place]
        rest = "-".join(part for part in place.parts[shared:] if part != patient)
        subject_id = patient if scans_of[patient] == 1 else f"{patient}_{rest}"
        ct, suv = (names.get(kind, str(place / f"{kind}.nii.gz")) for kind in ("CTres", "SUV"))
        found.append(FoundScan(_safe(subject_id), patient, ct, suv))
    return found


def names_patient(part: str) -> bool:
    """Whether a folder or file has the form in which a known data set names a person."""
    return _PATIENT.match(part) is not None


def _shared(places: list[tuple[str, ...]]) -> int:
    """How many leading parts all places share."""
    return next((i for i, parts in enumerate(zip(*places)) if len(set(parts)) > 1), min(map(len, places), default=0))


def _patient(place: PurePosixPath, shared: int, location: str) -> str:
    """The part of the path that names the person: by its form, else the folder that the scan's own lies in.

    Above it may be sites or cohorts. Folders that all scans share are nobody's; where only the scan's own is left, it
    is the person's.
    """
    known = next(filter(names_patient, place.parts), None)
    if known is not None:
        return known
    own = place.parts[shared:][-2:] or place.parts[-1:]
    return own[0] if own else PurePosixPath(location).name


def _channels(folder: Folder) -> list[FoundScan]:
    cases = {}
    for path in _names(folder):
        if match := _CHANNEL.fullmatch(path.name):
            cases[path.parent / match[1]] = match[2]
    found = []
    for case, ending in cases.items():
        match = _PATIENT.match(case.name)
        patient = f"PETCT_{match[1]}" if match else case.name
        found.append(FoundScan(_safe(case.name), patient, f"{case}_0000{ending}", f"{case}_0001{ending}"))
    return found


def _safe(text: str) -> str:
    """A text as the name of a file; a long one keeps its beginning and a hash of the whole."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "scan"
    if len(plain) <= _LONGEST:
        return plain
    return _hashed(plain, text)


def _hashed(plain: str, text: str) -> str:
    """A name with a hash of the text that it is to tell apart from others."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{plain[: _LONGEST - 9]}-{digest[:8]}"


def read_upright(folder: Folder, ct: str, suv: str) -> PetCt:
    """A PET/CT with its axes turned to RAS+, voxels as they are; InputError or OSError where it cannot be read."""
    pair = [upright(*nifti_from_bytes(folder.read(name), name)) for name in (ct, suv)]
    hu, values = (volume.voxels for volume in pair)
    if hu.shape != values.shape or hu.ndim != 3:
        raise InputError(f"{ct}: its grid {hu.shape} is not that of {suv}, {values.shape}")
    return PetCt(np.clip(hu, -32768, 32767).astype(np.int16), values.astype(np.float32), pair[1].spacing_mm)
