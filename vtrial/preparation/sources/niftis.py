"""Collections of NIfTI pairs: FDG-PET-CT-Lesions' folders of `CTres` and `SUV`, and nnU-Net raw's cases of channels.

Names are told apart by `vtrial.imaging.discovery`. Here links are followed, `dataset.json` says which channel is what,
and a case that is named as another tracer's is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vtrial.imaging.dicom.fields import plain
from vtrial.imaging.dicom.suv import Tracer
from vtrial.imaging.discovery import FoundScan, find_scans
from vtrial.preparation.sources.study import Candidate, Kind, Origin
from vtrial.preparation.sources.volumes import NiftiPair
from vtrial.records import InputError
from vtrial.storage import LocalFolder

_CASE = re.compile(r"(?P<case>.+)_\d{4}(?P<ending>\.nii(?:\.gz)?)")
_TRACED = re.compile(r"(?P<tracer>fdg|psma)_(?P<patient>[0-9a-z]+)_(?P<study>.+)", re.IGNORECASE)  # AutoPET III
_CT_NAMES = ("ct", "ctres")
_PET_NAME = re.compile(r"pet|suv|^pt$|fdg")


@dataclass(frozen=True)
class LinkedFolder(LocalFolder):
    """A folder whose links to files and folders are followed, each once; what is no link goes first."""

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files under here by name; links to nowhere and folders without leave are not there."""
        found: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()
        for path in self._walk(self.path(), seen):
            found[path.relative_to(self.path()).as_posix()] = path.stat().st_size
        return found

    def _walk(self, place: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(place), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:
            return
        for entry in entries:
            with suppress(OSError):  # a circle of links
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self._walk(Path(entry), seen)
                elif entry.is_file():
                    yield Path(entry)


def nifti_candidates(root: Path, tracer: Tracer, least_coverage: float) -> dict[Kind, list[Candidate]]:
    """The pairs and the cases under a folder; one of whose files is missing has its reason."""
    found: dict[Kind, list[Candidate]] = {"pairs": [], "nnunet": []}
    try:
        scans = find_scans(LinkedFolder(str(root)))
    except InputError:  # none are there
        return found
    for scan in scans:
        if _CASE.fullmatch(PurePosixPath(scan.ct).name):
            found["nnunet"].append(_case(root, scan, tracer, least_coverage))
        else:
            found["pairs"].append(_pair(root, scan, least_coverage))
    return found


def _pair(root: Path, scan: FoundScan, least_coverage: float) -> Candidate:
    place = PurePosixPath(scan.ct).parent
    origin = Origin(str(place), scan.patient)
    names = (f"{scan.patient}/{place.name}", place.name)
    return pair_candidate(origin, names, root / scan.ct, root / scan.suv, least_coverage)


def _case(root: Path, scan: FoundScan, tracer: Tracer, least_coverage: float) -> Candidate:
    """A case of channels. AutoPET III's names hold tracer, patient and study."""
    match = _CASE.fullmatch(scan.ct)
    assert match is not None, "the caller has looked"
    case = PurePosixPath(match["case"])
    patient = scan.patient
    names: tuple[str, ...] = (case.name,)
    if traced := _TRACED.fullmatch(case.name):
        fdg = traced["tracer"].lower() == "fdg"
        patient = f"{'PETCT' if fdg else 'PSMA'}_{traced['patient']}"
        names = (case.name, f"{patient}/{traced['study']}")
        if not fdg and tracer == "fdg":
            reason = "its name says PSMA and not FDG: --tracer any takes it"
            return Candidate(Origin(str(case), patient), names, reasons=(reason,))
    ct, suv = (root / f"{case}_{channel:04d}{match['ending']}" for channel in _channels(root / case.parent))
    return pair_candidate(Origin(str(case), patient), names, ct, suv, least_coverage)


def pair_candidate(origin: Origin, names: tuple[str, ...], ct: Path, suv: Path, least_coverage: float) -> Candidate:
    """What two files offer by their looks; their content is read by the loader alone."""
    reasons = tuple(reason for what, file in (("CT", ct), ("SUV", suv)) if (reason := _missing(what, file)))
    return Candidate(origin, names, (ct, suv), NiftiPair(ct, suv, least_coverage), reasons=reasons)


def _missing(what: str, file: Path) -> str:
    """Why a file cannot be a volume by its looks; "" if it may be."""
    try:
        if file.is_dir():
            return f"the {what} is a folder: a NIfTI file is needed"
        return "" if file.stat().st_size else f"the {what} is an empty file"
    except FileNotFoundError:
        return f"the {what} is missing"
    except OSError as error:
        return f"the {what} cannot be read ({error.strerror})"


def _channels(folder: Path) -> tuple[int, int]:
    """The numbers of CT and PET by the `dataset.json` beside `imagesTr`; 0 and 1 where its names do not tell.

    nnU-Net normalises by these names, so a PET may be called anything (`zscore`), and both may be called CT. Whoever
    is taken for the other is refused by its values when it is read.
    """
    for place in (folder.parent, folder):
        try:
            told = json.loads((place / "dataset.json").read_bytes())
            kinds = {
                int(number): plain(str(name))
                for number, name in (told.get("channel_names") or told["modality"]).items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        cts = [number for number, name in kinds.items() if name in _CT_NAMES]
        pets = [number for number, name in kinds.items() if _PET_NAME.search(name)]
        if len(kinds) == 2 and len(cts) + len(pets) == 1:
            cts = cts or [number for number in kinds if number not in pets]
            pets = pets or [number for number in kinds if number not in cts]
        if len(cts) == 1 and len(pets) == 1:
            return cts[0], pets[0]
    return 0, 1
