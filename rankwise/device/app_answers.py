"""What an app answered to the golden vectors, read from its own lines and put on the parity ladder.

    phone.jsonl ── read_answers ──▶ AppAnswer*, one of each case ── observed ──▶ Observed* ── rungs ──▶ Ladder
                                                         └── ms ──▶ median, 95th percentile

    {"case": "17", "text": "water", "sha256_rgb": "5b0c…", "prompt_ids": [1, 18, -1, -1, 7],
     "top_logprobs": [[[311, -0.02], [42, -4.1]], …], "ms": 412.5, "build": "b10257-22dc605c4"}

case and text are needed; a rung whose part an app does not write is not measured. Pixels are those that the app handed
to its runtime, whole (`png`, base64) or as a hash. A token is an id, or its text as the runtime gives it, which the
GGUF's vocabulary tells apart; -1 in `prompt_ids` is a place of a picture.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rankwise.device.bundle_files import spoken
from rankwise.device.golden import Golden
from rankwise.device.llama.client import LEAST_LOGPROB, REPLACED, Completion
from rankwise.device.parity.cases import Case
from rankwise.device.parity.ladder import Ladder
from rankwise.device.parity.reference import Expected, Observed, Pixels, common, whole_characters
from rankwise.device.parity.rungs import RUNGS
from rankwise.errors import DataError
from rankwise.files.document import build
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.splitting import BYTE_LEVEL, SENTENCEPIECE

MOST = 5  # mistakes that a message lists
BYTE = re.compile(r"(?:byte: \\x|<0x)([0-9a-fA-F]{2})>?")  # a byte as runtimes and SentencePiece write it
LITERAL, BYTE_TOKEN = (2, 3, 4), 6  # llama.cpp's kinds of tokens: unknown, control, user-defined; a byte
PICTURE = -1
Top = Sequence[tuple[int | str, float]]


@dataclass(frozen=True)
class AppAnswer:
    """One line. Several pictures or hashes: in order. top_logprobs: at each place of the app's own answer, its end
    token included."""

    case: str
    text: str
    sha256_rgb: str | tuple[str, ...] = ()
    png: str | tuple[str, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    top_logprobs: tuple[Any, ...] | None = None
    ms: float | None = None
    build: str | None = None

    def __post_init__(self) -> None:
        if self.ms is not None and not (math.isfinite(self.ms) and self.ms >= 0):
            raise ValueError(f"ms: {self.ms} is no time")
        for place, top in enumerate(self.top_logprobs or ()):
            if not top or not all(is_pair(pair) for pair in top):
                raise ValueError(
                    f"top_logprobs, place {place}: expected pairs [id or text, log-probability of at most 0]"
                )
        assert self.shown is not None  # ValueError for what is no PNG

    @cached_property
    def shown(self) -> tuple[Pixels | str, ...]:
        """Pictures that the app handed over: pixels, or hashes of them."""
        return tuple(map(decoded_png, listed(self.png))) or listed(self.sha256_rgb)

    @cached_property
    def tops(self) -> tuple[Top, ...]:
        return tuple(
            [(token, max(float(value), LEAST_LOGPROB)) for token, value in top] for top in self.top_logprobs or ()
        )


def is_pair(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], bool):
        return False
    token, value = pair
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 1e-6
    return isinstance(token, (int, str)) and known


def listed(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def decoded_png(text: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"png: no PNG in base64 ({error})") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def read_answers(file: Path | str, cases: Sequence[Case]) -> dict[str, AppAnswer]:
    """Case → its line. DataError naming file and line of every mistake: a line that is none, of no case, of a case
    that has one, a case without one."""
    path = Path(file)
    found: dict[str, AppAnswer] = {}
    first: dict[str, int] = {}
    known, mistakes = {case.id for case in cases}, []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            answer = parsed(line)
        except (ValueError, TypeError) as error:
            mistakes.append(f"line {number}: not an answer: {error}")
            continue
        if answer.case not in known:
            mistakes.append(f"line {number}: the case {answer.case!r} is not among the golden vectors")
        elif answer.case in found:
            mistakes.append(
                f"line {number}: a second answer to {answer.case!r}; the first is in line {first[answer.case]}"
            )
        else:
            found[answer.case], first[answer.case] = answer, number
    mistakes += [f"no line for the case {case.id!r}" for case in cases if case.id not in found]
    if mistakes:
        more = f"; and {len(mistakes) - MOST} more" if len(mistakes) > MOST else ""
        raise DataError(
            f"{path}: {'; '.join(mistakes[:MOST])}{more}. Write one line of JSON for each case of golden/golden.json"
        )
    return found


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def parsed(line: str) -> AppAnswer:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"expected an object {{…}}, found {type(row).__name__}")
    return build(AppAnswer, row, partial=True)


# --- tokens as texts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTexts:
    """What llama.cpp writes for each id. pieces: as bytes, by id."""

    pieces: Sequence[bytes]

    @classmethod
    def of(cls, file: GGUFFile) -> TokenTexts:
        """DataError for a kind of tokenizer whose texts are not known here."""
        kind = file.metadata.get("tokenizer.ggml.model")
        tokens = file.metadata["tokenizer.ggml.tokens"]
        types = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        if kind not in (SENTENCEPIECE, BYTE_LEVEL):
            raise DataError(f"{file.path}: the tokenizer {kind!r} has no texts known here; replay with --server")
        write = sentencepiece if kind == SENTENCEPIECE else byte_level()
        return cls([one.encode() if type_ in LITERAL else write(one) for one, type_ in zip(tokens, types, strict=True)])

    def detokenize(self, ids: Iterable[int]) -> str:
        return b"".join(self.pieces[one] for one in ids if 0 <= one < len(self.pieces)).decode(errors="replace")

    @cached_property
    def _ids(self) -> Mapping[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for number, piece in enumerate(self.pieces):
            found.setdefault(piece, []).append(number)
        return found

    def ids(self, text: str) -> Sequence[int]:
        """All ids that are written so; none for a piece of a character that is not whole."""
        byte = BYTE.fullmatch(text)
        return self._ids.get(bytes([int(byte[1], 16)]) if byte else text.encode(), ())


def sentencepiece(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def byte_level() -> Any:
    """GPT-2's letters for bytes, reversed."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return lambda token: b"".join(bytes([letters[one]]) if one in letters else one.encode() for one in token)


# --- on the ladder ---------------------------------------------------------------------------------------------------


def climbed(golden: Golden, answers: Mapping[str, AppAnswer], texts: TokenTexts) -> Ladder:
    """The ladder of what an app says; rungs whose parts it does not write are not measured."""
    seen = [observed(golden.expected(case), case, answers[case.id], texts) for case in golden.cases]
    return Ladder(tuple(rung(seen, texts, golden.thresholds) for rung in RUNGS.values()))


def observed(expected: Expected, case: Case, answer: AppAnswer, texts: TokenTexts) -> Observed:
    ids = laid_out(answer.prompt_ids, expected) if answer.prompt_ids is not None else None
    tops = identified(answer.tops, expected, texts)
    tokens = said(answer, tops, expected, texts)
    if REPLACED in answer.text and tokens[: len(tops)] != tuple(max(top, key=top.__getitem__) for top in tops):
        tops = ()  # a server leaves out the places of pieces of characters: which are which is not known
    read = [one for one in ids or () if one != expected.image_id]
    free = Completion(
        text=answer.text,
        tokens=tokens,
        prompt_tokens=len(ids or ()),
        prompt_text=texts.detokenize(read),
        seconds=(answer.ms or 0) / 1000,
        ended=tokens[-1:] != () and tokens[-1] in expected.end_ids,
        top=tops,
    )
    return Observed(
        case=case,
        expected=replace(expected, template=None),
        text_ids=(),
        wanted=texts.detokenize(expected.written),
        free=free,
        tops=tops[: comparable(tokens, expected, texts)],
        handed=answer.shown or (None,) * len(case.sources),
        by_app=True,
        ids=ids,
    )


def comparable(tokens: Sequence[int], expected: Expected, texts: TokenTexts) -> int:
    """Places up to the first token that differs, and before the first that is a piece of a character."""
    return min(common(tokens, expected.answer) + 1, whole_characters(expected.answer, texts.detokenize))


def laid_out(found: Sequence[int], expected: Expected) -> tuple[int, ...]:
    """The prompt's ids with the pictures' own. An app that counts a picture's delimiters among its places has runs as
    long as the whole expansions; one whose runtime names them has embeddings alone."""
    runs = [(picture, list(run)) for picture, run in groupby(found, lambda one: one == PICTURE)]
    whole = [len(run) for picture, run in runs if picture] == list(map(len, expected.expansions))
    pictures, ids = iter(expected.expansions), list[int]()
    for picture, run in runs:
        if not picture:
            ids += run
        elif whole:
            ids += next(pictures)
        else:
            ids += [PICTURE if expected.image_id is None else expected.image_id] * len(run)
    return tuple(ids)


def identified(tops: Sequence[Top], expected: Expected, texts: TokenTexts) -> tuple[Mapping[int, float], ...]:
    """Each place's tokens by id. Of several that are written alike (a letter and its byte), the one that the reference
    finds likeliest there; a text that no token has gets a negative number, which is a token beside all others."""
    found = []
    for place, top in enumerate(tops):
        row = expected.log_probs[place].tolist() if place < len(expected.log_probs) else []
        known = {each: value for each, value in enumerate(row) if not math.isnan(value)}
        one: dict[int, float] = {}
        for rank, (token, value) in enumerate(top):
            alike = [token] if isinstance(token, int) else [each for each in texts.ids(token) if each not in one]
            likely = sorted((each for each in alike if each in known), key=known.__getitem__, reverse=True)
            one[next(iter([*likely, *alike]), -2 - rank)] = value
        found.append(one)
    return tuple(found)


def said(
    answer: AppAnswer, tops: Sequence[Mapping[int, float]], expected: Expected, texts: TokenTexts
) -> tuple[int, ...]:
    """Ids of the app's answer: its likeliest tokens where they are its text; else as much of the reference's answer as
    the text begins with, and a token of no other where it goes on otherwise. Texts are known up to the first piece of a
    character."""
    words, text = spoken(expected.answer, expected.end_ids), answer.text
    for end in expected.end_ids:
        text = text.removesuffix(texts.detokenize([end]))
    likeliest = tuple(max(top, key=top.__getitem__) for top in tops)
    if likeliest and texts.detokenize(spoken(likeliest, expected.end_ids)).strip() == text.strip():
        return expected.answer if likeliest == words else likeliest  # its end token may be untold
    whole, text = known(texts.detokenize(words)), known(text)
    if whole == text:
        return expected.answer
    starts = [known(texts.detokenize(words[:place])) for place in range(len(words) + 1)]
    place = max(place for place, start in enumerate(starts) if text.startswith(start))
    return expected.answer[:place] if text == starts[place] else (*expected.answer[:place], PICTURE)


def known(text: str) -> str:
    return text.partition(REPLACED)[0].strip()
