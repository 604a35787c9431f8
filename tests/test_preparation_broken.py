"""What a collection may suffer from: no bad study stops the good ones, and nothing that is told names anybody."""

from __future__ import annotations

import errno
import logging
import os
import stat
import traceback
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from tests.dicoms import ACCESSION, DAY, PATIENT, ROOT_UID, setting, write_series, write_study
from tests.petcts import (
    AFFINE,
    FDG,
    SHAPE,
    hu_at,
    in_place,
    only,
    refusal,
    save,
    suv_at,
    world,
    write_fdg,
    write_pair,
)
from vtrial.execution import LocalExecutor
from vtrial.imaging.discovery import find_scans
from vtrial.imaging.volume import Volume, upright
from vtrial.preparation.sources import NOBODY, Origin, Study, find_studies, source_key, write_key
from vtrial.preparation.work import PrepareWorkFactory
from vtrial.records import InputError
from vtrial.storage import open_folder


def test_bad_studies_are_left_out_with_their_reasons_and_the_good_one_stays(tmp_path: Path) -> None:
    for i in range(1, 6):
        write_fdg(tmp_path, patient=f"PETCT_a{i}", study="x", shift=i)
    (tmp_path / "PETCT_a1/x/SUV.nii.gz").unlink()
    (tmp_path / "PETCT_a2/x/CTres.nii.gz").write_bytes(b"")
    (tmp_path / "PETCT_a3/x/CTres.nii.gz").unlink()
    (tmp_path / "PETCT_a3/x/CTres.nii.gz").symlink_to(tmp_path / "gone")
    torn = tmp_path / "PETCT_a4/x/SUV.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-400])
    found = find_studies(tmp_path)
    assert {left.subject_id: left.reasons for left in found.left_out} == {
        "s0001": ("the SUV is missing",),
        "s0002": ("the CT is an empty file",),
        "s0003": ("the CT is missing",),
    }
    truncated, good = found.studies
    with pytest.raises(InputError, match="the PET is truncated or no NIfTI file: copy it again"):
        truncated.load()
    assert good.subject_id == "s0005" and in_place(*good.load(), 5)


def _turned(axes: tuple[int, int, int], flips: tuple[int, ...]) -> np.ndarray:
    affine = AFFINE[:, [*axes, 3]].copy()
    affine[:3, list(flips)] *= -1.0
    return affine


@pytest.mark.parametrize("affine", [_turned((0, 1, 2), (0,)), _turned((0, 1, 2), (0, 1)), _turned((2, 0, 1), (1,))])
def test_grids_are_turned_upright(tmp_path: Path, affine: np.ndarray) -> None:
    """Left-handed, mirrored and permuted grids, judged by where the values lie and by nibabel."""
    write_pair(tmp_path / "CTres.nii.gz", tmp_path / "SUV.nii.gz", affine)
    ct, suv = only(find_studies(tmp_path)).load()
    assert in_place(ct, suv)
    closest = nibabel.as_closest_canonical(nibabel.load(tmp_path / "SUV.nii.gz"))
    assert np.array_equal(suv.voxels, closest.get_fdata(dtype=np.float32))
    assert np.allclose(suv.affine, closest.affine)


def test_an_oblique_grid_stays_oblique() -> None:
    angle = np.deg2rad(20.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    volume = upright(hu_at(world(SHAPE, affine)), affine)
    assert np.allclose(volume.affine, affine)


def _sheared() -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 2] = 0.5
    return affine


MM = world(SHAPE, AFFINE)
CT, SUV = hu_at(MM), suv_at(MM)
BAD = [
    (CT, SUV, _sheared(), "sheared"),
    (CT, SUV, np.diag([0.004, 0.005, 0.006, 1.0]), "voxel size"),
    (CT, SUV * 5000.0, AFFINE, "Bq/ml"),
    (CT, SUV * 0.0, AFFINE, "empty"),
    (CT + 1024.0, SUV, AFFINE, "offset of 1024"),
    (CT, CT, AFFINE, "SUV is not negative"),
    (CT, np.where(SUV > 3.0, np.nan, SUV), AFFINE, "not finite"),
    (CT[:, :, :4], SUV, AFFINE, "too few"),
    (CT, np.stack([SUV, SUV], axis=-1), AFFINE, "4 axes"),
]


@pytest.mark.parametrize(("ct", "suv", "affine", "told"), BAD, ids=[case[3] for case in BAD])
def test_what_cannot_be_a_pet_ct_is_refused(
    tmp_path: Path, ct: np.ndarray, suv: np.ndarray, affine: np.ndarray, told: str
) -> None:
    save(tmp_path / "CTres.nii.gz", ct.astype(np.float32), affine)
    save(tmp_path / "SUV.nii.gz", suv.astype(np.float32), affine)
    assert told in refusal(find_studies(tmp_path))


@pytest.mark.parametrize(("z_mm", "told"), [(40.0, ""), (70.0, "covers 27%"), (200.0, "covers 0%")])
def test_ct_and_pet_must_overlap(tmp_path: Path, z_mm: float, told: str) -> None:
    write_fdg(tmp_path)
    moved = AFFINE.copy()
    moved[2, 3] += z_mm
    save(tmp_path.joinpath(*FDG) / "CTres.nii.gz", CT.astype(np.int16), moved)
    if told:
        assert told in refusal(find_studies(tmp_path))
    else:
        ct, suv = only(find_studies(tmp_path)).load()
        assert ct.affine[2, 3] - suv.affine[2, 3] == z_mm


def test_a_fourth_axis_of_one_is_none(tmp_path: Path) -> None:
    save(tmp_path / "CTres.nii.gz", CT.astype(np.int16)[..., None])
    save(tmp_path / "SUV.nii.gz", SUV.astype(np.float32))
    assert in_place(*only(find_studies(tmp_path)).load())


def test_duplicates_are_left_out_and_join_their_people(tmp_path: Path) -> None:
    """A study copied under another name, beside that name's own: both names are one person."""
    write_fdg(tmp_path, patient="PETCT_a1", study="x")
    write_fdg(tmp_path, patient="PETCT_b2", study="own", shift=1)
    copied = write_fdg(tmp_path, patient="PETCT_b2", study="x")
    for name in ("CTres.nii.gz", "SUV.nii.gz"):
        (copied / name).write_bytes((tmp_path / "PETCT_a1" / "x" / name).read_bytes())
    write_fdg(tmp_path, patient="PETCT_c3", study="x", shift=3)
    found = find_studies(tmp_path)
    assert [s.subject_id for s in found.studies] == ["s0001", "s0002", "s0004"]
    assert found.left_out[0].reasons == ("a duplicate: its files are those of s0001",)
    a, b, c = (s.patient for s in found.studies)
    assert a == b != c


def test_files_alike_but_for_their_middle_are_no_duplicates(tmp_path: Path) -> None:
    """Uncompressed volumes of the same size begin and end with the same air."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        voxels = np.zeros((64, 64, 600), np.float32)
        voxels[32, 32, 301] = value
        save(tmp_path / name / "CTres.nii", (-1000 + voxels * 100).astype(np.int16))
        save(tmp_path / name / "SUV.nii", voxels)
    assert len(find_studies(tmp_path).studies) == 2


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_fdg(tmp_path / "store", patient="PETCT_a1", study="x")
    source = tmp_path / "source"
    write_fdg(source, patient="PETCT_b2", study="x", shift=1)
    (source / "PETCT_a1").symlink_to(tmp_path / "store" / "PETCT_a1")
    (source / "AAA").symlink_to(source / "PETCT_b2")
    (source / "circle").symlink_to(source)
    (source / "loop").symlink_to(source / "loop")
    found = find_studies(source)
    assert [study.origin.path for study in found.studies] == ["PETCT_a1/x", "PETCT_b2/x"]
    assert not found.left_out and in_place(*found.studies[0].load())


NAME = "Ximénez-Überall"
PLANTED = (NAME, "Quorzelda", "Ximenes", "19510203", DAY, PATIENT, ACCESSION, ROOT_UID)


def _named_collections(root: Path) -> list[Path]:
    """Collections whose folders, cases, files and headers name somebody, sound and broken."""
    pairs, cases, dicom = root / "1", root / "2", root / "3"
    write_fdg(pairs, patient=NAME, study="19510203")
    write_fdg(pairs, patient=f"{NAME}-2", study="torn", shift=1)
    for torn in (pairs / f"{NAME}-2").rglob("SUV.nii.gz"):
        torn.write_bytes(torn.read_bytes()[:-300])
    write_pair(cases / "imagesTr" / f"{NAME}_0000.nii.gz", cases / "imagesTr" / f"{NAME}_0001.nii.gz")
    save(cases / "imagesTr" / "Quorzelda_0000.nii.gz", CT)
    write_study(dicom / NAME / "19510203")
    write_study(dicom / f"{NAME} torn", study=2)
    for place in ("pet", "ct"):
        torn = dicom / f"{NAME} torn" / place / "000.dcm"
        torn.write_bytes(torn.read_bytes()[:-9])
    write_study(dicom / f"{NAME}, PET series of 3 images", study=3, ct=setting(FrameOfReferenceUID="1.2.3"))
    write_series(dicom / f"{NAME} two" / "a", "PT", study=4)
    write_series(dicom / f"{NAME} two" / "b", "PT", study=4, series=9, edit=setting(CorrectedImage=["DECY"]))
    write_series(dicom / f"{NAME} two" / "c", "CT", study=4)
    (dicom / NAME / "junk").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))
    return [pairs, cases, dicom]


def test_nobody_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    told, keys = "", ""
    sources = _named_collections(tmp_path)
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    for source in sources:
        found = find_studies(source)
        assert found.studies and (found.left_out or source.name == "1")
        told += repr(found) + repr(found.studies) + repr(found.left_out) + repr([s.load for s in found.studies])
        told += repr([s.origin for s in found.studies])
        for study in found.studies:
            try:
                study.load()
            except InputError as error:
                told += str(error) + repr(error) + traceback.format_exc(chain=True)
        keys += str(source_key(found))
    out, err = capfd.readouterr()
    told += caplog.text + out + err
    for planted in PLANTED:
        assert planted.lower() not in told.replace(str(tmp_path), "").lower(), planted
    assert all(planted in keys for planted in (NAME, "19510203", PATIENT, ROOT_UID))


def test_what_goes_wrong_unforeseen_names_nobody(tmp_path: Path) -> None:
    """Nor does it stop the others, as a disk that cannot be written would."""

    def load() -> tuple[Volume, Volume]:
        raise PermissionError(errno.EACCES, "Permission denied", f"/data/{NAME}/CT.nii")

    study = Study("s0001", NOBODY, {}, (), "print", "person", load, Origin(NAME))
    (told,) = LocalExecutor(threads=1).run(PrepareWorkFactory(None, str(tmp_path), True), [study], max_attempts=1)
    assert told.final and "PermissionError while the study was read" in told.error and NAME not in told.error


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Latin-1 on a disk of UTF-8, long, and alike but for letters that no file of ours may have."""
    people = [os.fsdecode(b"M\xfcller-" * 12), os.fsdecode(b"M\xf6ller-" * 12), "Müller", "Möller"]
    for i, name in enumerate(people):
        write_fdg(tmp_path / "src", patient=name, shift=i)
    found = find_studies(tmp_path / "src")
    assert len(found.studies) == 4 and not found.left_out
    assert all(in_place(*study.load(), people.index(study.origin.patient)) for study in found.studies)
    write_key(tmp_path / "key.csv", found)
    assert len(pd.read_csv(tmp_path / "key.csv")) == 4
    names = [scan.subject_id for scan in find_scans(open_folder(tmp_path / "src"))]
    assert len({name.casefold() for name in names}) == 4 and all(name.isascii() and len(name) <= 64 for name in names)


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = write_fdg(tmp_path / "src", patient=NAME)
    (folder / "SUV.nii.gz").unlink()
    write_fdg(tmp_path / "src", patient="PETCT_b2", study="x", shift=1)
    write_key(tmp_path / "key.csv", find_studies(tmp_path / "src"))
    key = pd.read_csv(tmp_path / "key.csv")
    assert key["subject_id"].tolist() == ["s0001", "s0002"]
    assert key["path"].tolist() == ["PETCT_b2/x", f"{NAME}/{FDG[1]}"]
    assert key["left_out"].tolist()[1] == "the SUV is missing"
    assert stat.S_IMODE((tmp_path / "key.csv").stat().st_mode) == 0o600
    with pytest.raises(InputError, match="name another file"):
        write_key(tmp_path / "key.csv" / "below", find_studies(tmp_path / "src"))
