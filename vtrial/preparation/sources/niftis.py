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


def nifti_candidates(root: Path, tracer: Tracer) -> dict[Kind, list[Candidate]]:
    """The pairs and the cases under a folder; one of whose files is missing has its reason."""
    found: dict[Kind, list[Candidate]] = {"pairs": [], "nnunet": []}
    try:
        scans = find_scans(LinkedFolder(str(root)))
    except InputError:  # none are there
        return found
    for scan in scans:
        origin, names = called(scan)
        if match := _CASE.fullmatch(scan.ct):
            found["nnunet"].append(_case(root, match, origin, names, tracer))
        else:
            found["pairs"].append(pair_candidate(origin, names, root / scan.ct, root / scan.suv))
    return found


def called(scan: FoundScan) -> tuple[Origin, tuple[str, ...]]:
    """Where a scan lies and whose it is by its name, and what a table may call it.

    AutoPET III's cases hold tracer, patient and study.
    """
    match = _CASE.fullmatch(scan.ct)
    if match is None:
        place = PurePosixPath(scan.ct).parent
        return Origin(str(place), scan.patient), (f"{scan.patient}/{place.name}", place.name, scan.subject_id)
    case = PurePosixPath(match["case"])
    traced = _TRACED.fullmatch(case.name)
    if traced is None:
        return Origin(str(case), scan.patient), (case.name, scan.subject_id)
    patient = f"{'PETCT' if _is_fdg(traced) else 'PSMA'}_{traced['patient']}"
    return Origin(str(case), patient), (case.name, scan.subject_id, f"{patient}/{traced['study']}")


def _is_fdg(traced: re.Match[str]) -> bool:
    return traced["tracer"].lower() == "fdg"


def _case(root: Path, match: re.Match[str], origin: Origin, names: tuple[str, ...], tracer: Tracer) -> Candidate:
    case = PurePosixPath(match["case"])
    traced = _TRACED.fullmatch(case.name)
    if traced and not _is_fdg(traced) and tracer == "fdg":
        return Candidate(origin, names, reasons=("its name says PSMA and not FDG: --tracer any takes it",))
    ct, suv = (root / f"{case}_{channel:04d}{match['ending']}" for channel in _channels(root / case.parent))
    return pair_candidate(origin, names, ct, suv)


def pair_candidate(origin: Origin, names: tuple[str, ...], ct: Path, suv: Path) -> Candidate:
    """What two files offer by their looks; their content is read by the loader alone."""
    reasons = tuple(reason for what, file in (("CT", ct), ("SUV", suv)) if (reason := _missing(what, file)))
    return Candidate(origin, names, (ct, suv), NiftiPair(ct, suv), reasons=reasons)


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
