"""A subject's scan as the work of an executor: rendered by whatever makes scans, then written with its row.

A renderer turns a subject into a scan. It is loaded once in every worker and draws all its random numbers from the
subject's own (seed, index), so any worker, order or restart gives the same voxels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vtrial.execution import Resources, Saved
from vtrial.imaging.autopet import SEG_NAME, study_name
from vtrial.imaging.files import CT_NAME, SUV_NAME, nifti_bytes, scan_folder, segmentation_name
from vtrial.records import PetCt, Subject
from vtrial.storage import Folder, open_folder

Layout = Literal["scans", "training", "autopet"]
"""How a run keeps its volumes: with its masks, as arrays for `vtrial train`, or as FDG-PET-CT-Lesions is shipped."""


@dataclass(frozen=True)
class Scan:
    """A PET/CT, and where they are known its organ labels (uint8, same grid) and the numbers behind it."""

    pet_ct: PetCt
    labels: NDArray[np.uint8] | None = None
    truth: dict[str, float] | None = None


Renderer = Callable[[Subject], Scan]
LoadRenderer = Callable[[Resources], Renderer]  # called once in every worker; it must pickle


def save_arrays(folder: Folder, subject_id: str, pet_ct: PetCt) -> Saved:
    """Write ct/<id>.npy (int16 HU) and suv/<id>.npy (float16 g/ml), each whole or not at all, as `vtrial train` maps
    them; tells their sizes and paths. OSError if that cannot be."""
    arrays: dict[str, NDArray[Any]] = {"ct": pet_ct.ct_hu, "suv": pet_ct.suv.astype(np.float16)}
    files, row = {}, {}
    for kind, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        name = f"{kind}/{subject_id}.npy"
        folder.write(name, buffer.getvalue())
        files[name], row[f"{kind}_path"] = buffer.tell(), name
    return Saved(files, row)


@dataclass(frozen=True)
class ScanWork:
    """The work on one subject for an executor: `make` renders, `save` writes the files and gives the row."""

    render: Renderer
    folder: Folder
    sharded: bool
    layout: Layout
    device: str
    threads: int

    def make(self, subject: Subject) -> Scan:
        """Render one subject."""
        return self.render(subject)

    def save(self, subject: Subject, scan: Scan) -> Saved:
        """Write the files of a scan and tell their sizes, paths and hashes; OSError if that cannot be."""
        save = {"scans": self._save_scan, "training": self._save_volume, "autopet": self._save_study}[self.layout]
        saved = save(subject, scan)
        spacing = [round(step, 5) for step in scan.pet_ct.spacing_mm]
        saved.row.update(spacing_z_mm=spacing[2], device=self.device, threads=self.threads)
        if scan.truth is not None:
            saved.row["truth"] = {key: float(value) for key, value in scan.truth.items()}
        return saved

    def _save_volume(self, subject: Subject, scan: Scan) -> Saved:
        return save_arrays(self.folder, subject.subject_id, scan.pet_ct)

    def _save_scan(self, subject: Subject, scan: Scan) -> Saved:
        base = scan_folder(subject.subject_id, subject.index, sharded=self.sharded)
        masks = segmentation_name(subject.subject_id, subject.index, sharded=self.sharded)
        return self._save_niftis(
            scan.pet_ct, base, {} if scan.labels is None else {"segmentation": (masks, scan.labels)}
        )

    def _save_study(self, subject: Subject, scan: Scan) -> Saved:
        """CT, PET and a mask without lesions, under the name that the data set would give the study."""
        base = study_name(subject).folder
        lesions = np.zeros(scan.pet_ct.ct_hu.shape, dtype=np.uint8)
        return self._save_niftis(scan.pet_ct, base, {"lesions": (f"{base}/{SEG_NAME}", lesions)})

    def _save_niftis(self, pet_ct: PetCt, base: str, masks: dict[str, tuple[str, NDArray[Any]]]) -> Saved:
        volumes: dict[str, tuple[str, NDArray[Any]]] = {
            "ct": (f"{base}/{CT_NAME}", pet_ct.ct_hu),
            "suv": (f"{base}/{SUV_NAME}", pet_ct.suv),
            **masks,
        }
        files, row = {}, {}
        for kind, (name, array) in volumes.items():
            data, digest = nifti_bytes(array, pet_ct.spacing_mm)
            self.folder.write(name, data)
            files[name] = len(data)
            row[f"{kind}_path"], row[f"{kind}_sha256"] = name, digest
        return Saved(files, row)


@dataclass(frozen=True)
class ScanWorkFactory:
    """Builds the work in a worker: opens the run's folder there and loads the renderer."""

    load: LoadRenderer
    location: str
    sharded: bool
    layout: Layout = "scans"

    def __call__(self, resources: Resources) -> ScanWork:
        """The work with these resources."""
        return ScanWork(
            render=self.load(resources),
            folder=open_folder(self.location),
            sharded=self.sharded,
            layout=self.layout,
            device=resources.device,
            threads=resources.threads,
        )
