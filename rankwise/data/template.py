"""Prompt layouts without a chat template, a chat template's text and variables, and image placeholders in texts.

    Example ── sections | raw | prefixed ──▶ Layout(before, answers, end)
    given, or the tokenizer's own ── template_text ──▶ text ── pin_date(kwargs) ──▶ kwargs ── with_date ──▶ as rendered
    "Picture 1: <img>a.jpg</img> or <|image_2|>?" ── found ──▶ Marker(path="a.jpg"), Marker(number=2)

Templates that print today's date (Llama 3.2: "Today Date: 29 Nov 2026") would make another prompt tomorrow. The date of
the first rendering is kept among the variables, so that whoever reads them later makes the same prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.errors import DataError, UsageError

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


NOW, DATE = "strftime_now", "date_string"
CALL = re.compile(rf"{NOW}\(\s*([\"'])(.*?)\1\s*\)")


def template_text(given: str | None) -> str | None:
    """The template that --chat_template names: the content of a file, or the text itself; None for none.

    UsageError where it is neither.
    """
    if given is None or "{%" in given or "{{" in given:
        return given
    path = Path(given)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat_template {given}: neither a readable file nor a Jinja template ({error})") from error


def pin_date(text: str, kwargs: Mapping[str, Any], today: date | None = None) -> dict[str, Any]:
    """The variables with the date that the template prints among them; as they are where it prints none.

    It is `date_string`, in the template's own format, where the template has that variable; elsewhere `strftime_now`
    as YYYY-MM-DD, which `with_date` puts into the text.
    """
    if NOW not in text or {NOW, DATE} & set(kwargs):
        return dict(kwargs)
    today = today or date.today()
    call = CALL.search(text)
    if DATE in text and call:
        return {**kwargs, DATE: today.strftime(call[2])}
    return {**kwargs, NOW: today.isoformat()}


def with_date(text: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(template, variables) as they are rendered: each `strftime_now(format)` replaced by the pinned date.

    UsageError where that is no date.
    """
    if NOW not in kwargs:
        return text, dict(kwargs)
    try:
        day = date.fromisoformat(str(kwargs[NOW]))
    except ValueError as error:
        raise UsageError(f"--chat_template_kwargs: {NOW} must be a date, YYYY-MM-DD; got {kwargs[NOW]!r}") from error
    fixed = CALL.sub(lambda call: json.dumps(day.strftime(call[2])), text)
    return fixed, {name: value for name, value in kwargs.items() if name != NOW}


IMAGE, VIDEO, AUDIO = "image", "video", "audio"
OWN = ("<image>", "<IMAGE>", "<__media__>")  # what docs/data.md asks for: in a row without images, an image is missing
NAMED = re.compile(r"<[Ii]mg>([^<>\n]*)</[Ii]mg>")  # the image's own path stands in it

# Image placeholders of other programs: name in messages (N: it says which image) · what it stands for · pattern. The
# first pattern that fits counts; one that was expanded already (`[IMG][IMG_BREAK]…[IMG_END]`) is one image.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("<img>…</img>", IMAGE, rf"<[Ii]mg>(?:(?:<IMG_CONTEXT>)+|<ImageHere>)</[Ii]mg>|{NAMED.pattern}"),
    ("(<image>./</image>)", IMAGE, r"\(?<image>\./</image>\)?"),
    ("<image>", IMAGE, "|".join(OWN)),
    ("<|image_N|>", IMAGE, r"<\|image_\d{1,3}\|>"),
    ("<image_N>", IMAGE, r"<image[ _-]?\d{1,3}>"),
    ("<|image_pad|>", IMAGE, r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"),
    ("<|IMAGE|>", IMAGE, r"<\|vision_bos\|>(?:<\|IMAGE\|>)+<\|vision_eos\|>|<\|IMAGE\|>"),
    (
        "<|image|>",
        IMAGE,
        r"<\|begin_of_image\|>(?:<\|image\|>)+<\|end_of_image\|>|"
        r"<\|image_start\|>(?:<\|image\|>|<\|patch\|>)+<\|image_end\|>|<\|image\|>",
    ),
    ("<start_of_image>", IMAGE, r"<start_of_image>(?:(?:<image_soft_token>)*<end_of_image>)?|<image_soft_token>"),
    ("[IMG]", IMAGE, r"(?:\[IMG\]|\[IMG_BREAK\])+\[IMG_END\]|\[IMG\]"),
    ("<IMG_CONTEXT>", IMAGE, "<IMG_CONTEXT>"),
    ("<ImageHere>", IMAGE, "<ImageHere>"),
    ("<image_placeholder>", IMAGE, r"<image_placeholder>|<\|image_placeholder\|>|<\|IMAGE_PLACEHOLDER\|>"),
    ("<image_pad>", IMAGE, "<image_pad>"),
    ("<img>", IMAGE, "<img>"),
    ("<|video_pad|>", VIDEO, r"<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>|<\|video_pad\|>"),
    ("<video>", VIDEO, r"<(?:video|VIDEO|video_soft_token|VideoHere|VIDEO_CONTEXT)>|<\|(?:video|VIDEO|video_\d+)\|>"),
    ("<audio>", AUDIO, r"<(?:audio|AUDIO|audio_soft_token)>|<\|(?:audio|AUDIO|audio_\d+)\|>"),
)
PATTERN = re.compile("|".join(f"(?P<row{row}>{pattern})" for row, (*_, pattern) in enumerate(TABLE)))
OPENING = re.compile(r"[<(\[]")  # how each placeholder begins: `re` alone would try all rows at every character
OF_MEDIA = re.compile(r"image|img|vision|video|audio|media|patch", re.IGNORECASE)


@dataclass(frozen=True)
class Marker:
    """A placeholder in a text, from `start` to `end`.

    own: whether it is what docs/data.md asks for, not another program's. number: which image it means, as it says;
    path: the image that it names itself.
    """

    name: str
    stands_for: str
    start: int
    end: int
    own: bool = False
    number: int | None = None
    path: str | None = None


def found(text: str) -> Iterator[Marker]:
    """The placeholders of a text, in order."""
    for match in _matches(text):
        name, stands_for, _ = TABLE[int(str(match.lastgroup).removeprefix("row"))]
        number = int("".join(filter(str.isdigit, match[0]))) if "_N" in name else None
        named = NAMED.fullmatch(match[0])
        path = named[1].strip() or None if named else None
        yield Marker(name, stands_for, *match.span(), any(own in match[0] for own in OWN), number, path)


def _matches(text: str) -> Iterator[re.Match[str]]:
    """What `PATTERN.finditer` finds."""
    end = 0
    while opening := OPENING.search(text, end):
        match = PATTERN.match(text, opening.start())
        end = match.end() if match else opening.end()
        if match:
            yield match


def of_media(tokens: Sequence[str]) -> list[str]:
    """Those of a tokenizer's added tokens that stand for images, videos or sounds, or for what is around them."""
    return [token for token in tokens if OF_MEDIA.search(token)]
