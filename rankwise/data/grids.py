"""Where an image's tokens lie on the image: what a depth map is pooled to, family by family.

image_grids(processor, 640, 480)   # Qwen2.5-VL: (Grid(whole image, 17 rows, 23 columns),)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import ProcessorMixin

from rankwise.core.geometry import WHOLE, Grid, bounded_size, centre_crop, tile_counts, tiled
from rankwise.data.device_processor import AlwaysTiled
from rankwise.errors import UsageError

__all__ = ["Grid", "image_grids"]

Rule = Callable[[Any, int, int], tuple[Grid, ...]]


def image_grids(processor: ProcessorMixin, width: int, height: int) -> tuple[Grid, ...]:
    """The grids of one image's tokens, in the order in which the tokens stand in the prompt, row-major inside.

    Qwen2-VL, Qwen2.5-VL, Isaac, LLaVA: one grid. SmolVLM, Idefics3: the tiles, row-major, then the whole image.
    Raises UsageError, naming the family, where the processor's rule is not known here.
    """
    images = processor.image_processor
    rule = RULES.get(type(images).__name__.removeprefix("Tiled").removesuffix("Pil"))
    if rule is None or not getattr(images, "do_resize", True):
        known = "Qwen2-VL, Qwen2.5-VL, Isaac, SmolVLM, Idefics3 and LLaVA (CLIP)"
        raise UsageError(
            f"{type(processor).__name__} with {type(images).__name__}: how its image tokens lie on the image is not "
            f"known here, so depth has no place to go; it works with the processors of {known}, images resized"
        )
    return rule(processor, width, height)


def merged_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """One token per merge_size² patches of the image resized within its pixel limits."""
    images = processor.image_processor
    side = images.patch_size * images.merge_size
    size = images.size
    tall, wide = bounded_size(height, width, side, size["shortest_edge"], size["longest_edge"])
    return (Grid(WHOLE, tall // side, wide // side),)


def shuffled_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """Isaac: one token per pixel-shuffled block of the image resized to whole blocks."""
    images = processor.image_processor
    side = images.patch_size * images.pixel_shuffle_scale
    tall, wide = images.target_size(height, width)
    return (Grid(WHOLE, tall // side, wide // side),)


def tiles_and_whole(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    images = processor.image_processor
    side = math.isqrt(processor.image_seq_len)
    if not images.do_image_splitting:
        return tiled(0, 0, side)
    longest, tile = images.size["longest_edge"], images.max_image_size["longest_edge"]
    rows, columns = tile_counts(height, width, longest, tile)
    if isinstance(images, AlwaysTiled) and not rows:
        rows, columns = 1, 1
    return tiled(rows, columns, side)


def cropped_patches(processor: Any, width: int, height: int) -> tuple[Grid, ...]:
    """CLIP: the middle of the image, one token per patch; the class token must be dropped."""
    images, patch = processor.image_processor, processor.patch_size
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    shortest = images.size.get("shortest_edge")
    crop = images.crop_size["height"], images.crop_size["width"]
    if extra or not images.do_center_crop or not shortest or max(crop) > shortest:
        raise UsageError(
            f"{type(processor).__name__}: depth needs one token per patch of an image that is resized by its shortest "
            "side and cropped in the middle; this processor's settings are others"
        )
    return (Grid(centre_crop(height, width, shortest, crop), crop[0] // patch, crop[1] // patch),)


RULES: dict[str, Rule] = {
    "Qwen2VLImageProcessor": merged_patches,
    "IsaacImageProcessor": shuffled_patches,
    "SmolVLMImageProcessor": tiles_and_whole,
    "Idefics3ImageProcessor": tiles_and_whole,
    "CLIPImageProcessor": cropped_patches,
}
