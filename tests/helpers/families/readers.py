"""Readers of documents, and others with a way of their own: LightOnOCR, GOT-OCR 2, Granite, Aria, Ovis, MiniCPM-V …"""

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
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    LlavaNextImageProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessor,
    Ovis2Processor,
    PixtralImageProcessor,
)

from families.llavas import PINPOINTS, PIXTRAL_TOWER
from families.parts import (
    NORMAL,
    PATCH,
    SIGLIP,
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
from families.qwens import HYBRID

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


@family
def granite4_vision() -> Parts:
    """Features of several vision layers, each gathered by a small transformer and added to a layer of the language
    model."""
    tokenizer = tokenizer_with(*TURNS, "<image>", end="<|im_end|>")
    processor = Granite4VisionProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMAL),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
        downsample_rate="2/4",
    )
    config = Granite4VisionConfig(
        text_config={**text_sizes(tokenizer), "num_hidden_layers": 4},
        vision_config={**SIGLIP, "hidden_size": 64},
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        projector_dropout=0.0,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[2, 3],
        image_seq_length=4,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(Granite4VisionForConditionalGeneration, config, processor)


@family
def minicpmv4_6() -> Parts:
    """Slices with names and a number for each image; linear attention."""
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    tokenizer = tokenizer_with(*TURNS, *named.values(), end="<|im_end|>", named=named)
    images = MiniCPMV4_6ImageProcessor(scale_resolution=64, patch_size=PATCH, max_slice_nums=4)
    processor = MiniCPMV4_6Processor(
        images, MiniCPMV4_6VideoProcessor(), tokenizer, chat_template=chatml("<|image_pad|>")
    )
    config = MiniCPMV4_6Config(
        text_config={"model_type": "qwen3_5_text", **text_sizes(tokenizer), **HYBRID},
        vision_config={**TOWER, "num_hidden_layers": 3, "image_size": 64},
        insert_layer_id=1,
        image_size=64,
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(MiniCPMV4_6ForConditionalGeneration, config, processor)


@family
def molmo2() -> Parts:
    """Its processor puts a begin token before every prompt."""
    image = {
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    more = ("<|image|>", "<|video|>", "<im_col>", "<im_low>")
    tokenizer = tokenizer_with(*TURNS, *more, *image.values(), end="<|im_end|>", begin="<|im_end|>")
    processor = Molmo2Processor(
        Molmo2ImageProcessor(size=SQUARE, patch_size=PATCH, max_crops=4, overlap_margins=[0, 0], **NORMAL),
        Molmo2VideoProcessor(),
        tokenizer,
        chat_template=chatml("<|image|>"),
        use_single_crop_col_tokens=False,
        use_single_crop_start_token=True,
    )
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Molmo2Config(
        text_config={**text_sizes(tokenizer), "head_dim": 8, "additional_vocab_size": 8},
        vision_config={**TOWER, **heads, "image_size": [32, 32], "initializer_range": 0.05},
        adapter_config={
            **heads,
            "initializer_range": 0.05,
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "intermediate_size": 48,
            "text_hidden_size": 32,
        },
        **ids_of(tokenizer, **image),
    )
    return Parts(Molmo2ForConditionalGeneration, config, processor)
