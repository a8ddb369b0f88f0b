"""A runtime that is transformers itself: a llama.cpp without any difference, and what can be set wrong in it.

HFRuntime(model, renderer)                     agrees on every rung
HFRuntime(model, renderer, begin=3)            puts a BOS before every prompt, as llama.cpp does by default
HFRuntime(other_model, renderer)               another model's weights
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from rankwise.data.device import MARKER
from rankwise.data.example import Turn
from rankwise.data.render import Renderer
from rankwise.device.llama.runtime import Completion, RuntimeInfo
from rankwise.device.parity.floor import top_of
from rankwise.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures where a reader of files stands."""

    images: tuple[Image.Image, ...]

    def open(self, reference: str) -> Image.Image:
        return self.images[int(reference)]

    def size(self, reference: str) -> tuple[int, int]:
        return self.images[int(reference)].size


@dataclass(frozen=True)
class HFRuntime:
    """end_ids: where it stops; None for the renderer's. template: what its chat template appends, to differ."""

    model: Any
    renderer: Renderer
    begin: int | None = None
    end_ids: tuple[int, ...] | None = None
    template: str = ""

    @property
    def info(self) -> RuntimeInfo:
        text = "" if self.begin is None else self.detokenize([self.begin])
        return RuntimeInfo("transformers", MARKER, "", 512, self.renderer.sight is not None, self.begin, text)

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        ids = self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.begin, *ids] if add_special and self.begin is not None else list(ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.renderer.text(ids)

    def apply_template(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        turns = [Turn(one["role"], one["content"]) for one in messages]
        return self.renderer.template.text(turns, generate=True) + self.template

    def memory(self) -> None:
        return None

    @torch.inference_mode()
    def complete(
        self,
        prompt: str | Sequence[int],
        images: Sequence[bytes] = (),
        *,
        max_new_tokens: int = 32,
        top: int = 0,
        grammar: str | None = None,
        force: Sequence[int] | str | None = None,
        reuse: bool = False,
    ) -> Completion:
        ids, inputs = self.read(prompt, images)
        ends = self.end_ids or self.renderer.end_ids
        answer = [] if force is None else [int(token) for token in force]
        whole = torch.tensor([ids + answer[:-1]])
        row = inputs | (self.renderer.sight.row_inputs(whole) if self.renderer.sight else {})
        found = self.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=True, **row)
        rows = found.logits[0, len(ids) - 1 :]
        while force is None and (answer := [*answer, int(rows[-1].argmax())])[-1] not in ends:
            if len(answer) == max_new_tokens:
                break
            mask, last = torch.ones(1, len(ids) + len(answer)), torch.tensor([answer[-1:]])
            kept = {"past_key_values": found.past_key_values, "use_cache": True}
            found = self.model(input_ids=last, attention_mask=mask, **kept)
            rows = torch.cat([rows, found.logits[0]])
        tops = top_of(rows.float().log_softmax(-1), max(top, 1))
        logprobs = tuple(found.get(token, -100.0) for found, token in zip(tops, answer, strict=True))
        text, written = self.renderer.answer(answer), [token for token in ids if token != self._image_id]
        shown = self.detokenize(written)
        return Completion(text, tuple(answer), len(ids), shown, 0.01, answer[-1] in ends, logprobs, tuple(tops))

    @property
    def _image_id(self) -> int:
        return self.renderer.sight.placeholder_id if self.renderer.sight else -1

    def read(self, prompt: str | Sequence[int], images: Sequence[bytes]) -> tuple[list[int], dict[str, Any]]:
        """A prompt's ids, and what the model takes beside them."""
        if not isinstance(prompt, str):
            return list(prompt), {}
        if prompt.count(MARKER) != len(images):
            raise DataError(f"{prompt.count(MARKER)} slots and {len(images)} images")
        begin = self.info.begin_text
        text = prompt.removeprefix(begin) if begin else prompt
        if not images:
            return self.tokenize(text, add_special=True), {}
        assert self.renderer.sight
        pictures = Pictures(tuple(Image.open(io.BytesIO(image)).convert("RGB") for image in images))
        sight = replace(self.renderer.sight, reader=pictures)
        names = [str(number) for number in range(len(images))]
        for name in names:
            text = text.replace(MARKER, sight.expansions([name])[0], 1)
        return self.tokenize(text, add_special=True), sight.inputs([names])
