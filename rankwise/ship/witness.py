"""A GGUF engine watched while it answers: seconds and confidence of every item, kept in a file as predictions are.

Witness(generator, folder / "answers.jsonl").generate(examples)        # the generator's texts, one line each
witness.answers()                                                      # id → Answered, of earlier runs too
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.evaluate.generate import Generated, LabelScores
from rankwise.files.ledger import drop_cut_line
from rankwise.ship.llama.gguf_generator import GGUFGenerator
from rankwise.ship.llama.runtime import Completion, Runtime, RuntimeInfo


@dataclass(frozen=True)
class Answered:
    """seconds: of the request. confidence: probability of the whole answer, its end token included; None where the
    runtime does not tell it. tokens: generated. prompt_tokens: read."""

    seconds: float
    confidence: float | None
    tokens: int
    prompt_tokens: int


@dataclass
class Overheard:
    """A runtime whose last completion is remembered, with the log-probability of each of its tokens."""

    runtime: Runtime
    last: Completion | None = None

    @property
    def info(self) -> RuntimeInfo:
        return self.runtime.info

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        return self.runtime.tokenize(text, add_special, parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.runtime.detokenize(ids)

    def apply_template(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        return self.runtime.apply_template(messages, variables)

    def memory(self) -> int | None:
        return self.runtime.memory()

    def complete(self, prompt: str | Sequence[int], images: Sequence[bytes] = (), **how: Any) -> Completion:
        self.last = self.runtime.complete(prompt, images, **{**how, "top": max(1, how.get("top", 0))})
        return self.last


@dataclass(frozen=True)
class Witness:
    """The generator with a record of each answer at `path`, on the disk before the answer is handed on."""

    generator: GGUFGenerator
    path: Path
    overheard: Overheard = field(init=False)

    def __post_init__(self) -> None:
        overheard = Overheard(self.generator.runtime)
        object.__setattr__(self, "overheard", overheard)
        object.__setattr__(self, "generator", replace(self.generator, runtime=overheard))

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.generator.settings

    @property
    def renderer(self) -> Renderer:
        return self.generator.renderer

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        drop_cut_line(self.path)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            for found in self.generator.generate(examples):
                row = {"id": examples[found.position].id, **asdict(answered(self.overheard.last))}
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield found

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]:
        return self.generator.label_scores(examples, labels)

    def answers(self) -> dict[str, Answered]:
        """What is recorded, by id; the last record of an item counts."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = [json.loads(line) for line in lines]
        return {row.pop("id"): Answered(**row) for row in rows}


def answered(completion: Completion | None) -> Answered:
    assert completion
    sure = math.exp(sum(completion.logprobs)) if completion.logprobs else None
    return Answered(completion.seconds, sure, len(completion.tokens), completion.prompt_tokens)
