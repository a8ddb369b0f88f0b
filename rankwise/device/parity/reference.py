"""The trained side of the parity ladder: transformers' result for a case, from the image to the answer.

    Case ── Renderer ──▶ prompt ids, spans of images ── model ──▶ greedy answer ── one pass over both ──▶ log p

    reference = HFReference(load_model(merged, torch.float32), renderer)
    expected = reference.expected(case)           # computed once and kept

Anything with `expected(case) -> Expected` is a reference: stored ("golden") values are one too.

    Observed: the same case on both sides, what the reference expects and what the runtime did
        case ── complete(top=k) ───────────────▶ free: the runtime's own greedy answer
             ── complete(force=answer, top=k) ─▶ tops: log p at every place of the reference's answer
             ── tokenize, part by part ────────▶ text_ids: what stands around the pictures

Where the runtime's own answer is the reference's, it was forced along it already, and is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig

from rankwise.data.dataset import seen
from rankwise.data.render import Rendered, Renderer
from rankwise.data.template import joined, without_images
from rankwise.device.llama.client import REPLACED, NotTold, Refusal
from rankwise.device.llama.runtime import Completion, Runtime
from rankwise.device.parity.cases import Case
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.evaluate.likelihood import answer_ids, append_ids, forced_log_probs

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]
MOST_IDS = 3  # cases that a reason names


@dataclass(frozen=True)
class Expected:
    """Reference values of one case.

    pixels: (height, width, 3) of each picture as the device gives it to the model. tiles: (frames, height, width) that
    the processor cuts each one into. ids: of the prompt, pictures expanded. expansions: ids that stand for each one,
    delimiters included; image_id: the one that a picture's embeddings replace. answer: ids that both sides are forced
    along, an end token last where one came; greedy: it is the model's own. log_probs: (answer, vocabulary) float32 in
    nats; NaN where not known. text: of the answer. end_ids: ids that end an answer. begin_id: BOS. template: a
    conversation and the text that the chat template makes of it; None where no template makes the prompts.
    template_kwargs: the variables that it was given. embeddings: (image tokens, width) of the pictures, where they were
    asked for.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    log_probs: Tensor
    text: str
    end_ids: tuple[int, ...]
    greedy: bool = True
    pixels: tuple[Pixels, ...] = ()
    tiles: tuple[tuple[int, int, int], ...] = ()
    expansions: tuple[tuple[int, ...], ...] = ()
    image_id: int | None = None
    begin_id: int | None = None
    template: tuple[Sequence[Mapping[str, Any]], str] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Rows | None = None

    @property
    def image_tokens(self) -> int:
        """Embeddings of pictures in the prompt."""
        return self.ids.count(self.image_id) if self.image_id is not None else 0

    @property
    def span(self) -> int:
        """Tokens in place of all pictures, delimiters included."""
        return sum(map(len, self.expansions))

    @property
    def written(self) -> list[int]:
        """The prompt's ids without those that embeddings replace."""
        return [token for token in self.ids if token != self.image_id]


class Reference(Protocol):
    """Protocol: gives the reference values of a case."""

    def expected(self, case: Case) -> Expected: ...


@dataclass(frozen=True)
class HFReference:
    """A transformers model with the renderer that its training used; float32 for a reference to trust.

    max_new_tokens: longest greedy answer. embeds: keep the pictures' embeddings too. Values are kept, so that several
    runtimes are compared with one run.
    """

    model: Any
    renderer: Renderer
    max_new_tokens: int = 32
    embeds: bool = False
    _known: dict[str, Expected] = field(default_factory=dict, repr=False, compare=False)

    def expected(self, case: Case) -> Expected:
        """See `Expected`. DataError where the sample cannot be rendered."""
        if case.id not in self._known:
            self._known[case.id] = self._made(case)
        return self._known[case.id]

    def _made(self, case: Case) -> Expected:
        rendered = self.renderer.prompt(case.example)
        answer = answer_ids(self.renderer, case.example, case.answer) if case.answer else self.greedy(rendered)
        return Expected(
            ids=tuple(rendered.input_ids),
            answer=tuple(answer),
            log_probs=forced(self.model, self.renderer, [rendered], [answer])[0],
            text=self.renderer.answer(answer),
            end_ids=self.renderer.end_ids,
            greedy=case.answer is None,
            begin_id=self.renderer.tokenizer.bos_token_id,
            template=self._template(case),
            template_kwargs=self.renderer.template.kwargs if self.renderer.style == "chat" else {},
            embeddings=embedded(self.model, self.renderer, rendered) if self.embeds else None,
            **self._seen(rendered.images),
        )

    def _seen(self, images: Sequence[str]) -> dict[str, Any]:
        """The processor's output for the images."""
        sight = self.renderer.sight
        if sight is None:
            return {}
        encode = self.renderer.tokenizer
        texts = sight.expansions(images)
        return {
            "pixels": tuple(np.asarray(sight.reader.open(reference)) for reference in images),
            "tiles": tuple(frames(sight.inputs([[reference]])) for reference in images),
            "expansions": tuple(tuple(encode(text, add_special_tokens=False)["input_ids"]) for text in texts),
            "image_id": sight.placeholder_id,
        }

    def _template(self, case: Case) -> tuple[Sequence[Mapping[str, Any]], str] | None:
        """The conversation without its pictures, and what the model's template makes of it."""
        if self.renderer.style != "chat":
            return None
        bare = without_images(case.example)
        said = [{"role": turn.role, "content": turn.text} for turn in joined(bare)[:-1]]
        return said, self.renderer.template.prompt(bare)

    @torch.inference_mode()
    def greedy(self, rendered: Rendered) -> list[int]:
        """Ids of the greedy answer, its end token included, alone in its batch."""
        inputs = inputs_of(self.model, self.renderer, rendered)
        output = self.model.generate(**inputs, generation_config=self._decoding())
        found: list[int] = output[0, len(rendered.input_ids) :].tolist()
        return found

    def _decoding(self) -> GenerationConfig:
        """All that shapes the text is given, or generate() would fill it in from the model's own defaults."""
        end_ids = list(self.renderer.end_ids)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
        )


def frames(inputs: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(frames, height, width) of one picture's pixel values; (1, patches, values) where a family hands over patches."""
    pixels = inputs["pixel_values"]
    flat = pixels.reshape(-1, *pixels.shape[-3:]) if pixels.dim() > 3 else pixels[None]
    return int(flat.shape[0]), int(flat.shape[-2]), int(flat.shape[-1])


def forced(
    model: Any, renderer: Renderer, prompts: Sequence[Rendered], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """For every prompt with its answer: (answer, vocabulary) float32, log p of each token at each of its places."""
    rows = [append_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return forced_log_probs(model, renderer.sight, rows, fill=renderer.end_ids[0])


def inputs_of(model: Any, renderer: Renderer, rendered: Rendered) -> dict[str, Tensor]:
    """What the model takes of one prompt, an answer behind it or none."""
    ids, labels = torch.tensor([rendered.input_ids]), torch.tensor([rendered.labels])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= seen(renderer.sight, ids, [rendered.images], labels)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


@torch.inference_mode()
def embedded(model: Any, renderer: Renderer, rendered: Rendered) -> Rows | None:
    """(image tokens, width) of a prompt's pictures: what stands at their tokens before the first layer. None for a
    prompt without."""
    if renderer.sight is None or not rendered.images:
        return None
    inputs = inputs_of(model, renderer, rendered)
    with _first_inputs(model) as found:
        model(**inputs)
    rows: Rows = found[0][0, inputs["input_ids"][0] == renderer.sight.placeholder_id].float().cpu().numpy()
    return rows


@contextmanager
def _first_inputs(model: Any) -> Iterator[list[Any]]:
    """What the language model is given, as its calls come."""
    found: list[Any] = []

    def keep(_: Any, __: Any, given: dict[str, Any]) -> None:
        found.append(given["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def distance(found: Rows, expected: Rows) -> float:
    """Relative (root mean square); infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@dataclass(frozen=True)
class Observed:
    """What was seen of one case. refused: why the runtime did not take it; `free` is then None.

    text_ids: ids of the prompt's text parts as the runtime cuts them, its own BOS included, pictures left out. tops:
    token → log p at the places of the reference's answer; fewer than these where the runtime ends an answer inside it.
    wanted: the expected ids, pictures' own left out, as the runtime writes them. embeddings: (tokens, width) of all the
    case's pictures; None where nothing can tell them. handed: what the app says it sent, picture by picture (pixels, or
    a hash of them); empty where it says nothing. template: the reference's prompt of a conversation and what the GGUF's
    chat template makes of it, without BOS. by_app: an app asked, and not we: `case.images` were sent by nobody. ids:
    the prompt's as the app says, pictures laid out; None where it does not.
    """

    case: Case
    expected: Expected
    text_ids: tuple[tuple[int, ...], ...]
    wanted: str
    free: Completion | None = None
    tops: tuple[Mapping[int, float], ...] = ()
    refused: str = ""
    embeddings: Rows | None = None
    handed: tuple[Pixels | str | None, ...] = ()
    template: tuple[str, str] | None = None
    by_app: bool = False
    ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, expected: Expected, runtime: Runtime, case: Case, top: int) -> Observed:
        seen = cls(
            case,
            expected,
            text_ids(runtime, case),
            runtime.detokenize(expected.written),
            template=templated(expected, runtime),
        )
        try:
            free = runtime.complete(case.prompt, case.images, max_new_tokens=len(expected.answer) + 1, top=top)
        except (DataError, UsageError, Refusal) as error:
            return replace(seen, refused=str(error))
        return replace(seen, free=free, tops=forced_tops(expected, runtime, case, free, top))

    @property
    def tells_prompt(self) -> bool:
        """Whether it is known what the runtime read."""
        return not self.refused and (not self.by_app or self.ids is not None)

    @property
    def whole_ids(self) -> list[int]:
        """The prompt as the runtime reads it, with the pictures laid out as the reference has them."""
        if self.ids is not None:
            return list(self.ids)
        found = list(self.text_ids[0])
        for expansion, part in zip(self.expected.expansions, self.text_ids[1:], strict=False):
            found += [*expansion, *part]
        return found

    @property
    def span(self) -> int:
        """Tokens that the runtime put in place of all pictures."""
        if self.ids is not None:  # of which the embeddings can be told from the text
            return self.expected.span + self.ids.count(self.expected.image_id) - self.expected.image_tokens
        return self.free.prompt_tokens - sum(map(len, self.text_ids)) if self.free else 0


def templated(expected: Expected, runtime: Runtime) -> tuple[str, str] | None:
    """A conversation's prompt by the reference's template and by the GGUF's, without BOS."""
    if expected.template is None:
        return None
    (messages, text), begin = expected.template, runtime.info.begin_text
    return text.removeprefix(begin), runtime.apply_template(messages, expected.template_kwargs).removeprefix(begin)


def forced_tops(
    expected: Expected, runtime: Runtime, case: Case, free: Completion, top: int
) -> tuple[Mapping[int, float], ...]:
    """log p along the reference's answer, as far as the runtime tells: not of pieces of characters and what follows
    them. Where it ends answers with another token, no farther than one place behind what its own answer shares."""
    answer, shared = expected.answer, common(free.tokens, expected.answer)
    if shared == len(answer) and free.top:
        return free.top[:shared]
    whole = answer[: whole_characters(answer, runtime.detokenize)]
    if not whole:
        return ()
    try:
        return runtime.complete(case.prompt, case.images, force=whole, top=top).top
    except NotTold:
        return ()
    except ServiceError:
        runtime.tokenize("a")  # raises where the server is gone, which is another matter
        return free.top[: shared + 1]


def whole_characters(answer: Sequence[int], detokenize: Callable[[Sequence[int]], str]) -> int:
    """How many of the ids come before the first that is a piece of a character, which has no text of its own."""
    pieces = (number for number, token in enumerate(answer) if REPLACED in detokenize([token]))
    return next(pieces, len(answer))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def text_ids(runtime: Runtime, case: Case) -> tuple[tuple[int, ...], ...]:
    """The prompt's text around its pictures as the runtime reads it: special tokens parsed, BOS before the first part
    where it puts one by itself."""
    info = runtime.info
    text = case.prompt.removeprefix(info.begin_text) if info.begin_text else case.prompt
    parts = text.split(case.marker)
    ids = [runtime.tokenize(part, add_special=not number) if part else [] for number, part in enumerate(parts)]
    if not parts[0] and info.begin_id is not None:
        ids[0] = [info.begin_id]
    return tuple(map(tuple, ids))


def named(cases: Sequence[Observed]) -> str:
    """3 cases (a, b, c)"""
    ids = [one.case.id for one in cases]
    shown = ", ".join(ids[:MOST_IDS]) + (", …" if len(ids) > MOST_IDS else "")
    return f"{len(ids)} case{'s' if len(ids) != 1 else ''} ({shown})"
