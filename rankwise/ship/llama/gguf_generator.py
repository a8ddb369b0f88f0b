"""A GGUF as an engine of evaluation: the renderer's prompts, llama.cpp's answers and label scores.

    Example ── Renderer ──▶ ids (no image) ───────────────┐
                       └──▶ text with markers, PNG images ┴── Runtime ──▶ Generated, LabelScores

What it gives is comparable with `HFGenerator`, item by item: `score.tasks.evaluate` takes either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.data.device import MARKER, DeviceTarget, encoded
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.errors import UsageError
from rankwise.evaluate.generate import Generated, GenerationSettings, LabelScores
from rankwise.evaluate.likelihood import answer_ids
from rankwise.ship.llama.runtime import Completion, Runtime


@dataclass(frozen=True)
class GGUFGenerator:
    """One request at a time, as a phone is asked. Greedy.

    target: what the device does to an image before the model's own processor; None where the renderer's reader gives
    the device's pixels already. latencies: seconds of each sample's request by its id, of all labels' requests for
    label scores. unlike: id → (tokens that training's prompt has, tokens that the runtime read) where they differ,
    which the parity ladder explains; a caller must say so.
    """

    runtime: Runtime
    renderer: Renderer
    decoding: GenerationSettings = GenerationSettings()
    target: DeviceTarget | None = None
    latencies: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    unlike: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.decoding.do_sample or self.decoding.num_beams > 1:
            raise UsageError("a GGUF answers greedily here, as on the device; leave --do_sample and --num_beams out")

    @property
    def settings(self) -> dict[str, Any]:
        info = self.runtime.info
        engine = {"engine": "llama.cpp", "build": info.build, "gguf": Path(info.model).name}
        return {**engine, **self.renderer.settings, **self.decoding.deciding}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        """Texts in the order of the samples, each as soon as it is there."""
        for position, example in enumerate(examples):
            prompt = self.renderer.prompt(example)
            found = self._asked(example, prompt, max_new_tokens=self.decoding.max_new_tokens)
            self._seen(example, prompt, [found])
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
