"""Qwen3-VL and those after it: packed patches merged two by two, positions in three directions."""

from __future__ import annotations

from tiny_vision import QWEN_SPECIALS, QWEN_TEMPLATE, qwen_ids
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from families.parts import GRID_TOWER, MROPE, Parts, family, text_sizes, tokenizer_with

TOWER = {**GRID_TOWER, "patch_size": 16, "num_position_embeddings": 64}
DEEP_TOWER = {**TOWER, "depth": 3, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
}


def parts() -> tuple[PreTrainedTokenizerFast, Qwen3VLProcessor]:
    tokenizer = tokenizer_with(*QWEN_SPECIALS, end="<|im_end|>")
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 16384})
    return tokenizer, Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE)


@family
def qwen3_vl() -> Parts:
    """Features of early vision layers are added to the language model's (deepstack)."""
    tokenizer, processor = parts()
    text = {**text_sizes(tokenizer), "head_dim": 8, "rope_parameters": MROPE}
    config = Qwen3VLConfig(text_config=text, vision_config=dict(DEEP_TOWER), **qwen_ids(tokenizer))
    return Parts(Qwen3VLForConditionalGeneration, config, processor)


@family
def qwen3_vl_moe() -> Parts:
    tokenizer, processor = parts()
    text = {**text_sizes(tokenizer), "head_dim": 8, "rope_parameters": MROPE, **EXPERTS}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=dict(DEEP_TOWER), **qwen_ids(tokenizer))
    return Parts(Qwen3VLMoeForConditionalGeneration, config, processor)


@family
def qwen3_5() -> Parts:
    """Linear attention in most layers: padding must not enter its state."""
    tokenizer, processor = parts()
    text = {**text_sizes(tokenizer), **HYBRID}
    config = Qwen3_5Config(text_config=text, vision_config=dict(TOWER), **qwen_ids(tokenizer))
    return Parts(Qwen3_5ForConditionalGeneration, config, processor)


@family
def qwen3_5_moe() -> Parts:
    tokenizer, processor = parts()
    text = {**text_sizes(tokenizer), **HYBRID, **EXPERTS, "shared_expert_intermediate_size": 16}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=dict(TOWER), **qwen_ids(tokenizer))
    return Parts(Qwen3_5MoeForConditionalGeneration, config, processor)
