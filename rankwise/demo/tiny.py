"""rankwise tiny: a tiny vision-language model and sample images, so that the way to a phone can be walked offline.

rankwise tiny -o runs/tiny

scenes with captions ── train_vision_base ──▶ base/     it says "blue waves: water"; never asked the task's question
other scenes ───────────────────────────────▶ photos/   JPEG files of all sizes, as cameras leave them
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.data.device import encoded, resize_for_device
from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.label_task import load_task
from rankwise.demo.base import BaseTraining, spoken, train_vision_base
from rankwise.demo.scenes import LOOKS, SHADES, SIZES, paint, photos
from rankwise.files.atomic import atomic_folder
from rankwise.files.run_folder import RunFolder
from rankwise.models.tiny import SIDE
from rankwise.options.commands import TinyConfig

TASK, ASKED = "elements", "What do you see?"
QUARTERS = 4  # of a picture, as the Eye looks at them; a scene is of one element in all of them
# Ten to fifteen seconds on two cores.
COURSE = BaseTraining(400, 320, 100, batch_size=12, eye_steps=40, eye_batch_size=24)
QUICK = replace(COURSE, samples=40, steps=4, eye_steps=2)


@dataclass(frozen=True)
class ElementImage:
    """A picture, letterboxed to the tower's size as a data URL, and its element."""

    element: str
    url: str


def run(config: TinyConfig) -> Path:
    """Make `base` and `photos` in the folder, each where it is not there yet. Returns the folder."""
    folder = RunFolder(config.output_dir)
    with folder.lock():
        make_photos(folder / "photos", config.seed)
        make_base(folder / "base", QUICK if config.quick else COURSE, config.seed)
    print(f"base model and photos in {folder.path}")
    return folder.path


def make_photos(folder: Path, seed: int) -> None:
    if folder.is_dir():
        return
    with atomic_folder(folder) as made:
        written = photos(made, random.Random(seed))
    print(f"photos: {len(written)} drawn, one of them twice and one on its side", flush=True)


def make_base(folder: Path, course: BaseTraining, seed: int) -> None:
    """A SmolVLM of a million parameters that can tell the elements apart and name them in a caption."""
    if folder.is_dir():
        return
    generator = random.Random(f"base {seed}")  # other scenes than the photos
    scenes = [seen(element, generator) for element in generator.choices(list(SHADES), k=course.samples)]
    examples = [captioned(scene, generator) for scene in scenes]
    contents = [[[list(SHADES).index(scene.element)]] * QUARTERS for scene in scenes]
    with atomic_folder(folder) as made:
        texts = [*spoken(examples), load_task(TASK).student_prompt]
        train_vision_base(made, texts, examples, contents, [len(SHADES)], course, seed)


def seen(element: str, generator: random.Random) -> ElementImage:
    width, height = generator.choice(SIZES)
    picture = resize_for_device(paint(element, width // 2, height // 2, generator), SIDE)
    return ElementImage(element, "data:image/png;base64," + base64.b64encode(encoded(picture, "PNG")).decode())


def captioned(scene: ElementImage, generator: random.Random) -> Example:
    """What is seen, and what it is made of, in either order."""
    words = [LOOKS[scene.element], scene.element]
    turns = (Turn("user", f"{IMAGE_SLOT}\n{ASKED}"), Turn("assistant", ": ".join(generator.sample(words, 2))))
    name = f"{scene.element}-{generator.getrandbits(32):08x}"
    return Example(name, name, turns, images=(scene.url,))


def describe(config: TinyConfig) -> list[str]:
    course = QUICK if config.quick else COURSE
    return [f"draw photos, and pretrain a tiny SmolVLM for {course.eye_steps} + {course.steps} steps"]
