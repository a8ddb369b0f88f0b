"""How files and other programs write "an image goes here" in a text: one table, for all that read or refuse it.

    "Picture 1: <img>a.jpg</img> or <|image_2|>?" ── found ──▶ Marker(path="a.jpg"), Marker(number=2)

A placeholder that was expanded already (`<img><IMG_CONTEXT>…</img>`, `[IMG][IMG_BREAK]…[IMG_END]`) is one image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

IMAGE, VIDEO, AUDIO = "image", "video", "audio"
OWN = ("<image>", "<IMAGE>", "<__media__>")  # what docs/data.md asks for: in a row without images, an image is missing
NAMED = re.compile(r"<[Ii]mg>([^<>\n]*)</[Ii]mg>")  # the image's own path stands in it

# name in messages (N: it says which image) · what it stands for · pattern; the first pattern that fits counts
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
    for match in PATTERN.finditer(text):
        name, stands_for, _ = TABLE[int(str(match.lastgroup).removeprefix("row"))]
        number = int("".join(filter(str.isdigit, match[0]))) if "_N" in name else None
        named = NAMED.fullmatch(match[0])
        path = named[1].strip() or None if named else None
        yield Marker(name, stands_for, *match.span(), any(own in match[0] for own in OWN), number, path)


def of_media(tokens: Sequence[str]) -> list[str]:
    """Those of a tokenizer's added tokens that stand for images, videos or sounds, or for what is around them."""
    return [token for token in tokens if OF_MEDIA.search(token)]
