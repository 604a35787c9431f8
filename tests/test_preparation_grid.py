"""Volumes on other grids: what is sampled where, and where an organ mask says that organs lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.patients import affine_around, ball, points_of, rotation, scan
from vtrial.imaging.volume import Volume
from vtrial.organs import ORGAN_IDS
from vtrial.preparation.extent import organ_places
from vtrial.preparation.grid import Grid, sample
from vtrial.preparation.volume import ct_to_segment

FINE = Grid((60, 60, 70), (2.0, 2.0, 1.8), (-60.0, -60.0, -63.0))
SHEAR = np.array([[2.5, 0.0, 0.0], [0.0, 2.5, -0.8], [0.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    "directions",
    [
        np.diag([1.0, 1.3, 3.0]),
        np.diag([-2.0, 2.0, 3.0]),
        np.column_stack([(0.0, 0.0, 2.5), (-2.0, 0.0, 0.0), (0.0, -1.5, 0.0)]),
        rotation(20.0, 0) @ rotation(-12.0, 2) @ np.diag([2.0, 2.5, 3.0]),
        SHEAR,
    ],
    ids=["anisotropic", "left-handed", "axes-swapped", "oblique", "sheared"],
)
def test_a_ball_keeps_place_volume_and_mean_on_any_grid(directions: NDArray[np.float64]) -> None:
    centre, radius = (7.3, -4.1, 5.2), 32.0
    shape = tuple(int(n) for n in np.ceil(150.0 / np.linalg.norm(directions, axis=0)))
    affine = affine_around(shape, directions, (2.0, -1.0, 3.0))
    there = 1.0 + 5.0 * ball(points_of(shape, affine), centre, radius, 6.0)
    values, inside = sample(Volume(there.astype(np.float32), affine), FINE, 0.0)
    assert values[inside].min() == pytest.approx(1.0)
    at = points_of(FINE.shape, FINE.affine)
    hot = np.where(inside, values - 1.0, 0.0)
    assert np.average(at, axis=(0, 1, 2), weights=np.broadcast_to(hot[..., None], at.shape)) == pytest.approx(
        centre, abs=0.1
    )
    voxel_ml = 4.0 / 3.0 * np.pi * radius**3 / FINE.voxel_ml / 1000.0
    assert (hot > 2.5).sum() == pytest.approx(voxel_ml, rel=0.01)
    assert values[ball(at, centre, radius - 9.0, 1e-6) == 1.0].mean() == pytest.approx(6.0, rel=0.01)


def test_beyond_the_field_is_what_is_asked_for_and_its_rim_is_not() -> None:
    affine = affine_around((4, 4, 4), np.diag([3.2, 3.2, -3.2]), (0.0, 0.0, 0.0))
    seven = Volume(np.full((4, 4, 4), 7, np.int16), affine)
    values, inside = sample(seven, Grid((9, 9, 9), (2.0, 2.0, 2.0), (-9.0, -9.0, -9.0)), -1000.0)
    expected = np.zeros((9, 9, 9), dtype=bool)
    expected[1:8, 1:8, 1:8] = True  # centres from -6 to 6 mm; the field ends at -6.4 and 6.4, its last centres at 4.8
    assert np.array_equal(inside, expected)
    assert np.array_equal(values, np.where(expected, 7.0, -1000.0))


def test_specks_of_a_segmenter_do_not_move_an_organ() -> None:
    _, _, labels = scan()
    before = organ_places(labels)["sacrum"]
    speckled = labels.voxels.copy()
    speckled[-12:-8, 60:70, 20:30] = ORGAN_IDS["sacrum"]  # the first axis runs down: 32 ml at the thighs
    after = organ_places(replace(labels, voxels=speckled))["sacrum"]
    assert (after.low_mm, after.high_mm) == (before.low_mm, before.high_mm)
    assert (before.low_mm, before.high_mm) == pytest.approx((-240.0, -140.0), abs=4.0)


def test_organs_are_drawn_on_an_upright_ct() -> None:
    shape, tilted = (40, 40, 30), SHEAR * 4.0
    affine = affine_around(shape, tilted, (0.0, 0.0, 50.0))
    hu = (points_of(shape, affine) @ np.array([1.0, 2.0, -3.0])).astype(np.int16)
    pet = Volume(np.zeros((10, 10, 10), np.float32), affine_around((10, 10, 10), np.eye(3) * 9.0, (0.0, 0.0, 0.0)))
    upright = ct_to_segment(Volume(hu, affine), pet)
    assert upright.affine[:3, :3] == pytest.approx(np.eye(3) * 1.5)
    at = points_of(upright.voxels.shape, upright.affine)
    assert (at[0, 0, [0, -1], 2]) == pytest.approx([-45.0, 45.0], abs=1.5)
    seen = upright.voxels > -1000
    inner = ndimage.binary_erosion(seen, iterations=8)
    assert inner.mean() > 0.3
    assert np.abs(upright.voxels - at @ np.array([1.0, 2.0, -3.0]))[inner].max() < 1.6
