"""Families that cut a picture into square tiles, each with the same number of tokens, and cross-attention (mllama)."""

from __future__ import annotations

from tiny_vision import SMOLVLM_TEMPLATE
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4ImageProcessor,
    Llama4Processor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
)

from families.parts import (
    NORMAL,
    PATCH,
    ROPE,
    SIDE,
    SIGLIP,
    SQUARE,
    TOWER,
    Parts,
    chatml,
    cut_as_llama3,
    family,
    ids_of,
    templated,
    text_sizes,
    tokenizer_with,
)

COHERE = ("<BOS>", "<|im_start|>", "<|im_end|>", "<image>")
COHERE_IMAGE = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
    "image_break_token": "<|IMG_LINE_BREAK|>",
}
MLLAMA_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
LLAMA3_TEMPLATE = templated(
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|image|>",
    "{{ bos_token }}",
)


def cropped(**more: int) -> GotOcr2ImageProcessor:
    return GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, crop_to_patches=True, **NORMAL, **more)


@family
def internvl() -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", *named.values(), end="<|im_end|>", named=named)
    processor = InternVLProcessor(
        cropped(),
        tokenizer,
        InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config={**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        image_seq_length=4,
        **ids_of(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return Parts(InternVLForConditionalGeneration, config, processor)


@family
def aya_vision() -> Parts:
    tokenizer = tokenizer_with(*COHERE, *list(COHERE_IMAGE.values())[:4], end="<|im_end|>", begin="<BOS>")
    processor = AyaVisionProcessor(
        cropped(), tokenizer, patch_size=16, img_size=SIDE, downsample_factor=2, chat_template=chatml("<image>")
    )
    processor.patch_size = 16
    config = AyaVisionConfig(
        text_config={"model_type": "cohere2", **text_sizes(tokenizer), "head_dim": 8},
        vision_config=dict(SIGLIP),
        downsample_factor=2,
        vision_feature_layer=-1,
        **ids_of(tokenizer, image_token_index="<|IMG_PATCH|>"),
    )
    return Parts(AyaVisionForConditionalGeneration, config, processor)


@family
def cohere2_vision() -> Parts:
    """A tile has as many tokens as the patch size squared: the released sizes (512, 16, 2) make both 256; ours 16."""
    tokenizer = tokenizer_with(
        *COHERE, *list(COHERE_IMAGE.values())[:4], end="<|im_end|>", begin="<BOS>", named=COHERE_IMAGE
    )
    images = Cohere2VisionImageProcessor(
        size=SQUARE, min_patches=1, max_patches=4, patch_size=4, downsample_factor=2, **NORMAL
    )
    processor = Cohere2VisionProcessor(images, tokenizer, chat_template=chatml("<|IMG_PATCH|>"))
    config = Cohere2VisionConfig(
        text_config={"model_type": "cohere2", **text_sizes(tokenizer), "head_dim": 8},
        vision_config={**SIGLIP, "patch_size": 4},
        downsample_factor=2,
        alignment_intermediate_size=64,
        **ids_of(tokenizer, image_token_id="<|IMG_PATCH|>"),
    )
    return Parts(Cohere2VisionForConditionalGeneration, config, processor)


@family
def lfm2_vl() -> Parts:
    """Tiles named by row and column, a thumbnail behind them; small pictures keep their own shape."""
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    tiles = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = tokenizer_with(
        "<|startoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *tiles,
        end="<|im_end|>", begin="<|startoftext|>", named=named,
    )  # fmt: skip
    images = Lfm2VlImageProcessor(
        tile_size=64,
        encoder_patch_size=PATCH,
        min_image_tokens=4,
        max_image_tokens=16,
        min_tiles=2,
        max_tiles=4,
        downsample_factor=2,
        max_num_patches=64,
        **NORMAL,
    )
    processor = Lfm2VlProcessor(images, tokenizer, chat_template=chatml("<image>", "{{ bos_token }}"))
    tower = {name: value for name, value in TOWER.items() if name != "image_size"}
    config = Lfm2VlConfig(
        text_config={
            **text_sizes(tokenizer),
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        vision_config={**tower, "num_patches": 64},
        projector_hidden_size=32,
        downsample_factor=2,
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    return Parts(Lfm2VlForConditionalGeneration, config, processor)


@family
def llama4() -> Parts:
    """Tiles with separators, then the whole picture; experts in the language model."""
    image = {"image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"}
    turns = ("<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>")
    separators = ("<|tile_x_separator|>", "<|tile_y_separator|>")
    specials = (*turns, "<|image|>", *image.values(), *separators)
    tokenizer = cut_as_llama3(tokenizer_with(*specials, end="<|eot|>", begin="<|begin_of_text|>"))
    images = Llama4ImageProcessor(size=SQUARE, max_patches=4, **NORMAL)
    template = templated(
        "<|header_start|>{{ m['role'] }}<|header_end|>\n\n",
        "<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
        "<|image|>",
        "{{ bos_token }}",
    )
    processor = Llama4Processor(images, tokenizer, patch_size=PATCH, pixel_shuffle_ratio=0.5, chat_template=template)
    config = Llama4Config(
        text_config={
            **text_sizes(tokenizer),
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "head_dim": 8,
            "moe_layers": [1],
        },
        vision_config={
            **TOWER,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        **ids_of(tokenizer, **image),
    )
    return Parts(Llama4ForConditionalGeneration, config, processor)


@family
def mllama() -> Parts:
    """One token an image; what it shows comes by cross-attention."""
    turns = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    specials = (*turns, "<|image|>", "<|python_tag|>")
    tokenizer = cut_as_llama3(tokenizer_with(*specials, end="<|eot_id|>", begin="<|begin_of_text|>"))
    images = MllamaImageProcessor(size=SQUARE, max_image_tiles=4, **NORMAL)
    config = MllamaConfig(
        text_config={
            **text_sizes(tokenizer),
            "bos_token_id": 1,
            "cross_attention_layers": [1],
            "num_hidden_layers": 3,
            "rope_parameters": ROPE,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
            "supported_aspect_ratios": MLLAMA_RATIOS,
        },
        **ids_of(tokenizer, image_token_index="<|image|>"),
    )
    return Parts(
        MllamaForConditionalGeneration, config, MllamaProcessor(images, tokenizer, chat_template=LLAMA3_TEMPLATE)
    )


@family
def idefics2() -> Parts:
    """Pictures of their own shape, padded in a batch, read by a perceiver."""
    specials = ("<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    tokenizer = tokenizer_with(*specials, end="<end_of_utterance>", begin="<s>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 64}, do_image_splitting=False, **NORMAL)
    template = SMOLVLM_TEMPLATE.replace("<|im_start|>", "")
    config = Idefics2Config(
        text_config={"model_type": "mistral", **text_sizes(tokenizer), "head_dim": 8},
        vision_config={**TOWER, "image_size": 64},
        perceiver_config={
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
            "hidden_size": 32,
        },
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return Parts(Idefics2ForConditionalGeneration, config, processor)
