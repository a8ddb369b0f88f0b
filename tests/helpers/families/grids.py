"""Other families whose image tokens follow the picture's own shape: VideoLLaMA 3, PaddleOCR-VL, EXAONE, Kimi …"""

from __future__ import annotations

from tiny_vision import QWEN_SPECIALS, QWEN_TEMPLATE, qwen_ids
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Processor,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLImageProcessor,
    HunYuanVLProcessor,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from families.parts import (
    GRID_TOWER,
    MROPE,
    PATCH,
    TOWER,
    Parts,
    chatml,
    family,
    ids_of,
    spoken,
    text_sizes,
    tokenizer_with,
)


@family
def video_llama_3() -> Parts:
    tokenizer = tokenizer_with(*QWEN_SPECIALS, end="<|im_end|>")
    images = VideoLlama3ImageProcessor(patch_size=PATCH, min_pixels=256, max_pixels=4096)
    processor = VideoLlama3Processor(
        images, tokenizer, VideoLlama3VideoProcessor(), chat_template=chatml("<|image_pad|>\n")
    )
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config={name: value for name, value in TOWER.items() if name != "image_size"},
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(VideoLlama3ForConditionalGeneration, config, processor)


@family
def paddleocr_vl() -> Parts:
    image = "<|IMAGE_PLACEHOLDER|>"
    tokenizer = tokenizer_with(
        "<s>", "</s>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>", image,
        end="</s>", begin="<s>", named={"image_token": image},
    )  # fmt: skip
    images = PaddleOCRVLImageProcessor(patch_size=14, min_pixels=28 * 28, max_pixels=56 * 112)
    template = spoken(f"<|IMAGE_START|>{image}<|IMAGE_END|>", "</s>", "\n", "{{ bos_token }}")
    config = PaddleOCRVLConfig(
        text_config={**text_sizes(tokenizer), "head_dim": 8, "rope_parameters": MROPE},
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        **ids_of(
            tokenizer,
            image_token_id=image,
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|IMAGE_START|>",
            vision_end_token_id="<|IMAGE_END|>",
        ),
    )
    return Parts(
        PaddleOCRVLForConditionalGeneration, config, PaddleOCRVLProcessor(images, tokenizer, chat_template=template)
    )


ERNIE = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}


@family
def ernie4_5_vl_moe() -> Parts:
    """Experts of their own for image tokens, which the processor marks."""
    tokenizer = tokenizer_with("<s>", "</s>", *ERNIE.values(), end="</s>", begin="<s>", named=ERNIE)
    processor = Ernie4_5_VLMoeProcessor(
        Ernie4_5_VLMoeImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 112}),
        tokenizer,
        Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
        chat_template=spoken("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "</s>", "\n", "{{ bos_token }}"),
    )
    experts = {"moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    config = Ernie4_5_VLMoeConfig(
        text_config={**text_sizes(tokenizer), "rope_parameters": MROPE, **experts},
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
        **ids_of(tokenizer, **{f"{name}_id": token for name, token in ERNIE.items()}),
    )
    return Parts(Ernie4_5_VLMoeForConditionalGeneration, config, processor)


@family
def exaone4_5() -> Parts:
    tokenizer = tokenizer_with(*QWEN_SPECIALS, end="<|im_end|>")
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 112)
    processor = Exaone4_5_Processor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE)
    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    windows = {"window_size": 112, "fullatt_block_indexes": [1], "num_key_value_heads": 1}
    config = Exaone4_5_Config(
        text_config={"model_type": "exaone4", **text_sizes(tokenizer), "head_dim": 8, **layers},
        vision_config={**GRID_TOWER, "depth": 3, **windows},
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(Exaone4_5_ForConditionalGeneration, config, processor)


@family
def lfm3_vl() -> Parts:
    tokenizer = tokenizer_with(*QWEN_SPECIALS, end="<|im_end|>")
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 1024, "longest_edge": 16384})
    processor = Lfm3VlProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE)
    layers = {"layer_types": ["conv", "full_attention"]}
    tower = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    config = Lfm3VlConfig(
        text_config={"model_type": "lfm3", **text_sizes(tokenizer), **layers},
        vision_config={**tower, "num_key_value_heads": 1, **layers},
        projector_hidden_size=32,
        **qwen_ids(tokenizer),
    )
    return Parts(Lfm3VlForConditionalGeneration, config, processor)


@family
def kimi_k25() -> Parts:
    """DeepSeek's language model: latent attention and experts."""
    named = {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}
    media = ("<|media_begin|>", "<|media_content|>", "<|media_end|>")
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", *media, *named.values(), end="<|im_end|>", named=named)
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(size={"max_height": 56, "max_width": 56}, max_patches=64),
        tokenizer,
        Kimi_K25VideoProcessor(),
        chat_template=chatml("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"),
    )
    text = {
        "model_type": "deepseek_v3",
        **text_sizes(tokenizer),
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    tower = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    config = Kimi_K25Config(
        text_config=text,
        vision_config={**tower, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        **ids_of(
            tokenizer,
            image_token_id=named["image_token"],
            video_token_id=named["video_token"],
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
    )
    return Parts(Kimi_K25ForConditionalGeneration, config, processor)


@family
def hunyuan_vl() -> Parts:
    """Its processor takes an image token only between the tokens of begin and end."""
    named = {"image_token": "<img>", "image_start_token": "<im_start>", "image_end_token": "<im_end>"}
    tokenizer = tokenizer_with("<bos>", "<eos>", *named.values(), end="<eos>", begin="<bos>", named=named)
    template = spoken("<im_start><img><im_end>", "<eos>", "\n", "{{ bos_token }}")
    images = HunYuanVLImageProcessor(min_pixels=32 * 32, max_pixels=64 * 128)
    tower = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    sizes = {"out_hidden_size": 32, "max_image_size": 128, "min_image_size": 32, "img_max_token_num": 64}
    config = HunYuanVLConfig(
        text_config={**text_sizes(tokenizer), "head_dim": 8, "rope_parameters": {**MROPE, "mrope_section": [1] * 4}},
        vision_config={**tower, **sizes},
        **ids_of(
            tokenizer, image_token_id="<img>", im_start_id="<im_start>", im_end_id="<im_end>", im_newline_id="<img>"
        ),
    )
    return Parts(HunYuanVLForConditionalGeneration, config, HunYuanVLProcessor(images, tokenizer, template))
