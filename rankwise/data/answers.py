"""Rules for the answers and image slots of a sample, whatever makes tokens of it."""

from __future__ import annotations

import re
from dataclasses import replace

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.errors import DataError


class NothingToLearn(DataError):
    """Every label of a sample is masked."""


def answers_apart(example: Example) -> list[Example]:
    """One sample for each answer that is learnt: what was said before it, and that answer."""
    turns = example.turns
    learnt = [number for number, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    given = [replace(turn, trained=False) if turn.role == "assistant" else turn for turn in turns]
    return [
        replace(
            example,
            id=f"{example.id}#{count}",
            turns=(*given[:number], turns[number]),
            images=example.images[: sum(turn.text.count(IMAGE_SLOT) for turn in turns[:number])],
        )
        for count, number in enumerate(learnt, 1)
    ]


def check_answer(sample: str, turn: Turn, control: re.Pattern[str]) -> None:
    """NothingToLearn for an empty answer, DataError for one that holds a token which ends or opens turns."""
    if turn.role != "assistant" or not turn.trained:
        return
    if not turn.text.strip():
        raise NothingToLearn(f"sample {sample}: its answer is empty, so all its labels are masked")
    found = control.search(turn.text) or control.search(turn.reasoning)
    if found:
        raise DataError(f"sample {sample}: its answer holds {found[0]}, a control token of the model; take it out")


def check_media(example: Example, tokens: re.Pattern[str]) -> None:
    """DataError where a text holds one of the tokenizer's own tokens for images or videos, or for what is around them:
    outside a slot it stands for nothing."""
    for turn in example.turns:
        if found := tokens.search(turn.text.replace(IMAGE_SLOT, "")):
            raise DataError(
                f"sample {example.id}: its text holds {found[0]}, a token of this model for images or videos; take it "
                "out, or name the image that it stands for"
            )


def check_slots(example: Example, image_token: str) -> None:
    """DataError unless a sample's texts ask for as many images as it has; the model's image token is never text."""
    asked = [turn.text.count(IMAGE_SLOT) for turn in example.turns]
    answered = [count for turn, count in zip(example.turns, asked, strict=True) if turn.role == "assistant"]
    if sum(asked) != len(example.images) or any(answered):
        raise DataError(
            f"sample {example.id}: {sum(asked)} image slots ({IMAGE_SLOT}) in its texts, {sum(answered)} of them in "
            f"answers, and {len(example.images)} images; each image needs one slot, before the last answer"
        )
    if image_token != IMAGE_SLOT and any(image_token in turn.text for turn in example.turns):
        raise DataError(f"sample {example.id}: its text holds {image_token}, which stands for an image in this model")
