"""What follows from an adapter that brings its own tokenizer: enough rows for its tokens, and its special tokens in the
merged model's configs, so that generation ends where training did.

special = special_tokens(base, adapter, rows)         # {"eos_token_id": 128}; nothing where both tokenizers agree
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.files.atomic import read_object, write_json
from rankwise.models.load import load_tokenizer
from rankwise.models.vocabulary import token_count

TOKENIZER_FILE, GENERATION = "tokenizer_config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_tokens(base: Path, adapter: Path, rows: int) -> dict[str, int]:
    """The special tokens that differ from the base's. DataError where the adapter's tokenizer knows more tokens than
    the merged model has rows for, and the base's does not."""
    if not all((folder / TOKENIZER_FILE).is_file() for folder in (base, adapter)):
        return {}
    before, after = load_tokenizer(str(base)), load_tokenizer(str(adapter))
    if token_count(after) > max(rows, token_count(before)):
        raise DataError(
            f"{adapter}: its tokenizer has {token_count(after)} tokens, and the embeddings {rows} rows: the rows of "
            "the added tokens are not in the adapter (PEFT's save_pretrained takes save_embedding_layers=True). If "
            "they were never trained, take the tokenizer's files out of the folder: the base's are used then"
        )
    ids = {name: getattr(after, name) for name in IDS}
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


def follow_generation(folder: Path, special: Mapping[str, int]) -> str:
    """Enter the special tokens in the copied generation config, whose own end tokens stay; returns what was changed."""
    file = folder / GENERATION
    content = read_object(file)
    for name, token in special.items():
        old = content.get(name)
        ends = [token, *(one for one in (old if isinstance(old, list) else [old]) if one not in (None, token))]
        content[name] = ends if name == "eos_token_id" and len(ends) > 1 else token
    write_json(file, content)
    return ", ".join(f"{name} {content[name]}" for name in special)
