"""How a vision-language model takes images: the text that stands for one in a prompt, and the tensors of a batch.

    Renderer ── expansion(reference) ──▶ the family's image tokens, as text       (needs the picture's size only)
    Collator ── inputs(references) ────▶ pixel_values, image_grid_thw, …          (decodes, in the loader's workers)

Both ask the family's own processor, so a family that transformers knows needs no code here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader, shown
from rankwise.errors import UsageError

ROW_INPUTS = ("mm_token_type_ids", "token_type_ids")  # one value per token: 1 on image tokens, 0 elsewhere
PROBE = (64, 64)


class ImageDepth(Protocol):
    """Depth of an image at its tokens, (tokens,) in their order; `data.depth_maps` reads it from a cache."""

    def for_image(self, reference: str) -> Tensor: ...


@dataclass(frozen=True)
class Sight:
    """A processor of transformers (or one with its interface), and where images come from.

    depth: maps to give to a depth-aware model beside the pixels. target: the device that processor and reader work as.
    """

    processor: ProcessorMixin
    reader: ImageReader | DeviceReader
    depth: ImageDepth | None = None
    target: DeviceTarget | None = None
    _expansions: dict[tuple[int, int], str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if getattr(self.processor, "image_token", None) is None:
            raise UsageError(
                f"{type(self.processor).__name__} names no image token, so no image can be put in a prompt"
            )

    @property
    def image_token(self) -> str:
        return str(self.processor.image_token)

    @cached_property
    def image_token_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.image_token))

    def expansion(self, reference: str) -> str:
        """The text that the processor puts in place of its image token. It depends on the picture's size alone.

        BadImage where the processor takes no picture of that size.
        """
        size = self.reader.size(reference)
        if size not in self._expansions:
            try:
                self._expansions[size] = self._expanded(size)
            except ValueError as error:
                shape = f"{size[0]}×{size[1]} pixels"
                raise BadImage(f"image {shown(reference)}: the processor refuses {shape}: {error}") from error
        return self._expansions[size]

    def _expanded(self, size: tuple[int, int]) -> str:
        found = self._processed([Image.new("RGB", size)], return_text_replacement_offsets=True)
        return str(found["text_replacement_offsets"][0][0]["replacement"])

    def inputs(self, references: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of these images in order, as the family's model takes them for a whole batch; {} without images.

        depth: (image tokens of the batch,) float32, where there are maps.
        """
        if not references:
            return {}
        tensors = self.pixels([self.reader.open(reference) for reference in references])
        if self.depth is not None:
            tensors["depth"] = torch.cat([self.depth.for_image(reference) for reference in references]).float()
        return tensors

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The same tensors, without depth, of pictures at hand: at least one."""
        found = self._processed(images, return_tensors="pt")
        return {name: value for name, value in found.items() if name not in self._text_inputs}

    def row_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model wants to know of every token: which ones are an image's. ids: (batch, length)."""
        return {name: (ids == self.image_token_id).long() for name in self._row_inputs}

    def _processed(self, images: Sequence[Image.Image], **how: Any) -> Mapping[str, Any]:
        """All images in one row of text: families that keep images by row (Idefics3) then have one row of them, which
        their models take as they take several."""
        text = self.image_token * len(images)
        return self.processor(text=[text], images=list(images), add_special_tokens=False, **how)

    @cached_property
    def _text_inputs(self) -> frozenset[str]:
        return frozenset(["input_ids", "attention_mask", *ROW_INPUTS])

    @cached_property
    def _row_inputs(self) -> tuple[str, ...]:
        found = self._processed([Image.new("RGB", PROBE)])
        return tuple(name for name in ROW_INPUTS if name in found)
