"""Gemma 3, Gemma 4 and PaliGemma: tokens of an image see each other in both directions."""

from __future__ import annotations

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from families.parts import NORMAL, SIGLIP, SQUARE, TOWER, Parts, family, ids_of, templated, text_sizes, tokenizer_with

TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
GEMMA4_TEMPLATE = templated(
    "<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n",
    "<turn|>\n",
    "<|turn>model\n",
    "<|image|>",
    "{{ bos_token }}",
)


@family
def gemma3() -> Parts:
    """The template writes `<start_of_image>`; the processor puts soft tokens between begin and end of an image."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tokenizer_with(*TURNS, *named.values(), end="<end_of_turn>", pad="<eos>", begin="<bos>", named=named)
    images = Gemma3ImageProcessor(size=SQUARE, **NORMAL)
    processor = Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4)
    config = Gemma3Config(
        text_config={**text_sizes(tokenizer), "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 64},
        vision_config=dict(TOWER),
        mm_tokens_per_image=4,
        **ids_of(
            tokenizer,
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
            image_token_index="<image_soft_token>",
        ),
    )
    return Parts(Gemma3ForConditionalGeneration, config, processor)


@family
def paligemma() -> Parts:
    """Released without a chat template: its prompts are images, begin token, text and a line break."""
    tokenizer = tokenizer_with(
        "<bos>", "<eos>", "<image>", end="<eos>", pad="<eos>", begin="<bos>", named={"image_token": "<image>"}
    )
    images = SiglipImageProcessor(size=SQUARE, **NORMAL)
    images.image_seq_length = 16
    config = PaliGemmaConfig(
        text_config={**text_sizes(tokenizer), "model_type": "gemma", "head_dim": 8},
        vision_config={**SIGLIP, "projection_dim": 32},
        projection_dim=32,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(PaliGemmaForConditionalGeneration, config, PaliGemmaProcessor(images, tokenizer))


@family
def gemma4() -> Parts:
    """Patches at their own places in a grid, pooled three by three; embeddings of each layer's own."""
    turns = ("<bos>", "<eos>", "<|turn>", "<turn|>")
    tokenizer = tokenizer_with(
        *turns, *GEMMA4.values(), "<|video|>", end="<turn|>", pad="<eos>", begin="<bos>", named=GEMMA4
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        Gemma4VideoProcessor(),
        chat_template=GEMMA4_TEMPLATE,
        image_seq_length=70,
    )
    text = {
        **text_sizes(tokenizer),
        "head_dim": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "vocab_size_per_layer_input": len(tokenizer),
        "hidden_size_per_layer_input": 8,
        "bos_token_id": 1,
    }
    tower = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    names = {f"{name}_id": token for name, token in GEMMA4.items() if name != "eoa_token"}
    config = Gemma4Config(
        text_config=text,
        vision_config={**tower, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        audio_config=None,
        **ids_of(tokenizer, **names, video_token_id="<|video|>", eoa_token_index="<audio|>"),
    )
    return Parts(Gemma4ForConditionalGeneration, config, processor)
