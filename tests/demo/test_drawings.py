"""Laws of the vision demo's world: pictures show what words say, the split is honest, no answer is a safe guess."""

from __future__ import annotations

import base64
import io
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from rankwise.data.images import ImageReader
from rankwise.data.sources.load import load
from rankwise.demo.drawings import (
    ASKED,
    BESIDE,
    COLOURS,
    FEATURES,
    KINDS,
    LOOKS,
    PLACES,
    SHAPES,
    SIDE,
    Scene,
    SceneQuestion,
    Thing,
    captioned,
    contents,
    conversations,
    draw,
    paint,
    questions,
    seen,
    write_conversations,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(count: int, look: str = "filled") -> list[Scene]:
    generator = random.Random(3)
    return [draw(generator, look=look) for _ in range(count)]


def asked(*, held_out: bool, count: int = 120, turns: int = 1) -> list[tuple[Scene, list[SceneQuestion]]]:
    return list(conversations(random.Random(0), count, turns=turns, held_out=held_out))


def nearest_colour(pixel: tuple[int, int, int]) -> str:
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[name], strict=True)))


def covered(scene: Scene, thing: Thing) -> int:
    """How many pixels of the thing's quarter differ from the same scene painted without it."""
    rest = Scene(tuple(other for other in scene.things if other != thing), scene.seed, scene.look)
    column, row = PLACES[thing.place]
    half = SIDE // 2
    box = (column * half, row * half, (column + 1) * half, (row + 1) * half)
    here, there = (paint(one).crop(box).tobytes() for one in (scene, rest))
    triples = zip(range(0, len(here), 3), range(3, len(here) + 1, 3), strict=True)
    return sum(max(abs(a - b) for a, b in zip(here[i:j], there[i:j], strict=True)) > 40 for i, j in triples)


def single(shape: str, colour: str = "yellow", size: str = "large", look: str = "filled", seed: int = 0) -> Scene:
    return Scene((Thing(colour, shape, size, "top left"),), seed, look)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("place", PLACES)
def test_the_thing_is_where_and_what_the_words_say(colour: str, place: str) -> None:
    image = paint(Scene((Thing(colour, "square", "large", place),), 7))
    centres = {name: ((c * 2 + 1) * SIDE // 4, (r * 2 + 1) * SIDE // 4) for name, (c, r) in PLACES.items()}
    pixel = image.getpixel(centres[place])
    assert isinstance(pixel, tuple)
    assert nearest_colour(pixel[:3]) == colour
    assert covered(Scene((Thing(colour, "square", "large", place),), 7), Thing(colour, "square", "large", place)) > 300


def test_shapes_sizes_and_looks_differ_in_what_they_cover() -> None:
    area = {shape: covered(single(shape), single(shape).things[0]) for shape in SHAPES}
    assert area["square"] > area["circle"] > area["triangle"]
    assert area["circle"] > area["cross"]
    for shape in SHAPES:
        small = single(shape, size="small")
        assert covered(small, small.things[0]) < 0.7 * area[shape]
        outlined = single(shape, look=LOOKS[1])
        assert 0 < covered(outlined, outlined.things[0]) < 0.75 * area[shape]


def test_a_scene_has_one_picture_and_no_other_has_it() -> None:
    for first, second in pairwise(scenes(40)):
        assert paint(first).tobytes() == paint(first).tobytes()
        assert paint(first).tobytes() != paint(second).tobytes()
    assert paint(scenes(1)[0]).size == (SIDE, SIDE)


def test_every_question_has_exactly_the_answer_that_the_scene_gives() -> None:
    for scene in scenes(300):
        at = {thing.place: thing for thing in scene.things}
        for question in questions(scene):
            if question.kind == "count":
                assert question.answer == ("one", "two", "three")[len(at) - 1]
            elif question.kind == "place":
                assert question.text == f"Where is the {at[question.answer].name}?"
            elif question.kind in ("colour", "shape"):
                known = question.text.rstrip("?").split()[-1]
                wanted = {
                    thing.colour if question.kind == "colour" else thing.shape
                    for thing in scene.things
                    if known in (thing.colour, thing.shape)
                }
                assert wanted == {question.answer}
            else:
                there, here = question.about[1], question.about[0]
                words = next(words for words in BESIDE if words in question.text)
                (c, r), (right, down) = PLACES[here.place], BESIDE[words]
                assert PLACES[there.place] == (c + right, r + down)
                reverse = f"What is {OPPOSITE[words]} the {there.name}?"
                assert (reverse, here.name) in [(one.text, one.answer) for one in questions(scene)]


def test_training_shows_no_held_out_pair_and_held_out_questions_are_about_one() -> None:
    train, held = asked(held_out=False, turns=3), asked(held_out=True)
    shown = {thing.name for scene, _ in train for thing in scene.things}
    assert not [question for _, found in held for question in found if not {t.name for t in question.about} - shown]
    parts = [{word for name in shown for word in name.split()}, {*COLOURS, *SHAPES}]
    assert parts[0] == parts[1], "every colour and every shape is met, in other pairs"
    assert {question.kind for _, found in held for question in found} == set(KINDS)


def test_no_answer_is_a_safe_guess() -> None:
    given = Counter((question.kind, question.answer) for _, found in asked(held_out=True) for question in found)
    for kind in KINDS:
        counts = [count for (of, _), count in given.items() if of == kind]
        assert max(counts) <= min(counts) + 3, kind


def test_rows_are_llava_conversations_with_their_pictures(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "train.json", random.Random(1), count=9, turns=2, held_out=False)
    again = write_conversations(tmp_path / "b" / "train.json", random.Random(1), count=9, turns=2, held_out=False)
    assert path.read_text() == again.read_text()
    rows = json.loads(path.read_text())
    assert [turn["from"] for turn in rows[0]["conversations"]] == ["human", "gpt"] * (
        len(rows[0]["conversations"]) // 2
    )
    reader = ImageReader(tmp_path)
    for example in load("conversations", path):
        assert reader.open(example.images[0]).size == (SIDE, SIDE)
        assert example.stratum in KINDS


def test_captions_show_every_pair_and_say_what_is_there() -> None:
    examples = captioned(seen(random.Random(0), 400), random.Random(0))
    assert {turn.text for example in examples for turn in example.turns[:1]} == {f"<image>\n{ASKED}"}
    said = " ".join(example.answer for example in examples)
    assert not [pair for pair in (f"{c} {s}" for c in COLOURS for s in SHAPES) if pair not in said]
    image = Image.open(io.BytesIO(base64.b64decode(examples[0].images[0].split(",")[1])))
    assert image.size == (SIDE, SIDE)


def test_contents_name_what_is_in_each_quarter() -> None:
    for scene in scenes(50):
        rows = dict(zip(PLACES, contents(scene), strict=True))
        told = {
            (place, *(names[number - 1] for names, number in zip(FEATURES.values(), row, strict=True)))
            for place, row in rows.items()
            if any(row)
        }
        assert told == {(thing.place, thing.shape, thing.colour, thing.size) for thing in scene.things}
