"""From a tuned model, its base and rows to cases: what is asked, and what every hypothesis would answer.

rows ── renderer of training ──▶ prompts, forced answers
tuned, base ── log p at every place of the answers ──▶ the places that tell most (KL from tuned to base)
every hypothesis ── log p at these places of the tokens that tuned or base find likely ──▶ Candidates
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.data.device import MARKER, encoded
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import check_data, read_examples
from rankwise.data.template import SLOT, joined, without_images
from rankwise.device.handoff.cases import IMAGES, HandoffCase, HandoffCases, Place
from rankwise.device.handoff.prompts import other_prompts
from rankwise.device.handoff.variants import WAYS, Asked, Tuning, log_probs, wrong_scales
from rankwise.device.handoff.verdict import Candidates, Hypothesis
from rankwise.device.llama.client import REPLACED
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.generate import fitting, pick_device
from rankwise.evaluate.likelihood import answer_ids
from rankwise.files.adapter import CONFIG_NAME, adapter_files, base_and_adapter
from rankwise.files.atomic import fingerprint, fingerprints, read_object
from rankwise.files.checkpoint import resolve
from rankwise.files.run_folder import without_places
from rankwise.models.adapters import load_adapter
from rankwise.models.depth.encoder import read_depth
from rankwise.models.load import load_config, load_model
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import ModelSection

ITEMS, LONGEST, PLACES = 24, 16, 6  # rows; tokens of an answer that are forced at most; places of one answer
LIKELY = 48  # tokens of each of the two models that are known at a place


@dataclass(frozen=True)
class Models:
    """tuned: the folder as given; base: name; adapter: its folder, None for a merged model."""

    tuned: str
    base: str
    adapter: Path | None

    @classmethod
    def of(cls, config: ValidateConfig) -> Models:
        """UsageError where one of the two is not given."""
        if not config.reference:
            raise UsageError("give the tuned model, an adapter or a merged one, with --reference TUNED")
        base, adapter = base_and_adapter(config.reference, config.base_model)
        if adapter is None and not config.base_model:
            raise UsageError("a merged model does not say what it was made from: give its base with --base_model BASE")
        models = cls(config.reference, base if adapter else str(config.base_model), adapter)
        if read_depth(adapter or resolve(models.tuned)) is not None:
            raise UsageError(
                f"{models.tuned} takes depth, which no other runtime does: compare it by rankwise evaluate"
            )
        return models

    @property
    def name(self) -> str:
        """Where the tuned model's config and tokenizer are."""
        return self.base if self.adapter else self.tuned

    def renderer(self, config: ValidateConfig) -> Renderer:
        places = [self.adapter] if self.adapter else []
        model = ModelSection(model_name=self.name)
        return renderer_for(config.data, model, self.name, load_config(self.name), places, of_others=True)

    def load(self, device: torch.device) -> Tuning:
        """Both, in float32; the base is let go but for what tuning changed."""
        tuned: Any = load_model(self.name, torch.float32)
        settings = read_object(self.adapter / CONFIG_NAME) if self.adapter else {}
        if self.adapter:
            tuned = load_adapter(tuned, self.adapter).merge_and_unload()
        base = load_model(self.base, torch.float32)
        return Tuning.of(tuned.to(device).eval(), base.to(device), wrong_scales(settings), self.tuned)


def prepared(config: ValidateConfig) -> HandoffCases:
    """All cases. DataError where the rows have none, or the two models are one."""
    models = Models.of(config)
    renderer = models.renderer(config)
    check_data(config.data, "validate")
    path = str(config.data.data_path)
    items = read_examples(config.data, path, config.split, sees_images=renderer.sight is not None)
    longest = config.max_new_tokens or LONGEST
    renderer = renderer.leaving(longest)
    examples = fitting(distinct(items.items, config.num_samples or ITEMS), renderer)
    if not examples:
        raise DataError(f"{path}: no items to ask")
    rendered = [renderer.prompt(example) for example in examples]
    asked = [
        Asked(tuple(prompt.input_ids), answer, tuple(range(len(answer))), prompt.images)
        for prompt, answer in zip(rendered, (forced(renderer, one, longest) for one in examples), strict=True)
    ]
    tuning = models.load(pick_device(config.device))
    chosen, likely = telling(tuning, renderer, asked)
    asked = [replace(one, places=places) for one, places in zip(asked, chosen, strict=True)]
    prompts = [one.prompt for one in asked]
    variants = [*of_weights(tuning, prompts), *of_prompts(renderer, examples, prompts)]
    values = []
    for _, rows, way in variants:
        moved = [replace(one, prompt=ids) for one, ids in zip(asked, rows, strict=True)]
        with way:
            values.append(at_tokens(log_probs(tuning.model, renderer.sight, moved), likely))
    numbers = np.repeat(np.arange(len(asked), dtype=np.int32), [len(one.places) for one in asked])
    candidates = Candidates(tuple(one for one, _, _ in variants), numbers, likely, np.stack(values))
    cases, pictures = described(renderer, examples, asked)
    return HandoffCases(
        reference=without_places(models.tuned),
        base=without_places(models.base),
        cases=cases,
        candidates=candidates,
        tokens=texts_of(renderer.tokenizer, likely),
        template_kwargs=renderer.template_kwargs if renderer.style == "chat" else {},
        made_from={"data": fingerprints(items.files), "tuned": tuned_files(models)},
        pictures=pictures,
    )


def distinct(items: Iterable[Example], count: int) -> list[Example]:
    """The first samples of so many prompts: several answers to one question are one row, and no more."""
    found: dict[Any, Example] = {}
    for one in items:
        found.setdefault(one.prompt, one)
        if len(found) == count:
            break
    return list(found.values())


def tuned_files(models: Models) -> str:
    weights = adapter_files(models.adapter)[0] if models.adapter else resolve(models.tuned)
    return fingerprint(weights)


def forced(renderer: Renderer, example: Example, longest: int) -> tuple[int, ...]:
    """The row's answer with its end token, as training sees it, up to so many tokens."""
    return tuple(answer_ids(renderer, example, example.answer)[:longest])


# A hypothesis, its prompts, and the model being so.
Way = tuple[Hypothesis, Sequence[tuple[int, ...]], AbstractContextManager[Any]]


def of_weights(tuning: Tuning, prompts: Sequence[tuple[int, ...]]) -> Iterator[Way]:
    for one, way in WAYS.items():
        yield one, prompts, way(tuning.model)
    for one, share in tuning.variants():
        yield one, prompts, tuning.weighted(share)


def of_prompts(renderer: Renderer, examples: Sequence[Example], prompts: Sequence[tuple[int, ...]]) -> Iterator[Way]:
    for one, rows in other_prompts(renderer, examples, prompts):
        yield one, rows, nullcontext()


def telling(tuning: Tuning, renderer: Renderer, asked: Sequence[Asked]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The places of each answer that are asked, the first one and those where tuned and base differ most; and the
    tokens (P, U) that either of them finds likely there, -1 where there are fewer."""
    tuned = log_probs(tuning.model, renderer.sight, asked)
    with tuning.weighted(lambda _: 0.0):
        base = log_probs(tuning.model, renderer.sight, asked)
    chosen, rows = [], []
    for p, q in zip(tuned, base, strict=True):
        apart = (p.exp() * (p - q)).sum(-1)
        apart[0] = torch.inf
        places = tuple(sorted(apart.argsort(descending=True, stable=True)[:PLACES].tolist()))
        chosen.append(places)
        rows += [union(p[place], q[place]) for place in places]
    width = max(map(len, rows))
    return chosen, np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int32)


def union(*rows: Tensor) -> list[int]:
    """Ids of the LIKELY likeliest tokens of each row (vocabulary,)."""
    found = [token for row in rows for token in row.topk(min(LIKELY, len(row))).indices.tolist()]
    return list(dict.fromkeys(found))


def at_tokens(found: Sequence[Tensor], likely: np.ndarray) -> np.ndarray:
    """(P, U): log p of the known tokens; 0 where there are fewer, which is never read."""
    rows, ids = torch.cat(list(found)), torch.from_numpy(likely).long()
    return torch.where(ids >= 0, rows.gather(1, ids.clamp_min(0)), 0.0).numpy()


def texts_of(tokenizer: Any, likely: np.ndarray) -> dict[int, tuple[str | None, str | None]]:
    """Of every known token: its text behind another token, and alone; None where another token has the same one."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    before, count = len(decoded(tokenizer, [[anchor]])[0]), len(tokenizer)
    behind = [text[before:] for text in decoded(tokenizer, [[anchor, token] for token in range(count)])]
    forms = (behind, decoded(tokenizer, [[token] for token in range(count)]))
    once = [{text for text, number in counts(form).items() if number == 1} for form in forms]
    known = sorted(set(likely.ravel().tolist()) & set(range(count)))
    return {
        token: (
            behind[token] if behind[token] in once[0] else None,
            forms[1][token] if forms[1][token] in once[1] else None,
        )
        for token in known
    }


def decoded(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def counts(texts: Sequence[str]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        found[text] = found.get(text, 0) + 1
    return found


def described(
    renderer: Renderer, examples: Sequence[Example], asked: Sequence[Asked]
) -> tuple[tuple[HandoffCase, ...], dict[str, bytes]]:
    """The cases as they are written, and their pictures."""
    cases, pictures, row = [], dict[str, bytes](), 0
    for number, (example, one) in enumerate(zip(examples, asked, strict=True)):
        text = renderer.prompt_text(example, MARKER)
        begin = "".join(renderer.tokenizer.convert_ids_to_tokens(renderer.encoder.begin))
        text = text.removeprefix(begin) if begin else text
        places = []
        for forced_tokens in one.places:
            ids = [*one.prompt, *one.answer[:forced_tokens]]
            behind = renderer.text(ids)[len(renderer.text(one.prompt)) :]
            same = bool(example.images) or list(renderer.tokenizer(text + behind)["input_ids"]) == ids
            places.append(Place(row, forced_tokens, behind, same and REPLACED not in behind))
            row += 1
        names = [f"{IMAGES}/{number:03d}_{place}.png" for place in range(len(one.images))]
        if renderer.sight:
            shown = zip(names, one.images, strict=True)
            pictures |= {name: encoded(renderer.sight.reader.open(image), "PNG") for name, image in shown}
        messages = (
            tuple(messages_of(example if renderer.sight else without_images(example)))
            if renderer.style == "chat"
            else ()
        )
        cases.append(HandoffCase(example.id, text, one.prompt, one.answer, tuple(places), messages, tuple(names)))
    return tuple(cases), pictures


def messages_of(example: Example) -> list[dict[str, Any]]:
    """The conversation before the answer, as a chat API takes it: texts, or parts where there are pictures."""
    return [{"role": turn.role, "content": parts_of(turn.text)} for turn in joined(example)[:-1]]


def parts_of(text: str) -> str | list[dict[str, Any]]:
    pieces = SLOT.split(text)
    if len(pieces) == 1:
        return text
    said = [[{"type": "text", "text": piece}] if piece else [] for piece in pieces]
    return [part for piece in said for part in ({"type": "image"}, *piece)][1:]
