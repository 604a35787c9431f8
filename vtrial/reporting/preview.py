"""One small picture of a few PET/CTs: coronal CT, coronal PET and PET maximum-intensity projection of each.

As readers of PET/CT expect it: head up, the patient's right on the left, true proportions, CT in a soft-tissue window
(40/400 HU), PET as inverted grey from SUV 0 to 7.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from vtrial.records import PetCt

matplotlib.use("Agg")

from matplotlib import pyplot as plt

CT_LEVEL_HU, CT_WIDTH_HU = 40.0, 400.0
SUV_WINDOW = 7.0
MAX_BYTES = 300_000

Image = NDArray[np.uint8]


def ct_grey(ct_hu: NDArray[Any]) -> Image:
    """HU of any shape to grey, soft-tissue window, bone white."""
    low = CT_LEVEL_HU - CT_WIDTH_HU / 2.0
    return _grey((ct_hu.astype(np.float32) - low) / CT_WIDTH_HU)


def suv_grey(suv: NDArray[Any]) -> Image:
    """SUV of any shape to grey, hot is black."""
    return _grey(1.0 - suv.astype(np.float32) / SUV_WINDOW)


def _grey(fraction: NDArray[np.float32]) -> Image:
    return (fraction.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def as_seen(coronal: NDArray[Any]) -> NDArray[Any]:
    """An (x, z) plane of a RAS+ volume as rows and columns of a picture: head up, the patient's right on the left."""
    return coronal[::-1, ::-1].T


def views(pet_ct: PetCt) -> tuple[Image, Image, Image]:
    """Coronal CT and PET through the middle of the body, and the frontal PET maximum-intensity projection."""
    y = body_middle(pet_ct)
    ct, pet = ct_grey(pet_ct.ct_hu[:, y, :]), suv_grey(pet_ct.suv[:, y, :])
    return as_seen(ct), as_seen(pet), as_seen(suv_grey(pet_ct.suv.max(axis=1)))


def body_middle(pet_ct: PetCt) -> int:
    """Index along y of the coronal plane with the most body in it."""
    return int((pet_ct.ct_hu > -200).sum(axis=(0, 2)).argmax())


def preview_png(scans: Sequence[tuple[str, PetCt]]) -> bytes:
    """A PNG of at most 300 kB with a row of pictures for each (title, scan); ValueError without scans."""
    if not scans:
        raise ValueError("no scans to show")
    for dots_per_inch in (110, 80, 55, 40):
        data = _draw(scans, dots_per_inch)
        if len(data) <= MAX_BYTES:
            break
    return data


def _draw(scans: Sequence[tuple[str, PetCt]], dots_per_inch: int) -> bytes:
    columns = min(len(scans), 2)
    rows = -(-len(scans) // columns)
    figure, axes = plt.subplots(rows, 3 * columns, figsize=(5.4 * columns, 3.6 * rows), squeeze=False)
    try:
        for axis in axes.flat:
            axis.set_axis_off()
        for position, (title, pet_ct) in enumerate(scans):
            row, column = divmod(position, columns)
            aspect = pet_ct.spacing_mm[2] / pet_ct.spacing_mm[0]
            for offset, image in enumerate(views(pet_ct)):
                axis = axes[row, 3 * column + offset]
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=aspect, interpolation="antialiased")
                if offset == 0:
                    axis.set_title(title, fontsize=8, loc="left")
        figure.tight_layout(pad=0.4)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dots_per_inch, bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()
    finally:
        plt.close(figure)
