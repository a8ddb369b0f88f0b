"""DeepSeek-VL, its hybrid with a second vision tower, and Janus, which also makes pictures."""

from __future__ import annotations

from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridImageProcessor,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    PreTrainedTokenizerFast,
)

from families.parts import (
    NORMAL,
    PATCH,
    SIDE,
    SIGLIP,
    SQUARE,
    Parts,
    family,
    ids_of,
    sam_tower,
    spoken,
    text_sizes,
    tokenizer_with,
)

IMAGE, TOKENS = "<image_placeholder>", 16
NAMED = {"image_token": IMAGE, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
TEMPLATE = spoken(IMAGE, "<|end|>", "\n\n", "<|begin|>")


def made_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with("<|begin|>", "<|end|>", *NAMED.values(), end="<|end|>", begin="<|begin|>", named=NAMED)


@family
def deepseek_vl() -> Parts:
    tokenizer = made_tokenizer()
    images = DeepseekVLImageProcessor(size=SQUARE, min_size=8, **NORMAL)
    processor = DeepseekVLProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=TOKENS)
    text = {"model_type": "llama", **text_sizes(tokenizer)}
    config = DeepseekVLConfig(text_config=text, vision_config=dict(SIGLIP), **ids_of(tokenizer, image_token_id=IMAGE))
    return Parts(DeepseekVLForConditionalGeneration, config, processor)


@family
def deepseek_vl_hybrid() -> Parts:
    """Two vision towers, for two sizes of the same picture."""
    tokenizer = made_tokenizer()
    images = DeepseekVLHybridImageProcessor(
        size=SQUARE, min_size=8, high_res_size={"height": 64, "width": 64}, **NORMAL
    )
    processor = DeepseekVLHybridProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=TOKENS)
    sam = {"model_type": "sam_vision_model", "num_pos_feats": 16}
    config = DeepseekVLHybridConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config=dict(SIGLIP),
        high_res_vision_config={**sam_tower(64, PATCH), **sam},
        **ids_of(tokenizer, image_token_id=IMAGE),
    )
    return Parts(DeepseekVLHybridForConditionalGeneration, config, processor)


@family
def janus() -> Parts:
    tokenizer = made_tokenizer()
    images = JanusImageProcessor(size=SQUARE, min_size=8, **NORMAL)
    processor = JanusProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=TOKENS)
    config = JanusConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "mlp_ratio": 2.0,
            "projection_dim": 32,
            "num_image_tokens": TOKENS,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_patches": 4,
        },
        **ids_of(tokenizer, image_token_id=IMAGE),
    )
    return Parts(JanusForConditionalGeneration, config, processor)
