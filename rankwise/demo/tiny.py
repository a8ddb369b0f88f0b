"""rankwise tiny: a small model that sees and photos for it, so that the way to a phone can be walked offline.

rankwise tiny -o runs/tiny

scenes ── pretrain (Eye) ────▶ vision tower   it tells the five elements apart
captions ── pretrain ────────▶ base/          it says "blue waves: water", and has never been asked the task's question
other scenes ────────────────▶ photos/        JPEG files of all sizes, as cameras leave them

A trained model, because with random weights a mistake in conversion or geometry changes nothing that one could see.
"""

from __future__ import annotations

import base64
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.device import DeviceReader, DeviceTarget, device_processor, encoded, resize_for_device
from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.label_task import load_task
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.demo.pretrain import pretrain
from rankwise.demo.scenes import LOOKS, SHADES, SIZES, paint, photos
from rankwise.demo.vision import eye_batch, spoken
from rankwise.files.atomic import atomic_folder
from rankwise.files.run_folder import RunFolder
from rankwise.models.tiny_vision import SIDE, Eye, processor_of, random_smolvlm, save_tokenizer
from rankwise.options.commands import TinyConfig
from rankwise.page.text import amount, duration

TASK, ASKED = "elements", "What do you see?"
QUARTERS = 4  # of a picture, as the Eye looks at them; a scene is of one element in all of them


@dataclass(frozen=True)
class World:
    """How much the base sees. The defaults take ten to fifteen seconds on two cores."""

    pictures: int = 400
    vocabulary: int = 320
    eye_steps: int = 40
    eye_batch_size: int = 24
    steps: int = 100
    batch_size: int = 12
    learning_rate: float = 3e-3


QUICK = World(pictures=40, eye_steps=2, steps=4)


@dataclass(frozen=True)
class Scene:
    """A picture, letterboxed to the tower's size as a data URL, and its element."""

    element: str
    url: str


def run(config: TinyConfig) -> Path:
    """Make `base` and `photos` in the folder, each where it is not there yet. Returns the folder."""
    folder = RunFolder(config.output_dir)
    with folder.lock():
        make_photos(folder / "photos", config.seed)
        make_base(folder / "base", QUICK if config.quick else World(), config.seed)
    print(f"base model and photos in {folder.path}")
    return folder.path


def make_photos(folder: Path, seed: int) -> None:
    if folder.is_dir():
        return
    with atomic_folder(folder) as made:
        written = photos(made, random.Random(seed))
    print(f"photos: {len(written)} drawn, one of them twice and one on its side", flush=True)


def make_base(folder: Path, world: World, seed: int) -> None:
    """A SmolVLM of a million parameters that can tell the elements apart and name them in a caption."""
    if folder.is_dir():
        return
    started = time.monotonic()
    generator = random.Random(f"base {seed}")  # other scenes than the photos
    scenes = [seen(element, generator) for element in generator.choices(list(SHADES), k=world.pictures)]
    examples = [captioned(scene, generator) for scene in scenes]
    with atomic_folder(folder) as made:
        tokenizer = save_tokenizer(made, [*spoken(examples), load_task(TASK).student_prompt], world.vocabulary)
        processor = processor_of(tokenizer)
        processor.save_pretrained(made)
        model = random_smolvlm(tokenizer, seed)
        size = amount(model.num_parameters())
        print(f"base: a SmolVLM of {size} parameters sees {world.pictures:,} scenes", flush=True)
        train = partial(pretrain, learning_rate=world.learning_rate, seed=seed)
        reader = ImageReader(made)
        train(
            Eye(model, [len(SHADES)]),
            [{"url": scene.url, "contents": [[list(SHADES).index(scene.element)]] * QUARTERS} for scene in scenes],
            partial(eye_batch, Sight(processor, reader)),
            steps=world.eye_steps,
            batch_size=world.eye_batch_size,
        )
        sight = device_sight(processor, reader)
        loss = train(
            model,
            RenderedDataset(examples, Renderer(tokenizer, style="chat", sight=sight)),
            Collator.of(tokenizer, sight=sight),
            steps=world.steps,
            batch_size=world.batch_size,
        )
        model.save_pretrained(made)
    print(f"base: loss {loss:.2f} nats per token after {duration(time.monotonic() - started)}", flush=True)


def device_sight(processor: object, reader: ImageReader) -> Sight:
    """As the phone's runtime lays pictures out: the released models have seen tiles before anyone fine-tunes them."""
    target = DeviceTarget(image_size=SIDE)
    return Sight(device_processor(processor, target), DeviceReader(reader, target), target=target)


def seen(element: str, generator: random.Random) -> Scene:
    width, height = generator.choice(SIZES)
    picture = resize_for_device(paint(element, width // 2, height // 2, generator), SIDE)
    return Scene(element, data_url(picture))


def data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(picture, "PNG")).decode()


def captioned(scene: Scene, generator: random.Random) -> Example:
    """What is seen, and what it is made of, in either order."""
    words = [LOOKS[scene.element], scene.element]
    turns = (Turn("user", f"{IMAGE_SLOT}\n{ASKED}"), Turn("assistant", ": ".join(generator.sample(words, 2))))
    name = f"{scene.element}-{generator.getrandbits(32):08x}"
    return Example(name, name, turns, images=(scene.url,))


def describe(config: TinyConfig) -> list[str]:
    world = QUICK if config.quick else World()
    return [
        f"draw photos to {config.output_dir}/photos",
        f"pretrain a tiny SmolVLM for {world.eye_steps} + {world.steps} steps, to {config.output_dir}/base",
    ]
