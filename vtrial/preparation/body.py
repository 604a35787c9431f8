"""Where the patient is in a CT, and the removal of all else: table, blankets, tubes.

The paper does not tell of tables; the phantoms that its cascade is tried on have none, and a network would otherwise
learn the tables of one hospital. So what lies off the body becomes what phantoms have there: −1000 HU and SUV 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TISSUE_HU = -300.0  # between fat (-100) and what blankets, mattresses and foam have (-950 to -600)
AIR_HU = -1000.0
# Shells of tables and folds of blankets are thinner; a child's wrist is thicker.
THICKNESS_MM = 10.0
# One voxel keeps the skin's partial volume, which the model's range (down to -500 HU) still shows.
CT_MARGIN_MM = 2.0
# The tail of the PET's blur (5 to 7 mm FWHM) and the skin's breathing; beyond is scatter.
PET_MARGIN_MM = 10.0

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]


def find_body(ct_hu: NDArray[Any], spacing_mm: Spacing) -> Mask:
    """The largest connected thing as dense as tissue after an opening in plane, its holes filled slice by slice.

    Arms stay if they hang together with the trunk inside the volume (at the shoulders). Air between an arm and the
    trunk may count as body, which does no harm: what is inside is left as it was measured. An empty mask: no body.
    """
    dense = ct_hu > TISSUE_HU
    width = (_odd(THICKNESS_MM / spacing_mm[0]), _odd(THICKNESS_MM / spacing_mm[1]), 1)
    body = largest_part(grown(shrunk(dense, width), width))
    # What the opening rounded off comes back, and with it at most as much of what touches the skin.
    return filled(grown(body, width) & dense)


def largest_part(mask: Mask) -> Mask:
    """The largest connected part of a mask; all of it where it is empty."""
    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())


def clear_outside(ct_hu: NDArray[Any], suv: NDArray[Any], body: Mask, spacing_mm: Spacing) -> None:
    """Make what lies off the body air (CT) and nothing (PET), in place, each with its margin."""
    ct_hu[~grown(body, reach(CT_MARGIN_MM, spacing_mm))] = AIR_HU
    suv[~grown(body, reach(PET_MARGIN_MM, spacing_mm))] = 0.0


def filled(body: Mask) -> Mask:
    """Each slice with its holes: what is not body and does not reach the slice's rim."""
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1, :, 1] = in_plane[:, 1, 1] = True
    parts, count = ndimage.label(~body, structure=in_plane)
    outside = np.zeros(count + 1, dtype=bool)
    for rim in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outside[np.unique(rim)] = True
    outside[0] = False
    return np.asarray(~outside[parts])


def reach(margin_mm: float, spacing_mm: Spacing) -> tuple[int, int, int]:
    """The box (voxels) that reaches so far from its middle."""
    x, y, z = (2 * round(margin_mm / step) + 1 for step in spacing_mm)
    return x, y, z


def _odd(length: float) -> int:
    """The nearest odd number of voxels, 3 at least."""
    return max(2 * round((length - 1.0) / 2.0) + 1, 3)


def grown(mask: Mask, size: tuple[int, int, int]) -> Mask:
    """Everything within a box of so many voxels around the mask."""
    return np.asarray(ndimage.maximum_filter(mask.view(np.uint8), size=size).view(bool))


def shrunk(mask: Mask, size: tuple[int, int, int]) -> Mask:
    """What is left where such a box around a voxel must be in the mask."""
    return np.asarray(ndimage.minimum_filter(mask.view(np.uint8), size=size).view(bool))
