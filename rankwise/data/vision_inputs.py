"""How a vision-language model takes images: the text that stands for them in a prompt, and the tensors of a batch.

    Renderer ── expanded(texts, references) ──▶ prompts with the family's image tokens   (needs pictures' sizes only)
    Collator ── seen(ids, rows) ──────────────▶ pixel_values, image_grid_thw, token types, …  (decodes, in its workers)

Both ask the family's own processor, a whole row at a time, so a family that transformers knows needs no code here.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader, shown
from rankwise.errors import DataError, UsageError

IGNORED = -100  # the label of what is not learnt
PREFIX = "token_type_ids"  # of a family that reads prompts in both directions: 1 from the answer on
TEXT_INPUTS = frozenset(["input_ids", "attention_mask", "labels", "text_replacement_offsets"])
PROBE = (64, 64)
QUESTION = "What is it?"
MOST = 20_000  # different sizes of a row's pictures that are kept with what stands for them
APART = " \ue000 "  # between the texts of one row that a processor is given as one
Sizes = tuple[tuple[int, int], ...]
Made = TypeVar("Made")
SUPPORTED = "`rankwise check` says which model families are tested; docs/vision.md lists them"
CROSSED = "cross_attention_mask"


class DepthSource(Protocol):
    """Depth of an image at its tokens, (tokens,) in their order; `data.depth.maps` reads it from a cache."""

    def for_image(self, reference: str) -> Tensor: ...


@dataclass(frozen=True)
class Sight:
    """A processor of transformers (or one with its interface), and where images come from.

    depth: maps to give to a depth-aware model beside the pixels. target: the device that processor and reader work as.
    takes: names that the model's forward takes, others are left out; None for all that the processor makes.
    """

    processor: ProcessorMixin
    reader: ImageReader | DeviceReader
    depth: DepthSource | None = None
    target: DeviceTarget | None = None
    takes: frozenset[str] | None = None
    _expansions: dict[Sizes, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if getattr(self.processor, "image_token", None) is None:
            raise UsageError(f"{self._name} names no image token, so no image can be put in a prompt")

    @property
    def _name(self) -> str:
        return type(self.processor).__name__

    @property
    def image_token(self) -> str:
        """What a chat template puts where an image is; the processor replaces it."""
        return str(self.processor.image_token)

    @cached_property
    def placeholder_id(self) -> int:
        """The token that image features take the place of: the one that the processor writes most often for an image.
        It is not always the image token (Gemma 3, Llama 4, Aya)."""
        ids = self._probe["input_ids"][0].tolist()
        return int(Counter(ids).most_common(1)[0][0])

    @cached_property
    def crossed(self) -> bool:
        """Whether images stand beside the sequence, so that rows of one batch must have equally many (Mllama)."""
        return CROSSED in self._probe and self.taken(CROSSED)

    @cached_property
    def prefixes(self) -> bool:
        """Whether the family's rows are one prompt and one answer behind it, the prompt read in both directions
        (PaliGemma): its processor takes the answer as `suffix`."""
        return "suffix" in inspect.signature(type(self.processor).__call__).parameters

    def expanded(self, texts: Sequence[str], references: Sequence[str]) -> list[str]:
        """Texts of one row with their image tokens replaced as the processor does it, given all its images at once.

        It depends on the pictures' sizes alone. BadImage where the processor takes no pictures of these sizes.
        """
        if not references and self.replaces:
            return list(texts)
        if not references:
            return self._without_images(texts)
        if self.replaces:
            expansions = iter(self.expansions(references))
            return [re.sub(re.escape(self.image_token), lambda _: next(expansions), text) for text in texts]
        return self._sized(references, lambda sizes: self._written(texts, sizes))

    def _without_images(self, texts: Sequence[str]) -> list[str]:
        try:
            return self._written(texts, ())
        except ValueError as error:
            raise DataError(f"{self._name} takes no row without images: {error}") from error

    def expansions(self, references: Sequence[str]) -> tuple[str, ...]:
        """Expanded text of each image of a row."""
        return self._sized(references, self._expanded) if references else ()

    def _sized(self, references: Sequence[str], asked: Callable[[Sizes], Made]) -> Made:
        sizes = tuple(self.reader.size(reference) for reference in references)
        try:
            return asked(sizes)
        except ValueError as error:
            names = ", ".join(shown(reference) for reference in references)
            shapes = ", ".join(f"{width}×{height}" for width, height in sizes)
            raise BadImage(f"image {names}: the processor refuses {shapes} pixels: {error}") from error

    def _expanded(self, sizes: Sizes) -> tuple[str, ...]:
        if len(self._expansions) >= MOST:
            self._expansions.clear()
        if sizes not in self._expansions:
            self._expansions[sizes] = tuple(self._written([self.image_token] * len(sizes), sizes))
        return self._expansions[sizes]

    def _written(self, texts: Sequence[str], sizes: Sizes) -> list[str]:
        """What the processor hands to its tokenizer for these texts, which have images of these sizes."""
        _, given = listen(self.processor, [APART.join(texts)], [blank(sizes)])
        found = given[0].split(APART) if len(given) == 1 else []
        if len(found) != len(texts):
            raise UsageError(f"{self._name} builds prompts in a way that is not supported; {SUPPORTED}")
        return found

    @cached_property
    def replaces(self) -> bool:
        """Whether the processor only replaces its image token in a text: then the replacement depends on
        the images alone."""
        assert self._probe
        pair = (PROBE, PROBE)
        [given] = self._written([f"{QUESTION}{self.image_token}{self.image_token}{QUESTION}"], pair)
        return given == f"{QUESTION}{''.join(self._expanded(pair))}{QUESTION}"

    def seen(self, ids: Tensor, rows: Sequence[Sequence[str]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """What a model takes beside ids (batch, length): the images of all rows, and which tokens are theirs. labels:
        those of the rows, for families that part prompt and answer; None for prompts alone."""
        tensors = self.inputs(rows)
        if CROSSED in tensors:
            tensors |= crossed(tensors, ids, [len(row) for row in rows], self.placeholder_id)
        return self.row_inputs(ids, labels) | tensors

    def inputs(self, rows: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Tensors of the images of these rows in order, as the family's model takes them; {} without images.

        depth: (image tokens of the batch,) float32, where there are maps.
        """
        rows = [row for row in rows if row]
        if not rows:
            return {}
        tensors = self.pixels([[self.reader.open(reference) for reference in row] for row in rows])
        if self.depth is not None:
            tensors["depth"] = torch.cat([self.depth.for_image(name) for row in rows for name in row]).float()
        return tensors

    def pixels(self, rows: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """The same tensors, without depth, of loaded images: at least one per row. Floats are float32."""
        texts = [self.image_token * len(row) for row in rows]
        found, _ = listen(self.processor, texts, rows)
        return {
            name: value.float() if value.is_floating_point() else value
            for name, value in found.items()
            if name not in TEXT_INPUTS and name not in self.token_types and self.taken(name)
        }

    def row_inputs(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the model wants to know of every token: which ones are an image's, as the processor says; or which ones
        are the answer's."""
        if self.prefixes:
            answers = torch.zeros_like(ids) if labels is None else (labels != IGNORED).long()
            return {name: answers.cummax(1).values for name in self.token_types if name == PREFIX}
        # A family may have a way of its own: ERNIE's experts count the tokens around an image, too.
        own: Any = self.processor
        makers = {name: getattr(own, f"create_{name}", None) for name in self.token_types}
        return {
            name: torch.tensor((make or own.create_mm_token_type_ids)(ids.tolist())) for name, make in makers.items()
        }

    @cached_property
    def token_types(self) -> tuple[str, ...]:
        """Inputs that the model takes and that have a value for every token."""
        shape = self._probe["input_ids"].shape
        names = (name for name, value in self._probe.items() if getattr(value, "shape", None) == shape)
        return tuple(name for name in names if name not in TEXT_INPUTS and self.taken(name))

    @cached_property
    def _probe(self) -> Mapping[str, Any]:
        """What the processor makes of an image alone. UsageError where it takes no such row."""
        try:
            found, _ = listen(self.processor, [self.image_token], [blank((PROBE,))])
        except ValueError as error:
            raise UsageError(f"{self._name} does not take an image by its image token: {error}; {SUPPORTED}") from error
        return found

    def taken(self, name: str) -> bool:
        """Whether the model's forward takes an input of this name."""
        return self.takes is None or name in self.takes


def blank(sizes: Sizes) -> list[Image.Image]:
    return [Image.new("RGB", size) for size in sizes]


def listen(
    processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> tuple[Mapping[str, Any], list[str]]:
    """(the processor's output as tensors, the texts given to its tokenizer) for rows of text with their images.

    ValueError where it refuses the images; UsageError, naming the processor, where it cannot be called so.
    """
    listening = copy.copy(processor)
    listening.tokenizer = tokenizer = _Listening(processor.tokenizer)
    try:
        found = listening(
            text=list(texts),
            images=[list(row) for row in images] if any(images) else None,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",  # some processors count their placeholders by what tensors have (Ovis2, Aria)
        )
    except (AttributeError, LookupError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{type(processor).__name__} takes no text with images ({reason}); {SUPPORTED}") from error
    return found, tokenizer.given


class _Listening:
    """A tokenizer that keeps the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.given = tokenizer, []  # type: tuple[Any, list[str]]

    def __call__(self, text: Any, *args: Any, **how: Any) -> Any:
        self.given += [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def crossed(found: Mapping[str, Tensor], ids: Tensor, images: Sequence[int], image_id: int) -> dict[str, Tensor]:
    """Which tokens look at which image's tiles, for images beside the sequence instead of in it (Llama 3.2 Vision).

    The mask for ids (batch, length), made anew for each batch by transformers' own rule. found: tensors of the images;
    images: how many each row has.

    UsageError for rows with different numbers of images: in transformers' model the tokens before an image look at all
    images of the batch, padding included, so that a row would get other logits in a batch than alone.
    """
    if len(set(images)) > 1:
        raise UsageError(
            f"the model takes images by {CROSSED}, and rows with {min(images)} and {max(images)} images in one batch "
            "would change each other: use a batch size of 1, or rows with equally many images"
        )
    tiles = found["aspect_ratio_mask"]
    looking = [get_cross_attention_token_mask(row, image_id) for row in ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(
        looking, tiles.sum(-1).tolist(), max_num_tiles=tiles.shape[-1], length=ids.shape[1]
    )
    return {CROSSED: torch.from_numpy(mask)}
