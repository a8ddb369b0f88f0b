"""config.json of a merged model: the base's, with the merge's type, tied or untied, its tokens and special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from rankwise.errors import DataError
from rankwise.models.load import is_mxfp4, load_tokenizer
from rankwise.models.vocabulary import token_count

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_tokens(base: Path, adapter: Path, rows: int) -> dict[str, int]:
    """The special tokens that differ from the base's. DataError where the adapter's tokenizer knows more tokens than
    the merged model has rows for, and the base's does not."""
    if not all((folder / TOKENIZER_CONFIG).is_file() for folder in (base, adapter)):
        return {}
    before, after = load_tokenizer(str(base)), load_tokenizer(str(adapter))
    if token_count(after) > max(rows, token_count(before)):
        raise DataError(
            f"{adapter}: its tokenizer has {token_count(after)} tokens, and the embeddings {rows} rows: the rows of "
            "the added tokens are not in the adapter (PEFT's save_pretrained takes save_embedding_layers=True). If "
            "they were never trained, take the tokenizer's files out of the folder: the base's are used then"
        )
    ids = {name: getattr(after, name) for name in SPECIAL_IDS}
    if ids["pad_token_id"] == ids["eos_token_id"]:
        del ids["pad_token_id"]  # what stands in for a missing one is no choice
    return {name: token for name, token in ids.items() if token is not None and token != getattr(before, name)}


def with_special(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """config.json with these special tokens, wherever it speaks of them."""
    changed = {
        name: with_special(value, special) if isinstance(value, dict) and name == "text_config" else value
        for name, value in config.items()
    }
    return changed | {name: token for name, token in special.items() if name in config}


def merged_config(config: Mapping[str, Any], dtype: str, untie: bool) -> dict[str, Any]:
    """config.json of the merged model: the base's, with what the merge has changed, in its sub-configs as well."""
    changed = {
        name: merged_config(value, dtype, untie) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in config.items()
    }
    if is_mxfp4(config.get("quantization_config")):
        changed.pop("quantization_config")
        changed |= {"dtype": "bfloat16"} if dtype == "auto" else {}
    if dtype != "auto":
        changed["dtype"] = dtype
    if "dtype" in changed:
        changed.pop("torch_dtype", None)
    if untie and ("architectures" in config or "tie_word_embeddings" in config):
        changed["tie_word_embeddings"] = False
    return changed


def with_vocabulary(config: Mapping[str, Any], settings: PreTrainedConfig, rows: int) -> dict[str, Any]:
    """config.json with this many tokens, in the part of it that describes the decoder."""
    text = settings.get_text_config()
    part = next((name for name in settings.sub_configs if getattr(settings, name, None) is text), None)
    return {**config, part: {**config.get(part, {}), "vocab_size": rows}} if part else {**config, "vocab_size": rows}
