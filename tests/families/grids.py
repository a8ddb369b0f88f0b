"""Other families whose image tokens follow the picture's own shape: VideoLLaMA 3, PaddleOCR-VL."""

from __future__ import annotations

from tiny_vision import QWEN_SPECIALS
from transformers import (
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from families.parts import (
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
