"""What the vision benchmarks share: Qwen2.5-VL with random weights in several sizes, its processor with a tokenizer
trained on the spot, and conversations about pictures that are drawn here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rankwise.data.dataset import RenderedDataset
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.data.vision_inputs import Sight

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "a red green blue small large round square thing stands left right of above below and beside the other".split()
# name → (text hidden, layers, heads, key-value heads, MLP), (vision hidden, blocks, heads, MLP), vocabulary
SHAPES: dict[str, tuple[tuple[int, int, int, int, int], tuple[int, int, int, int], int]] = {
    "tiny": ((256, 4, 4, 2, 512), (256, 4, 4, 512), 2000),
    "small": ((512, 8, 8, 2, 1408), (512, 6, 8, 1024), 8000),
    "3b": ((2048, 36, 16, 2, 11008), (1280, 32, 16, 3420), 151936),
    "7b": ((3584, 28, 28, 4, 18944), (1280, 32, 16, 3420), 152064),
}


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS), *WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")


def processor(max_pixels: int) -> Qwen2_5_VLProcessor:
    words = tokenizer()
    words.chat_template = TEMPLATE
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=max_pixels)
    return Qwen2_5_VLProcessor(images, words, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def model(shape: str, device: torch.device, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights, drawn where they stay: billions of them on a CPU would take minutes."""
    text, vision, vocabulary = SHAPES[shape]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    eyes = ("hidden_size", "depth", "num_heads", "intermediate_size")
    ids = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}
    half = text[0] // text[2] // 2  # rotary half-frequencies of a head, shared out over time, height and width
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={
            **dict(zip(names, text, strict=True)),
            "vocab_size": vocabulary,
            "rope_parameters": rope,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        vision_config={**dict(zip(eyes, vision, strict=True)), "out_hidden_size": text[0]},
        tie_word_embeddings=shape == "3b",
        **ids,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def write_rows(folder: Path, count: int, sides: tuple[int, int], answer_words: int) -> Path:
    """`count` conversations of one picture each, sides between the two given, in LLaVA form."""
    generator = random.Random(0)
    rows = []
    for number in range(count):
        size = (generator.randint(*sides), generator.randint(*sides))
        drawn(generator, size).save(folder / f"{number}.jpg", quality=90)
        answer = " ".join(generator.choices(WORDS, k=generator.randint(answer_words // 2, answer_words)))
        turns = [{"from": "human", "value": "<image>\nWhat stands where?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns, "image": f"{number}.jpg"})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def drawn(generator: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.effect_noise(size, 40).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = generator.randrange(size[0] * 3 // 4), generator.randrange(size[1] * 3 // 4)
        colour = tuple(generator.randrange(256) for _ in range(3))
        generator.choice([pen.ellipse, pen.rectangle])([left, top, left + size[0] // 4, top + size[1] // 4], colour)
    return image


def renderer(folder: Path, max_pixels: int, depth: Any = None) -> Renderer:
    own = processor(max_pixels)
    sight = Sight(own, ImageReader(folder), depth)
    return Renderer(own.tokenizer, style="chat", max_length=8192, sight=sight)


def rows_of(path: Path, seeing: Renderer) -> RenderedDataset:
    return RenderedDataset(load("conversations", path).items, seeing)
