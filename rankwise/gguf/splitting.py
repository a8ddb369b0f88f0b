"""Texts as llama.cpp splits them by what a GGUF of SentencePiece's kind states, against transformers.

    tokens, scores, types, space in front ── ScoredPieces.ids(text) ──▶ must be ◀── tokenizer(text), in transformers
    merges of tokenizer.json ── merge_scores ──▶ scores, without a tokenizer.model to take them from

llama.cpp joins the two neighbours whose piece has the highest score, the leftmost first (llama-vocab.cpp,
llm_tokenizer_spm). Keys that are right each by itself do not show where a text is split: a converter that does not know
the scores writes one number for all, and Unigram's are not meant for joining. Byte-level BPE is split by a regular
expression that llama.cpp has under a name; that is not done here, `rankwise validate` compares it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

from rankwise.errors import VerificationError, need
from rankwise.files.gguf import GGUFFile
from rankwise.models.load import load_tokenizer

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
SPACED = {SENTENCEPIECE: True, BYTE_LEVEL: False}  # llama.cpp's default, by the kind of tokenizer
SPECIAL_TYPES = (2, 3, 4)  # llama.cpp reads a token in a text as one only if it is unknown, control or user-defined
NORMAL = 1
SCORES = "tokenizer.ggml.scores"
SPACE = "▁"  # how SentencePiece writes a space
SPACES = (SPACE, "Ġ")  # and byte-level BPE
PIECES = 24  # of the vocabulary, in one probing text
TEXTS, ROUNDS = 4000, 8  # probing texts, and how often a piece is in one, at most; each is once
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "name[The Vaults], priceRange[more than £30], near[Café Adriatic]",
    "two  spaces,\n\na\tline and 1234567890 digits",
    "Größe, naïve, señor, 東京, 안녕, Привет, 🙂",
    "def f(x):\n    return {'a': x ** 2}  # code",
)
LEADING = "  and so on"  # SentencePiece puts a space before every text, transformers 5 not before one that has it


@dataclass(frozen=True)
class ScoredPieces:
    """A vocabulary as llama.cpp holds it. ids_of: token → id. special: those that a text holds as one token."""

    ids_of: Mapping[str, int]
    scores: Sequence[float]
    special: frozenset[str]
    ordinary: tuple[str, ...]
    spaced: bool

    @classmethod
    def of(cls, file: GGUFFile) -> ScoredPieces:
        tokens, types, scores = (
            file.metadata.get(key, []) for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", SCORES)
        )
        kinds = list(zip(tokens, types, strict=True))
        return cls(
            ids_of={token: index for index, token in enumerate(tokens)},
            scores=scores,
            special=frozenset(token for token, kind in kinds if kind in SPECIAL_TYPES and token),
            ordinary=tuple(token.replace(SPACE, " ") for token, kind in kinds if kind == NORMAL),
            spaced=file.metadata.get("tokenizer.ggml.add_space_prefix", SPACED[SENTENCEPIECE]),
        )

    def ids(self, text: str) -> list[int]:
        """Special tokens first, the longest before others; a space goes before what follows one, or begins the text."""
        longest = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest))})", text) if longest else [text]
        found: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                found.append(self.ids_of[part])
            elif part:
                found += self._joined((" " if self.spaced else "") + part)
        return found

    def _joined(self, text: str) -> Iterator[int]:
        symbols: list[str] = list(text.replace(" ", SPACE))
        before, behind = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]

        def pair(left: int) -> Iterator[tuple[float, int, int, str]]:
            right = behind[left] if left >= 0 else -1
            index = self.ids_of.get(symbols[left] + symbols[right]) if right >= 0 else None
            if index is not None:
                yield -self.scores[index], left, right, symbols[left] + symbols[right]

        waiting = [one for left in range(len(symbols)) for one in pair(left)]
        heapify(waiting)
        while waiting:
            _, left, right, joined = heappop(waiting)
            if behind[left] != right or symbols[left] + symbols[right] != joined:
                continue  # one of the two was joined to another neighbour
            symbols[left], symbols[right], behind[left] = joined, "", behind[right]
            if behind[right] >= 0:
                before[behind[right]] = left
            behind[right] = -1
            for one in (before[left], left):
                for each in pair(one):
                    heappush(waiting, each)
        for symbol in filter(None, symbols):
            if symbol in self.ids_of:
                yield self.ids_of[symbol]
            else:
                yield from (self.ids_of.get(f"<0x{byte:02X}>", -1) for byte in symbol.encode())


def probing_texts(ordinary: Iterable[str]) -> Iterator[str]:
    """PROBES, and texts that between them hold every ordinary piece, in its order and in others; none begins with a
    space."""
    yield from PROBES
    words, shuffled = list(ordinary), random.Random(0)
    for _ in range(max(1, min(ROUNDS, TEXTS * PIECES // max(len(words), 1)))):
        for start in range(0, len(words), PIECES):
            yield "".join(words[start : start + PIECES]).strip()
        shuffled.shuffle(words)


def check_texts(file: GGUFFile, model: Path, template: str | None) -> tuple[int, list[str]]:
    """How many texts llama.cpp splits as the tokenizer of a model folder does, and notes for people; 0 where the file
    is of another kind than SentencePiece's.

    VerificationError, with a text, where it splits one otherwise. Notes: texts that begin with a space, and those
    around special tokens of the template, which the two treat differently in some families.
    """
    if file.metadata.get("tokenizer.ggml.model") != SENTENCEPIECE:
        return 0, []
    pieces, tokenizer = ScoredPieces.of(file), load_tokenizer(str(model))
    texts = list(dict.fromkeys(probing_texts(pieces.ordinary)))
    for text, here in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        there = pieces.ids(text)
        if here != there:
            raise VerificationError(
                f"{file.path}: llama.cpp would split {text!r} into {there}, transformers into {here}: a GGUF joins "
                "pieces by their scores, and no scores give this tokenizer's order. Run the model with transformers "
                "(`rankwise evaluate`), or train one whose tokenizer has a tokenizer.model of SentencePiece's BPE"
            )
    return len(texts), list(notes(pieces, tokenizer, template or ""))


def notes(pieces: ScoredPieces, tokenizer: Any, template: str) -> Iterator[str]:
    def otherwise(text: str) -> bool:
        return bool(tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.ids(text))

    if otherwise(LEADING):
        yield "a text that begins with a space has one token more in llama.cpp than in transformers"
    named = {getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token") if name in template}
    around = [
        text
        for token in sorted(pieces.special)
        if token in named or token in template
        for text in (f"a{token}b", f"a{token}\nb", f"a {token} b")
        if otherwise(text)
    ]
    if around:
        yield (
            f"llama.cpp splits a text around special tokens of the chat template otherwise than transformers, such as "
            f"{around[0]!r}: {pieces.ids(around[0])} instead of "
            f"{tokenizer(around[0], add_special_tokens=False)['input_ids']}; `rankwise validate` compares your prompts"
        )


# --- scores that the converter does not know -------------------------------------------------------------------------


def merge_scores(tokenizer: Any) -> dict[int, float]:
    """Scores by which llama.cpp joins pieces in the order of a BPE's merges, by id; {} for another kind of tokenizer.
    Pieces that no merge makes come last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return {}
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else pair for pair in model["merges"]]
    made = list(dict.fromkeys(left + right for left, right in pairs))
    ranks = {token: -float(rank) for rank, token in enumerate(made)}
    return {index: ranks.get(token, -float(len(made))) for token, index in model["vocab"].items()}


def score(path: Path, scores: Mapping[int, float]) -> None:
    """State them in a converted file of SentencePiece's kind, in place of the one number that stands for all."""
    reader = need("gguf", extra="device").GGUFReader(path, "r+")
    field, kind = reader.fields.get(SCORES), reader.fields.get("tokenizer.ggml.model")
    if field is not None and kind is not None and kind.contents() == SENTENCEPIECE:
        for index, value in scores.items():
            if index < len(field.data):
                field.parts[field.data[index]][0] = value
