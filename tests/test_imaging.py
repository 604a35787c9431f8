"""Volumes: units in and out of model space, files that are what they say, pictures the right way round."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from vtrial.geometry import spacing_mm
from vtrial.imaging.codec import decode, decode_ct, decode_suv, encode_ct, encode_suv
from vtrial.imaging.files import (
    nifti_bytes,
    nifti_from_bytes,
    read_nifti,
    scan_folder,
    spacing_of,
    voxel_sha256,
    write_nifti_atomic,
)
from vtrial.records import InputError, PetCt
from vtrial.reporting.preview import MAX_BYTES, as_seen, preview_png, views

SPACING = (2.0, 2.0, 1.88)


def test_ct_survives_model_space_to_the_unit() -> None:
    hu = torch.arange(-500, 501, dtype=torch.int16)
    assert torch.equal(decode_ct(encode_ct(hu)), hu)
    assert encode_ct(torch.tensor([-1024, 3000])).tolist() == [0.0, 1.0]


def test_suv_survives_model_space_and_is_censored_at_25() -> None:
    suv = torch.linspace(0.0, 25.0, 1001)
    assert torch.allclose(decode_suv(encode_suv(suv)), suv, rtol=1e-5, atol=1e-6)
    assert decode_suv(encode_suv(torch.tensor([80.0]))).item() == pytest.approx(25.0, rel=1e-6)
    assert encode_suv(torch.tensor([25.0])).item() == pytest.approx(1.0)
    assert encode_suv(torch.tensor([0.0])).item() == 0.0


def test_decode_gives_units_and_refuses_nonsense() -> None:
    volume = torch.full((2, 3, 4, 5), 0.5)
    pet_ct = decode(volume, SPACING)
    assert (pet_ct.ct_hu.dtype, pet_ct.suv.dtype, pet_ct.ct_hu.shape) == (np.int16, np.float32, (3, 4, 5))
    assert (pet_ct.ct_hu == 0).all()
    assert pet_ct.suv == pytest.approx(np.sqrt(26.0) - 1.0, rel=1e-6)
    volume[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        decode(volume, SPACING)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_nifti_is_what_was_written(tmp_path: Path, dtype: type) -> None:
    array = (np.random.default_rng(0).random((5, 6, 7)) * 100).astype(dtype)
    digest = write_nifti_atomic(tmp_path / "a" / "x.nii.gz", array, SPACING)
    back, affine = read_nifti(tmp_path / "a" / "x.nii.gz")
    assert back.dtype == dtype
    assert np.array_equal(back, array)
    assert spacing_of(affine) == pytest.approx(SPACING)
    assert voxel_sha256(back, affine) == digest
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.nii.gz"]


def test_a_file_of_any_body_length_has_the_hash_it_was_written_with() -> None:
    array = np.zeros((1, 1, 384), np.int16)
    for height_cm in np.linspace(150.0, 200.0, 201):  # a header has float32: some lie at the rim of rounding
        data, digest = nifti_bytes(array, spacing_mm(height_cm))
        assert voxel_sha256(*nifti_from_bytes(data, "x")) == digest, height_cm


def test_other_readers_see_ras_mm_and_a_centred_grid(tmp_path: Path) -> None:
    write_nifti_atomic(tmp_path / "x.nii.gz", np.zeros((5, 6, 7), np.int16), SPACING)
    image = nibabel.load(tmp_path / "x.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_xyzt_units()[0] == "mm"
    middle = (np.array(image.shape) - 1) / 2
    assert image.affine @ [*middle, 1] == pytest.approx([0, 0, 0, 1], abs=1e-5)
    assert image.get_qform() == pytest.approx(image.get_sform(), abs=1e-5)


def test_equal_volumes_give_equal_bytes_and_hash_sees_every_change() -> None:
    array = np.random.default_rng(0).integers(0, 100, (8, 8, 8)).astype(np.int16)
    data, digest = nifti_bytes(array, SPACING)
    assert nifti_bytes(np.asfortranarray(array), SPACING) == (data, digest)
    changed = array.copy()
    changed[0, 0, 0] += 1
    assert nifti_bytes(changed, SPACING)[1] != digest
    assert nifti_bytes(array, (2.0, 2.0, 1.89))[1] != digest
    assert nifti_bytes(array.astype(np.int32), SPACING)[1] != digest


def test_unreadable_nifti_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    for name in ("x.nii.gz", "absent.nii.gz"):
        with pytest.raises(InputError, match=name):
            read_nifti(tmp_path / name)


def test_large_runs_are_sharded() -> None:
    assert scan_folder("VT000007", 7, sharded=False) == "scans/VT000007"
    assert scan_folder("VT123456", 123456, sharded=True) == "scans/000123/VT123456"


def test_pictures_show_patient_right_on_the_left_and_head_up() -> None:
    plane = np.zeros((3, 4))
    plane[2, 3] = 1.0  # right, head
    assert as_seen(plane)[0, 0] == 1.0
    ct_hu, suv = np.full((16, 16, 24), -1000, np.int16), np.zeros((16, 16, 24), np.float32)
    ct_hu[:, 8, :] = 40
    suv[13, 8, 20] = 50.0
    ct, pet, mip = views(PetCt(ct_hu, suv, SPACING))
    assert ct.shape == (24, 16)
    assert (ct == 128).all()
    for picture in (pet, mip):
        assert np.argwhere(picture == 0).tolist() == [[3, 2]]


def test_preview_is_a_small_png_in_true_proportion() -> None:
    rng = np.random.default_rng(0)
    shape = (112, 112, 192)
    noisy = PetCt(rng.integers(-500, 500, shape).astype(np.int16), rng.random(shape, np.float32) * 7, (4.0, 4.0, 3.7))
    data = preview_png([(f"subject {i}", noisy) for i in range(4)])
    assert len(data) <= MAX_BYTES
    assert Image.open(io.BytesIO(data)).format == "PNG"
    with pytest.raises(ValueError, match="no scans"):
        preview_png([])
