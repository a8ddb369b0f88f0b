"""The matrix can turn red: with the product broken in one place, the question about it says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families.subject import Family, Product, Subject
from families.talks import TALKS, drawn, written
from families.trials import QUESTIONS

from rankwise.data import dataset, render, vision_inputs
from rankwise.data.render import Rendered, Renderer
from rankwise.evaluate import generate
from rankwise.merge import write
from rankwise.models import sites

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]


def padded_on_the_left(patch: Patch) -> None:
    whole = dataset.pad
    patch.setattr(dataset, "pad", lambda *rows, **_: whole(*rows, left=True))


def prompts_padded_on_the_right(patch: Patch) -> None:
    whole = generate.pad

    def pad(rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False) -> torch.Tensor:
        mask = set(map(tuple, rows)) <= {(1,) * len(row) for row in rows}
        return whole(rows, width, value, left=mask)  # a mask for the wrong side

    patch.setattr(generate, "pad", pad)


def an_image_token_more(patch: Patch) -> None:
    """At the end of what stands for each image."""
    whole = Renderer.prompt

    def prompt(self: Renderer, example: Any) -> Rendered:
        found = whole(self, example)
        token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        place = found.input_ids.index(token) if token in found.input_ids else 0
        return replace(found, input_ids=[*found.input_ids[:place], token, *found.input_ids[place:]])

    patch.setattr(Renderer, "prompt", prompt)


def images_in_the_other_order(patch: Patch) -> None:
    whole = vision_inputs.Sight.pixels
    patch.setattr(vision_inputs.Sight, "pixels", lambda self, rows: whole(self, [row[::-1] for row in rows]))


def the_question_is_learnt_too(patch: Patch) -> None:
    whole = Renderer.training

    def training(self: Renderer, example: Any) -> Rendered:
        found = whole(self, example)
        return replace(found, labels=list(found.input_ids))

    patch.setattr(Renderer, "training", training)


def the_end_token_is_not_learnt(patch: Patch) -> None:
    whole = Renderer.training

    def training(self: Renderer, example: Any) -> Rendered:
        found = whole(self, example)
        ends = set(self.end_ids)
        return replace(found, labels=[render.IGNORED if label in ends else label for label in found.labels])

    patch.setattr(Renderer, "training", training)


def no_tower_is_told_apart(patch: Patch) -> None:
    patch.setattr(sites, "tower_of", lambda *_: "language")


def merged_at_half_the_scale(patch: Patch) -> None:
    whole = write.change_weight

    def merged(plan: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + (whole(plan, name, weight) - weight) / 2

    patch.setattr(write, "change_weight", merged)


FAULTS: tuple[tuple[str, str, Break], ...] = (
    ("one image", "qwen2_5_vl", an_image_token_more),
    ("two images", "llava_next", images_in_the_other_order),
    ("turns", "qwen2_5_vl", images_in_the_other_order),
    ("labels", "llava", the_question_is_learnt_too),
    ("labels", "qwen2_5_vl", the_end_token_is_not_learnt),
    ("forward", "smolvlm", images_in_the_other_order),
    ("batch", "qwen2_5_vl", padded_on_the_left),
    ("batch", "llava", images_in_the_other_order),
    ("generation", "qwen2_5_vl", prompts_padded_on_the_right),
    ("towers", "llava", no_tower_is_told_apart),
    ("train", "llava", the_question_is_learnt_too),
    ("train", "qwen2_5_vl", the_end_token_is_not_learnt),
    ("merge", "llava", merged_at_half_the_scale),
    ("check", "qwen2_5_vl", an_image_token_more),
)


@pytest.fixture(scope="module")
def sides(family_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The families' own sides, which no fault of the product touches."""
    return cache(lambda name: Family(family_models(name), drawn(tmp_path_factory.mktemp(name))))


@pytest.mark.parametrize(("question", "name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fault_of_the_product_is_seen(
    question: str, name: str, fault: Break, sides: Callable[[str], Family], tmp_path: Path, monkeypatch: Patch
) -> None:
    family = sides(name)
    subject = Subject(name, family, Product(family.folder, written(tmp_path / "data", list(TALKS))), tmp_path)
    fault(monkeypatch)
    try:
        said = QUESTIONS[question](subject)
    except Exception as error:  # noqa: BLE001 - a product that breaks is no yes, either
        said = str(error)
    assert said


def test_every_question_has_its_fault() -> None:
    kinds = {"image last", "text only", "system"}  # asked like the other conversations
    assert {question for question, *_ in FAULTS} == QUESTIONS.keys() - kinds
