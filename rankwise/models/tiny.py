"""The demo's base model before it has read anything: a SentencePiece vocabulary and a random Llama of 1 M parameters.

The tokenizer is stored in both forms that exist, `tokenizer.model` (the GGUF converter reads it) and `tokenizer.json`
(transformers reads it), made from one vocabulary and compared on the whole corpus.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from rankwise.errors import VerificationError
from rankwise.files.atomic import atomic_write

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.08,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def train_vocabulary(texts: Sequence[str], vocab_size: int, **more: Any) -> bytes:
    """A SentencePiece model (byte-pair merges, byte fallback, no normalisation: as Llama's) of `texts`.

    more: options of SentencePiece's trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **more,
    )
    return model.getvalue()


def tokenizer_of(pieces: sentencepiece.SentencePieceProcessor) -> LlamaTokenizer:
    """The same vocabulary for transformers."""
    return LlamaTokenizer(**vocabulary_and_merges(pieces), pad_token="<unk>", add_bos_token=True)


def vocabulary_and_merges(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """As transformers takes them: `vocab` and `merges`, these in the order of the pieces, which is their rank."""
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(vocabulary)
        if not (pieces.is_control(index) or pieces.is_byte(index) or pieces.is_unknown(index))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return {"vocab": vocabulary, "merges": merges}


def save_tokenizer(
    folder: Path,
    texts: Sequence[str],
    vocab_size: int,
    made: Callable[[sentencepiece.SentencePieceProcessor], LlamaTokenizer] = tokenizer_of,
    compared: Sequence[str] = (),
    **more: Any,
) -> LlamaTokenizer:
    """Both forms of a tokenizer for `texts`, in `folder`; VerificationError where they would disagree on any text.

    made: the one of transformers. compared: further texts to compare on. more: options of SentencePiece's trainer.
    """
    model = train_vocabulary([line for text in texts for line in text.splitlines()], vocab_size, **more)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = made(pieces)
    check_same_ids(pieces, tokenizer, [*texts, *compared])
    tokenizer.save_pretrained(folder)
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    return tokenizer


def check_same_ids(
    pieces: sentencepiece.SentencePieceProcessor, tokenizer: LlamaTokenizer, texts: Iterable[str]
) -> None:
    for text in texts:
        here, there = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if here != there:
            raise VerificationError(f"tokenizer.json and tokenizer.model disagree on {text!r}: {here} and {there}")


def random_llama(tokenizer: LlamaTokenizer, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights (float32) for this vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **SIZES
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
