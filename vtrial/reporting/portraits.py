"""A subject for the gallery: coronal CT and PET and the PET maximum-intensity projection as small PNGs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as Pillow

from vtrial.records import PetCt
from vtrial.reporting.content import Picture, Portrait
from vtrial.reporting.preview import Image, views

HEIGHT_PX = 300
_GREYS = 64  # the eye tells no more on a screen, and they pack to half the bytes
LABELS = ("coronal CT", "coronal PET", "PET projection")


def portrait(title: str, caption: str, pet_ct: PetCt, height_px: int = HEIGHT_PX) -> Portrait:
    """A subject's three views in true proportions, each so many pixels high."""
    spacing = pet_ct.spacing_mm
    pictures = [
        Picture(label, png(view, spacing[2] / spacing[0], height_px)) for label, view in zip(LABELS, views(pet_ct))
    ]
    return Portrait(title, caption, tuple(pictures))


def png(image: Image, pixel_aspect: float = 1.0, height_px: int = HEIGHT_PX) -> bytes:
    """A grey picture (rows, columns), 0 to 255, whose pixels are `pixel_aspect` times as high as wide, as a PNG."""
    rows, columns = image.shape
    size = (max(round(height_px * columns / (rows * pixel_aspect)), 1), height_px)
    scaled = np.asarray(Pillow.fromarray(image).resize(size, Pillow.Resampling.LANCZOS))
    fewer = (np.round(scaled / 255.0 * (_GREYS - 1)) * (255.0 / (_GREYS - 1))).round().astype(np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(fewer).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
