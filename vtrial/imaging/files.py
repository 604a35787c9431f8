"""NIfTI volumes: fast gzip (isal), equal bytes for equal voxels, whole files or none.

Volumes are (x, y, z) on a RAS+ grid whose middle is the origin: world coordinates are millimetres from the centre of
the field of view to the patient's right, front and head.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from vtrial.records import InputError
from vtrial.storage import write_atomic

CT_NAME = "CTres.nii.gz"  # names of the FDG-PET-CT-Lesions data set
SUV_NAME = "SUV.nii.gz"
SUBJECTS_PER_SHARD = 1000
_COMPRESSION = 1  # of 0-3; level 1 writes twice as fast as level 3 for 3 % more bytes

Array = NDArray[Any]

_decompress: Any = igzip.decompress
_Image: Any = nibabel.Nifti1Image  # nibabel is not typed


def scan_folder(subject_id: str, index: int, *, sharded: bool) -> str:
    """Folder of a subject's scan inside a run: `scans/<id>`, or `scans/<thousand>/<id>` in a very large run."""
    return f"scans/{index // SUBJECTS_PER_SHARD:06d}/{subject_id}" if sharded else f"scans/{subject_id}"


def segmentation_name(subject_id: str, index: int, *, sharded: bool) -> str:
    """File of a subject's masks inside a run."""
    shard = f"{index // SUBJECTS_PER_SHARD:06d}/" if sharded else ""
    return f"segmentations/{shard}{subject_id}.nii.gz"


def centred_affine(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """The 4x4 voxel-to-world matrix (mm, RAS+) with the middle of the grid at the origin."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-step * (size - 1) / 2.0 for step, size in zip(spacing_mm, shape, strict=True)]
    return affine


def voxel_sha256(array: Array, affine: NDArray[np.float64]) -> str:
    """SHA-256 of type, shape, affine (float32 as in a NIfTI header, to 1e-4 mm) and voxels of a volume.

    It names the content: another compressor or header leaves it as it is.
    """
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    rounded = np.round(np.asarray(affine, dtype=np.float32).astype(np.float64) * 1e4).astype("<i8")
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    digest.update(rounded.tobytes())
    digest.update(little.data)
    return digest.hexdigest()


def nifti_bytes(
    array: Array, spacing_mm: tuple[float, float, float], description: str = "synthetic, vtrial"
) -> tuple[bytes, str]:
    """A `.nii.gz` file of a volume (x, y, z) as bytes, and the hash of its voxels. Equal volumes give equal bytes.

    `description` is what the header says of it (ASCII, up to 79 characters).
    """
    affine = centred_affine(array.shape, spacing_mm)
    image = _Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header["descrip"] = description.encode("ascii")
    return igzip.compress(image.to_bytes(), _COMPRESSION, mtime=0), voxel_sha256(array, affine)


def write_nifti_atomic(path: Path | str, array: Array, spacing_mm: tuple[float, float, float]) -> str:
    """Write a volume (x, y, z) as `.nii.gz`, whole or not at all; gives its voxels' hash. OSError if it cannot."""
    data, digest = nifti_bytes(array, spacing_mm)
    write_atomic(Path(path), data)
    return digest


class NoOrientation(InputError):
    """A NIfTI file that does not say how its voxels lie in the patient."""


def nifti_from_bytes(data: bytes, name: str) -> tuple[Array, NDArray[np.float64]]:
    """Array and affine (mm) of a NIfTI file's bytes, compressed or not; InputError if it is none.

    The array has its stored type, or is float32 where the file has a scale. NoOrientation where the affine is a guess.
    """
    try:
        raw = _decompress(data) if data[:2] == b"\x1f\x8b" else data
        image = _Image.from_bytes(raw)
        array, slope, intercept = image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
        if (slope, intercept) != (1.0, 0.0):
            array = array.astype(np.float32)
            array *= slope  # in place, as nibabel's own scaling takes twice the memory
            array += intercept
    except Exception as error:
        raise InputError(f"{name}: not a readable NIfTI file ({error}); write it again") from None
    if not image.header["sform_code"] and not image.header["qform_code"]:  # readers then guess left and right
        raise NoOrientation(
            f"{name}: its orientation is not known, as sform and qform have code 0; set its affine anew"
        )
    return array, np.asarray(image.affine, dtype=np.float64)


def read_nifti(path: Path | str) -> tuple[Array, NDArray[np.float64]]:
    """Array (x, y, z) in its stored type and affine (mm) of a `.nii` or `.nii.gz` file; InputError if it is none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None
    return nifti_from_bytes(data, str(path))


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size in mm along the three array axes."""
    x, y, z = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    return float(x), float(y), float(z)
