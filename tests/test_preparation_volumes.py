"""NIfTI pairs as they are read: what memory that takes, and what is no volume in a patient."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.petcts import AFFINE, in_place, only, refusal, write_pair
from vtrial.imaging.files import nifti_from_bytes
from vtrial.preparation.sources import find_studies
from vtrial.preparation.sources.volumes import NiftiPair


def scaled(stored: np.ndarray, slope: float, intercept: float) -> bytes:
    """A file of stored values and their scale, as scanners' exports have it."""
    image = nibabel.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(slope, intercept)
    return bytes(image.to_bytes())


def test_a_scaled_file_is_float32() -> None:
    stored = np.arange(-3000, 3000, dtype=np.int16).reshape(10, 20, 30)
    values, _ = nifti_from_bytes(scaled(stored, 0.25, -1024.0), "x")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, stored * 0.25 - 1024.0)


def test_a_scaled_ct_takes_half_the_memory_of_its_values_in_float64(tmp_path: Path) -> None:
    """512x512x500 voxels must be read within the 3 GB of a worker."""
    shape = (128, 128, 100)
    stored = np.random.default_rng(0).integers(0, 3000, shape).astype(np.int16)
    (tmp_path / "ct.nii").write_bytes(scaled(stored, 1.0, -1024.0))
    write_pair(tmp_path / "no.nii", tmp_path / "suv.nii")
    tracemalloc.start()
    try:
        ct, _ = NiftiPair(tmp_path / "ct.nii", tmp_path / "suv.nii")()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ct.voxels.dtype == np.int16
    np.testing.assert_array_equal(ct.voxels, np.maximum(stored - 1024, -1024))
    assert peak < 12.0 * stored.size


@pytest.mark.parametrize("kind", ["CT", "PET"])
def test_a_volume_whose_orientation_is_not_known_is_refused(tmp_path: Path, kind: str) -> None:
    """Without a code readers guess, and take left for right."""
    write_pair(tmp_path / "CTres.nii", tmp_path / "SUV.nii")
    path = tmp_path / {"CT": "CTres.nii", "PET": "SUV.nii"}[kind]
    image = nibabel.Nifti1Image.from_bytes(path.read_bytes())
    for code, told in ((0, f"the {kind}: its orientation is not known, as sform and qform have code 0"), (1, "")):
        image.set_sform(AFFINE, code=0)
        image.set_qform(AFFINE, code=code)
        path.write_bytes(image.to_bytes())
        if told:
            assert told in refusal(find_studies(tmp_path))
    assert in_place(*only(find_studies(tmp_path)).load())
