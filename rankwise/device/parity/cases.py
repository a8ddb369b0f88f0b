"""What the parity ladder puts to both sides: a prompt as the app sends it, its pictures as sent, and the sample they
come from.

    Example* ── pick_cases (a few of every aspect, mode, orientation) ── case_of ──▶ Case*

A fault is a changed case (or another GGUF file): `replace(case, images=(white_padded,))`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from rankwise.data.device import MARKER, encoded
from rankwise.data.example import Example
from rankwise.data.images import SCHEME
from rankwise.data.pixels import kind_of
from rankwise.data.render import Renderer
from rankwise.data.split import in_turn
from rankwise.data.template import without_images

UNKNOWN, BLIND = "unknown", "no picture"


@dataclass(frozen=True)
class SourceImage:
    """An image before the device processes it. name: what the app's version of it is called (`--app_pixels`);
    content: the file's bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Case:
    """One item of the ladder.

    id: unique. example: the sample as training and evaluation know it; the reference starts from it. images: the bytes
    that the runtime gets, in order. prompt: the text that it gets, `marker` where a picture goes. answer: what both
    sides are teacher-forced along; None for the reference's own greedy answer. stratum: kind of picture ("tall RGB"),
    for the tables. sources: what `images` were made of; size: side of the device's square, None where pictures are sent
    in their own.
    """

    id: str
    example: Example
    images: tuple[bytes, ...]
    prompt: str
    answer: str | None = None
    stratum: str = ""
    marker: str = MARKER
    sources: tuple[SourceImage, ...] = ()
    size: int | None = None


def case_of(example: Example, renderer: Renderer, answer: str | None = None) -> Case:
    """The case of a sample: the files that its pictures were made of go through the renderer's reader, which knows the
    device, and are sent as PNG."""
    prompt, sight = renderer.prompt_text(example, MARKER), renderer.sight
    if sight is None or not example.images:
        return Case(example.id, example, (), prompt, answer)
    images = tuple(encoded(sight.reader.open(reference), "PNG") for reference in example.sources)
    kind, size = stratum_of(example, sight.reader.folder), sight.target.image_size if sight.target else None
    sources = tuple(
        SourceImage(name_of(shown), sight.reader.content(reference))
        for shown, reference in zip(example.images, example.sources, strict=True)
    )
    return Case(example.id, example, images, prompt, answer, kind, sources=sources, size=size)


def name_of(reference: str) -> str:
    """images/00017_cat.png → 00017_cat.png: the app's version of a picture, always PNG."""
    return f"{PurePosixPath(reference).stem}.png"


def blind(example: Example, renderer: Renderer) -> Case:
    """The same question without its pictures. Where such cases agree and those with pictures do not, the fault is on
    the vision side."""
    bare = replace(without_images(example), id=f"{example.id} without pictures")
    return replace(case_of(bare, renderer), stratum=BLIND)


def pick(examples: Sequence[Example], count: int, folder: Path | None) -> list[Example]:
    """At most `count` samples, in turn from every kind of picture, each kind in file order: rare kinds are all in.
    Samples whose sources are kept come first: of the others the device's work is done already."""
    kept = [example for example in examples if example.sources != example.images]
    others = [example for example in examples if example.sources == example.images]
    ordered = [example for part in (kept, others) for example in in_turn(part, lambda one: stratum_of(one, folder))]
    chosen = {id(example) for example in ordered[:count]}
    return [example for example in examples if id(example) in chosen]


def stratum_of(example: Example, folder: Path | None) -> str:
    """ "tall RGB", "wide L turned" …, of the first picture's source as it lies on the disk; "" without one."""
    if not example.images or folder is None:
        return ""
    file = folder / example.sources[0]
    if SCHEME.match(example.sources[0]) or not file.is_file():
        return UNKNOWN  # a data URL (which is too long for a name), or one of the internet
    with Image.open(file) as image:
        return kind_of(image)


def strata(cases: Sequence[Case]) -> Mapping[str, list[str]]:
    """Kind of picture → ids of its cases; {} where the cases have none."""
    found: dict[str, list[str]] = {}
    for case in cases:
        if case.stratum:
            found.setdefault(case.stratum, []).append(case.id)
    return found


def decoded(image: bytes) -> Image.Image:
    """The bytes decoded as the runtime does: RGB."""
    return Image.open(io.BytesIO(image)).convert("RGB")
