"""A tiny Isaac with its processor, made on the spot; no network.

`tiny_isaac(folder)` saves model, processor and chat template in `folder` and returns it. Images of 64×32 pixels give
2 tokens, 64×64 give 4: the limits on patches are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_vision import saved, special_tokenizer, text_sizes
from transformers import PreTrainedTokenizerFast

import rankwise.models.isaac  # noqa: F401 - transformers learns the classes
from rankwise.models.isaac.configuration import IsaacConfig
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration
from rankwise.models.isaac.processing import IsaacImageProcessor, IsaacProcessor

ISAAC_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")
PATCHES = {"min_num_patches": 4, "max_num_patches": 64}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_patches": 16,
    "image_size": 64,
}


def isaac_tokenizer() -> PreTrainedTokenizerFast:
    return special_tokenizer(ISAAC_SPECIALS, end="<|im_end|>", pad="<|im_end|>")


def isaac_processor(**patches: int) -> IsaacProcessor:
    return IsaacProcessor(IsaacImageProcessor(**(PATCHES | patches)), isaac_tokenizer())


def isaac_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> IsaacConfig:
    sizes = text_sizes(tokenizer) | {
        "head_dim": 16,
        "rope_theta": 10000.0,
        "vision_config": VISION | changes.pop("vision_config", {}),
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vision_min_num_patches": PATCHES["min_num_patches"],
        "vision_max_num_patches": PATCHES["max_num_patches"],
        "max_sequence_length": 1024,
        "tie_word_embeddings": False,
    }
    return IsaacConfig(**(sizes | changes))


def tiny_isaac(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """`changes` go to the config."""
    processor = isaac_processor()
    config = isaac_config(processor.tokenizer, **changes)
    return saved(folder, IsaacForConditionalGeneration, config, processor, seed)
