"""How often a model that is being trained names the right class: what the best checkpoint is chosen by.

    validation samples ── LabelAccuracy.of ──▶ prompts up to the label ── right(model) ──▶ Tally(right, asked)

By label likelihood or by what is generated, as `evaluate` does it: never by comparing the logits of a forward pass with
labels one position off, and never on the tokens of a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.files.processes import own_share
from rankwise.score.classify import ByLikelihood, guess, label_set, true_label
from rankwise.score.generate import Answering, GenerationSettings, HFGenerator
from rankwise.score.likelihood import longest_answer

MAX_NEW_TOKENS = 32  # where no device says how long an answer may be


@dataclass(frozen=True)
class Tally:
    """Right answers among those asked for."""

    right: int
    asked: int


@dataclass(frozen=True)
class LabelAccuracy:
    """The samples of a classification task, ready to be put to a model again and again.

    examples: up to their label; what comes after it (a reason) is no part of the question. by: `likelihood` or
    `generation` (greedy, the label that is named). renderer: leaves room for the answer.
    """

    examples: tuple[Example, ...]
    renderer: Renderer
    by: str = "likelihood"
    batch_size: int = 8
    max_new_tokens: int = MAX_NEW_TOKENS

    @classmethod
    def of(
        cls, examples: Sequence[Example], renderer: Renderer, by: str = "likelihood", batch_size: int = 8
    ) -> LabelAccuracy:
        asked = tuple(map(up_to_label, examples))
        target = renderer.sight.target if renderer.sight else None
        tokens = target.max_new_tokens if target else MAX_NEW_TOKENS
        reserve = longest_answer(renderer, asked[0], label_set(asked)) if by == "likelihood" else tokens
        return cls(asked, renderer.leaving(reserve), by, batch_size, tokens)

    def right(self, model: Any) -> Tally:
        """This process's share of the samples, put to the model as it is; no random number is drawn."""
        lengths = [sum(len(turn.text) for turn in example.turns) for example in self.examples]
        share = own_share(list(self.examples), lengths)
        if not share:
            return Tally(0, 0)
        engine, labels = self._engine(model), label_set(share)
        guesses = {one.position: guess(one.text, labels) for one in engine.generate(share)}
        right = sum(guesses[position] == true_label(example, labels) for position, example in enumerate(share))
        return Tally(right, len(share))

    def _engine(self, model: Any) -> Answering:
        engine = HFGenerator(model, self.renderer, GenerationSettings(self.max_new_tokens, batch_size=self.batch_size))
        return ByLikelihood(engine, label_set(self.examples)) if self.by == "likelihood" else engine


def up_to_label(example: Example) -> Example:
    """The sample up to its first answer, which is its label."""
    first = next(place for place, turn in enumerate(example.turns) if turn.role == "assistant")
    return replace(example, turns=example.turns[: first + 1])
