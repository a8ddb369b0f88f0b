"""From turns to text: which text surrounds each answer, in the sections form or as the texts alone.

A layout holds texts only; `render` makes tokens of it, piece by piece. Chat templates make layouts in `chat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.errors import DataError

SLOT = re.compile(rf"\n?{IMAGE_SLOT}\n?")  # a line break beside a slot parts marker and text, and is no part of either
HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Layout:
    """Texts in order: before[0] answers[0] end before[1] answers[1] end …

    end: the text of the end token behind each answer, learnt with it. Image tokens stand in the texts before answers,
    one for each image. in_context: an answer is tokenized together with what stands before it, as chat templates are;
    else apart from it, so that its ids are the same behind every prompt.
    """

    before: tuple[str, ...]
    answers: tuple[str, ...]
    end: str
    in_context: bool = False


def without_images(example: Example) -> Example:
    """The sample as a text-only run sees it: image slots cut out of its texts."""
    if not example.images:
        return example
    turns = tuple(replace(turn, text=turn.text.replace(IMAGE_SLOT, "").strip()) for turn in example.turns)
    return replace(example, turns=turns, images=())


def sections(example: Example, end: str) -> Layout:
    """Headed sections with a blank line between, the answer last, `end` (the end token) after each earlier answer."""
    before, answers, text = [], [], ""
    for turn in example.turns:
        text += f"{heading(turn)}\n"
        if turn.role == "assistant" and turn.trained:
            before.append(text)
            answers.append(turn.text)
            text = "\n\n"
        else:
            text += f"{turn.text}{end if turn.role == 'assistant' else ''}\n\n"
    return Layout(tuple(before), tuple(answers), end)


def raw(example: Example, image_token: str | None, end: str) -> Layout:
    """The turns' texts and nothing else, an answer behind a space, `end` after each earlier answer: what an app without
    a chat template sends."""
    before, answers, text, parted = [], [], "", ""
    for turn in example.turns:
        if turn.role == "assistant" and turn.trained:
            before.append(text)
            answers.append(f" {turn.text}")
            text, parted = "", ""
        elif turn.role == "assistant":
            text, parted = f"{text} {turn.text}{end}", ""
        else:
            text += parted + turn.text.replace(IMAGE_SLOT, IMAGE_SLOT if image_token is None else image_token)
            parted = "\n"
    return Layout(tuple(before), tuple(answers), end)


def prefixed(example: Example, image_token: str, end: str) -> Layout:
    """One prompt and one answer, nothing between them: the processor writes what parts them (PaliGemma). A line break
    beside an image's slot is none of the prompt's. DataError for other rows."""
    *asked, answer = example.turns
    if answer.role != "assistant" or any(turn.role == "assistant" for turn in asked):
        raise DataError(f"sample {example.id}: the model takes one prompt and one answer, and this has several turns")
    prompt = "\n".join(SLOT.sub(lambda _: image_token, turn.text) for turn in asked)
    return Layout((prompt,), (answer.text,), end)


def heading(turn: Turn) -> str:
    return f"### {turn.heading or HEADINGS[turn.role]}:"


def joined(example: Example) -> list[Turn]:
    """The turns as a conversation has them: the sections of one prompt are one turn, each under its heading."""
    roles = [turn.role for turn in example.turns]
    if all(one != other or one == "assistant" for one, other in pairwise(roles)):
        return list(example.turns)
    turns: list[Turn] = []
    for role, group in groupby(example.turns, key=lambda turn: turn.role):
        said = list(group)
        if role == "assistant" or len(said) == 1:
            turns += said
        else:
            turns.append(Turn(role, "\n\n".join(f"{heading(turn)}\n{turn.text}" for turn in said)))
    return turns
