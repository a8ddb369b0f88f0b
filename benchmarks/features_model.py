"""A model folder with the real vision tower's shape and random weights, so that features of the real size can be made.

    python benchmarks/features_model.py CONFIGS OUT [--depth 8] [--seed 0]

CONFIGS: a folder with Qwen2.5-VL's config.json and preprocessor_config.json. The tower keeps its widths (1280, out
2048) and its window and full attention, with fewer blocks; the language part is one small layer of the same width with
a vocabulary of bytes. Random weights: such features measure speed and shapes, and say nothing of real ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIALS = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDS = ("eos_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
TEXT = {"num_hidden_layers": 1, "intermediate_size": 2048, "layer_types": ["full_attention"]}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<|im_end|>{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIALS, *letters]
    bytes_only = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=SPECIALS[0], pad_token=SPECIALS[0])


def reduced(configs: Path, depth: int, vocabulary: int) -> object:
    """The config with `depth` blocks in the tower; full attention where it was, else in the last block."""
    config = AutoConfig.from_pretrained(configs)
    vision = config.vision_config
    vision.depth = depth
    vision.fullatt_block_indexes = [block for block in vision.fullatt_block_indexes if block < depth] or [depth - 1]
    for name, value in {**TEXT, "vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0}.items():
        setattr(config.text_config, name, value)
    for number, name in enumerate(IDS):
        setattr(config, name, number)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.dtype = "float32"
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokenizer = byte_tokenizer()
    torch.manual_seed(given.seed)
    model = Qwen2_5_VLForConditionalGeneration(reduced(given.configs, given.depth, len(tokenizer)))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(given.out)
    images = AutoImageProcessor.from_pretrained(given.configs)
    videos = Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(given.out)
    count = sum(parameter.numel() for parameter in model.model.visual.parameters())
    print(f"{given.out}: a tower of {given.depth} blocks, {count / 1e6:,.0f} million weights, random")


if __name__ == "__main__":
    main()
