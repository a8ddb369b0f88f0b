"""Readers of documents, and others with a tower of their own: LightOnOCR, GOT-OCR 2, Aria, Ovis 2."""

from __future__ import annotations

from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaImageProcessor,
    AriaProcessor,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessor,
    Ovis2Processor,
    PixtralImageProcessor,
)

from families.llavas import PIXTRAL_TOWER
from families.parts import (
    NORMAL,
    PATCH,
    SQUARE,
    TOWER,
    Parts,
    chatml,
    family,
    ids_of,
    sam_tower,
    text_sizes,
    tokenizer_with,
)

TURNS = ("<|im_start|>", "<|im_end|>")
OVIS = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


@family
def lighton_ocr() -> Parts:
    """Pixtral's tower without its break tokens."""
    named = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = tokenizer_with(*TURNS, *named.values(), end="<|im_end|>", named=named)
    images = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16}, **NORMAL)
    processor = LightOnOcrProcessor(
        images, tokenizer, patch_size=PATCH, spatial_merge_size=2, chat_template=chatml("<|image_pad|>")
    )
    config = LightOnOcrConfig(
        text_config={"model_type": "qwen3", **text_sizes(tokenizer), "head_dim": 8},
        vision_config=dict(PIXTRAL_TOWER),
        spatial_merge_size=2,
        **ids_of(tokenizer, image_token_id="<|image_pad|>"),
    )
    return Parts(LightOnOcrForConditionalGeneration, config, processor)


@family
def got_ocr2() -> Parts:
    tokenizer = tokenizer_with(*TURNS, "<img>", "</img>", "<imgpad>", end="<|im_end|>")
    images = GotOcr2ImageProcessor(size={"height": 128, "width": 128}, **NORMAL)
    processor = GotOcr2Processor(images, tokenizer, chat_template=chatml("<img><imgpad></img>\n"))
    config = GotOcr2Config(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config=sam_tower(128, 16),
        image_seq_length=4,
        **ids_of(tokenizer, image_token_index="<imgpad>"),
    )
    return Parts(GotOcr2ForConditionalGeneration, config, processor)


@family
def aria() -> Parts:
    """Its processor knows pictures of 980 pixels only, so patches are large here."""
    tokenizer = tokenizer_with(*TURNS, "<|img|>", end="<|im_end|>", named={"image_token": "<|img|>"})
    processor = AriaProcessor(
        AriaImageProcessor(max_image_size=980, min_image_size=336, **NORMAL),
        tokenizer,
        chat_template=chatml("<fim_prefix><|img|><fim_suffix>"),
        size_conversion={980: 4},
    )
    config = AriaConfig(
        text_config={**text_sizes(tokenizer), "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
        vision_config={"model_type": "idefics3_vision", **TOWER, "image_size": 980, "patch_size": 140},
        projector_patch_to_query_dict={49: 4},
        **ids_of(tokenizer, image_token_index="<|img|>"),
    )
    return Parts(AriaForConditionalGeneration, config, processor)


@family
def ovis2() -> Parts:
    """Image features are mixtures of a visual vocabulary's embeddings; indicator tokens part the tiles."""
    tokenizer = tokenizer_with(*TURNS, "<image>", *OVIS, end="<|im_end|>")
    images = Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4, **NORMAL)
    processor = Ovis2Processor(images, tokenizer, chat_template=chatml("<image>\n"), image_seq_length=16)
    atom, *indicators = tokenizer.convert_tokens_to_ids(list(OVIS))
    config = Ovis2Config(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config={**TOWER, "vocab_size": 32},
        image_token_id=atom,
        visual_indicator_token_ids=indicators,
        vocab_size=len(tokenizer),
        hidden_size=32,
    )
    return Parts(Ovis2ForConditionalGeneration, config, processor)
