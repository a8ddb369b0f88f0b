"""The vision demo's world: small images of coloured shapes, and what is said about them.

    draw(random) ── Scene(things, look, seed) ──┬─ paint ─────▶ image of 64 × 64 pixels
                                                ├─ contents ──▶ what is in each quarter, as numbers
                                                ├─ caption ───▶ captioned: what the base learns from, of every pair
                                                └─ questions ─▶ write_conversations: LLaVA files for the fine-tune

A scene has one to three things, each in a quarter of its own. One (colour, shape) pair in `HELD_OUT_OF` is held out of
the training conversations. No caption answers a question, and no answer is a safe guess: all are asked for about as
often.
"""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.files.atomic import write_json

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
KINDS = ("colour", "shape", "place", "count", "beside")
IN_ORDER = "a {size} {colour} {shape} at the {place}"  # things in reading order; in the other forms in any
BESIDE_FORM = "{words} the {name}: a {other}"
FORMS = (
    "{place}: a {size} {colour} {shape}",
    IN_ORDER,
    "{colour}: a {size} {shape} at the {place}",
    "{shape}: {size}, {colour}, at the {place}",
    BESIDE_FORM,
)
NUMBERS = ("one", "two", "three")
CHOICE = 6  # scenes to choose a question from, so that every answer is asked for about as often
ASKED = "What do you see?"
PICTURES = "images"


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


@dataclass(frozen=True)
class SceneQuestion:
    """kind: what has to be found out; `about`: the things that it takes to answer."""

    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        return any(thing.held_out for thing in self.about)


def caption(scene: Scene, random_state: random.Random) -> str:
    """Every thing, in one of several forms: place, size, colour or shape first, or what lies beside what."""
    pairs = list(neighbours(scene))
    form = random_state.choice(FORMS)
    if form == BESIDE_FORM and pairs:
        words, thing, other = random_state.choice(pairs)
        return form.format(words=words, name=thing.name, other=other.name)
    form = IN_ORDER if form == BESIDE_FORM else form
    things = scene.things if form == IN_ORDER else random_state.sample(scene.things, len(scene.things))
    return ", ".join(form.format_map(vars(thing)) for thing in things)


def questions(scene: Scene) -> Iterator[SceneQuestion]:
    """Every question that has one answer."""
    for thing in scene.things:
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            yield SceneQuestion("colour", f"What colour is the {thing.shape}?", thing.colour, (thing,))
        if sum(other.colour == thing.colour for other in scene.things) == 1:
            yield SceneQuestion("shape", f"Which shape is {thing.colour}?", thing.shape, (thing,))
        yield SceneQuestion("place", f"Where is the {thing.name}?", thing.place, (thing,))
    yield SceneQuestion("count", "How many shapes are there?", NUMBERS[len(scene.things) - 1], scene.things)
    for words, thing, other in neighbours(scene):
        yield SceneQuestion("beside", f"What is {words} the {thing.name}?", other.name, (thing, other))


def conversations(
    random_state: random.Random, count: int, *, turns: int, held_out: bool, look: str = "filled"
) -> Iterator[tuple[Scene, list[SceneQuestion]]]:
    """Scenes with up to `turns` questions of different kinds, of one side of the split; answers are balanced.

    Held-out questions are about a held-out pair; the other side's scenes show none.
    """
    given: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        asked = _candidates(random_state, kind, held_out, look)
        scene, first = min(asked, key=lambda pair: given[pair[1].kind, pair[1].answer])
        more = [question for question in questions(scene) if question.held_out == held_out]
        random_state.shuffle(more)
        more.sort(key=lambda question: given[question.kind, question.answer])
        chosen = {first.kind: first}
        for question in more:
            chosen.setdefault(question.kind, question)
        found = list(chosen.values())[:turns]
        given.update((question.kind, question.answer) for question in found)
        yield scene, found


def _candidates(random_state: random.Random, kind: str, held_out: bool, look: str) -> list[tuple[Scene, SceneQuestion]]:
    """Questions of a kind to choose from, about `CHOICE` scenes of one side of the split."""
    found: list[tuple[Scene, SceneQuestion]] = []
    scenes = 0
    while scenes < CHOICE:
        scene = draw(random_state, look=look)
        fitting = [question for question in questions(scene) if question.kind == kind]
        fitting = [question for question in fitting if question.held_out] if held_out else fitting
        if fitting and scene.held_out == held_out:
            scenes += 1
            found += [(scene, question) for question in fitting]
    random_state.shuffle(found)
    return found


def write_conversations(
    path: Path, random_state: random.Random, *, count: int, turns: int, held_out: bool, look: str = "filled"
) -> Path:
    """`count` pictures with their questions as conversations in LLaVA form; the pictures go to images/ beside it.

    `task_type` of a row is the kind of its last question, which is the one that is scored.
    """
    pictures = path.parent / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (scene, asked) in enumerate(
        conversations(random_state, count, turns=turns, held_out=held_out, look=look)
    ):
        name = f"{path.stem}-{number:04d}"
        paint(scene).save(pictures / f"{name}.png")
        talk = []
        for place, question in enumerate(asked):
            slot = "" if place else f"{IMAGE_SLOT}\n"
            talk.append({"from": "human", "value": slot + question.text})
            talk.append({"from": "gpt", "value": question.answer})
        row = {"id": name, "image": f"{PICTURES}/{name}.png", "task_type": asked[-1].kind, "conversations": talk}
        rows.append(row)
    return write_json(path, rows)


def seen(random_state: random.Random, count: int) -> list[tuple[Scene, str]]:
    """Scenes of any pair with their pictures as data URLs: what the base model learns from."""
    found = []
    for scene in [draw(random_state) for _ in range(count)]:
        content = io.BytesIO()
        paint(scene).save(content, "JPEG", quality=90, subsampling=0)
        found.append((scene, "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()))
    return found


def captioned(pictures: Sequence[tuple[Scene, str]], random_state: random.Random) -> list[Example]:
    """The pictures, each with a caption for an answer."""
    asked = Turn("user", f"{IMAGE_SLOT}\n{ASKED}")
    return [
        Example(name, name, (asked, Turn("assistant", caption(scene, random_state))), images=(url,))
        for name, (scene, url) in ((f"caption-{number}", row) for number, row in enumerate(pictures))
    ]
