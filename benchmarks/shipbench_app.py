"""Faults of an app: what it does to a picture, to the prompt, and to the request for an answer."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from shipbench_fault import Change, Delivery, Fault, Request
from shipbench_ships import Ship

from rankwise.data.device import MARKER, encoded, resize_for_device
from rankwise.device.parity.cases import decoded

BEGIN, ASKED, END = "<|im_start|>", "User:", "<end_of_utterance>"
WORDS = "yes no left right red green blue white yellow circle square cross triangle top bottom".split()
Picture = Image.Image


# --- pictures ----------------------------------------------------------------------------------------------------


def from_source(make: Callable[[Path, int], Picture]) -> Change:
    """Every picture that is sent is `make` of the file and the device's size."""

    def change(delivery: Delivery, ship: Ship) -> Delivery:
        sight = ship.trained.renderer.sight
        assert sight and sight.target
        folder, size = sight.reader.folder, sight.target.image_size
        cases = [
            replace(case, images=tuple(encoded(make(folder / one, size), "PNG") for one in case.example.images[:1]))
            if case.images
            else case
            for case in delivery.cases
        ]
        return replace(delivery, cases=cases)

    return change


def upright(path: Path) -> Picture:
    with Image.open(path) as picture:
        picture.load()
        turned = picture.getexif().get(0x0112, 1) == 6
        return picture.convert("RGB").transpose(Image.Transpose.ROTATE_270) if turned else picture.convert("RGB")


def scaled(resample: Image.Resampling) -> Callable[[Path, int], Picture]:
    """The letterbox with another filter."""

    def make(path: Path, size: int) -> Picture:
        picture, square = upright(path), Image.new("RGB", (size, size))
        scale = min(size / picture.width, size / picture.height)
        small = picture.resize((int(picture.width * scale), int(picture.height * scale)), resample)
        square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
        return square

    return make


def stretched(path: Path, size: int) -> Picture:
    return upright(path).resize((size, size), Image.Resampling.BILINEAR)


def as_stored(path: Path, size: int) -> Picture:
    """The device's geometry, without asking which way is up."""
    with Image.open(path) as picture:
        lying = picture.convert("RGB")
    lying.info.clear()  # the note goes along with the pixels
    return resize_for_device(lying, size)


def afterwards(make: Callable[[Picture], Picture]) -> Change:
    """What the device's target makes of the picture, and then something that it should not."""

    def change(delivery: Delivery, _: Ship) -> Delivery:
        cases = [
            replace(case, images=tuple(encoded(make(decoded(one)), "PNG") for one in case.images))
            for case in delivery.cases
        ]
        return replace(delivery, cases=cases)

    return change


def on_white(picture: Picture) -> Picture:
    """Rows and columns that are black from end to end, as the letterbox leaves them, made white."""
    pixels = np.array(picture)
    rows, columns = (pixels == 0).all((1, 2)), (pixels == 0).all((0, 2))
    pixels[rows], pixels[:, columns] = 255, 255
    return Image.fromarray(pixels)


def to_corner(picture: Picture) -> Picture:
    moved = Image.new("RGB", picture.size)
    moved.paste(picture.crop(picture.getbbox()), (0, 0))
    return moved


def as_jpeg(picture: Picture) -> Picture:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return Image.open(stream).convert("RGB")


def swapped_colours(picture: Picture) -> Picture:
    return Image.fromarray(np.array(picture)[..., ::-1].copy())


def larger(picture: Picture) -> Picture:
    return picture.resize((3 * picture.width // 2, 3 * picture.height // 2), Image.Resampling.BILINEAR)


# --- prompts and requests ----------------------------------------------------------------------------------------


def prompts(make: Callable[[str], str]) -> Change:
    def change(delivery: Delivery, _: Ship) -> Delivery:
        return replace(delivery, cases=[replace(case, prompt=make(case.prompt)) for case in delivery.cases])

    return change


def picture_last(prompt: str) -> str:
    if MARKER not in prompt:
        return prompt
    before, after = prompt.split(MARKER)
    return before + after.replace(END, MARKER + END, 1)


def without_template(prompt: str) -> str:
    """What stands in the user's turn, and nothing around it."""
    return prompt.split(ASKED, 1)[1].split(END)[0].strip()


def requests(request: Request) -> Change:
    def change(delivery: Delivery, _: Ship) -> Delivery:
        return replace(delivery, request=request)

    return change


def grammar(words: list[str]) -> str:
    return "root ::= " + " | ".join(f'"{word}"' for word in words)


APP = [
    Fault("filter", "scaled with LANCZOS", "pixels", change=from_source(scaled(Image.Resampling.LANCZOS))),
    Fault(
        "antialias",
        "Pillow's BILINEAR, whose filter widens as it shrinks",
        "pixels",
        change=from_source(scaled(Image.Resampling.BILINEAR)),
    ),
    Fault("padding", "padded with white", "pixels", change=afterwards(on_white)),
    Fault("corner", "the picture in a corner, not centred", "pixels", change=afterwards(to_corner)),
    Fault("stretched", "stretched to the square, no letterbox", "pixels", change=from_source(stretched)),
    Fault("colours swapped", "BGR in place of RGB", "pixels", change=afterwards(swapped_colours)),
    Fault("EXIF", "orientation note ignored", "pixels", change=from_source(as_stored)),
    Fault("JPEG", "sent as a JPEG of quality 90", "pixels", change=afterwards(as_jpeg)),
    Fault("size", "sent half as large again", "pixels", change=afterwards(larger)),
    Fault(
        "literal marker",
        "`<image>` in the prompt where the runtime's marker belongs",
        "image tokens",
        change=prompts(lambda prompt: prompt.replace(MARKER, "<image>")),
    ),
    Fault("picture last", "the picture behind the question", "token ids", change=prompts(picture_last)),
    Fault("no template", "the question without the chat template", "token ids", change=prompts(without_template)),
    Fault("trailing space", "a space behind `Assistant:`", "token ids", change=prompts(lambda one: f"{one} ")),
    Fault("no BOS", "no start token", "token ids", change=prompts(lambda one: one.removeprefix(BEGIN))),
    Fault("double BOS", "a second start token in front", "token ids", change=prompts(lambda one: BEGIN + one)),
    Fault("cut answer", "one new token at most", "text", change=requests(lambda body: body | {"n_predict": 1})),
    Fault(
        "sampling",
        "temperature 1.5 in place of greedy",
        "text",
        change=requests(lambda body: body | {"temperature": 1.5, "seed": 1}),
    ),
    Fault("penalty", "a repeat penalty of 1.5", "text", change=requests(lambda body: body | {"repeat_penalty": 1.5})),
    Fault(
        "label's space",
        "a grammar of words without the space that training put before an answer",
        "text",
        change=requests(lambda body: body | {"grammar": grammar(WORDS)}),
    ),
]
