"""GLM-4V and those after it: begin and end tokens around an image's, merged patches."""

from __future__ import annotations

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from families.parts import GRID_TOWER, MROPE, Parts, chatml, family, ids_of, text_sizes, tokenizer_with

IMAGE = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
SIZE = {"shortest_edge": 784, "longest_edge": 56 * 112 * 2}
TEMPLATE = chatml("<|begin_of_image|><|image|><|end_of_image|>")
TOWER = {**GRID_TOWER, "image_size": 56, "patch_size": 14}


def made_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with("<|im_start|>", "<|im_end|>", *IMAGE.values(), end="<|im_end|>")


def processor_4(tokenizer: PreTrainedTokenizerFast) -> Glm4vProcessor:
    return Glm4vProcessor(Glm4vImageProcessor(size=SIZE), tokenizer, Glm4vVideoProcessor(), chat_template=TEMPLATE)


def processor_46(tokenizer: PreTrainedTokenizerFast) -> Glm46VProcessor:
    return Glm46VProcessor(Glm46VImageProcessor(size=SIZE), tokenizer, Glm46VVideoProcessor(), chat_template=TEMPLATE)


@family
def glm4v() -> Parts:
    tokenizer = made_tokenizer()
    text = {**text_sizes(tokenizer), "rope_parameters": MROPE}
    config = Glm4vConfig(text_config=text, vision_config=dict(TOWER), **ids_of(tokenizer, **IMAGE))
    return Parts(Glm4vForConditionalGeneration, config, processor_4(tokenizer))


@family
def glm4v_moe() -> Parts:
    """Experts behind a first layer without."""
    tokenizer = made_tokenizer()
    text = {
        **text_sizes(tokenizer),
        "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    config = Glm4vMoeConfig(text_config=text, vision_config=dict(TOWER), **ids_of(tokenizer, **IMAGE))
    return Parts(Glm4vMoeForConditionalGeneration, config, processor_4(tokenizer))


@family
def glm46v() -> Parts:
    tokenizer = made_tokenizer()
    config = Glm46VConfig(
        text_config={"model_type": "glm4v_text", **text_sizes(tokenizer), "rope_parameters": MROPE},
        vision_config={"model_type": "glm4v_vision", **TOWER},
        **ids_of(tokenizer, **IMAGE),
    )
    return Parts(Glm46VForConditionalGeneration, config, processor_46(tokenizer))


@family
def glm_ocr() -> Parts:
    tokenizer = made_tokenizer()
    text = {**text_sizes(tokenizer), "rope_parameters": MROPE, "head_dim": 8}
    config = GlmOcrConfig(text_config=text, vision_config=dict(TOWER), **ids_of(tokenizer, **IMAGE))
    return Parts(GlmOcrForConditionalGeneration, config, processor_46(tokenizer))
