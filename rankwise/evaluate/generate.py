"""Engines: from samples to generated texts, or to the log-likelihood of each label.

Any engine that is a `Generator` will do; `HFGenerator` is the one of transformers models.

    Example* ── generate ─────▶ Generated*     (predictions.py records them one by one)
    Example* ── label_scores ─▶ LabelScores*   (classify.py chooses the likeliest label)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rankwise.data.dataset import Collator, check_samples, pad, seen
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import batch_losses, prompt_of, render_answers
from rankwise.files.processes import announce, process_index
from rankwise.options.field import option
from rankwise.options.sections import GenerationSection

DECIDING = "max_new_tokens do_sample temperature top_p num_beams length_penalty seed".split()


@dataclass(frozen=True)
class GenerationSettings(GenerationSection):
    """Decoding, and in which batches. Greedy unless `do_sample` or `num_beams` says otherwise; top_k never cuts.

    batch_size and length_sorted (longest prompts first) decide the speed, not the texts.
    """

    batch_size: int = option(16, least=1, help="prompts per step")
    seed: int = 42
    length_sorted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise UsageError("--temperature and --top_p need --do_sample")

    @property
    def deciding(self) -> dict[str, Any]:
        """Settings that decide the texts: texts of other settings must not be mixed in."""
        return {name: getattr(self, name) for name in DECIDING}

    def order(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Positions in the order of work. Longest first: rows of a batch are alike, so little of it is padding, and
        what does not fit the memory shows at once."""
        positions = range(len(prompts))
        return sorted(positions, key=lambda p: -len(prompts[p])) if self.length_sorted else list(positions)


@dataclass(frozen=True)
class Generated:
    """One text as it is ready: the position of its sample, the prompt and the text; for a label that was chosen by
    its likelihood, the log-likelihoods of all labels."""

    position: int
    prompt: str
    text: str
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class LabelScores:
    """Label → log p(label and the end token behind it | prompt) in nats, for the sample at `position`."""

    position: int
    prompt: str
    log_likelihoods: dict[str, float]


class Answering(Protocol):
    """Engine: a text for each sample, in any order. `settings`: all that decides the texts, as JSON values."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]: ...


class Generator(Answering, Protocol):
    """An engine: it generates, and it says how likely given labels are, in any order too. Its prompts are the
    renderer's."""

    @property
    def renderer(self) -> Renderer: ...

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]: ...


@dataclass(frozen=True)
class HFGenerator:
    """A decoder-only transformers (or PEFT) model. Prompts are padded on the left, whatever the tokenizer's side.

    The renderer's `reserve` should be `settings.max_new_tokens`, so that prompt and answer fit the model together.
    """

    model: PreTrainedModel
    renderer: Renderer
    decoding: GenerationSettings = GenerationSettings()

    def __post_init__(self) -> None:
        if self.model.config.is_encoder_decoder:
            raise UsageError(f"{type(self.model).__name__} is an encoder-decoder model; only decoders are supported")

    @property
    def settings(self) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"engine": "transformers", "dtype": dtype, **self.renderer.settings, **self.decoding.deciding}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        """Greedy, sampled or beam-searched texts, batch by batch in the order of the settings."""
        prompts = [self.renderer.prompt(example) for example in examples]
        if self.decoding.num_beams > 1 and any(prompt.images for prompt in prompts):
            raise UsageError("beam search mixes up the images of a batch in most model families; leave --num_beams out")
        order = self.decoding.order([prompt.input_ids for prompt in prompts])
        with _evaluating(self.model), _seeded(self.decoding.seed, self._device):
            for start in range(0, len(order), self.decoding.batch_size):
                batch = order[start : start + self.decoding.batch_size]
                for position, ids in zip(batch, self._batch([prompts[p] for p in batch]), strict=True):
                    prompt = self.renderer.text(prompts[position].input_ids)
                    yield Generated(position, prompt, self.renderer.answer(ids))

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]:
        """A forward pass over prompt and label for every pair of them; all labels of a sample are in one batch.

        The renderer's `reserve` should be the longest label's tokens, its end token included.
        """
        rows = render_answers(self.renderer, examples, labels)
        order = self.decoding.order([group[0].input_ids for group in rows])
        step = max(1, self.decoding.batch_size // len(labels))
        with _evaluating(self.model):
            for start in range(0, len(order), step):
                batch = order[start : start + step]
                sums = self._log_likelihoods([row for position in batch for row in rows[position]])
                for number, position in enumerate(batch):
                    values = sums[number * len(labels) : (number + 1) * len(labels)]
                    prompt = self.renderer.text(prompt_of(rows[position][0]))
                    yield LabelScores(position, prompt, dict(zip(labels, values, strict=True)))

    @torch.inference_mode()
    def _log_likelihoods(self, rows: Sequence[Rendered]) -> list[float]:
        batch = Collator.of(self.renderer.tokenizer, sight=self.renderer.sight)([vars(row) for row in rows])
        losses, _ = batch_losses(self.model, batch, self._device)
        return [-loss for loss in losses.tolist()]

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Rendered]) -> list[list[int]]:
        rows = [prompt.input_ids for prompt in prompts]
        width = max(map(len, rows))
        ids = pad(rows, width, self._pad_id, left=True)
        mask = pad([[1] * len(row) for row in rows], width, 0, left=True)
        assert bool(mask[:, -1].all()), "decoder-only models need their padding on the left"
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= seen(self.renderer.sight, ids, [prompt.images for prompt in prompts])
        output: Tensor = self.model.generate(
            **{name: value.to(self._device) for name, value in inputs.items()}, generation_config=self._configuration()
        )
        generated: list[list[int]] = output[:, width:].tolist()
        return generated

    @property
    def _pad_id(self) -> int:
        pad_id = self.renderer.tokenizer.pad_token_id
        return self.renderer.end_ids[0] if pad_id is None else pad_id

    def _configuration(self) -> GenerationConfig:
        """All that shapes the text is given, or generate() would fill it in from the model's own defaults."""
        return GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            do_sample=self.decoding.do_sample,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            top_k=0 if self.decoding.do_sample else 50,  # 50 is "unset" to greedy search
            num_beams=self.decoding.num_beams,
            length_penalty=self.decoding.length_penalty,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=list(self.renderer.end_ids),
            pad_token_id=self._pad_id,
        )


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def fitting(examples: Sequence[Example], renderer: Renderer) -> list[Example]:
    """The items whose prompts fit; the others are counted aloud."""
    checked = check_samples(examples, renderer, prompts=True)
    for note in checked.notes():
        announce(note)
    return [examples[index] for index in checked.usable]


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one; of several processes each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch here")
    if name == "cuda" and process_index()[1] > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device is auto, cpu or cuda, got {name}") from error
