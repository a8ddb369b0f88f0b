"""Bilinear scaling as Android's software canvas does it: Skia's integer arithmetic for its native 32-bit bitmaps.

    RGB, upright ── positions in sixteenths of a pixel, four neighbours, ÷ 256 ──▶ (size, size, 3)

Bit for bit what Skia draws (`tests/test_skia_pixels.py`). Our own rule (`data/device.py`) has exact weights; on photos
it is within a level on the average and a dozen levels at an edge. An app's pixels may be either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rankwise.core.geometry import letterbox
from rankwise.ship.parity.reference import Pixels

STEPS = 16  # positions between two pixels
SPAN = 127  # pixels of a line that Skia computes from one start; the rounding of the start shows
Places = NDArray[np.int64]


def canvas_pixels(image: Image.Image, size: int) -> Pixels:
    """A picture in RGB in a black square of `size` pixels: (size, size, 3)."""
    place = letterbox(*image.size, size)
    columns = sampled(image.width, place.width, place.left, SPAN)
    rows = sampled(image.height, place.height, place.top, 1)
    square = np.zeros((size, size, 3), np.uint8)
    inside = square[place.top : place.top + place.height, place.left : place.left + place.width]
    inside[:] = mixed(np.asarray(image, np.int64), rows, columns)
    return square


def sampled(length: int, scaled: int, start: int, span: int) -> Places:
    """(scaled,) positions of the scaled pixels in the line of `length`, in sixteenths, in Skia's single precision."""
    step = np.float32(1) / (np.float32(scaled) / np.float32(length))
    offset = -np.float32(start) * step
    number = np.arange(scaled)
    first = number - number % span
    begin = (np.float32(start) + first.astype(np.float32) + np.float32(0.5)) * step + offset
    return np.floor(STEPS * (begin.astype(np.float64) + (number % span) * float(step) - 0.5)).astype(np.int64)


def mixed(pixels: Places, rows: Places, columns: Places) -> Places:
    """The four neighbours of every place, weighted."""
    (above, below), (left, right) = neighbours(rows, len(pixels)), neighbours(columns, pixels.shape[1])
    down, across = (rows % STEPS)[:, None, None], (columns % STEPS)[None, :, None]
    both = down * across
    upper, lower = pixels[above], pixels[below]
    return (
        upper[:, left] * (256 - STEPS * (down + across) + both)
        + upper[:, right] * (STEPS * across - both)
        + lower[:, left] * (STEPS * down - both)
        + lower[:, right] * both
    ) >> 8


def neighbours(places: Places, length: int) -> tuple[Places, Places]:
    first = places // STEPS
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1)
