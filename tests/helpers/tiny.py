"""Tiny models and tokenizers of the real architectures, made on the spot; no network, no files of others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = (
    "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]",
    "The Vaults pub near Café Adriatic has a 5 star rating.  Prices start at £30.",
    "### Instruction:\nDescribe the restaurant.\n\n### Input:\nname[Alimentum], area[city centre]\n\n### Output:\n",
    "Alimentum is a family-friendly restaurant in the city centre.",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(
    folder: Path,
    texts: Iterable[str] = TEXTS,
    *,
    vocab_size: int = 384,
    add_bos: bool = True,
    pad: str | None = "</s>",
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` and saved in `folder`.

    pad is the end token by default: the hard case, as in TinyLlama. `chat_template=CHAT_TEMPLATE` makes it a chat one.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(
    folder: Path,
    texts: Iterable[str] = TEXTS,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A random Llama with grouped queries and its tokenizer, saved in `folder`; returns the folder.

    `tokenizer` are keywords of `tiny_tokenizer`, the others go to LlamaConfig.
    """
    vocabulary = tiny_tokenizer(folder, texts, **(tokenizer or {}))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    settings = sizes | {"vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(dtype).save_pretrained(folder)
    return folder
