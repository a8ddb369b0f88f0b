"""How long the vocabulary is, by tokenizer, config and weights: found to agree before the converter asserts it.

tokenizer: highest id + 1  ≤  config: vocab_size  =  rows of the embeddings and of the output head
"""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import DataError
from rankwise.nets.load import meta_model
from rankwise.nets.sites import weight_table
from rankwise.nets.vocabulary import embedding_paths
from rankwise.ship.gguf.metadata import config_of
from rankwise.store.checkpoint import Checkpoint


def check_lengths(folder: Path, checkpoint: Checkpoint, tokens: int) -> None:
    """DataError with both numbers where the tokenizer has more tokens (`tokens`: its highest id + 1) than the model, or
    where config and weights are of different lengths. Nothing is known of a class that transformers does not have."""
    config = config_of(folder)
    if config is None:
        return
    rows = stored_rows(folder, checkpoint)
    wrong = [f"{key} has {stored:,} rows and the config is of {stated:,}" for key, stored, stated in rows]
    wrong = [line for line, (_, stored, stated) in zip(wrong, rows, strict=True) if stored != stated]
    if wrong:
        raise DataError(
            f"{folder}: {'; '.join(wrong)}: config.json and the weights are not of one model; save both again "
            "(model.resize_token_embeddings changes both)"
        )
    known = config.get_text_config().vocab_size
    held = min([known, *(stored for _, stored, _ in rows)])
    if tokens > held:
        raise DataError(
            f"{folder}: the tokenizer has {tokens:,} tokens (its highest id + 1) and the model {held:,} rows for them; "
            "call model.resize_token_embeddings(len(tokenizer)) and train the new rows, or put back the tokenizer that "
            "the model was trained with"
        )


def stored_rows(folder: Path, checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """(key, rows in the files, rows by the config) of the embeddings and of the head; what is tied is stored once."""
    model = meta_model(str(folder))
    weights = weight_table(model, checkpoint.keys()).weights
    found = [(path, weights.get(f"{path}.weight")) for path in embedding_paths(model)]
    return [
        (weight.key, checkpoint.shape(weight.key)[0], model.get_parameter(f"{path}.weight").shape[0])
        for path, weight in found
        if weight is not None and weight.part == (0, 1)
    ]
