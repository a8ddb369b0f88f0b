"""Scenes for the depth evidence: pictures that say nothing about depth, and depth maps that know it.

    draw(random, turn) ── Scene ──┬─ picture(scene) ─────▶ 64 × 64 pixels
                                  ├─ distances(scene) ───▶ 16-bit depth map, far = large
                                  └─ nearer(thing, thing) ───▶ "Which is nearer, the red or the blue one?" "blue"

Size, place, colour, brightness, and who covers whom are drawn without a look at depth. Height is balanced on top: the
orders of depth are dealt to scenes in turn, so that the nearer thing of a pair is the higher one in half of the pairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rankwise.demo import drawings
from rankwise.demo.drawings import OUTLINES, SHAPES, SIDE

COLOURS = {name: drawings.COLOURS[name] for name in ("red", "green", "blue", "yellow")}
WIDTHS = (22.0, 32.0)  # pixels of a thing: more than a token's 16
VISIBLE = 0.8  # share of every thing that the others leave uncovered
NEAREST, FARTHEST = 800.0, 8000.0  # distances, in the unit of the maps
APART = 0.1  # no two of a scene are closer in inverse depth, as a share of its range; the background counts too
FINE = 4  # drawn this much larger, then reduced: smooth edges


@dataclass(frozen=True)
class Thing:
    """One shape: its centre and width in pixels, how bright its colour is, and how far away it is said to be."""

    colour: str
    shape: str
    x: float
    y: float
    width: float
    brightness: float
    distance: float


@dataclass(frozen=True)
class Scene:
    """Things in the order in which they are painted: a later one covers an earlier one, whatever their distances."""

    things: tuple[Thing, ...]
    grey: int
    distance: float
    seed: int


def draw(state: random.Random, turn: int) -> Scene:
    """Two or three things. turn: which order of depth, from top to bottom, it is the scene's turn to have."""
    count = 2 + state.randrange(2)
    colours = state.sample(list(COLOURS), count)
    while True:
        things = [loose(colour, state) for colour in colours]
        if min(visible_shares(things)) >= VISIBLE:
            break
    background, *own = distances_apart(state, count + 1)
    orders = list(itertools.permutations(sorted(own)))
    order = dict(zip(sorted(thing.y for thing in things), orders[turn % len(orders)], strict=True))
    placed = tuple(Thing(**{**vars(thing), "distance": order[thing.y]}) for thing in things)
    return Scene(placed, state.randrange(30, 150), background, state.getrandbits(32))


def loose(colour: str, state: random.Random) -> Thing:
    """A thing anywhere in the picture, at no distance yet."""
    width = state.uniform(*WIDTHS)
    x, y = (state.uniform(width / 2, SIDE - width / 2) for _ in range(2))
    return Thing(colour, state.choice(SHAPES), x, y, width, state.uniform(0.55, 1.0), 0.0)


def distances_apart(state: random.Random, count: int) -> list[float]:
    """Distances in random order, uniform in inverse depth, which is what a token gets."""
    while True:
        places = [state.random() for _ in range(count)]
        if all(high - low >= APART for low, high in itertools.pairwise(sorted(places))):
            return [1 / (place / NEAREST + (1 - place) / FARTHEST) for place in places]


def mask(thing: Thing, fine: int = 1) -> Image.Image:
    """White where the thing is, `fine` times as large as the picture."""
    image = Image.new("L", (SIDE * fine, SIDE * fine))
    pen = ImageDraw.Draw(image)
    left, top = thing.x - thing.width / 2, thing.y - thing.width / 2
    if thing.shape in OUTLINES:
        corners = [((left + x * thing.width) * fine, (top + y * thing.width) * fine) for x, y in OUTLINES[thing.shape]]
        pen.polygon(corners, fill=255)
        return image
    shape = pen.ellipse if thing.shape == "circle" else pen.rectangle
    shape([left * fine, top * fine, (left + thing.width) * fine, (top + thing.width) * fine], fill=255)
    return image


def visible_shares(things: Sequence[Thing]) -> list[float]:
    """What the later things leave of each."""
    masks = [np.asarray(mask(thing)) > 0 for thing in things]
    covers = [np.any(masks[number + 1 :], axis=0) for number in range(len(masks))]
    return [float((own & ~cover).sum() / own.sum()) for own, cover in zip(masks, covers, strict=True)]


def picture(scene: Scene) -> Image.Image:
    """What the model sees: flat colours on a grainy ground, no shading, no size cue."""
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), (scene.grey,) * 3)
    for thing in scene.things:
        colour = tuple(round(value * thing.brightness) for value in COLOURS[thing.colour])
        image.paste(colour, mask=mask(thing, FINE))
    grain = Image.frombytes("RGB", (SIDE, SIDE), random.Random(scene.seed).randbytes(3 * SIDE * SIDE))
    return Image.blend(image.reduce(FINE), grain, 0.1)


def distances(scene: Scene) -> NDArray[np.uint16]:
    """Distance of what is seen at every pixel, (SIDE, SIDE)."""
    found = np.full((SIDE, SIDE), round(scene.distance), dtype=np.uint16)
    for thing in scene.things:
        found[np.asarray(mask(thing)) > 0] = round(thing.distance)
    return found


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


def pairs(scene: Scene, state: random.Random) -> Iterator[tuple[Thing, Thing]]:
    """Every two things, in random order."""
    for first, second in itertools.combinations(scene.things, 2):
        yield (first, second) if state.random() < 0.5 else (second, first)


def nearer(first: Thing, second: Thing) -> Question:
    """What the picture cannot say."""
    return compared("nearer", first, second, first.distance < second.distance)


def visible(first: Thing, second: Thing) -> Iterator[Question]:
    """What the picture does say: a model that answers these finds a named thing and compares two of them."""
    yield compared("higher", first, second, first.y < second.y)
    yield compared("further left", first, second, first.x < second.x)


def compared(word: str, first: Thing, second: Thing, is_first: bool) -> Question:
    text = f"Which is {word}, the {first.colour} or the {second.colour} one?"
    return Question(text, (first if is_first else second).colour)


def caption(scene: Scene, state: random.Random) -> Question:
    """All things and their places, in random order."""
    things = state.sample(scene.things, len(scene.things))
    return Question("What is there?", " and ".join(f"{thing.colour} at the {place(thing)}" for thing in things) + ".")


def place(thing: Thing) -> str:
    across = ("left", "middle", "right")[min(2, int(3 * thing.x / SIDE))]
    down = ("top", "centre", "bottom")[min(2, int(3 * thing.y / SIDE))]
    return f"{down} {across}"
