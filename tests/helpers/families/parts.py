"""What the tiny families are put together from: tokenizers, templates in the released form, sizes of both towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiny_vision import HALF, saved, special_tokenizer, text_sizes
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

__all__ = ["BUILDERS", "Parts", "chatml", "family", "ids_of", "made", "text_sizes", "tokenizer_with"]

SIDE, PATCH = 32, 8  # pixels: 16 patches a picture, or a tile of one
SQUARE = {"height": SIDE, "width": SIDE}
NORMAL = {"image_mean": HALF, "image_std": HALF}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
CLIP = {"model_type": "clip_vision_model", **TOWER, "num_hidden_layers": 3}
GRID_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Parts(NamedTuple):
    """A family's model class, a tiny config of it, and a processor that fits."""

    model_class: Any
    config: Any
    processor: ProcessorMixin


BUILDERS: dict[str, Callable[[], Parts]] = {}  # by model_type; variants of one by a name of their own


def family(make: Callable[[], Parts]) -> Callable[[], Parts]:
    """Enter a family under its function's name, its model_type."""
    BUILDERS[make.__name__] = make
    return make


def made(name: str, folder: Path, seed: int = 0) -> Path:
    """Model with random weights and processor of a family, saved."""
    parts = BUILDERS[name]()
    return saved(folder, parts.model_class, parts.config, parts.processor, seed)


def tokenizer_with(
    *specials: str, end: str, pad: str | None = None, begin: str | None = None, named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens; named: attributes that the family's processor reads its own by."""
    tokenizer = special_tokenizer(specials, end=end, pad=pad or end, bos=begin)
    if not named:
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=end,
        pad_token=pad or end,
        unk_token="<unk>",
        bos_token=begin,
        extra_special_tokens=dict(named),
    )


def cut_as_llama3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Line breaks stay together before a word, as Llama 3 and those after it cut text: its prompts end with two."""
    word, mark = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    cut = pre_tokenizers.Split(Regex(rf"{word}|{mark}|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    """Config names of tokens → their ids."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def chatml(image: str, begin: str = "", end: str = "<|im_end|>\n") -> str:
    """ChatML with `image` where an image part stands, `begin` before everything, `end` behind each turn."""
    return templated("<|im_start|>{{ m['role'] }}\n", end, "<|im_start|>assistant\n", image, begin)


def templated(opening: str, end: str, asking: str, image: str, begin: str = "") -> str:
    """A chat template: `opening` before a turn's content, `end` behind it, `asking` before an answer."""
    content = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    turns = "{% for m in messages %}" + opening + content + end + "{% endfor %}"
    return begin + turns + "{% if add_generation_prompt %}" + asking + "{% endif %}"


def spoken(image: str, end: str, between: str, begin: str = "") -> str:
    """Turns as `User: … Assistant: …`, `end` behind an answer, `between` behind a question."""
    said = "{{ {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[m['role']] }}"
    closing = "{% if m['role'] == 'assistant' %}" + end + "{% else %}" + between + "{% endif %}"
    return templated(said, closing, "Assistant:", image, begin)


def sam_tower(side: int, patch: int) -> dict[str, Any]:
    """A vision tower with local windows, as Segment Anything has it."""
    return {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    }
