"""One CT as the work of an executor: read, check, segment, check, write."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal import igzip

from vtrial.execution import Resources, Saved
from vtrial.imaging.files import voxel_sha256
from vtrial.records import InputError
from vtrial.segmentation.cases import CtCase, check_ct, check_mask
from vtrial.segmentation.segmenter import LoadSegmenter, Segmenter
from vtrial.storage import Folder, open_folder

_COMPRESSION = 2  # of isal's 0-3: masks shrink by a third against 1, for nothing that matters beside segmenting
_compress: Any = igzip.compress


@dataclass(frozen=True)
class _Product:
    mask: bytes = b""
    ct_sha256: str = ""
    labels: tuple[int, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class SegmentWork:
    """The work on one case. What is wrong with a subject's CT is its result, and stops no other."""

    segment: Segmenter
    source: Folder
    folder: Folder
    masks: str
    device: str
    threads: int

    def make(self, case: CtCase) -> _Product:
        """Read, check and segment a CT; exceptions of the segmenter are the executor's to retry."""
        try:
            data = self.source.read(case.ct)
            voxels, affine = check_ct(data, case.ct)
        except InputError as error:
            return _Product(problem="; ".join(error.problems))
        except OSError as error:
            return _Product(problem=f"{error.filename or case.ct}: cannot be read ({error.strerror or error})")
        sha256 = case.voxel_sha256
        if not sha256:
            sha256 = hashlib.sha256(data).hexdigest()
        elif voxel_sha256(voxels, affine) != sha256:
            return _Product(problem=f"{case.ct}: not the CT that the run's journal has; generate it again")
        mask = self.segment(data)
        labels, _ = check_mask(mask, f"mask of {case.subject_id}", voxels.shape, affine)
        found = tuple(int(label) for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=256)) if label)
        return _Product(mask, sha256, found)

    def save(self, case: CtCase, product: _Product) -> Saved:
        """Write the mask, whole or not at all; OSError if that cannot be."""
        if product.problem:
            return Saved({}, {"problem": product.problem})
        packed = product.mask[:2] == b"\x1f\x8b"
        data: bytes = product.mask if packed else _compress(product.mask, _COMPRESSION, mtime=0)
        name = f"{self.masks}/{case.mask}"
        self.folder.write(name, data)
        row = {
            "ct_sha256": product.ct_sha256,
            "mask_sha256": hashlib.sha256(data).hexdigest(),
            "labels": list(product.labels),
            "device": self.device,
            "threads": self.threads,
        }
        return Saved({name: len(data)}, row)


@dataclass(frozen=True)
class SegmentWorkFactory:
    """Builds the work in a worker: opens the folders there and loads the segmenter."""

    load: LoadSegmenter
    source: str
    location: str
    masks: str

    def __call__(self, resources: Resources) -> SegmentWork:
        """The work with these resources."""
        return SegmentWork(
            segment=self.load(resources),
            source=open_folder(self.source),
            folder=open_folder(self.location),
            masks=self.masks,
            device=resources.device,
            threads=resources.threads,
        )
