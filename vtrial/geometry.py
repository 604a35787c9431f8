"""The grid of the method: 224×224×384 voxels, 2 mm in plane, the body's length stretched to 384 slices.

Yoon et al. 2025, section 2.2, and the authors' released preprocessing: the field of view reaches from the lower neck
to the hip joints; every body is stretched to 384 slices and its length restored from height.
"""

from __future__ import annotations

SHAPE = (224, 224, 384)  # full resolution (x, y, z)
FACTOR = 4  # between full and low resolution, along each axis
LOW_SHAPE = (56, 56, 96)
IN_PLANE_MM = 2.0

# Robust fit of body extent on height over the paper's 565 training subjects (in 2 mm slices, height in m).
EXTENT_SLICES_PER_M = 146.629
EXTENT_SLICES_AT_0 = 110.419


def extent_mm(height_cm: float) -> float:
    """Length of the field of view along z in mm for a body height in cm."""
    return 2.0 * (EXTENT_SLICES_PER_M * height_cm / 100.0 + EXTENT_SLICES_AT_0)


def spacing_mm(height_cm: float, shape: tuple[int, int, int] = SHAPE) -> tuple[float, float, float]:
    """Voxel size in mm (x, y, z) of a grid of `shape` over the field of view of a person of `height_cm`."""
    in_plane = IN_PLANE_MM * SHAPE[0] / shape[0]
    return in_plane, in_plane, extent_mm(height_cm) / shape[2]
