"""What is said about the drawings: captions for the demo's base model, questions and answers for the fine-tune.

    Scene ──┬─ caption ───▶ captioned: samples that the base learns to describe pictures from; they show every pair
            └─ questions ─▶ write_conversations: LLaVA files, without the held-out pairs or about them

No caption answers a question, and no answer is a safe guess: all are asked for about as often.
"""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.demo.drawings import Scene, Thing, draw, neighbours, paint
from rankwise.files.atomic import write_json

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
class Question:
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


def questions(scene: Scene) -> Iterator[Question]:
    """Every question that has one answer."""
    for thing in scene.things:
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            yield Question("colour", f"What colour is the {thing.shape}?", thing.colour, (thing,))
        if sum(other.colour == thing.colour for other in scene.things) == 1:
            yield Question("shape", f"Which shape is {thing.colour}?", thing.shape, (thing,))
        yield Question("place", f"Where is the {thing.name}?", thing.place, (thing,))
    yield Question("count", "How many shapes are there?", NUMBERS[len(scene.things) - 1], scene.things)
    for words, thing, other in neighbours(scene):
        yield Question("beside", f"What is {words} the {thing.name}?", other.name, (thing, other))


def conversations(
    random_state: random.Random, count: int, *, turns: int, held_out: bool, look: str = "filled"
) -> Iterator[tuple[Scene, list[Question]]]:
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


def _candidates(random_state: random.Random, kind: str, held_out: bool, look: str) -> list[tuple[Scene, Question]]:
    """Questions of a kind to choose from, about `CHOICE` scenes of one side of the split."""
    found: list[tuple[Scene, Question]] = []
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
    scenes = [draw(random_state) for _ in range(count)]
    return [(scene, _data_url(paint(scene))) for scene in scenes]


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def captioned(pictures: Sequence[tuple[Scene, str]], random_state: random.Random) -> list[Example]:
    """The pictures, each with a caption for an answer."""
    asked = Turn("user", f"{IMAGE_SLOT}\n{ASKED}")
    return [
        Example(name, name, (asked, Turn("assistant", caption(scene, random_state))), images=(url,))
        for name, (scene, url) in ((f"caption-{number}", row) for number, row in enumerate(pictures))
    ]
