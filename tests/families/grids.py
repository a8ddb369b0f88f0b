"""Families whose image tokens follow the picture's own shape: grids of merged patches, packed without padding."""

from __future__ import annotations

from tiny_vision import QWEN_SPECIALS, QWEN_TEMPLATE, qwen_ids
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from families.parts import MROPE, Parts, chatml, family, ids_of, text_sizes, tokenizer_with

GLM_IMAGE = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GRID_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}


@family
def qwen3_vl() -> Parts:
    """Features of early vision layers are added to the language model's (deepstack)."""
    tokenizer = tokenizer_with(*QWEN_SPECIALS, end="<|im_end|>")
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 16384})
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE)
    config = Qwen3VLConfig(
        text_config={**text_sizes(tokenizer), "head_dim": 8, "rope_parameters": MROPE},
        vision_config={
            **GRID_TOWER,
            "depth": 3,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        **qwen_ids(tokenizer),
    )
    return Parts(Qwen3VLForConditionalGeneration, config, processor)


@family
def glm4v() -> Parts:
    """Begin and end tokens around an image's."""
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", *GLM_IMAGE.values(), end="<|im_end|>")
    processor = Glm4vProcessor(
        Glm4vImageProcessor(size={"shortest_edge": 784, "longest_edge": 56 * 112 * 2}),
        tokenizer,
        Glm4vVideoProcessor(),
        chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    config = Glm4vConfig(
        text_config={**text_sizes(tokenizer), "rope_parameters": MROPE},
        vision_config={**GRID_TOWER, "image_size": 56, "patch_size": 14},
        **ids_of(tokenizer, **GLM_IMAGE),
    )
    return Parts(Glm4vForConditionalGeneration, config, processor)
