"""From samples to generated texts, recorded one by one so that a killed evaluation goes on where it stopped.

Any engine that is a `Generator` will do; `HFGenerator` is the one of transformers models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rankwise.data import Example, Renderer
from rankwise.data.collate import pad
from rankwise.errors import UsageError


@dataclass(frozen=True)
class GenerationSettings:
    """Decoding. Greedy unless `do_sample` or `num_beams` says otherwise; top_k never cuts."""

    max_new_tokens: int = 128
    batch_size: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_beams"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.do_sample and (self.temperature <= 0 or not 0 < self.top_p <= 1):
            raise UsageError("sampling needs --temperature above 0 and --top_p above 0 and at most 1")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise UsageError("--temperature and --top_p act on sampling only; add --do_sample")


@dataclass(frozen=True)
class Generated:
    """One text as it is ready: the position of its sample, the prompt and the text."""

    position: int
    prompt: str
    text: str


class Generator(Protocol):
    """An engine: samples → texts, in any order. `settings` holds all that decides the texts, as JSON values."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]: ...


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
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"engine": "transformers", "dtype": dtype, **self.renderer.settings, **decoding}

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        """Longest prompts first: what does not fit the memory shows at once, and rows of a batch are alike."""
        prompts = [self.renderer.prompt_ids(example) for example in examples]
        order = sorted(range(len(prompts)), key=lambda position: -len(prompts[position]))
        with _evaluating(self.model), _seeded(self.decoding.seed, self._device):
            for start in range(0, len(order), self.decoding.batch_size):
                batch = order[start : start + self.decoding.batch_size]
                for position, ids in zip(batch, self._batch([prompts[p] for p in batch]), strict=True):
                    prompt = self.renderer.text(prompts[position])
                    yield Generated(position, prompt, self.renderer.answer(ids))

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = pad(prompts, width, self._pad_id, left=True)
        mask = pad([[1] * len(prompt) for prompt in prompts], width, 0, left=True)
        assert bool(mask[:, -1].all()), "decoder-only models need their padding on the left"
        output: Tensor = self.model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._configuration(),
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
