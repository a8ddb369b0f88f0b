"""What the parity ladder puts to both sides: a prompt as the app sends it, its pictures as sent, and the sample they
come from.

    Example* ── pick_cases (a few of every aspect, mode, orientation) ── case_of ──▶ Case*

A fault is a changed case (or another GGUF file): `replace(case, images=(white_padded,))`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ExifTags, Image

from rankwise.data import Example, Renderer
from rankwise.data.device import MARKER, encoded
from rankwise.data.layout import without_images

UNKNOWN, BLIND = "unknown", "no picture"
SQUARE = 0.05  # sides that differ by less count as a square


@dataclass(frozen=True)
class Case:
    """One item of the ladder.

    id: unique. example: the sample as training and evaluation know it; the reference starts from it. images: the bytes
    that the runtime gets, in order. prompt: the text that it gets, `marker` where a picture goes. answer: what both
    sides are teacher-forced along; None for the reference's own greedy answer. stratum: kind of picture ("tall RGB"),
    for the tables.
    """

    id: str
    example: Example
    images: tuple[bytes, ...]
    prompt: str
    answer: str | None = None
    stratum: str = ""
    marker: str = MARKER


def case_of(example: Example, renderer: Renderer, answer: str | None = None) -> Case:
    """The case of a sample: pictures go through the renderer's reader, which knows the device, and are sent as PNG."""
    prompt, sight = renderer.prompt_text(example, MARKER), renderer.sight
    if sight is None or not example.images:
        return Case(example.id, example, (), prompt, answer)
    images = tuple(encoded(sight.reader.open(reference), "PNG") for reference in example.images)
    return Case(example.id, example, images, prompt, answer, stratum_of(example, sight.reader.folder))


def blind(example: Example, renderer: Renderer) -> Case:
    """The same question without its pictures. Where such cases agree and those with pictures do not, the fault is on
    the vision side."""
    bare = replace(without_images(example), id=f"{example.id} without pictures")
    return replace(case_of(bare, renderer), stratum=BLIND)


def pick(examples: Sequence[Example], count: int, folder: Path | None) -> list[Example]:
    """At most `count` samples, in turn from every kind of picture, each kind in file order: rare kinds are all in."""
    kinds: dict[str, list[Example]] = {}
    for example in examples:
        kinds.setdefault(stratum_of(example, folder), []).append(example)
    turns = [(number, position) for position, kind in enumerate(kinds) for number in range(len(kinds[kind]))]
    names = list(kinds)
    chosen = {id(kinds[names[position]][number]) for number, position in sorted(turns)[:count]}
    return [example for example in examples if id(example) in chosen]


def stratum_of(example: Example, folder: Path | None) -> str:
    """ "tall RGB", "wide L turned" …, of the first picture as it lies on the disk; "" for a sample without one."""
    if not example.images or folder is None:
        return ""
    file = folder / example.images[0]
    if not file.is_file():
        return UNKNOWN  # a data URL, or one of the internet
    with Image.open(file) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        shape = "square" if abs(width - height) <= SQUARE * max(width, height) else "wide" if width > height else "tall"
        return f"{shape} {image.mode}{' turned' if turned else ''}"


def strata(cases: Sequence[Case]) -> Mapping[str, list[str]]:
    """Kind of picture → ids of its cases; {} where the cases have none."""
    found: dict[str, list[str]] = {}
    for case in cases:
        if case.stratum:
            found.setdefault(case.stratum, []).append(case.id)
    return found


def decoded(image: bytes) -> Image.Image:
    """What the runtime sees of the bytes: RGB."""
    return Image.open(io.BytesIO(image)).convert("RGB")
