"""Evaluation with a GGUF: the renderer's prompts, llama.cpp's answers and label scores.

    Example ── Renderer ──▶ ids (no image) ───────────────┐
                       └──▶ text with markers, PNG images ┴── Runtime ──▶ Generated, LabelScores
                                                                └──▶ answers.jsonl: seconds, confidence of each item

What it gives is comparable with `HFGenerator`, item by item: `evaluate.tasks.evaluate` takes either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankwise.data.device import MARKER, DeviceTarget, encoded
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.device.llama.runtime import Completion, Runtime
from rankwise.errors import UsageError
from rankwise.evaluate.generate import Generated, GenerationSettings, LabelScores
from rankwise.evaluate.likelihood import answer_ids
from rankwise.files.document import append_lines, read_lines


@dataclass(frozen=True)
class GGUFGenerator:
    """One request at a time, as a phone is asked. Greedy.

    target: what the device does to an image before the model's own processor; None where the renderer's reader gives
    the device's pixels already. latencies: seconds of each sample's request by its id, of all labels' requests for
    label scores. unlike: id → (tokens that training's prompt has, tokens that the runtime read) where they differ,
    which the parity ladder explains; a caller must say so. record: a file with a line of each answer, written before
    the answer is handed on.
    """

    runtime: Runtime
    renderer: Renderer
    decoding: GenerationSettings = GenerationSettings()
    target: DeviceTarget | None = None
    record: Path | None = None
    latencies: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    unlike: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.decoding.do_sample or self.decoding.num_beams > 1:
            raise UsageError("GGUF files are decoded greedily, as on the device; leave --do_sample and --num_beams out")

    @property
    def settings(self) -> dict[str, Any]:
        info = self.runtime.info
        engine = {"engine": "llama.cpp", "build": info.build, "gguf": Path(info.model).name}
        return {**engine, **self.renderer.settings, **self.decoding.deciding}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        """Texts in the order of the samples, each as soon as it is there."""
        for position, example in enumerate(examples):
            prompt, top = self.renderer.prompt(example), int(self.record is not None)
            found = self._asked(example, prompt, max_new_tokens=self.decoding.max_new_tokens, top=top)
            self._seen(example, prompt, [found])
            if self.record:
                append_lines(self.record, [{"id": example.id, **asdict(answered(found))}])
            yield Generated(position, self.renderer.text(prompt.input_ids), self.renderer.answer(found.tokens))

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]:
        """Each label is given as the answer, with its end token. NotTold for labels whose tokens are pieces of
        characters."""
        ends = [answer_ids(self.renderer, examples[0], label) for label in labels] if examples else []
        for position, example in enumerate(examples):
            prompt = self.renderer.prompt(example)
            found = [self._asked(example, prompt, force=end, reuse=number > 0) for number, end in enumerate(ends)]
            self._seen(example, prompt, found)
            sums = {label: sum(one.logprobs) for label, one in zip(labels, found, strict=True)}
            yield LabelScores(position, self.renderer.text(prompt.input_ids), sums)

    def answers(self) -> dict[str, Answered]:
        """Recorded answers by id, earlier runs included; the last record of an item counts."""
        rows = read_lines(self.record, "an answer", dict) if self.record else ()
        return {row.pop("id"): Answered(**row) for row in rows}

    def _asked(self, example: Example, prompt: Rendered, **how: Any) -> Completion:
        if not prompt.images:
            return self.runtime.complete(prompt.input_ids, **how)
        text = self.renderer.prompt_text(example, MARKER)
        return self.runtime.complete(text, [self._picture(reference) for reference in prompt.images], **how)

    def _picture(self, reference: str) -> bytes:
        assert self.renderer.sight is not None
        image = self.renderer.sight.reader.open(reference)
        return self.target.png(image) if self.target else encoded(image, "PNG")

    def _seen(self, example: Example, prompt: Rendered, found: Sequence[Completion]) -> None:
        self.latencies[example.id] = sum(one.seconds for one in found)
        if found and found[0].prompt_tokens != len(prompt.input_ids):
            self.unlike[example.id] = (len(prompt.input_ids), found[0].prompt_tokens)


@dataclass(frozen=True)
class Answered:
    """seconds: of the request. confidence: probability of the whole answer, its end token included; None where the
    runtime does not tell it. tokens: generated. prompt_tokens: read."""

    seconds: float
    confidence: float | None
    tokens: int
    prompt_tokens: int


def answered(completion: Completion) -> Answered:
    sure = math.exp(sum(completion.logprobs)) if completion.logprobs else None
    return Answered(completion.seconds, sure, len(completion.tokens), completion.prompt_tokens)
