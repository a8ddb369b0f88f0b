"""Faults of a file: metadata and tensors that are not what the model is, damage, and another model under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from shipbench_fault import FILE, MMPROJ, Fault
from shipbench_gguf import Draft

TOKEN = "tokenizer.ggml."
PLAIN = int(gguf.TokenType.NORMAL)
PROJECTOR = "mm.model.fc.weight"


def setting(key: str, value: Any) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        assert draft.values.get(key) != value, "no fault at all"
        draft[key] = value

    return edit


def tensor(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Draft], None]:
    return lambda draft: draft.put(name, make(draft.floats(name)))


def template(draft: Draft) -> None:
    draft["tokenizer.chat_template"] = draft["tokenizer.chat_template"].replace("capitalize", "upper")


def word_ends(draft: Draft) -> None:
    """The end token is a word that answers hold."""
    tokens = draft[f"{TOKEN}tokens"]
    draft[f"{TOKEN}eos_token_id"] = next(
        tokens.index(piece) for piece in ("▁bottom", "▁top", "▁cross", "▁left", "▁") if piece in tokens
    )


def plain_types(*tokens: str) -> Callable[[Draft], None]:
    """Special tokens that a text no longer holds as one; all of them where none is named."""

    def edit(draft: Draft) -> None:
        kinds, pieces = list(draft[f"{TOKEN}token_type"]), draft[f"{TOKEN}tokens"]
        for place, kind in enumerate(kinds):
            special = kind in (int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED))
            if special and (not tokens or pieces[place] in tokens):
                kinds[place] = PLAIN
        draft[f"{TOKEN}token_type"] = kinds

    return edit


def scores_reversed(draft: Draft) -> None:
    """Pieces that should be merged last are merged first."""
    scores, kinds = list(draft[f"{TOKEN}scores"]), draft[f"{TOKEN}token_type"]
    ordinary = [place for place, kind in enumerate(kinds) if kind == PLAIN]
    for place, score in zip(ordinary, [scores[place] for place in reversed(ordinary)], strict=True):
        scores[place] = score
    draft[f"{TOKEN}scores"] = scores


def not_permuted(draft: Draft) -> None:
    """Rows of queries and keys in transformers' order: the two halves of a head, not pairs."""
    heads = draft["llama.attention.head_count"]
    for name in [name for name in draft.tensors if name.endswith(("attn_q.weight", "attn_k.weight"))]:
        rows = draft.floats(name)
        pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
        draft.put(name, pairs.swapaxes(1, 2).reshape(rows.shape))


def layers_swapped(draft: Draft) -> None:
    for name in [name for name in draft.tensors if name.startswith("blk.0.")]:
        draft.swap(name, name.replace("blk.0.", "blk.1."))


def overwritten(values: np.ndarray) -> np.ndarray:
    """The middle quarter of the rows gone, as a bad sector leaves them."""
    broken, quarter = values.copy(), len(values) // 4
    broken[quarter : 2 * quarter] = 0
    return broken


def flipped_bit(draft: Draft) -> None:
    """One bit of the scale of one block of 32 values."""
    data, kind = draft.tensors["blk.1.ffn_down.weight"]
    broken = data.copy()
    broken.reshape(-1)[1] ^= 0x40  # the highest bit of the exponent of the first block's float16 scale
    draft.tensors["blk.1.ffn_down.weight"] = (broken, kind)


TEXT_FILE = [
    Fault("chat template", "another chat template in the file", "token ids", True, edit=template),
    Fault("EOS is a word", "a word of the answers as end token", "text", True, edit=word_ends),
    Fault(
        "EOS is another special",
        "the start token as end token (llama.cpp knows `<end_of_utterance>` by its name as well)",
        None,
        True,
        edit=lambda draft: setting(f"{TOKEN}eos_token_id", draft[f"{TOKEN}bos_token_id"])(draft),
    ),
    Fault(
        "BOS added",
        "the file says to add a start token, and the template has one (our client drops its own then)",
        None,
        True,
        edit=setting(f"{TOKEN}add_bos_token", True),
    ),
    Fault(
        "space prefix",
        "a space put before every text",
        "token ids",
        True,
        edit=setting(f"{TOKEN}add_space_prefix", True),
    ),
    Fault("special tokens plain", "no special token is parsed", "image tokens", True, edit=plain_types()),
    Fault(
        "end of turn plain",
        "`<end_of_utterance>` is read as words",
        "token ids",
        True,
        edit=plain_types("<end_of_utterance>"),
    ),
    Fault("merges", "the vocabulary's scores in reverse", "token ids", True, edit=scores_reversed),
    Fault("q/k not permuted", "queries and keys in transformers' order of rows", "logprobs", True, edit=not_permuted),
    Fault("rope theta", "rope theta ten times as large", "logprobs", True, edit=setting("llama.rope.freq_base", 1e5)),
    Fault(
        "norm epsilon",
        "epsilon of the norms 1e-2 in place of 1e-6",
        "logprobs",
        True,
        edit=setting("llama.attention.layer_norm_rms_epsilon", 1e-2),
    ),
    Fault(
        "norm scale",
        "the last norm without its scale",
        "logprobs",
        True,
        edit=tensor("output_norm.weight", np.ones_like),
    ),
    Fault("layers swapped", "the first two layers in the other order", "logprobs", True, edit=layers_swapped),
    Fault(
        "overwritten",
        "a quarter of a Q8_0 tensor zeroed",
        "logprobs",
        True,
        edit=tensor("blk.1.ffn_down.weight", overwritten),
        form="q8_0",
        damage=True,
    ),
    Fault("flipped bit", "one bit of one Q8_0 scale", "logprobs", True, edit=flipped_bit, form="q8_0", damage=True),
    Fault("truncated", "the last tenth of the file missing", FILE, True, cut=0.9, damage=True),
    Fault("base shipped", "the model before tuning", "logprobs", True, model="base"),
    Fault("alpha", "adapter merged with twice its alpha", "logprobs", False, model="alpha"),
]


def reversed_rows(values: np.ndarray) -> np.ndarray:
    return values[::-1]


def earlier(values: np.ndarray) -> np.ndarray:
    """Five percent away from what training ended with."""
    noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    return values + 0.05 * values.std() * noise


VISION_FILE = [
    Fault(
        "picture size",
        "pictures scaled to twice the size, so cut into four tiles",
        "image tokens",
        True,
        edit=lambda draft: setting("clip.vision.preproc_image_size", 2 * draft["clip.vision.image_size"])(draft),
        kind=MMPROJ,
    ),
    Fault(
        "projector rows",
        "rows of the projector reversed",
        "logprobs",
        True,
        edit=tensor(PROJECTOR, reversed_rows),
        kind=MMPROJ,
    ),
    Fault(
        "earlier projector",
        "the projector of an earlier step: 5 % off",
        "logprobs",
        True,
        edit=tensor(PROJECTOR, earlier),
        kind=MMPROJ,
    ),
    Fault(
        "other model's eyes",
        "the mmproj file of another model of this size",
        "logprobs",
        True,
        kind=MMPROJ,
        model="elements",
    ),
    Fault(
        "mean and std",
        "pixels normalized with another mean",
        "logprobs",
        True,
        edit=setting("clip.vision.image_mean", [0.5, 0.5, 0.5]),
        kind=MMPROJ,
    ),
    Fault(
        "positions",
        "position embeddings of the patches gone",
        "logprobs",
        True,
        edit=tensor("v.position_embd.weight", np.zeros_like),
        kind=MMPROJ,
    ),
    Fault(
        "patch colours",
        "the patch kernel's red and blue swapped",
        "logprobs",
        True,
        edit=tensor("v.patch_embd.weight", lambda values: values[:, ::-1]),
        kind=MMPROJ,
    ),
    Fault(
        "activation",
        "another activation in the vision tower",
        "logprobs",
        True,
        edit=setting("clip.use_gelu", False),
        kind=MMPROJ,
    ),
    Fault(
        "truncated mmproj", "the last tenth of the mmproj file missing", FILE, True, cut=0.9, kind=MMPROJ, damage=True
    ),
]
FILES = [*TEXT_FILE, *VISION_FILE]
