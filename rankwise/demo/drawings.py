"""The vision demo's world: small pictures of coloured shapes. `drawing_talk` says what is said about them.

    draw(random) ── Scene(things, look, seed) ──┬─ paint ─────▶ picture of 64 × 64 pixels
                                                └─ contents ──▶ what is in each quarter, as numbers

A scene has one to three things, each in a quarter of its own. One (colour, shape) pair in `HELD_OUT_OF` is held out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 62),
    "blue": (44, 88, 220),
    "yellow": (240, 208, 40),
    "purple": (150, 60, 190),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (17, 19), "large": (25, 28)}  # width in pixels, from … to
FEATURES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}  # column, row
BESIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where it lies, seen from there
LOOKS = ("filled", "outlined")
SIDE = 64  # pixels of a picture
FINE = 4  # drawn this much larger, then reduced: smooth edges
GRAIN = 0.1  # share of a pixel that is noise
JITTER = 2.0  # pixels that a thing may lie off the middle of its quarter
LINE = 2.5  # pixels, of an outline
HELD_OUT_OF = 4


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    colour: str
    shape: str
    size: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """Whether its (colour, shape) pair is kept for the held-out rows; one pair in `HELD_OUT_OF` is."""
        return (list(COLOURS).index(self.colour) + SHAPES.index(self.shape)) % HELD_OUT_OF == 0


@dataclass(frozen=True)
class Scene:
    """Things in reading order, no two in one place, no two of one name. `seed`: of the background and the jitter."""

    things: tuple[Thing, ...]
    seed: int
    look: str = "filled"

    @property
    def held_out(self) -> bool:
        return any(thing.held_out for thing in self.things)


def draw(random_state: random.Random, *, look: str = "filled") -> Scene:
    """A scene of one, two or three different things."""
    places = random_state.sample(list(PLACES), random_state.randint(1, 3))
    names = random_state.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], len(places))
    things = [
        Thing(colour, shape, random_state.choice(list(SIZES)), place)
        for place, (colour, shape) in zip(sorted(places, key=list(PLACES).index), names, strict=True)
    ]
    return Scene(tuple(things), random_state.getrandbits(32), look)


def paint(scene: Scene) -> Image.Image:
    """The picture, the same for the same scene: a mottled, grainy background and the things on it."""
    random_state = random.Random(scene.seed)
    image = _background(random_state).resize((SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(pen, thing, scene.look, random_state)
    return Image.blend(image.reduce(FINE), _noise(SIDE, random_state), GRAIN)


def _background(random_state: random.Random) -> Image.Image:
    """Dark spots of nearly any grey, a few pixels wide."""
    grey = random_state.randrange(40, 120)
    tint = tuple(grey + random_state.randint(-20, 20) for _ in range(3))
    plain = Image.new("RGB", (8, 8), tint)
    return Image.blend(plain, _noise(8, random_state), 0.14).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _noise(side: int, random_state: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random_state.randbytes(3 * side * side))


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, look: str, random_state: random.Random) -> None:
    width = random_state.uniform(*SIZES[thing.size])
    column, row = PLACES[thing.place]
    left = (column + 0.5) * SIDE / 2 - width / 2 + random_state.uniform(-JITTER, JITTER)
    top = (row + 0.5) * SIDE / 2 - width / 2 + random_state.uniform(-JITTER, JITTER)
    colour = tuple(min(255, max(0, value + random_state.randint(-18, 18))) for value in COLOURS[thing.colour])
    how = {"fill": colour} if look == "filled" else {"outline": colour, "width": round(LINE * FINE)}
    box = [(left * FINE, top * FINE), ((left + width) * FINE, (top + width) * FINE)]
    if thing.shape == "circle":
        pen.ellipse(box, **how)
    elif thing.shape == "square":
        pen.rectangle(box, **how)
    else:
        corners = [((left + x * width) * FINE, (top + y * width) * FINE) for x, y in OUTLINES[thing.shape]]
        pen.polygon(corners, **how)


OUTLINES = {
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "cross": (
        *((0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)),
        *((0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)),
    ),
}


def neighbours(scene: Scene) -> Iterator[tuple[str, Thing, Thing]]:
    """(words, thing, the other one that lies there, seen from the thing)."""
    at = {PLACES[thing.place]: thing for thing in scene.things}
    for (column, row), thing in at.items():
        for words, (right, down) in BESIDE.items():
            if (column + right, row + down) in at:
                yield words, thing, at[column + right, row + down]


def contents(scene: Scene) -> list[list[int]]:
    """(4, 3): shape, colour and size in each quarter, in the order of `PLACES`; 0 for nothing, else 1 more than the
    position in `FEATURES`."""
    at = {thing.place: thing for thing in scene.things}
    return [
        [1 + names.index(getattr(at[place], feature)) if place in at else 0 for feature, names in FEATURES.items()]
        for place in PLACES
    ]
