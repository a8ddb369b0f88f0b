"""Families of LLaVA's form: a CLIP or SigLIP or Pixtral tower, a projector, a language model."""

from __future__ import annotations

from typing import Any

from tiny_vision import LLAVA_TEMPLATE
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from families.parts import (
    CLIP,
    NORMAL,
    PATCH,
    SIGLIP,
    SQUARE,
    Parts,
    chatml,
    family,
    ids_of,
    text_sizes,
    tokenizer_with,
)

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}</s>{% else %}[INST]"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "[/INST]{% endif %}{% endfor %}"
)
PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": PATCH,
    "head_dim": 16,
}


def vicuna(*more: str) -> PreTrainedTokenizerFast:
    return tokenizer_with("<s>", "</s>", "<image>", *more, end="</s>", begin="<s>")


@family
def vipllava() -> Parts:
    """Features of several vision layers, side by side."""
    tokenizer = vicuna()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, **NORMAL),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = VipLlavaConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=dict(CLIP),
        vision_feature_layers=(-2, -1, 1),
        image_seq_length=16,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(VipLlavaForConditionalGeneration, config, processor)


@family
def video_llava() -> Parts:
    """Its pictures only; a second tower is for films."""
    tokenizer = vicuna("<video>")
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, **NORMAL),
        VideoLlavaVideoProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
    )
    config = VideoLlavaConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=dict(CLIP),
        image_seq_length=16,
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(VideoLlavaForConditionalGeneration, config, processor)


@family
def llava_next_video() -> Parts:
    """Its pictures only."""
    tokenizer = vicuna("<video>")
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMAL),
        tokenizer,
        chat_template=LLAVA_TEMPLATE,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=dict(CLIP),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(LlavaNextVideoForConditionalGeneration, config, processor)


@family
def llava_onevision() -> Parts:
    """Tiles by aspect ratio with a line break after each row of features; several pictures in a row are not tiled."""
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", "<image>", "<video>", end="<|im_end|>")
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMAL),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer)},
        vision_config={**SIGLIP, "vision_use_head": False},
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(LlavaOnevisionForConditionalGeneration, config, processor)


@family
def llava_next() -> Parts:
    """Tiles by aspect ratio."""
    tokenizer = tokenizer_with("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", end="<|im_end|>", begin="<s>")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMAL),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>"),
    )
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=dict(CLIP),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(LlavaNextForConditionalGeneration, config, processor)


def pixtral_parts(merge: int) -> tuple[PreTrainedTokenizerFast, PixtralProcessor]:
    tokenizer = tokenizer_with(
        "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", end="</s>", begin="<s>"
    )
    images = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": PATCH, "width": PATCH}, **NORMAL)
    processor = PixtralProcessor(
        images, tokenizer, patch_size=PATCH, spatial_merge_size=merge, chat_template=MISTRAL_TEMPLATE
    )
    return tokenizer, processor


def mistral_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"model_type": "mistral", **text_sizes(tokenizer), "head_dim": 8}


@family
def mistral3() -> Parts:
    """Rows of patches with a break token after each; patches merged two by two."""
    tokenizer, processor = pixtral_parts(merge=2)
    config = Mistral3Config(
        text_config=mistral_text(tokenizer),
        vision_config=dict(PIXTRAL_TOWER),
        spatial_merge_size=2,
        **ids_of(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(Mistral3ForConditionalGeneration, config, processor)


@family
def pixtral() -> Parts:
    """A LLaVA config with a Pixtral tower: `model_type` is llava."""
    tokenizer, processor = pixtral_parts(merge=1)
    config = LlavaConfig(
        text_config=mistral_text(tokenizer),
        vision_config=dict(PIXTRAL_TOWER),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **ids_of(tokenizer, image_token_id="[IMG]"),
    )
    return Parts(LlavaForConditionalGeneration, config, processor)
