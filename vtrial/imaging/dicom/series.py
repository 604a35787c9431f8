"""A series of DICOM images as a volume: ordered along their normal, on one even grid, in RAS+ millimetres.

A DICOM pixel at column c, row r of image k lies at P_k + c·Δc·X + r·Δr·Y (PS3.3, C.7.6.2.1.1; LPS axes). The images
of a volume share X, Y and spacings, and their P_k lie evenly on a straight line. That line need not be the normal: a
tilted gantry shears the grid, and the affine says so. Nothing is interpolated here: a gap is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtrial.imaging.dicom.fields import coarse
from vtrial.imaging.dicom.headers import Image, Kind, read_pixels
from vtrial.imaging.volume import Affine, Box, Volume, box_of, upright
from vtrial.records import CannotRead, InputError

FEWEST_SLICES = 10  # less is a scout, a snapshot or a scrap, and no volume
AIR_HU = -1024
_LARGEST = 2048  # columns or rows
_SAME_PLACE_MM = 0.02
_UNEVEN = 0.1  # of a step
_TILT_DEGREES = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """The images of a volume, not read yet. `where` names it in errors, and nobody in it.

    `places` are the images from the first position along the normal to the last; several at one place must turn out
    to be equal. `affine` takes (column, row, place) to world millimetres (RAS).
    """

    kind: Kind
    where: str
    places: tuple[tuple[Image, ...], ...]
    affine: Affine
    tilt_degrees: float
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, places."""
        columns, rows = self.places[0][0].shape
        return columns, rows, len(self.places)

    @property
    def images(self) -> list[Image]:
        """The first image of each place."""
        return [place[0] for place in self.places]

    @property
    def box_mm(self) -> Box:
        """The field of view, voxel edges included."""
        return box_of(self.shape, self.affine)


def stacks(images: Iterable[Image]) -> list[list[Image]]:
    """Images apart by what one grid must share: series, frame of reference, size, spacing and orientation."""
    apart: dict[Any, list[Image]] = {}
    for image in images:
        along = tuple(round(part, 3) + 0.0 for part in (*(image.columns_along or ()), *(image.rows_along or ())))
        spacing = tuple(round(step, 3) for step in image.spacing_mm or ())
        apart.setdefault((image.series_uid, image.frame_uid, image.shape, spacing, along), []).append(image)
    return list(apart.values())


def series_of(images: list[Image], where: str) -> Series:
    """The series of a stack; InputError where it is no even grid."""
    first = images[0]
    if first.spacing_mm is None or first.columns_along is None or first.rows_along is None or not all(first.shape):
        raise InputError(f"{where}: PixelSpacing, ImageOrientationPatient, Rows or Columns is missing or no number")
    if max(first.shape) > _LARGEST:
        raise InputError(f"{where}: Columns and Rows are {first.shape}; at most {_LARGEST} are plausible")
    if any(image.position is None for image in images):
        raise InputError(f"{where}: ImagePositionPatient is missing: the images cannot be put in order")
    columns_along, rows_along = np.array(first.columns_along), np.array(first.rows_along)
    frame = np.stack([columns_along, rows_along])
    if min(first.spacing_mm) <= 0.0 or not np.allclose(frame @ frame.T, np.eye(2), atol=1e-3):
        raise InputError(f"{where}: PixelSpacing or ImageOrientationPatient is no grid at right angles")
    normal = np.cross(columns_along, rows_along)
    places = _in_order(images, normal)
    if len(places) < FEWEST_SLICES:
        raise InputError(f"{where}: {len(places)} slices are too few for a volume; at least {FEWEST_SLICES} are needed")
    positions = np.array([place[0].position for place in places])
    _refuse_gaps(positions @ normal, where)
    step = (positions[-1] - positions[0]) / (len(places) - 1)
    even = positions[0] + np.arange(len(places))[:, None] * step
    if np.linalg.norm(positions - even, axis=1).max() > _UNEVEN * np.linalg.norm(step):
        raise InputError(f"{where}: the slices are not evenly spaced on a line: they are no single volume")
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1.0, 1.0))))
    lps = np.column_stack([columns_along * first.spacing_mm[0], rows_along * first.spacing_mm[1], step, positions[0]])
    affine = np.vstack([lps * np.array([[-1.0], [-1.0], [1.0]]), [0.0, 0.0, 0.0, 1.0]])
    tilted = tilt > _TILT_DEGREES
    notes = _notes(images, places, tilt if tilted else 0.0)
    return Series(first.kind, where, places, affine, tilt if tilted else 0.0, notes)


def _in_order(images: list[Image], normal: NDArray[np.float64]) -> tuple[tuple[Image, ...], ...]:
    """Images by their place along the normal, those at one place together."""
    heights = {id(image): float(np.dot(image.position or (), normal)) for image in images}
    ordered = sorted(images, key=lambda image: (heights[id(image)], image.path))
    places: list[list[Image]] = [[ordered[0]]]
    for before, image in pairwise(ordered):
        if heights[id(image)] - heights[id(before)] > _SAME_PLACE_MM:
            places.append([])
        places[-1].append(image)
    return tuple(map(tuple, places))


def _refuse_gaps(heights: NDArray[np.float64], where: str) -> None:
    steps = np.diff(heights)
    usual = float(np.median(steps))
    wide = np.flatnonzero(steps > 1.5 * usual)
    if len(wide):
        gaps = [f"{round(steps[i] / usual) - 1} after slice {i + 1}" for i in wide[:5]]
        more = ", …" if len(wide) > 5 else ""
        raise InputError(
            f"{where}: slices are missing ({', '.join(gaps)}{more} of {len(heights)}, step {usual:.2f} mm): export the "
            "series again"
        )


def _notes(images: list[Image], places: tuple[tuple[Image, ...], ...], tilt: float) -> tuple[str, ...]:
    notes = []
    if len(images) > len(places):
        notes.append(f"{len(images) - len(places)} images lie where another one does; one of each place is taken")
    announced = images[0].announced_slices
    if announced and announced > len(places):
        told = f"{announced:.0f}" if announced < 10_000 else coarse(announced)
        notes.append(f"{len(places)} of the {told} slices that the header announces are there")
    if tilt:
        notes.append(f"the gantry was tilted by {tilt:.1f} degrees: the grid is sheared, and its affine says so")
    if images[0].lossy:
        notes.append("the images were compressed with loss")
    return tuple(notes)


def read_ct(series: Series) -> Volume:
    """A CT in Hounsfield units, int16; what the scanner padded, and all below −1024, is −1024. InputError if unfit."""
    first = series.places[0][0]
    if first.rescale_type not in ("", "HU"):
        raise InputError(f"{series.where}: RescaleType is not HU: these values are no Hounsfield units")
    columns, rows, count = series.shape
    voxels = np.empty((count, rows, columns), dtype=np.int16)
    for k, (image, stored) in enumerate(_values(series)):
        slope, intercept = _rescale(image, series.where)
        hu = np.clip(np.rint(slope * stored + intercept), AIR_HU, 32767)
        if image.padding is not None:
            hu[stored == image.padding] = AIR_HU
        voxels[k] = hu
    return upright(voxels.transpose(2, 1, 0), series.affine)


def read_pet(series: Series, factors: Iterable[float]) -> Volume:
    """A PET with every image rescaled by its own header and multiplied by its factor, float32; InputError if unfit."""
    columns, rows, count = series.shape
    voxels = np.empty((count, rows, columns), dtype=np.float32)
    for k, ((image, stored), factor) in enumerate(zip(_values(series), factors, strict=True)):
        slope, intercept = _rescale(image, series.where)
        voxels[k] = (slope * stored + intercept) * factor
    return upright(voxels.transpose(2, 1, 0), series.affine)


def _rescale(image: Image, where: str) -> tuple[float, float]:
    if not image.slope or image.intercept is None:
        raise InputError(f"{where}: RescaleSlope (not 0) or RescaleIntercept is missing in an image; both are needed")
    return image.slope, image.intercept


def _values(series: Series) -> Iterator[tuple[Image, NDArray[np.float64]]]:
    """The stored values of each place; CannotRead where files cannot be read, InputError for pixels that are none, or
    two different images at a place."""
    columns, rows, count = series.shape
    for k, place in enumerate(series.places, start=1):
        told = f"{series.where}, slice {k} of {count}"
        arrays = []
        for image in place:
            try:
                pixels = read_pixels(image.path)
            except (InputError, CannotRead) as error:
                raise type(error)(f"{told}: {error}") from None
            if pixels.shape != (rows, columns):
                raise InputError(f"{told}: the pixels are {pixels.shape}, the header says {(rows, columns)}")
            arrays.append(pixels.astype(np.float64))
        for image, other in zip(place[1:], arrays[1:], strict=True):
            same = (image.slope, image.intercept) == (place[0].slope, place[0].intercept)
            if not same or not np.array_equal(arrays[0], other):
                raise InputError(
                    f"{told}: two different images lie at this place (a dynamic or gated series, or two "
                    "reconstructions under one name): keep one of them"
                )
        yield place[0], arrays[0]
