"""Measurement: closed forms on boxes and spheres, spheres of 1 ml by brute force, what is refused, and cohorts."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import ndimage

from vtrial.execution import CannotGoOn, LocalExecutor, Progress
from vtrial.imaging.files import nifti_bytes, read_nifti
from vtrial.imaging.scans import Scan, ScanWork
from vtrial.measurement import (
    Case,
    FolderReader,
    LabelledScan,
    Measurement,
    Volume,
    check_scan,
    files_fingerprint,
    labelled_scan,
    measure,
    measure_cohort,
    not_measured,
    run_cases,
)
from vtrial.measurement.peak import RADIUS_MM, Bound, Field, Stencil, sphere_weights, suv_peaks
from vtrial.organs import GROUPS, ORGAN_IDS
from vtrial.records import InputError, PetCt, Subject
from vtrial.runs import JournalEntry, Manifest, now, open_run
from vtrial.storage import LocalFolder, open_folder

LIVER, SPLEEN, RIGHT, LEFT = (ORGAN_IDS[name] for name in ("liver", "spleen", "kidney_right", "kidney_left"))
SPACING = (2.0, 3.0, 4.0)
STRAIGHT = np.diag([2.0, 2.0, 3.0, 1.0])


def rotated(affine: np.ndarray, degrees: tuple[float, float, float] = (20.0, -35.0, 50.0)) -> np.ndarray:
    """The grid turned about three axes, and moved."""
    out = affine.copy()
    for axis, angle in enumerate(np.radians(degrees)):
        turn, (a, b) = np.eye(3), [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out[:3, :3] = turn @ out[:3, :3]
    out[:3, 3] = [12.0, -7.0, 100.0]
    return out


def sheared(affine: np.ndarray) -> np.ndarray:
    """The grid with z leaning over x, and y over z."""
    out = affine.copy()
    out[:3, :3] = out[:3, :3] @ np.array([[1.0, 0.0, 0.4], [0.0, 1.0, 0.0], [0.0, 0.25, 1.0]])
    return out


GRIDS = {
    "straight": STRAIGHT,
    "rotated": rotated(STRAIGHT),
    "sheared": sheared(STRAIGHT),
    "flipped": STRAIGHT @ np.diag([-1.0, 1.0, -1.0, 1.0]),
    "coarse": np.diag([5.0, 4.0, 6.0, 1.0]),
    "thin": np.diag([1.2, 1.2, 5.0, 1.0]),
}


def scan_of(
    suv: np.ndarray, labels: np.ndarray, affine: np.ndarray = STRAIGHT, ct: np.ndarray | float = 40.0
) -> LabelledScan:
    hu = np.full(suv.shape, ct) if isinstance(ct, float) else ct
    hu = hu.astype(np.int16)
    hu.flat[0] = -1000  # some air
    return LabelledScan(
        Volume("CT", hu, affine), Volume("PET", suv.astype(np.float32), affine), Volume("mask", labels, affine)
    )


def row(rows: tuple[Measurement, ...], organ: str) -> Measurement:
    (found,) = [m for m in rows if m.organ == organ]
    return found


def box_scan(shape: tuple[int, int, int] = (30, 26, 22), affine: np.ndarray = STRAIGHT) -> LabelledScan:
    """A liver of 16×14×10 voxels at SUV 2 with one voxel of 10, 55 HU; a spleen of 4×4×4 at SUV 5."""
    suv, labels = np.full(shape, 0.5), np.zeros(shape, np.uint8)
    ct = np.full(shape, -100)
    liver, spleen = np.s_[3:19, 4:18, 6:16], np.s_[22:26, 3:7, 3:7]
    suv[liver], labels[liver], ct[liver] = 2.0, LIVER, 55
    suv[spleen], labels[spleen], ct[spleen] = 5.0, SPLEEN, 45
    suv[5, 6, 7] = 10.0
    return scan_of(suv, labels, affine, ct)


# ---- numbers


@pytest.mark.parametrize("name", GRIDS)
def test_a_box_is_exactly_measured_on_any_grid(name: str) -> None:
    affine = GRIDS[name]
    liver = row(measure(box_scan(affine=affine)), "liver")
    n = 16 * 14 * 10
    mean = (2.0 * (n - 1) + 10.0) / n
    edges = [float(np.linalg.norm(column)) for column in affine[:3, :3].T]
    voxel_mm3 = math.prod(edges) if name not in ("sheared",) else 2.0 * 2.0 * 3.0  # a shear keeps the volume
    assert liver.volume_ml == pytest.approx(n * voxel_mm3 / 1000.0, rel=1e-12)
    assert liver.hu_mean == 55.0
    assert liver.suv_mean == pytest.approx(mean, rel=1e-6)
    assert liver.suv_sd == pytest.approx(math.sqrt((64.0 * (n - 1) / n) / n), rel=1e-5)  # one voxel 8 above the others
    assert (liver.suv_max, liver.suv_p95, liver.missing) == (10.0, 2.0, "")
    assert not liver.touches_border and not liver.censored


def test_percentile_and_spread_are_those_of_the_voxels() -> None:
    rng = np.random.default_rng(1)
    suv, labels = rng.gamma(2.0, 1.0, (20, 20, 20)).astype(np.float32), np.zeros((20, 20, 20), np.uint8)
    labels[4:11, 5:15, 6:17] = LIVER
    liver, values = row(measure(scan_of(suv, labels)), "liver"), suv[labels == LIVER].astype(float)
    assert liver.suv_p95 == pytest.approx(np.percentile(values, 95), rel=1e-6)
    assert liver.suv_sd == pytest.approx(values.std(), rel=1e-5)
    assert liver.suv_mean == pytest.approx(values.mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["straight", "rotated", "sheared", "thin"])
def test_a_sphere_has_its_volume_and_uptake(name: str) -> None:
    """Radius 22 mm around the middle: the voxels' volume approaches the sphere's, and its middle is all uptake."""
    affine, shape = GRIDS[name], (64, 64, 36)
    inside = distance_mm(affine, shape) <= 22.0
    labels = np.where(inside, LIVER, 0).astype(np.uint8)
    assert not row(measure(scan_of(inside * 6.0, labels, affine)), "liver").touches_border
    liver = row(measure(scan_of(inside * 6.0, labels, affine)), "liver")
    assert liver.volume_ml == pytest.approx(4.0 / 3.0 * math.pi * 2.2**3, rel=0.01)
    assert (liver.suv_mean, liver.suv_max) == (6.0, 6.0)
    assert liver.suv_sd == pytest.approx(0.0, abs=1e-6)
    assert liver.suv_peak == pytest.approx(6.0, rel=1e-6)


def distance_mm(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Distance of every voxel from the middle of the grid."""
    grid = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij"), axis=-1)
    return np.asarray(np.linalg.norm(grid @ affine[:3, :3].T, axis=-1))


def test_turning_the_array_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    shape = (24, 20, 16)
    suv, labels = rng.gamma(2.0, 1.0, shape).astype(np.float32), np.zeros(shape, np.uint8)
    labels[0:10, 4:15, 3:12], labels[14:20, 5:12, 4:9] = LIVER, SPLEEN
    ct, affine = rng.integers(-200, 200, shape), sheared(STRAIGHT)
    plain = measure(scan_of(suv, labels, affine, ct), ["liver", "spleen"])
    order, turned = (2, 0, 1), affine.copy()
    turned[:3, :3] = affine[:3, :3][:, order] @ np.diag([1.0, -1.0, 1.0])

    def turn(array: np.ndarray) -> np.ndarray:
        return array.transpose(order)[:, ::-1, :]

    ct.flat[0] = -1000
    scan = LabelledScan(
        *(Volume("x", turn(a), turned) for a in (ct.astype(np.int16), suv)),
        Volume("mask", np.asfortranarray(turn(labels)), turned),
    )
    for a, b in zip(plain, measure(scan, ["liver", "spleen"]), strict=True):
        numbers = {name: v for name, v in a.to_dict().items() if isinstance(v, float)}
        assert {name: b.to_dict()[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, nan_ok=True)
        assert (b.organ, b.touches_border, b.censored, b.missing) == (a.organ, a.touches_border, a.censored, a.missing)


def test_sums_are_those_of_all_parts() -> None:
    shape = (24, 24, 24)
    suv, labels = np.ones(shape), np.zeros(shape, np.uint8)
    labels[2:8, 5:15, 5:15], labels[14:22, 5:15, 5:15] = LEFT, RIGHT
    suv[labels == LEFT], suv[labels == RIGHT] = 3.0, 4.0
    rows = measure(scan_of(suv, labels))
    both, left, right = (row(rows, name) for name in ("kidneys", "kidney_left", "kidney_right"))
    assert both.volume_ml == pytest.approx(left.volume_ml + right.volume_ml)
    assert both.suv_mean == pytest.approx((600 * 3.0 + 800 * 4.0) / 1400)
    assert both.suv_sd == pytest.approx(math.sqrt(600 * 800) / 1400)
    assert both.suv_peak == max(left.suv_peak, right.suv_peak)
    assert (both.suv_max, both.suv_p95) == (4.0, 4.0)


def test_what_is_not_there_is_missing_with_a_reason() -> None:
    scan = box_scan()
    scan.labels.voxels[scan.labels.voxels == SPLEEN] = LEFT
    rows = measure(scan)
    assert [m.organ for m in rows] == [*ORGAN_IDS, *GROUPS]
    for organ, reason in {
        "spleen": "not found in the mask",
        "kidney_right": "not found in the mask",
        "kidneys": "kidney_right not found in the mask",  # half a pair is no pair
    }.items():
        values = row(rows, organ).to_dict()
        assert values.pop("missing") == reason
        assert all(math.isnan(v) for v in values.values() if isinstance(v, float)), values
    assert row(rows, "kidney_left").volume_ml > 0


def test_rows_are_those_that_the_segmenter_knows() -> None:
    names = [m.organ for m in measure(box_scan(), ["liver", "kidney_left", "kidney_right", "rib_left_1"])]
    assert names == ["kidney_right", "kidney_left", "liver", "rib_left_1", "kidneys", "ribs"]
    scan = box_scan()
    scan.labels.voxels[scan.labels.voxels == SPLEEN] = ORGAN_IDS["rib_left_1"]
    ribs = measure(scan, ["liver"])  # one label for all ribs: no rib has that volume
    assert row(ribs, "ribs").volume_ml > 0 and "rib_left_1" not in [m.organ for m in ribs]
    assert [m.organ for m in not_measured("x", ["liver"])] == ["liver"]
    with pytest.raises(InputError, match="no TotalSegmentator organ: lever"):
        measure(box_scan(), ["lever"])


def test_an_empty_mask_is_no_error_but_all_missing() -> None:
    scan = box_scan()
    scan.labels.voxels[:] = 0
    assert {m.missing for m in measure(scan, ["liver"])} == {"not found in the mask"}


@pytest.mark.parametrize("corner", [(0, 5, 5), (29, 5, 5), (5, 0, 5), (5, 25, 5), (5, 5, 0), (5, 5, 21)])
def test_contact_with_each_border_is_seen(corner: tuple[int, int, int]) -> None:
    scan = box_scan()
    assert not row(measure(scan), "spleen").touches_border
    scan.labels.voxels[corner] = SPLEEN
    rows = measure(scan)
    assert row(rows, "spleen").touches_border and not row(rows, "liver").touches_border


@pytest.mark.parametrize(("highest", "censored"), [(24.9, False), (24.9999, True), (25.0, True), (51.0, True)])
def test_uptake_that_reaches_the_end_of_the_scale_is_censored(highest: float, censored: bool) -> None:
    scan = box_scan()
    scan.suv.voxels[5, 6, 7] = highest
    rows = measure(scan)
    assert row(rows, "liver").censored is censored
    assert row(rows, "liver").suv_max == pytest.approx(highest)
    assert not row(rows, "spleen").censored


# ---- SUVpeak


@pytest.mark.parametrize("name", GRIDS)
def test_the_sphere_holds_one_millilitre(name: str) -> None:
    """Against points thrown into a sphere of 1 ml: share of every voxel, whatever the grid."""
    steps = GRIDS[name][:3, :3]
    weights = sphere_weights(steps)
    points = np.random.default_rng(0).uniform(-RADIUS_MM, RADIUS_MM, (400_000, 3))
    points = points[np.linalg.norm(points, axis=1) <= RADIUS_MM]
    cells = np.rint(points @ np.linalg.inv(steps).T).astype(int) + np.array(weights.shape) // 2
    expected = np.zeros(weights.shape)
    np.add.at(expected, tuple(cells.T), 1.0 / len(points))
    assert weights.sum() == pytest.approx(1.0)
    assert weights == pytest.approx(expected, abs=5 * math.sqrt(expected.max() / len(points)))
    assert weights == pytest.approx(weights[::-1, ::-1, ::-1])
    assert 4.0 / 3.0 * math.pi * RADIUS_MM**3 == pytest.approx(1000.0)
    if name == "straight":
        assert weights[3, 3, 2] == pytest.approx(2 * 2 * 3 / 1000.0, rel=2e-3)  # a voxel wholly inside


@pytest.mark.parametrize("noise", ["white", "smooth"])
@pytest.mark.parametrize("name", GRIDS)
def test_peak_is_the_best_of_all_spheres(name: str, noise: str) -> None:
    """The bound passes over nothing: equal to convolving the whole image, spheres cut by its border included."""
    rng, shape = np.random.default_rng(3), (31, 28, 20)
    suv = rng.gamma(0.7, 2.0, shape)
    suv = suv if noise == "white" else ndimage.gaussian_filter(suv, 1.5)
    labels = rng.integers(1, 6, (8, 7, 5)).repeat(4, 0).repeat(4, 1).repeat(4, 2)[:31].astype(np.uint8)
    labels[rng.random(shape) < 0.3] = 0
    labels[0, 0, 0] = labels[-1, -1, -1] = 6  # nothing but corners
    weights = sphere_weights(GRIDS[name][:3, :3])
    share = ndimage.convolve(np.ones(shape), weights, mode="constant")
    means = ndimage.convolve(suv, weights, mode="constant") / share
    rows = measure(scan_of(suv, labels, GRIDS[name]))
    for organ in (name for name, label in ORGAN_IDS.items() if label <= 6):
        expected = means[labels == ORGAN_IDS[organ]].max()
        assert row(rows, organ).suv_peak == pytest.approx(expected, rel=3e-6), organ


def test_peak_in_a_gradient_is_the_value_at_the_centre() -> None:
    shape, affine = (40, 30, 24), GRIDS["sheared"]
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    suv = 3.0 + grid @ np.array([0.03, 0.05, 0.02])
    labels = np.zeros(shape, np.uint8)
    labels[15:25, 10:20, 8:16] = LIVER
    assert row(measure(scan_of(suv, labels, affine)), "liver").suv_peak == pytest.approx(suv[24, 19, 15], rel=1e-5)


@pytest.mark.parametrize("cut", [(20, 20, 20), (1, 20, 20), (20, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("shift", [(1, 0, 0), (1, 1, 1), (-1, 0, 1), (-1, -1, -1)])
def test_the_bound_holds_for_the_worst_of_images(cut: tuple[int, int, int], shift: tuple[int, int, int]) -> None:
    """Where Cauchy and Schwarz meet: the image is the change of weights over g, so a smaller bound would not hold."""
    steps = np.diag([2.0, 2.0, 1.9])
    weights = sphere_weights(steps)
    bound, sphere = Bound.of(weights, steps), Stencil.of(weights)
    assert bound.reach == (1, 1, 1)
    w, g = (column.reshape(9, 9, 9) for column in _cubes(bound.stencil))
    worst = np.divide(np.roll(w, shift, (0, 1, 2)) - w, g, out=np.zeros_like(w), where=g > 0)
    window = tuple(slice(41 - a, 82 - a) for a in cut)  # the anchor lies at `cut`, what is beyond the image is lost
    image, inside = np.pad(worst, 37)[window], np.pad(w, 37)[window]
    image[cut] -= (inside * image).sum() / w[4, 4, 4]  # the core, which stays within all spheres, makes the mean 0
    field, flat = Field(np.ascontiguousarray(image)), np.ravel_multi_index(cut, image.shape)
    (limit,) = field.limits(np.array([flat]), bound)
    block = np.array([p for p in product(*((a - 1, a, a + 1) for a in cut)) if min(p) >= 0])
    means = field.means(np.ravel_multi_index(tuple(block.T), image.shape), sphere)
    assert means.max() <= limit
    if cut == (20, 20, 20) and shift == (1, 1, 1):
        assert means.max() == pytest.approx(limit, rel=1e-3)


def _cubes(stencil: Stencil) -> Iterator[np.ndarray]:
    for column in stencil.weights.T:
        cube = np.zeros((9, 9, 9), np.float32)
        for (x, y), run in zip(stencil.columns + 4, column.reshape(-1, 9), strict=True):
            cube[x, y] = run
        yield cube


def test_most_spheres_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, shape = np.random.default_rng(4), (60, 60, 60)
    suv = ndimage.gaussian_filter(rng.random(shape, np.float32), 2.0) * 20
    seen: list[int] = []
    plain = Field.around
    monkeypatch.setattr(
        Field, "around", lambda self, centres, *rest: (seen.append(len(centres)), plain(self, centres, *rest))[1]
    )
    suv_peaks(suv, np.diag([2.0, 2.0, 2.0]), [np.arange(suv.size)])
    assert sum(seen) < suv.size / 10


def test_a_subject_takes_little_time() -> None:
    """Half a second is promised for a quiet core; processor time on a busy one may be twice that."""
    rng, shape = np.random.default_rng(5), (224, 224, 384)
    x, y, z = (np.sin(np.arange(n, dtype=np.float32) / 7.0) for n in shape)
    suv = rng.random((56, 56, 192), np.float32).repeat(4, 0).repeat(4, 1).repeat(2, 2)
    suv += (x[:, None, None] + y[:, None] + z) * np.float32(0.5) + np.float32(2.0)
    labels = np.zeros(shape, np.uint8)
    cells = labels[32:192, 52:172].reshape(5, 32, 4, 30, 3, 128)
    cells[:, 4:28, :, 4:26, :, 8:120] = np.arange(1, 61).reshape(5, 1, 4, 1, 3, 1)
    ct = np.full(shape, 40, np.int16)
    ct[0] = -1000
    scan = labelled_scan(PetCt(ct, suv, (2.0, 2.0, 1.9)), labels)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        rows = measure(scan)
        seconds.append(time.process_time() - started)
    assert sum(not m.missing for m in rows) >= 60
    assert min(seconds) < 1.0, seconds


# ---- the real example


def test_volumes_equal_the_statistics_of_totalsegmentator(shared_data: Path) -> None:
    folder = shared_data / "totalsegmentator-example"
    labels, affine = read_nifti(folder / "example_seg_fast.nii.gz")
    statistics = json.loads((folder / "example_seg_fast_statistics.json").read_text())
    rows = measure(scan_of(np.ones(labels.shape), labels, affine))
    for organ, told in statistics.items():
        if organ in ORGAN_IDS:
            measured = row(rows, organ)
            assert np.nan_to_num(measured.volume_ml) == pytest.approx(told["volume"] / 1000.0, rel=1e-6), organ
            assert (told["volume"] == 0) == bool(measured.missing)


def test_a_real_ct_and_its_mask(shared_data: Path) -> None:
    folder = shared_data / "totalsegmentator-example"
    ct = Volume("ct", *read_nifti(folder / "example_ct.nii.gz"))
    labels = Volume("mask", *read_nifti(folder / "example_seg_fast_force_split.nii.gz"))
    suv = replace(ct, name="pet", voxels=np.ones(ct.voxels.shape, np.float32))
    rows = measure(LabelledScan(ct, suv, labels))
    for organ, ml in {"liver": 1125.7, "spleen": 261.0, "kidney_right": 192.6, "kidney_left": 137.4}.items():
        assert row(rows, organ).volume_ml == pytest.approx(ml, abs=0.05)
    assert row(rows, "kidneys").volume_ml == pytest.approx(192.6 + 137.4, abs=0.1)
    assert 0 < row(rows, "liver").hu_mean < 200
    assert row(rows, "liver").touches_border and not row(rows, "spleen").censored
    assert sum(not m.missing for m in rows if m.organ in ORGAN_IDS) == 61


# ---- what is refused


def change(which: str, **values: Any) -> LabelledScan:
    scan = box_scan()
    return replace(scan, **{which: replace(getattr(scan, which), **values)})


def with_voxel(which: str, value: float, dtype: type | None = None) -> LabelledScan:
    voxels = getattr(box_scan(), which).voxels.astype(dtype or getattr(box_scan(), which).voxels.dtype)
    voxels[1, 2, 3] = value
    return change(which, voxels=voxels)


def suv_times(factor: float) -> LabelledScan:
    return change("suv", voxels=box_scan().suv.voxels * np.float32(factor))


MOVED = STRAIGHT + np.array([[0, 0, 0, 0.2], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
WIDER = STRAIGHT @ np.diag([1.0, 1.01, 1.0, 1.0])
REFUSED: dict[str, tuple[Callable[[], LabelledScan], str]] = {
    "mask of another shape": (
        lambda: change("labels", voxels=np.ones((30, 26, 21), np.uint8)),
        r"mask: shape \(30, 26, 21\), but CT has \(30, 26, 22\).*nothing is resampled",
    ),
    "PET of another shape": (lambda: change("suv", voxels=np.ones((3, 3, 3), np.float32)), "PET: shape"),
    "mask moved": (lambda: change("labels", affine=MOVED), "mask: its corners lie up to 0.2 mm from those of CT"),
    "mask wider": (lambda: change("labels", affine=WIDER), "mask: its corners lie up to 0.5 mm"),
    "PET turned": (lambda: change("suv", affine=rotated(STRAIGHT)), "PET: its corners"),
    "flat affine": (lambda: change("ct", affine=np.diag([2.0, 0.0, 2.0, 1.0])), "CT: its affine gives voxels no"),
    "affine not finite": (lambda: change("suv", affine=STRAIGHT * np.nan), "PET: its affine"),
    "4D": (lambda: change("suv", voxels=np.ones((30, 26, 22, 2), np.float32)), "PET: shape .* one 3D volume"),
    "empty": (lambda: change("ct", voxels=np.ones((0, 26, 22), np.int16)), "CT: shape"),
    "NaN in PET": (lambda: with_voxel("suv", math.nan), "PET: 1 voxels are NaN"),
    "infinity in PET": (lambda: with_voxel("suv", math.inf), "PET: 1 voxels are NaN or infinite"),
    "NaN in CT": (lambda: with_voxel("ct", math.nan, np.float32), "CT: 1 voxels"),
    "NaN in mask": (lambda: with_voxel("labels", math.nan, np.float32), "mask: 1 voxels"),
    "colours": (lambda: change("ct", voxels=np.zeros((30, 26, 22), [("R", "u1"), ("G", "u1")])), "plain numbers"),
    "air": (lambda: change("ct", voxels=np.full((30, 26, 22), -1000, np.int16)), "CT: nothing but air"),
    "air with noise": (
        lambda: change("ct", voxels=np.random.default_rng(0).integers(-1024, -900, (30, 26, 22))),
        "CT: nothing but air",
    ),
    "CT of nothing": (lambda: change("ct", voxels=np.zeros((30, 26, 22), np.int16)), "CT: nothing"),
    "Bq/ml": (lambda: suv_times(5000.0), "PET: not in SUV, perhaps in Bq/ml .*convert it to body-weight SUV"),
    "no activity": (lambda: suv_times(0.0), "PET: no activity"),
    "CT as PET": (lambda: with_voxel("suv", -1000.0), "PET: the lowest voxel is -1000, below any SUV"),
    "label 118": (lambda: with_voxel("labels", 118), r"labels that are no TotalSegmentator id .*: 118 \(1 voxels\)"),
    "label below 0": (lambda: with_voxel("labels", -3, np.int16), r"mask: .*-3 \(1 voxels\)"),
    "half a label": (lambda: with_voxel("labels", 4.5, np.float32), r"mask: .*4.5 \(1 voxels\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        measure(make())


def test_low_activity_in_becquerel_is_seen_by_the_whole() -> None:
    """No voxel beyond any SUV, but a body of tonnes: SUV times volume is the mass of the patient at most."""
    shape = (80, 80, 80)
    scan = scan_of(np.full(shape, 900.0), np.full(shape, LIVER, np.uint8), np.diag([4.0, 4.0, 4.0, 1.0]))
    with pytest.raises(InputError, match=r"a body of 2.949e\+04 kg"):
        measure(scan)
    scan.suv.voxels[1:] = 0.0
    scan.suv.voxels[:, 9:] = 0.0
    assert row(measure(scan), "liver").suv_max == 900.0  # a bladder or an injection site may be that hot


def test_all_problems_are_told_at_once() -> None:
    scan = replace(with_voxel("labels", 200), suv=with_voxel("suv", math.nan).suv)
    scan = replace(scan, ct=replace(scan.ct, voxels=np.full((30, 26, 22), -1000, np.int16)))
    with pytest.raises(InputError) as caught:
        measure(replace(scan, labels=replace(scan.labels, affine=MOVED)))
    assert len(caught.value.problems) == 4
    assert [p.split(":")[0] for p in caught.value.problems] == ["mask", "CT", "PET", "mask"]


def test_other_number_types_and_rounded_headers_are_taken() -> None:
    scan, expected = box_scan(), measure(box_scan())
    nudged = STRAIGHT + 1e-6
    other = LabelledScan(
        replace(scan.ct, voxels=scan.ct.voxels.astype(np.float32)),
        replace(scan.suv, voxels=scan.suv.voxels.astype(">f8"), affine=nudged),
        replace(scan.labels, voxels=scan.labels.voxels.astype(np.float32), affine=nudged),
    )
    assert [str(m) for m in measure(other)] == [str(m) for m in expected]
    assert check_scan(other).labels.dtype == np.uint8
    pet_ct = PetCt(scan.ct.voxels, scan.suv.voxels, (2.0, 2.0, 3.0))
    assert [str(m) for m in measure(labelled_scan(pet_ct, scan.labels.voxels))] == [str(m) for m in expected]


# ---- cohorts


@dataclass
class Files:
    """A folder of small scans."""

    folder: LocalFolder
    cases: list[Case] = field(default_factory=list)

    def add(self, subject_id: str, suv: float = 2.0) -> None:
        scan = box_scan()
        base = f"scans/{subject_id}"
        volumes = {"CT": scan.ct.voxels, "SUV": scan.suv.voxels * np.float32(suv / 2.0), "mask": scan.labels.voxels}
        for name, voxels in volumes.items():
            self.folder.write(f"{base}/{name}.nii.gz", nifti_bytes(voxels, SPACING)[0])
        self.cases = [c for c in self.cases if c.subject_id != subject_id] + [self.case(subject_id)]

    def case(self, subject_id: str) -> Case:
        names = [f"scans/{subject_id}/{kind}.nii.gz" for kind in ("CT", "SUV", "mask")]
        return Case(subject_id, *names, files_fingerprint(self.folder, names))

    def measure(self, **options: Any) -> Any:
        reader = FolderReader(self.folder.location)
        return measure_cohort(self.cases, self.folder, reader, organs=["liver", "spleen", "heart"], **options)

    def table(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder.path("measurements.parquet"))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    folder = open_folder(tmp_path / "run")
    assert isinstance(folder, LocalFolder)
    out = Files(folder)
    for i in range(4):
        out.add(f"s{i}", 2.0 + i)
    return out


def test_a_cohort_becomes_one_table(files: Files) -> None:
    seen: list[tuple[int, int, int, str | None]] = []

    def report(p: Progress) -> None:
        seen.append((p.done, p.failed, p.total, p.latest.item.subject_id if p.latest else None))

    summary = files.measure(report=report)
    assert (summary.total, summary.done, summary.new, summary.failures) == (4, 4, 4, {})
    assert seen == [(0, 0, 4, None), *((i + 1, 0, 4, f"s{i}") for i in range(4))]
    table = files.table()
    assert list(table.columns) == [
        *("subject_id", "organ", "volume_ml", "hu_mean", "suv_mean", "suv_sd", "suv_max", "suv_peak", "suv_p95"),
        *("touches_border", "censored", "missing", "segmenter", "caution"),
    ]
    assert table.subject_id.tolist() == [s for s in ("s0", "s1", "s2", "s3") for _ in range(3)]
    livers = table[table.organ == "liver"]
    assert livers.suv_mean.tolist() == pytest.approx([(2.0 + i) * (1 + 4 / 2240) for i in range(4)], rel=1e-5)
    assert livers.volume_ml.tolist() == pytest.approx([2240 * 24 / 1000] * 4)
    hearts = table[table.organ == "heart"]
    assert hearts.suv_mean.isna().all() and (hearts.missing == "not found in the mask").all()
    assert not table.touches_border.any() and table.touches_border.dtype == bool
    assert pq.read_schema(files.folder.path("measurements.parquet")).field("suv_peak").type == "double"


def test_a_finished_cohort_is_left_as_it_is(files: Files) -> None:
    files.measure()
    before = {p: p.stat().st_mtime_ns for p in files.folder.path().rglob("*") if p.is_file()}

    def never(case: Case) -> LabelledScan:
        raise AssertionError(case)

    summary = measure_cohort(files.cases, files.folder, never, organs=["liver", "spleen", "heart"])
    assert (summary.done, summary.new) == (4, 0)
    assert {p: p.stat().st_mtime_ns for p in files.folder.path().rglob("*") if p.is_file()} == before


def test_only_what_is_new_or_changed_is_measured(files: Files) -> None:
    files.measure()
    files.add("s4", 9.0)
    files.add("s1", 7.0)
    read: list[str] = []
    reader = FolderReader(files.folder.location)

    def counting(case: Case) -> LabelledScan:
        read.append(case.subject_id)
        return reader(case)

    summary = measure_cohort(files.cases, files.folder, counting, organs=["liver", "spleen", "heart"])
    assert sorted(read) == ["s1", "s4"]
    assert (summary.total, summary.done, summary.new) == (5, 5, 2)
    liver = files.table().query("organ == 'liver'").set_index("subject_id").suv_mean
    assert liver.index.tolist() == [case.subject_id for case in files.cases]
    assert (liver["s1"], liver["s4"], liver["s0"]) == pytest.approx([7.0, 9.0, 2.0], rel=2e-3)
    read.clear()
    measure_cohort(files.cases, files.folder, counting, organs=["liver"])  # other organs are another question
    assert len(read) == 5
    assert set(files.table().organ) == {"liver"}


def break_scan(files: Files, how: str) -> str:
    """Spoil a subject's files in one way; gives what must be said of it."""
    path = files.folder.path("scans/s1/SUV.nii.gz")
    if how == "absent":
        path.unlink()
        return "No such file"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "not a readable NIfTI file"
    if how == "no NIfTI":
        path.write_bytes(b"once upon a time")
        return "not a readable NIfTI file"
    voxels = read_nifti(path)[0]
    broken = voxels[:, :, 1:] if how == "other grid" else np.full_like(voxels, np.nan)
    path.write_bytes(nifti_bytes(broken, SPACING)[0])
    return "nothing is resampled here" if how == "other grid" else "NaN or infinite"


@pytest.mark.parametrize("how", ["absent", "truncated", "no NIfTI", "other grid", "NaN"])
def test_a_broken_subject_stops_no_other(files: Files, how: str) -> None:
    good = files.folder.path("scans/s1/SUV.nii.gz").read_bytes()
    message = break_scan(files, how)
    summary = files.measure()
    assert (summary.done, summary.total, list(summary.failures)) == (3, 4, ["s1"])
    assert message in summary.failures["s1"] and "scans/s1/SUV.nii.gz" in summary.failures["s1"]
    broken = files.table().query("subject_id == 's1'")
    assert broken.organ.tolist() == ["spleen", "liver", "heart"]
    assert broken.missing.str.startswith("not measured: ").all() and broken.missing.str.contains(message).all()
    assert broken[["volume_ml", "suv_mean", "suv_peak"]].isna().all(axis=None)
    assert files.table().query("subject_id != 's1' and organ == 'liver'").suv_mean.notna().all()
    files.folder.path("scans/s1/SUV.nii.gz").write_bytes(good)
    summary = files.measure()  # the same fingerprints: failures alone are tried again
    assert (summary.done, summary.new, summary.failures) == (4, 1, {})
    assert not files.table().missing.str.contains("not measured").any()


def test_an_unexpected_error_is_one_subjects_too(files: Files) -> None:
    reader = FolderReader(files.folder.location)

    def odd(case: Case) -> LabelledScan:
        if case.subject_id == "s2":
            raise RuntimeError("something else")
        return reader(case)

    summary = measure_cohort(files.cases, files.folder, odd)
    assert (summary.done, list(summary.failures)) == (3, ["s2"])
    assert "RuntimeError: something else" in summary.failures["s2"]


def test_an_interruption_keeps_what_is_measured(files: Files) -> None:
    reader = FolderReader(files.folder.location)

    def interrupted(case: Case) -> LabelledScan:
        if case.subject_id == "s2":
            raise KeyboardInterrupt
        return reader(case)

    with pytest.raises(KeyboardInterrupt):
        measure_cohort(files.cases, files.folder, interrupted, organs=["liver", "spleen", "heart"])
    assert sorted(set(files.table().subject_id)) == ["s0", "s1"]
    with files.folder.path("measurements.jsonl").open("a") as journal:
        journal.write('{"time": "torn')  # what a kill in the middle of a line leaves
    summary = files.measure()
    assert (summary.done, summary.new) == (4, 2)
    assert files.measure().new == 0
    assert sorted(set(files.table().subject_id)) == ["s0", "s1", "s2", "s3"]


def test_a_spoilt_or_lost_table_is_written_again(files: Files) -> None:
    files.measure()
    table, path = files.table(), files.folder.path("measurements.parquet")
    for spoil in (lambda: path.write_bytes(b"PAR1 nonsense"), path.unlink):
        spoil()
        assert files.measure().new == 0
        pd.testing.assert_frame_equal(files.table(), table)


@dataclass(frozen=True)
class FullDisk(LocalFolder):
    """A folder on which nothing can be written any more."""

    def append(self, name: str, line: str) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_stops_the_run_and_says_so(files: Files) -> None:
    with pytest.raises(CannotGoOn, match="No space left on device"):
        measure_cohort(files.cases, FullDisk(files.folder.location), FolderReader(files.folder.location))
    assert not files.folder.path("measurements.parquet").exists()


def test_bad_lists_of_subjects_are_refused(files: Files) -> None:
    with pytest.raises(InputError, match="subject s0 is there more than once"):
        measure_cohort([files.cases[0]] * 2, files.folder, FolderReader(""))
    with pytest.raises(InputError, match="no subjects to measure"):
        measure_cohort([], files.folder, FolderReader(""))


def test_readers_and_cases_travel_to_workers(files: Files) -> None:
    @dataclass(frozen=True)
    class Travelling(LocalExecutor):
        """Everything goes through pickle, as between processes."""

        def run(self, factory: Any, items: Any, max_attempts: int = 3) -> Iterator[Any]:
            factory, items = pickle.loads(pickle.dumps((factory, list(items))))
            for attempt in super().run(factory, items, max_attempts):
                yield pickle.loads(pickle.dumps(attempt))

    assert files.measure(executor=Travelling()).done == 4


def test_a_run_folder_lists_its_subjects(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run")
    manifest = Manifest(kind="phantom", identity={"seed": 0}, geometry={}, n=3, sharded=False)
    scan = box_scan()
    pet_ct = PetCt(scan.ct.voxels, scan.suv.voxels, SPACING)
    with open_run(folder, manifest) as run:
        run.write_manifest()
        for index, labels in enumerate((scan.labels.voxels, None, scan.labels.voxels)):
            subject = Subject(f"P{index}", index, 0, "F", 50.0, 165.0, 70.0)
            work = ScanWork(lambda _: None, folder, False, "scans", "cpu", 1)  # type: ignore[arg-type, return-value]
            saved = work.save(subject, Scan(pet_ct, labels))
            status, error = ("ok", "") if index < 2 else ("failed", "gave up")
            run.record(
                JournalEntry(
                    time=now(), status=status, subject_id=subject.subject_id, index=index, attempt=1, seconds=1.0,
                    error=error, files=saved.files, row=saved.row,
                )
            )  # fmt: skip
    cases = run_cases(folder)
    assert [case.subject_id for case in cases] == ["P0", "P1"]
    summary = measure_cohort(cases, folder, FolderReader(folder.location), organs=["liver"])
    assert (summary.done, list(summary.failures)) == (1, ["P1"])
    assert "segmentations/P1.nii.gz: cannot be read (No such file" in summary.failures["P1"]
    folder.write("segmentations/P1.nii.gz", nifti_bytes(scan.labels.voxels, SPACING)[0])
    assert run_cases(folder)[0] == cases[0]
    assert run_cases(folder)[1].fingerprint != cases[1].fingerprint
    assert measure_cohort(run_cases(folder), folder, FolderReader(folder.location), organs=["liver"]).new == 1
    with pytest.raises(InputError, match="no run is there"):
        run_cases(open_folder(tmp_path / "elsewhere"))
