"""A picture on its way to the tower: stretched to a square, laid out as a device does, or as it is.

    picture ── Preparation.picture ──▶ what the processor gets ── Sight.pixels ──▶ tensors for the tower

`grids` says where the tokens of such a picture lie, and so how many matrices it makes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from rankwise.core.geometry import Grid
from rankwise.data.depth.maps import image_grids
from rankwise.data.device import DeviceTarget, device_processor
from rankwise.data.pixels import BLACK, WHITE, Colour
from rankwise.errors import UsageError

SQUARE = 448  # pixels: 16 × 16 tokens in the Qwen-VL families
FILTER = Image.Resampling.BICUBIC  # Pillow's own default


@dataclass(frozen=True)
class Preparation:
    """How pictures go to the processor: to a square of `side` pixels whatever their shape, or as `target`'s device
    shows them, or, with neither, as they are."""

    side: int | None = SQUARE
    target: DeviceTarget | None = None

    def __post_init__(self) -> None:
        assert not (self.side and self.target)

    @property
    def background(self) -> Colour:
        """What transparency is laid on before."""
        return BLACK if self.target else WHITE

    def picture(self, image: Image.Image) -> Image.Image:
        if self.target:
            return self.target.resize(image)
        return image if self.side is None else image.resize((self.side, self.side), FILTER)

    def processor(self, processor: ProcessorMixin) -> ProcessorMixin:
        return device_processor(processor, self.target) if self.target else processor

    def record(self, images: Any) -> dict[str, Any]:
        """For the recipe: all that decides the tensors of a picture. images: the image processor."""
        own = images.to_json_string()
        return {
            "stretched_to": self.side,
            "device": self.target.geometry if self.target else None,
            "processor": f"{type(images).__name__} {digest(own.encode())[:12]}",
        }


def grids(processor: ProcessorMixin, image: Image.Image) -> tuple[Grid, ...] | None:
    """One grid per matrix of a prepared picture; None for a family whose rule is not known here, which has then one
    matrix per picture."""
    try:
        return image_grids(processor, *image.size)
    except UsageError:
        return None


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of the pixels that the processor gets: what the model cannot tell apart is one picture."""
    return digest(f"{image.mode} {image.size}".encode() + image.tobytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
