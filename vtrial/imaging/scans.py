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
from vtrial.imaging.files import CT_NAME, SUV_NAME, nifti_bytes, scan_folder, segmentation_name
from vtrial.records import PetCt, Subject
from vtrial.storage import Folder, open_folder

Layout = Literal["scans", "training"]


@dataclass(frozen=True)
class Scan:
    """A PET/CT, and where they are known its organ labels (uint8, same grid) and the numbers behind it."""

    pet_ct: PetCt
    labels: NDArray[np.uint8] | None = None
    truth: dict[str, float] | None = None


Renderer = Callable[[Subject], Scan]
LoadRenderer = Callable[[Resources], Renderer]  # called once in every worker; it must pickle


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
        saved = self._save_arrays(subject, scan) if self.layout == "training" else self._save_scan(subject, scan)
        spacing = [round(step, 5) for step in scan.pet_ct.spacing_mm]
        saved.row.update(spacing_z_mm=spacing[2], device=self.device, threads=self.threads)
        if scan.truth is not None:
            saved.row["truth"] = {key: float(value) for key, value in scan.truth.items()}
        return saved

    def _save_scan(self, subject: Subject, scan: Scan) -> Saved:
        base = scan_folder(subject.subject_id, subject.index, sharded=self.sharded)
        pet_ct = scan.pet_ct
        volumes: dict[str, tuple[str, NDArray[Any]]] = {
            "ct": (f"{base}/{CT_NAME}", pet_ct.ct_hu),
            "suv": (f"{base}/{SUV_NAME}", pet_ct.suv),
        }
        if scan.labels is not None:
            name = segmentation_name(subject.subject_id, subject.index, sharded=self.sharded)
            volumes["segmentation"] = (name, scan.labels)
        files, row = {}, {}
        for kind, (name, array) in volumes.items():
            data, digest = nifti_bytes(array, pet_ct.spacing_mm)
            self.folder.write(name, data)
            files[name] = len(data)
            row[f"{kind}_path"], row[f"{kind}_sha256"] = name, digest
        return Saved(files, row)

    def _save_arrays(self, subject: Subject, scan: Scan) -> Saved:
        arrays: dict[str, NDArray[Any]] = {
            "ct": scan.pet_ct.ct_hu.astype(np.int16, copy=False),
            "suv": scan.pet_ct.suv.astype(np.float16),
        }
        files, row = {}, {}
        for kind, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
            name = f"{kind}/{subject.subject_id}.npy"
            self.folder.write(name, buffer.getvalue())
            files[name], row[f"{kind}_path"] = buffer.tell(), name
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
