"""What is to be measured: each subject's three files, and how to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vtrial.imaging.files import nifti_from_bytes, segmentation_name
from vtrial.measurement.scan import LabelledScan, Volume
from vtrial.records import InputError
from vtrial.runs import read_journal, read_manifest
from vtrial.storage import Folder, open_folder


@dataclass(frozen=True)
class Case:
    """One subject's files by name, and a `fingerprint` that changes when their content does."""

    subject_id: str
    ct: str
    suv: str
    labels: str
    fingerprint: str


Reader = Callable[[Case], LabelledScan]  # InputError or OSError where it cannot; it must pickle


@dataclass(frozen=True)
class FolderReader:
    """Reads the NIfTI files of cases, named relative to a folder or URL; masks to one of their own where given."""

    location: str
    masks: str = ""

    def __call__(self, case: Case) -> LabelledScan:
        """The three volumes; InputError for a file that is no NIfTI, OSError for one that is not there."""
        folder = open_folder(self.location)
        beside = open_folder(self.masks) if self.masks else folder
        places = ((folder, case.ct), (folder, case.suv), (beside, case.labels))
        ct, suv, labels = (Volume(name, *nifti_from_bytes(place.read(name), name)) for place, name in places)
        return LabelledScan(ct, suv, labels)


def files_fingerprint(folder: Folder, names: Iterable[str]) -> str:
    """SHA-256 of the content of files; one that cannot be read counts as such, and reading it will tell why."""
    digest = hashlib.sha256()
    for name in names:
        try:
            digest.update(hashlib.sha256(folder.read(name)).digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def run_cases(folder: Folder, masks: str | None = None) -> list[Case]:
    """The finished subjects of a run by index, each with its mask in the folder `masks` of the run.

    By default that is the exact one that the run's journal names, or that of `segmentations/`.
    The scans' fingerprints are the hashes and sizes in the run's journal and folder, so only the masks are read here.
    Raises InputError if the folder holds no run, or one without scans.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder.location}: no run is there; name the folder of one")
    latest = {entry.index: entry for entry in read_journal(folder)}
    sizes = folder.sizes()
    cases = []
    for entry in (latest[index] for index in sorted(latest) if latest[index].status == "ok"):
        row = entry.row
        if "ct_sha256" not in row:
            raise InputError(f"{folder.location}: a training set, not a run of scans; nothing to measure there")
        name = segmentation_name(entry.subject_id, entry.index, sharded=manifest.sharded)
        labels = f"{masks}/{name.partition('/')[2]}" if masks else row.get("segmentation_path", name)
        scans = [f"{row[f'{kind}_sha256']} {sizes.get(row[f'{kind}_path'], 0)}" for kind in ("ct", "suv")]
        fingerprint = " ".join([*scans, files_fingerprint(folder, [labels])])
        cases.append(Case(entry.subject_id, row["ct_path"], row["suv_path"], labels, fingerprint))
    return cases
