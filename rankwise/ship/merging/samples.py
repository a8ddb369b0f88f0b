"""What a merged model is compared on: prompts of a data set, else random tokens, and random pictures where the adapter
changes how a model sees.

prompt_batch(renderer, examples)    the prompts, images included, as training rendered them
text_batch(model)                   (4, 32) ordinary tokens
image_batch(model, folder)          two rows: a picture's tokens as the family's processor makes them, then 32 tokens
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rankwise.data.dataset import pad, seen
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.models.load import load_processor

SEQUENCES, PICTURES, TOKENS, SEED = 4, 2, 32, 0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    """Pictures of noise, one for each number; they stand where a reader of files does."""

    width: int = 64
    height: int = 48

    def size(self, reference: str) -> tuple[int, int]:
        return self.width, self.height

    def open(self, reference: str) -> Image.Image:
        pixels = np.random.default_rng(int(reference)).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def prompt_batch(renderer: Renderer, examples: Sequence[Example]) -> Batch:
    """Prompts as one batch (rows, length), padded on the right."""
    rows = [renderer.prompt(example) for example in examples]
    width = max(len(row.input_ids) for row in rows)
    ids = pad([row.input_ids for row in rows], width, renderer.tokenizer.pad_token_id or 0)
    mask = pad([[1] * len(row.input_ids) for row in rows], width, 0)
    return {"input_ids": ids, "attention_mask": mask} | seen(renderer.sight, ids, [row.images for row in rows])


def text_batch(model: Any, among: Collection[int] = ()) -> Batch:
    """Random ordinary tokens: none that stands for an image, padding, or a beginning or end. Every other one is one of
    `among`, where that is given."""
    ids = ordinary_tokens(model, SEQUENCES)
    if among:
        places = ids[:, ::2].numel()
        chosen = torch.tensor(list(among))[torch.arange(places) % len(among)]
        ids[:, ::2] = chosen.view_as(ids[:, ::2])
    return for_decoder(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def for_decoder(model: Any, batch: Batch) -> Batch:
    """The same tokens for the decoder, where there is one of its own."""
    return batch | ({"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {})


def image_batch(model: Any, folder: str) -> Batch:
    """Rows of a picture and text. DataError where the folder holds no processor, which knows how to show a picture."""
    sight = Sight(load_processor(folder), Noise())  # type: ignore[arg-type]
    references = [str(number) for number in range(PICTURES)]
    encode = sight.processor.tokenizer
    shown = [encode(sight.expansions([one])[0], add_special_tokens=False)["input_ids"] for one in references]
    ids = torch.cat([torch.tensor(shown), ordinary_tokens(model, PICTURES)], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | sight.seen(ids, [[one] for one in references])


def ordinary_tokens(model: Any, rows: int) -> Tensor:
    """(rows, 32) token ids, fewer where the model has fewer positions."""
    config = model.config.get_text_config()
    special = {
        value
        for part in (model.config.to_dict(), config.to_dict())
        for name, value in part.items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    return ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)]
