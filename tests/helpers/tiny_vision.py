"""Tiny vision-language models of the real architectures with processors, made on the spot; no network.

`tiny_qwen25vl(folder)` saves model, processor and chat template in `folder` and returns it. The templates say the same
as the released models' own, so that prompts have the form of the family.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tiny import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

VISION_TEXTS = (*TEXTS, "What colour is the round thing left of the square?", "It is red.", "Two: a dog and a cat.\n\n")
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['role'] | upper + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SMOLVLM_SPECIALS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *TILES,
)
HALF = [0.5, 0.5, 0.5]


def drawn_image(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture of three coloured shapes, (width, height) as given."""
    generator = random.Random(seed)
    image = Image.new("RGB", size, (20, 40, 60))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = generator.randrange(size[0] * 3 // 4), generator.randrange(size[1] * 3 // 4)
        colour = tuple(generator.randrange(256) for _ in range(3))
        shape = generator.choice([pen.ellipse, pen.rectangle])
        shape([left, top, left + size[0] // 4, top + size[1] // 4], fill=colour)
    return image


def special_tokenizer(
    specials: Sequence[str], *, end: str, pad: str, bos: str | None = None, vocab_size: int = 512
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the spot; the specials have the first ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(VISION_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=pad, unk_token="<unk>", bos_token=bos)


def saved(folder: Path, model_class: Any, config: Any, processor: ProcessorMixin, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
    spread(model)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def spread(model: PreTrainedModel, scale: float = 4.0) -> None:
    """Weights wide enough that pictures and words show in the logits; the usual 0.02 would hide a wrong one. Gates,
    projections and queries that are all alike in a new model are drawn."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            alike = not parameter.any() or (parameter.dim() > 1 and bool((parameter == parameter.flatten()[0]).all()))
            if alike and not name.endswith("bias"):
                parameter.normal_(std=0.5, generator=generator)


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen_parts(**pixels: int) -> tuple[PreTrainedTokenizerFast, Any, Any]:
    tokenizer = special_tokenizer(QWEN_SPECIALS, end="<|im_end|>", pad="<|im_end|>")
    limits = {"min_pixels": 28 * 28, "max_pixels": 56 * 112, **pixels}
    return tokenizer, Qwen2VLImageProcessor(**limits), Qwen2VLVideoProcessor()


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids(list(QWEN_SPECIALS))
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, ids[2:], strict=True))


def tiny_qwen25vl(folder: Path, *, seed: int = 0, **text: Any) -> Path:
    tokenizer, images, videos = qwen_parts()
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**text_sizes(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False, **text},
        vision_config=vision,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **qwen_ids(tokenizer),
    )
    return saved(folder, Qwen2_5_VLForConditionalGeneration, config, processor, seed)


def tiny_qwen2vl(folder: Path, *, seed: int = 0, **text: Any) -> Path:
    tokenizer, images, videos = qwen_parts()
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**text_sizes(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False, **text},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=False,
        **qwen_ids(tokenizer),
    )
    return saved(folder, Qwen2VLForConditionalGeneration, config, processor, seed)


def smolvlm_tokenizer() -> PreTrainedTokenizerFast:
    return special_tokenizer(SMOLVLM_SPECIALS, end="<end_of_utterance>", pad="<|im_start|>", bos="<|im_start|>")


def smolvlm_sizes(tokenizer: PreTrainedTokenizerFast, **text: Any) -> dict[str, Any]:
    """Tiles of 32 pixels, patches of 8, shuffled by 2: 4 tokens a tile."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return {
        "text_config": {"model_type": "llama", **text_sizes(tokenizer), "tie_word_embeddings": False, **text},
        "vision_config": vision,
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def tile_sizes(longest_edge: int) -> dict[str, Any]:
    return {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": 32}}


def tiny_smolvlm(folder: Path, *, seed: int = 0, longest_edge: int = 64, **text: Any) -> Path:
    """`longest_edge` 32: no tiles, only the whole image."""
    tokenizer = smolvlm_tokenizer()
    means = {"image_mean": HALF, "image_std": HALF}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**tile_sizes(longest_edge), **means),
        tokenizer,
        SmolVLMVideoProcessor(**tile_sizes(longest_edge), **means),
        image_seq_len=4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    config = SmolVLMConfig(**smolvlm_sizes(tokenizer, **text))
    return saved(folder, SmolVLMForConditionalGeneration, config, processor, seed)


def tiny_idefics3(folder: Path, *, seed: int = 0, longest_edge: int = 64, **text: Any) -> Path:
    tokenizer = smolvlm_tokenizer()
    images = Idefics3ImageProcessor(**tile_sizes(longest_edge), image_mean=HALF, image_std=HALF)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    config = Idefics3Config(**smolvlm_sizes(tokenizer, **text))
    return saved(folder, Idefics3ForConditionalGeneration, config, processor, seed)


def tiny_llava(folder: Path, *, seed: int = 0, **text: Any) -> Path:
    """A CLIP tower of 32 pixels with patches of 8: 16 tokens an image."""
    tokenizer = special_tokenizer(["<s>", "</s>", "<image>"], end="</s>", pad="</s>", bos="<s>")
    images = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=HALF, image_std=HALF
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text_sizes(tokenizer), **text},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return saved(folder, LlavaForConditionalGeneration, config, processor, seed)


FAMILIES = {
    "qwen25vl": tiny_qwen25vl,
    "qwen2vl": tiny_qwen2vl,
    "smolvlm": tiny_smolvlm,
    "idefics3": tiny_idefics3,
    "llava": tiny_llava,
}
