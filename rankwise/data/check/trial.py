"""Run a few rows through a vision-language model before it is trained: what `rankwise check` does with a model.

    rows of check ── chosen ──▶ a few ── try_rows(model, renderer, rows) ──▶ Trial: what the model says of them

The model is a cut-down copy with random weights, or the real one: which tokens take an image's features, and what
padding does to a row, is the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rankwise.data.check.comparison import Oracle
from rankwise.data.dataset import Collator
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.data.vision_inputs import CROSSED
from rankwise.errors import UsageError
from rankwise.models.cut_down import Untried
from rankwise.models.vision_features import parts, seeing_part

ROWS, TOKENS = 4, 2500
PADDING = 8  # tokens behind the longest row of the batch
CLOSE = {torch.float32: 2e-3}  # of the largest value; other precisions: LOOSE
LOOSE = 0.1
Row = tuple[Example, Rendered]
MISMATCH = re.compile(r"features.*do(es)? not match|mismatch.*image", re.IGNORECASE)
REFUSALS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Trial:
    """samples: how many rows went through. problems: what is wrong with which. note: what the user should know."""

    samples: int
    problems: tuple[tuple[Example, str], ...] = ()
    note: str = ""


def chosen(by_count: Mapping[int, Sequence[Row]]) -> list[Row]:
    """A few rows, at most `TOKENS` in total: short ones of each number of images first, one without images second."""
    turns = [(place, row) for count, rows in by_count.items() if count for place, row in enumerate(rows)]
    seen = [row for _, row in sorted(turns, key=lambda turn: (turn[0], len(turn[1][1].input_ids)))]
    blind = [*by_count.get(0, ())][:1]
    found = [*seen[:1], *blind, *seen[1:]][:ROWS]
    totals = accumulate(len(row[1].input_ids) for row in found)
    return [row for number, (row, total) in enumerate(zip(found, totals, strict=True)) if not number or total <= TOKENS]


@torch.inference_mode()
def try_rows(model: Any, renderer: Renderer, by_count: Mapping[int, Sequence[Row]], *, sure: bool) -> Trial:
    """Rows through the model, each alone, then in one batch: it must take them, with a placeholder for each feature of
    their images, make of the first what it makes of the processor's own inputs, and the same of all before padding.

    by_count: rows by their number of images. sure: the model is a whole one, so what it does not take is bad; a copy
    may be at fault itself. Untried where it does not run on the processor's own inputs either.
    """
    rows = chosen(by_count)
    problems: list[tuple[Example, str]] = []
    alone: list[tuple[Row, Tensor]] = []
    for row in rows:
        try:
            [states], features = _run(model, renderer, [row])
        except REFUSALS as error:
            reason = f"{type(error).__name__}: {error}"
            if not (sure or MISMATCH.search(reason)) and (not row[1].images or _own(model, renderer, row) is None):
                raise Untried(f"its cut-down copy does not run ({reason})") from error
            problems.append((row[0], f"the model does not take it ({reason})"))
            continue
        alone.append((row, states))
        compared = row[1].images and not any(other.images for (_, other), _ in alone[:-1])
        own = _own(model, renderer, row) if compared else None
        problems += [(row[0], reason) for reason in _wrong(model, row, states, features, own)]
    together, note = _together(model, renderer, [row for row, _ in alone])
    if isinstance(together, str):
        return Trial(len(rows), (*problems, *((row[0], together) for row, _ in alone)))
    for (row, one), other in zip(alone, together, strict=False):
        if (apart := _apart(one, other)) is not None:
            reason = f"in a batch the model makes something else of it (by {apart:.0%}): padding counts"
            problems.append((row[0], reason))
    return Trial(len(rows), tuple(problems), note)


def _together(model: Any, renderer: Renderer, rows: Sequence[Row]) -> tuple[list[Tensor] | str, str]:
    """(states of each row in one batch with padding behind all, or why there is none; a note)."""
    rows = [*rows, *rows][: max(2, len(rows))]
    try:
        return (_run(model, renderer, rows, PADDING)[0], "") if rows else ([], "")
    except UsageError as error:
        return [], str(error)
    except REFUSALS as error:
        return f"the model takes it alone, but not in a batch ({type(error).__name__}: {error})", ""


def _run(model: Any, renderer: Renderer, rows: Sequence[Row], padding: int = 0) -> tuple[list[Tensor], int | None]:
    """(last hidden states of each row without its padding, features of their images) of one batch."""
    samples = [vars(rendered) for _, rendered in rows]
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch = Collator.of(renderer.tokenizer, max(lengths) + padding, renderer.sight)(samples)
    batch.pop("labels")
    with _features(model) as counts:
        states = _states(model, batch)
    features = sum(counts) if counts and CROSSED not in batch else None
    return [states[row, :length] for row, length in enumerate(lengths)], features


def _states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    found: Tensor = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    return found


def _wrong(
    model: Any, row: Row, states: Tensor, features: int | None, own: tuple[list[int], Tensor] | None
) -> Iterator[str]:
    """What is wrong with a row that the model takes. own: ids and states of the processor's own inputs."""
    token, ids = getattr(model.config, "image_token_id", None), row[1].input_ids
    if features is not None and token is not None and ids.count(token) != features:
        yield f"its images have {features} features, and {ids.count(token)} placeholders stand for them"
    if own is None:
        return
    given, theirs = own
    same = next((place for place, pair in enumerate(zip(ids, given, strict=False)) if pair[0] != pair[1]), None)
    if (apart := _apart(states[:same], theirs[:same])) is not None:
        yield f"the model makes something else of it (by {apart:.0%}) than of the processor's own inputs"


def _own(model: Any, renderer: Renderer, row: Row) -> tuple[list[int], Tensor] | None:
    """(ids, states) of one call of the processor; None without a chat template, or where the model does not take it."""
    if renderer.style != "chat" or renderer.sight is None:
        return None
    found = Oracle(renderer).own(row[0])
    inputs = {
        name: value.float() if value.is_floating_point() else value
        for name, value in found.items()
        if name != "labels" and (name in ("input_ids", "attention_mask") or renderer.sight.taken(name))
    }
    try:
        return inputs["input_ids"][0].tolist(), _states(model, inputs)[0]
    except REFUSALS:
        return None


def _apart(one: Tensor, other: Tensor) -> float | None:
    """How far states are from each other, of the largest; None where that is nothing."""
    length = min(len(one), len(other))
    if not length:
        return None
    apart = float((one[:length] - other[:length]).abs().max() / one[:length].abs().max())
    return None if apart <= CLOSE.get(one.dtype, LOOSE) else apart


@contextmanager
def _features(model: Any) -> Iterator[list[int]]:
    """How many features each call of `get_image_features` makes; nothing where a family has no such call."""
    counts: list[int] = []
    try:
        inner = seeing_part(model)
    except UsageError:
        yield counts
        return
    original = inner.get_image_features

    def counting(*args: Any, **named: Any) -> Any:
        found = original(*args, **named)
        if hasattr(found, "pooler_output") and found.pooler_output is not None:
            counts.extend(part.shape[:-1].numel() for part in parts(found))
        return found

    inner.get_image_features = counting
    try:
        yield counts
    finally:
        del inner.get_image_features
