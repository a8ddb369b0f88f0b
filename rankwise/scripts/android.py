"""What the Android app does to an image, under the documented names: `from rankwise.scripts import resize_for_android`.

image_256 = resize_for_android(image, 256)        # RGB, scaled into the square, centred on black

Labels, training, evaluation and export take the same from the data set's device.json (`data/device.py`).
"""

from __future__ import annotations

from PIL import Image

from rankwise.data.device import MARKER, MAX_NEW_TOKENS, SIZE, resize_for_device

ANDROID_IMAGE_SIZE: int = SIZE
ANDROID_MAX_TOKENS: int = MAX_NEW_TOKENS
ANDROID_IMAGE_MARKER: str = MARKER


def resize_for_android(image: Image.Image, target_size: int = ANDROID_IMAGE_SIZE) -> Image.Image:
    """The picture as the app gives it to the model: filtered bilinear scaling, black padding."""
    return resize_for_device(image, target_size)
