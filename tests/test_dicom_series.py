"""Series of DICOM images as volumes: every voxel where it belongs, or a refusal that says why."""

from __future__ import annotations

import gc
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.dicoms import Grid, ramp, setting, write_series
from vtrial.imaging.dicom.folder import read_folder
from vtrial.imaging.dicom.headers import Image, header_of
from vtrial.imaging.dicom.series import Series, read_ct, read_pet, series_of, stacks
from vtrial.imaging.volume import Volume
from vtrial.records import CannotRead, InputError

AXIAL = Grid()
ORIENTATIONS = {
    "on the back, head first": AXIAL,
    "feet first": Grid(columns_along=(-1.0, 0.0, 0.0), step=(0.0, 0.0, -4.0), origin=(27.0, -17.0, 20.0)),
    "on the belly": Grid(columns_along=(-1.0, 0.0, 0.0), rows_along=(0.0, -1.0, 0.0), origin=(27.0, 17.0, -20.0)),
    "from head to feet": Grid(step=(0.0, 0.0, -4.0), origin=(-27.0, -17.0, 20.0)),
    "sagittal": Grid(columns_along=(0.0, 1.0, 0.0), rows_along=(0.0, 0.0, -1.0), step=(4.0, 0.0, 0.0)),
    "coronal": Grid(rows_along=(0.0, 0.0, -1.0), step=(0.0, 4.0, 0.0)),
    "oblique": Grid(columns_along=(0.8, 0.6, 0.0), rows_along=(-0.6, 0.8, 0.0)),
    "tilted gantry": Grid(rows_along=(0.0, 0.96, 0.28), step=(0.0, 0.0, 4.0)),
}


def images_in(folder: Path) -> list[Image]:
    return list(read_folder(folder).images)


def one_series(folder: Path) -> Series:
    (stack,) = stacks(images_in(folder))
    return series_of(stack, "there")


def off_by(volume: Volume) -> float:
    """The largest difference between what a voxel holds and what lies at its place."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.voxels.shape), indexing="ij"), axis=-1)
    world = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return float(np.abs(volume.voxels - ramp(world)).max())


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_is_where_it_was(tmp_path: Path, name: str) -> None:
    grid = ORIENTATIONS[name]
    ct = read_ct(one_series(write_series(tmp_path / "ct", "CT", grid=grid)))
    assert off_by(ct) <= 0.5 + 1e-6  # values are whole HU
    assert ct.voxels.dtype == np.int16
    assert np.argmax(np.abs(ct.affine[:3, :3]), axis=0).tolist() == [0, 1, 2]
    assert (np.diag(ct.affine)[:3] > 0.0).all()
    pet = one_series(write_series(tmp_path / "pet", "PT", grid=grid))
    volume = read_pet(pet, [1.0] * 12)
    assert volume.voxels.dtype == np.float32
    assert off_by(volume) <= 0.31  # half a stored unit: slopes are 0.5 to 0.61, one for each slice
    assert (pet.tilt_degrees > 0.0) == (name == "tilted gantry")


def test_each_slice_has_its_factor(tmp_path: Path) -> None:
    pet = one_series(write_series(tmp_path, "PT"))
    plain, scaled = read_pet(pet, [1.0] * 12), read_pet(pet, range(12))
    assert scaled.voxels == pytest.approx(plain.voxels * np.arange(12), rel=1e-6)
    assert (scaled.voxels[..., 0] == 0.0).all()


def test_the_tilt_is_told(tmp_path: Path) -> None:
    series = one_series(write_series(tmp_path, "CT", grid=ORIENTATIONS["tilted gantry"]))
    assert series.tilt_degrees == pytest.approx(np.degrees(np.arcsin(0.28)), abs=0.01)
    assert any("16.3 degrees" in note for note in series.notes)


def test_padding_and_impossible_values_are_air(tmp_path: Path) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        dataset.PixelPaddingValue = 1400
        stored = np.frombuffer(dataset.PixelData, "<i2").copy()
        stored[:3] = (1400, -2000, 9)
        dataset.PixelData = stored.tobytes()

    ct = read_ct(one_series(write_series(tmp_path, "CT", edit=edit)))
    back_left = ct.voxels[::-1, ::-1]  # the first stored pixels: LPS origin is the patient's right front
    assert back_left[:3, 0, 0].tolist() == [-1024, -1024, -1015]


@pytest.mark.parametrize(
    ("skipped", "told"), [([5], "1 after slice 5"), ([3, 4, 8], "2 after slice 3, 1 after slice 6 of 11")]
)
def test_missing_slices_are_refused(tmp_path: Path, skipped: list[int], told: str) -> None:
    grid = Grid(count=12 if len(skipped) == 1 else 14)
    with pytest.raises(InputError, match=f"slices are missing .{told}"):
        one_series(write_series(tmp_path, "CT", grid=grid, skip=skipped))


def test_missing_end_slices_are_told(tmp_path: Path) -> None:
    series = one_series(write_series(tmp_path, "PT", skip=[11], edit=setting(NumberOfSlices=12)))
    assert "11 of the 12 slices that the header announces are there" in series.notes


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        if k >= 6:
            dataset.ImagePositionPatient = [-27.0 + (3.0 if k == 8 else 0.0), -17.0, -20.0 + 4.0 * k + 1.5]

    with pytest.raises(InputError, match="not evenly spaced"):
        one_series(write_series(tmp_path, "CT", edit=edit))


def test_equal_duplicates_are_taken_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "CT")
    write_series(tmp_path / "b", "CT", edit=setting(SOPInstanceUID="1.2.3.4.5.6.7"))
    series = one_series(tmp_path)
    assert any(note.startswith("12 images lie where another one does") for note in series.notes)
    assert off_by(read_ct(series)) <= 0.5 + 1e-6


def test_different_images_at_one_place_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "PT")
    write_series(tmp_path / "b", "PT", edit=setting(RescaleSlope="0.7"))
    with pytest.raises(InputError, match="there, slice 1 of 12: two different images"):
        read_pet(one_series(tmp_path), [1.0] * 12)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient, Rows"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 0.5, 0]}, "no grid at right angles"),
        ({"PixelSpacing": [0.0, 5.0]}, "no grid at right angles"),
        ({"PixelSpacing": None}, "PixelSpacing"),
        ({"Rows": 60000}, "at most 2048 are plausible"),
    ],
)
def test_no_grid_is_refused(tmp_path: Path, values: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        one_series(write_series(tmp_path, "CT", edit=setting(**values)))


def test_too_few_slices_are_no_volume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="9 slices are too few"):
        one_series(write_series(tmp_path, "CT", grid=Grid(count=9)))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"RescaleType": "US"}, "no Hounsfield"),
        ({"RescaleSlope": None}, "RescaleSlope"),
        ({"RescaleIntercept": None}, "Inter"),
    ],
)
def test_values_without_meaning_are_refused(tmp_path: Path, values: dict[str, object], reason: str) -> None:
    series = one_series(write_series(tmp_path, "CT", edit=setting(**values)))
    with pytest.raises(InputError, match=reason):
        read_ct(series)


def test_a_series_of_two_orientations_comes_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "CT")
    write_series(tmp_path / "b", "CT", grid=ORIENTATIONS["sagittal"])
    assert sorted(len(stack) for stack in stacks(images_in(tmp_path))) == [12, 12]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_uncompressed_syntaxes(tmp_path: Path, syntax: str) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax

    assert off_by(read_ct(one_series(write_series(tmp_path, "CT", edit=edit)))) <= 0.5 + 1e-6


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_syntaxes(tmp_path: Path, syntax: str) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(dataset.Rows, dataset.Columns)
        if syntax == RLELossless:
            dataset.compress(RLELossless, generate_instance_uid=False)
            return
        codecs = pytest.importorskip("imagecodecs", reason="imagecodecs writes the compressed images")
        dataset.PixelRepresentation, unsigned = 0, pixels.astype(np.uint16)
        encode: Callable[[Any], bytes] = {
            JPEGLossless: partial(codecs.ljpeg_encode, bitspersample=16),
            JPEGLSLossless: codecs.jpegls_encode,
            JPEG2000Lossless: partial(codecs.jpeg2k_encode, level=0, codecformat="j2k", reversible=True),
        }[syntax]
        dataset.PixelData = encapsulate([encode(unsigned)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax

    try:
        ct = read_ct(one_series(write_series(tmp_path, "CT", edit=edit)))
    except CannotRead as error:
        pytest.skip(f"no decoder here, and said so: {error}")
    assert off_by(ct) <= 0.5 + 1e-6


def test_what_cannot_be_decompressed_is_refused_with_a_remedy(tmp_path: Path) -> None:
    def edit(dataset: Dataset, k: int) -> None:
        if k == 2:
            dataset.PixelData = encapsulate([b"\xff\x4f not an image"])
            dataset["PixelData"].VR = "OB"
            dataset.file_meta.TransferSyntaxUID = HTJ2KLossless

    series = one_series(write_series(tmp_path, "CT", edit=edit))
    told = r"there, slice 3 of 12: the pixels \(High-Throughput JPEG 2000.*gdcmconv --raw"
    with pytest.raises((InputError, CannotRead), match=told):
        read_ct(series)


@pytest.mark.parametrize(("missing", "refusal"), [(True, CannotRead), (False, InputError)])
def test_a_decoder_that_is_not_installed_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool, refusal: type[Exception]
) -> None:
    """Once it is, the study can be read."""

    def edit(dataset: Dataset, _: int) -> None:
        dataset.PixelData = encapsulate([b"not an image"])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = RLELossless

    series = one_series(write_series(tmp_path, "CT", edit=edit))
    monkeypatch.setattr("vtrial.imaging.dicom.headers._has_decoder", lambda dataset: not missing)
    with pytest.raises(refusal, match="pip install" if missing else "damaged"):
        read_ct(series)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, "CT")
    torn = tmp_path / "005.dcm"  # slice 1
    torn.write_bytes(torn.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"slice 2 of 12.*damaged"):
        read_ct(one_series(tmp_path))
    torn.unlink()
    with pytest.raises(InputError, match="slices are missing"):
        one_series(tmp_path)


def test_files_that_vanish_are_no_fault_of_the_study(tmp_path: Path) -> None:
    series = one_series(write_series(tmp_path, "CT"))
    (tmp_path / "000.dcm").unlink()
    with pytest.raises(CannotRead, match=r"^there, slice 1 of 12: cannot be read \(No such file or directory\)$"):
        read_ct(series)


def test_what_images_have_in_common_is_there_once(tmp_path: Path) -> None:
    """A collection has a million images: in 3.5 kB each they would fill the driver's memory."""
    write_series(tmp_path / "ct", "CT", grid=Grid(count=51))
    write_series(tmp_path / "pet", "PT", grid=Grid(count=51))
    read_folder(tmp_path / "ct")
    tracemalloc.start()
    images = images_in(tmp_path)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 102 and held / len(images) < 1500.0
    shared = ("series_uid", "frame_uid", "image_type", "columns_along", "rows_along", "spacing_mm", "pet")
    for series in stacks(images):
        assert all(len({id(getattr(image, name)) for image in series}) == 1 for name in shared)
    assert len({id(image.person) for image in images}) == len({id(image.identity) for image in images}) == 1


def test_headers_are_read_side_by_side_and_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one waits for the network another is read; nobody's words come through meanwhile."""
    write_series(tmp_path, "CT")
    both, silent = threading.Barrier(2, timeout=30.0), []

    def header(path: Path) -> object:
        both.wait()
        silent.append(logging.getLogger("pydicom").disabled)
        return header_of(path)

    monkeypatch.setattr("vtrial.imaging.dicom.folder.header_of", header)
    content = read_folder(tmp_path)
    assert [image.path.name for image in content.images] == [f"{k:03d}.dcm" for k in range(12)]
    assert silent == [True] * 12 and not logging.getLogger("pydicom").disabled


def test_folders_as_they_are(tmp_path: Path) -> None:
    """No endings, letters of all alphabets, links to files and folders, circles, hidden files, other files."""
    root = tmp_path / "коллекция"
    write_series(root / "Röntgen 断層", "CT", name="IM{:05d}")
    store = write_series(tmp_path / "store", "PT", name="{:d}")
    (root / "PET").mkdir()
    for file in store.iterdir():
        (root / "PET" / f"é{file.name}").symlink_to(file)
    (root / "again").symlink_to(root / "PET", target_is_directory=True)
    (root / "circle").symlink_to(root, target_is_directory=True)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / ".hidden").write_bytes((store / "0").read_bytes())
    (root / "notes.txt").write_text("not an image")
    (root / "empty").touch()
    os.mkfifo(root / "pipe")
    content = read_folder(root)
    assert [sum(image.kind == kind for image in content.images) for kind in ("CT", "PT")] == [12, 12]
    assert content.others == {"files that are no DICOM": 2}
    assert [path.name for path, _ in content.broken] == ["dangling"]
    with pytest.raises(InputError, match="no folder is there"):
        read_folder(root / "notes.txt")


def test_what_is_no_image_of_a_stack_is_counted(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", "CT")
    write_series(
        tmp_path / "scout", "CT", edit=setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), skip=range(2, 12)
    )
    write_series(tmp_path / "mip", "PT", edit=setting(ImageType=["DERIVED", "SECONDARY", "MIP"]), skip=range(1, 12))
    for name, uid in (("dose", "1.2.840.10008.5.1.4.1.1.88.67"), ("enhanced", "1.2.840.10008.5.1.4.1.1.130")):
        write_series(tmp_path / name, "CT", edit=setting(SOPClassUID=uid), skip=range(1, 12))
    content = read_folder(tmp_path)
    assert len(content.images) == 12
    assert {what.split(" ")[0]: count for what, count in content.others.items()} == {
        "X-Ray": 1,
        "localizers": 2,
        "multi-frame": 1,
        "projections": 1,
    }
