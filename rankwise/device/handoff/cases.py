"""What is asked of a server or an app, and what each hypothesis would answer: in memory, and as a folder.

    FOLDER/cases.json              prompts (text, ids, messages), forced answers, the hypotheses, tokens as texts
    FOLDER/log_probs.safetensors   ids (P, U) and log_probs (H, P, U) of every place, cases and places (P,)
    FOLDER/images/*.png            pictures as they are sent

An answer is one token: the prompt with the first tokens of the forced answer behind it, `max_tokens` 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rankwise.device.handoff.verdict import Candidates, Hypothesis
from rankwise.errors import DataError
from rankwise.files.atomic import atomic_folder
from rankwise.files.document import Document, build

CASES = Document(
    "cases.json",
    "rankwise-cases/1",
    "cases of a hand-off",
    "rankwise validate --write_cases",
    ("reference", "base", "hypotheses", "tokens", "cases"),
    indent=None,
)
TENSORS, IMAGES = "log_probs.safetensors", "images"
IDS, TEXT, CHAT = "ids", "completions", "chat"  # how a place is asked
ROUTES = (IDS, TEXT, CHAT)


@dataclass(frozen=True)
class Place:
    """Where an answer is asked for: behind `forced` tokens of the answer, as a text. row: its number in the tensors.
    as_text: whether prompt and text together are these ids for the model's own tokenizer."""

    row: int
    forced: int
    text: str
    as_text: bool


@dataclass(frozen=True)
class HandoffCase:
    """One row of the data.

    prompt: its text, without a BOS that the tokenizer itself puts before a text. ids: of the prompt. answer: ids that
    are forced. messages: what a chat API is given; none where no chat template makes the prompts. images: files, in
    the order of the parts `{"type": "image"}` of the messages.
    """

    id: str
    prompt: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    places: tuple[Place, ...]
    messages: tuple[dict[str, Any], ...] = ()
    images: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class HandoffCases:
    """All of it.

    reference, base: what the models are called, not where they lie. tokens: id → (its text behind another token, its
    text alone), where no other id has that text. template_kwargs: variables of the chat template. pictures: file →
    PNG, before they are written.
    """

    reference: str
    base: str
    cases: tuple[HandoffCase, ...]
    candidates: Candidates
    tokens: Mapping[int, tuple[str | None, str | None]]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def chats(self) -> bool:
        """Whether a chat template makes the prompts."""
        return bool(self.cases[0].messages)

    @property
    def routes(self) -> tuple[str, ...]:
        """The API that an app would use comes first: chat where a chat template makes the prompts."""
        return (CHAT, TEXT, IDS) if self.chats else (TEXT, IDS, CHAT)

    @cached_property
    def _places(self) -> dict[tuple[str, int], Place]:
        return {(case.id, place.forced): place for case in self.cases for place in case.places}

    def find(self, case: str, forced: int) -> Place | None:
        """The place behind so many tokens of a case's answer."""
        return self._places.get((case, forced))

    @cached_property
    def _ids(self) -> tuple[dict[str, int], dict[str, int]]:
        first, second = (
            {text: token for token, texts in self.tokens.items() if (text := texts[form]) is not None}
            for form in (0, 1)
        )
        return first, second

    def ids_of(self, form: int) -> Mapping[str, int]:
        """Text → id, in one of the two forms of `tokens`."""
        return self._ids[form]


def write_cases(folder: Path, cases: HandoffCases) -> Path:
    """The folder, whole or not at all; an earlier one is replaced."""
    content = {
        "reference": cases.reference,
        "base": cases.base,
        "template_kwargs": dict(cases.template_kwargs),
        "hypotheses": [asdict(one) for one in cases.candidates.hypotheses],
        "cases": [asdict(one) for one in cases.cases],
        "tokens": {str(token): list(texts) for token, texts in cases.tokens.items()},
        "made_from": dict(cases.made_from),
    }
    found = cases.candidates
    with atomic_folder(folder) as temporary:
        CASES.write(temporary, content)
        save_file({"cases": found.cases, "ids": found.ids, "log_probs": found.log_probs}, temporary / TENSORS)
        for name, picture in cases.pictures.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(picture)
    return folder


def read_cases(folder: Path) -> HandoffCases:
    """DataError where a file is missing, damaged, or not of the others."""
    file, content = CASES.file(folder), CASES.read(folder)
    try:
        tensors = load_file(folder / TENSORS)
        hypotheses = tuple(build(Hypothesis, one) for one in content["hypotheses"])
        candidates = Candidates(hypotheses, tensors["cases"], tensors["ids"], tensors["log_probs"])
        cases = tuple(build(HandoffCase, one) for one in content["cases"])
        tokens = {int(token): (texts[0], texts[1]) for token, texts in content["tokens"].items()}
        pictures = {name: (folder / name).read_bytes() for case in cases for name in case.images}
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); write it again with --write_cases") from error
    _require_whole(file, cases, candidates)
    return HandoffCases(
        content["reference"],
        content["base"],
        cases,
        candidates,
        tokens,
        content["template_kwargs"],
        content["made_from"],
        pictures,
    )


def _require_whole(file: Path, cases: tuple[HandoffCase, ...], candidates: Candidates) -> None:
    """DataError where the tensors are not those of these cases."""
    rows = [(place.row, number) for number, case in enumerate(cases) for place in case.places]
    count = len(rows)
    shapes = (candidates.cases.shape, candidates.ids.shape[:1], candidates.log_probs.shape[:2])
    fits = shapes == ((count,), (count,), (len(candidates.hypotheses), count))
    fits = fits and candidates.log_probs.shape[2:] == candidates.ids.shape[1:]
    if (
        not fits
        or sorted(rows) != list(enumerate(candidates.cases.tolist()))
        or not np.isfinite(candidates.log_probs).all()
    ):
        raise DataError(f"{file}: {TENSORS} beside it is of other cases; write them again with --write_cases")
