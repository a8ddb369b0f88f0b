"""A family's processor as the device's runtime does its work: the same tiles, the same text around them.

    transformers, one tile:   <fake_token_around_image><global-img><image>×64<fake_token_around_image>
    llama.cpp, one tile:      <fake_token_around_image><row_1_col_1><image>×64 ⏎⏎
                              <fake_token_around_image><global-img><image>×64<fake_token_around_image>

llama.cpp cuts a SmolVLM (Idefics3) image into tiles even where one tile holds all of it. A model must be trained on
what it will be shown, so training goes the runtime's way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, Idefics3ImageProcessor, ProcessorMixin, SmolVLMImageProcessor

from rankwise.data.device import DeviceTarget
from rankwise.errors import UsageError


class AlwaysTiled:
    """An image that fits one tile becomes a tile and the whole image, as larger ones do."""

    def split_images(self, images: Tensor, *args: Any, **how: Any) -> tuple[Tensor, list[int], list[int]]:
        """images: (batch, 3, height, width) → frames (batch, tiles + 1, 3, side, side), rows and columns of each."""
        frames, rows, columns = super().split_images(images, *args, **how)  # type: ignore[misc]
        if rows[0]:
            return frames, rows, columns
        ones = [1] * len(rows)
        return torch.cat([frames, frames], 1), ones, list(ones)


class TiledSmolVLMImageProcessor(AlwaysTiled, SmolVLMImageProcessor):
    """SmolVLM's image processor with llama.cpp's tiling."""


class TiledIdefics3ImageProcessor(AlwaysTiled, Idefics3ImageProcessor):
    """Idefics3's image processor with llama.cpp's tiling."""


TILED: dict[type[BaseImageProcessor], type[BaseImageProcessor]] = {
    SmolVLMImageProcessor: TiledSmolVLMImageProcessor,
    Idefics3ImageProcessor: TiledIdefics3ImageProcessor,
}


def tiles(processor: ProcessorMixin) -> bool:
    """Whether the family cuts images into tiles of its own size."""
    return isinstance(processor.image_processor, tuple(TILED))


def device_processor(processor: ProcessorMixin, target: DeviceTarget) -> ProcessorMixin:
    """A copy of the processor that lays images out as the target's runtime does.

    Families that do not cut images into tiles stay as they are: their sizes follow from the image's. UsageError for a
    `longest_edge` that such a family has no place for.
    """
    if not tiles(processor):
        if target.longest_edge is not None:
            raise UsageError(
                f"device target: longest_edge acts on processors that cut images into tiles (SmolVLM, Idefics3), and "
                f"{type(processor).__name__} does not; leave it out"
            )
        return processor
    own = processor.image_processor
    settings = own.to_dict() | {"size": {"longest_edge": longest_edge(processor, target)}}
    if target.tiling == "runtime":
        settings["do_image_splitting"] = True
    kind = TILED[type(own)] if target.tiling == "runtime" and type(own) in TILED else type(own)
    changed = copy.copy(processor)
    changed.image_processor = kind.from_dict(settings)
    return changed


def longest_edge(processor: ProcessorMixin, target: DeviceTarget) -> int:
    """What the processor scales an image's longest side to, in pixels."""
    return target.longest_edge or int(processor.image_processor.max_image_size["longest_edge"])
