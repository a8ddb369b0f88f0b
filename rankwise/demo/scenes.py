"""Drawn scenes of water, land, fire, wood and metal: the photos of `rankwise tiny`, and what its base model has seen.

    paint("water", 320, 200, random) ──▶ a picture of waves        photos(folder, random) ──▶ JPEG files

The scenes differ in colour and in texture, in size and shape. Among the photos are what real folders have too: a
picture twice under two names, and one that is stored on its side with an EXIF note to turn it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Pen = ImageDraw.ImageDraw
SIZES = ((320, 200), (180, 300), (256, 256), (400, 260), (150, 150), (310, 233))  # none but one is the device's
ORIENTATION, ON_ITS_SIDE = 0x0112, 6  # EXIF: to be turned by 90° clockwise
QUALITY = 92
SHADES: dict[str, tuple[Colour, Colour]] = {
    "water": ((24, 80, 170), (120, 175, 220)),
    "land": ((140, 105, 65), (205, 178, 125)),
    "fire": ((205, 40, 15), (250, 165, 40)),
    "wood": ((35, 95, 40), (95, 130, 65)),
    "metal": ((105, 107, 112), (215, 217, 220)),
}
LOOKS = {
    "water": "blue waves",
    "land": "yellow dunes",
    "fire": "red flames",
    "wood": "green trees",
    "metal": "grey plates",
}


def paint(element: str, width: int, height: int, random_state: random.Random) -> Image.Image:
    """A scene of one element, darker or lighter as the random state has it, with a grain of its own."""
    dark, light = SHADES[element]
    image = Image.new("RGB", (width, height), mixed(dark, light, random_state.uniform(0.2, 0.5)))
    TEXTURES[element](ImageDraw.Draw(image), width, height, random_state)
    grain = Image.frombytes("RGB", (width, height), random_state.randbytes(3 * width * height))
    return Image.blend(image, grain, 0.06)


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def waves(pen: Pen, width: int, height: int, random_state: random.Random) -> None:
    step = height / random_state.randint(7, 10)
    for row in range(1, int(height / step) + 1):
        colour = mixed(*SHADES["water"], random_state.uniform(0.5, 1))
        for left in range(-random_state.randrange(40), width, 40):
            box = (left, row * step - step / 2, left + 40, row * step)
            pen.arc(box, 200, 340, colour, width=max(2, round(step / 5)))


def dunes(pen: Pen, width: int, height: int, random_state: random.Random) -> None:
    layers = random_state.randint(3, 5)
    for layer in range(layers):
        top = height * (layer + 0.4) / layers
        peaks = [(x * width / 3, top + random_state.uniform(-0.5, 0.5) * height / layers) for x in range(4)]
        pen.polygon([*peaks, (width, height), (0, height)], mixed(*SHADES["land"], random_state.uniform(0.2, 1)))


def flames(pen: Pen, width: int, height: int, random_state: random.Random) -> None:
    for _ in range(random_state.randint(8, 12)):
        middle, half = random_state.uniform(0, width), width * random_state.uniform(0.06, 0.14)
        tip = height * random_state.uniform(0, 0.5)
        colour = mixed(*SHADES["fire"], random_state.uniform(0.3, 1))
        pen.polygon([(middle - half, height), (middle, tip), (middle + half, height)], colour)


def trees(pen: Pen, width: int, height: int, random_state: random.Random) -> None:
    side = min(width, height)
    for _ in range(random_state.randint(14, 20)):
        x, y = random_state.uniform(0, width), random_state.uniform(0, height)
        radius = side * random_state.uniform(0.08, 0.16)
        pen.line((x, y, x, y + 2 * radius), (92, 64, 36), max(2, round(radius / 5)))
        crown = mixed(*SHADES["wood"], random_state.uniform(0, 0.9))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), crown)


def plates(pen: Pen, width: int, height: int, random_state: random.Random) -> None:
    side = min(width, height) // random_state.randint(2, 3)
    for left in range(0, width, side):
        for top in range(0, height, side):
            colour = mixed(*SHADES["metal"], random_state.uniform(0.2, 0.9))
            pen.rectangle((left, top, left + side, top + side), colour, outline=(70, 72, 76), width=2)
            for x, y in ((6, 6), (side - 6, 6), (6, side - 6), (side - 6, side - 6)):
                pen.ellipse((left + x - 3, top + y - 3, left + x + 3, top + y + 3), (70, 72, 76))


TEXTURES: dict[str, Callable[[Pen, int, int, random.Random], None]] = {
    "water": waves,
    "land": dunes,
    "fire": flames,
    "wood": trees,
    "metal": plates,
}


def photos(folder: Path, random_state: random.Random, *, per_element: int = 2) -> list[Path]:
    """Photos of every element, `per_element` of each, the last of them turned by its EXIF note; and the first again."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [(element, number) for number in range(per_element) for element in SHADES]
    written = []
    for place, (element, number) in enumerate(names):
        picture = paint(element, *SIZES[place % len(SIZES)], random_state)
        written.append(folder / f"{element}_{number}.jpg")
        if place < len(names) - 1:
            picture.save(written[-1], quality=QUALITY)
        else:
            save_on_its_side(picture, written[-1])
    return [*written, Path(shutil.copy(written[0], folder / "again.jpg"))]


def save_on_its_side(upright: Image.Image, path: Path) -> None:
    """As a phone that is held upright stores it, with a note for those who show it."""
    note = Image.Exif()
    note[ORIENTATION] = ON_ITS_SIDE
    upright.transpose(Image.Transpose.ROTATE_90).save(path, quality=QUALITY, exif=note)
