"""rankwise demo: the whole flow on a model and data that it makes itself. No network, no GPU, about four minutes.

It makes a world (a grammar of restaurants; with --vision, drawings), a base model that knows it, and a task that the
base has never met, and then runs `recipes/demo.yaml` (or demo_vision.yaml) like anyone would.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.data.device import DeviceTarget
from rankwise.data.sources.load import load
from rankwise.data.template import sections
from rankwise.demo.base import BaseTraining, spoken, train_text_base, train_vision_base
from rankwise.demo.drawings import FEATURES, captioned, contents, seen, write_conversations
from rankwise.demo.restaurants import guide, write_task
from rankwise.errors import UsageError, need
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import atomic_folder, read_object
from rankwise.files.run_folder import RunFolder
from rankwise.gguf.converter import find_converter
from rankwise.models.tiny import SIDE
from rankwise.options.commands import DemoConfig, RunConfig
from rankwise.page.text import duration
from rankwise.pipeline import run as recipes
from rankwise.pipeline.recipe import find_recipe, load_recipe


@dataclass(frozen=True)
class World:
    """How large everything is."""

    train_rows: int
    held_out_rows: int
    course: BaseTraining


# By --vision, then by --quick. The whole ones take about four minutes on two cores.
WORLDS = {
    False: {False: World(400, 64, BaseTraining(8000, 800, 800)), True: World(64, 6, BaseTraining(200, 400, 4))},
    True: {
        False: World(800, 200, BaseTraining(6000, 400, 1400, eye_steps=180)),
        True: World(24, 10, BaseTraining(60, 340, 4, eye_steps=2)),
    },
}
REFERENCES, TURNS = 3, 3  # wordings per meaning representation, questions per image
TRAIN, HELD_OUT = "train.json", "heldout.json"
QUICK_CHANGES = tuple(
    "train.max_steps=4 probe.subset_ratio=0.5 ranks.num_samples=6 before.num_samples=4 after.num_samples=4 "
    "before.max_new_tokens=8 after.max_new_tokens=8 ranks.no_plots=true "
    "validate.num_samples=4 validate.parity_samples=4 validate.max_new_tokens=8".split()
)
QUICK_ADVICE = tuple(
    f"advise.{change}" for change in "steps=8 ranks=4,2 choose_size=20 confirm_size=20 no_plots=true".split()
)
SHIPPING = ("merge", "export", "validate")  # stages that lead to llama.cpp and need its parts
SEEDED = ("probe", "ranks", "advise", "train", "before", "after", "validate")
METRICS = {False: ("bleu", "rouge_l"), True: ("exact_match", "token_f1")}


def run(config: DemoConfig) -> Path:
    """Make the base and the data where they are not there yet, run the recipe, and sum up."""
    started = time.monotonic()
    folder = run_folder(config)
    make(config, folder)
    lacking = lacking_parts()
    if lacking:
        RunFolder(folder).record("demo", {}, {}, 0.0, left_out=f"{', '.join(SHIPPING)}: {lacking}")
    recipes.run(recipe_config(config, shipping=not lacking))
    if lacking:
        print(f"left out: {', '.join(SHIPPING)}: {lacking}")
    print(summary(folder, time.monotonic() - started, METRICS[config.vision]))
    return folder / "report.html"


def ready(config: DemoConfig) -> None:
    """What its recipe's stages need."""
    made = [run_folder(config) / name for name in ("base", "data")]
    recipes.ready(recipe_config(config, shipping=not lacking_parts()), made)


def lacking_parts() -> str:
    """The parts of llama.cpp that are not installed, as a sentence; empty where all are."""
    try:
        need("gguf", extra="device")
        need("xllamacpp", extra="device")
        find_converter(None)
    except UsageError as error:
        return str(error)
    return ""


def run_folder(config: DemoConfig) -> Path:
    return Path(config.output_dir or f"runs/{recipe_name(config)}")


def recipe_name(config: DemoConfig) -> str:
    """The recipe, whose name the run folder has too."""
    return "demo-vision" if config.vision else "demo"


def make(config: DemoConfig, folder: Path) -> None:
    """`data` and `base` in the run folder, each where it is not there yet."""
    world = WORLDS[config.vision][config.quick]
    data_of, base_of = (make_conversations, make_vision_base) if config.vision else (make_rows, make_text_base)
    if not (folder / "data").is_dir():
        with atomic_folder(folder / "data") as made:
            data_of(made, world, random.Random(config.seed))
    if not (folder / "base").is_dir():
        with atomic_folder(folder / "base") as made:
            base_of(made, folder / "data", world.course, config.seed)


def recipe_config(config: DemoConfig, *, shipping: bool = True) -> RunConfig:
    """shipping: to llama.cpp and back as well."""
    recipe = recipe_name(config).replace("-", "_")
    names = stage_names(config)
    changes = [f"{name}.seed={config.seed}" for name in names if name in SEEDED]
    if config.quick:
        changes += QUICK_CHANGES if config.vision else (*QUICK_CHANGES, *QUICK_ADVICE)
    only = [] if shipping else [name for name in names if name not in SHIPPING]
    return RunConfig(recipe=recipe, output_dir=str(run_folder(config)), set=changes, only=only)


def stage_names(config: DemoConfig) -> list[str]:
    recipe = find_recipe(recipe_name(config).replace("-", "_"))
    return [stage.name for stage in load_recipe(recipe, run_folder(config)).stages]


def make_rows(folder: Path, world: World, generator: random.Random) -> None:
    """trainset.csv and devset.csv in the official form; names and foods of held-out rows never met in training."""
    for name, count, held_out in (("trainset.csv", world.train_rows, False), ("devset.csv", world.held_out_rows, True)):
        write_task(folder / name, generator, count=count, references=REFERENCES, held_out=held_out)


def make_conversations(folder: Path, world: World, generator: random.Random) -> None:
    """Conversations in LLaVA form with their images; held-out (colour, shape) pairs never met in training."""
    write_conversations(folder / TRAIN, generator, count=world.train_rows, turns=TURNS, held_out=False)
    write_conversations(folder / HELD_OUT, generator, count=world.held_out_rows, turns=1, held_out=True)


def make_text_base(folder: Path, data: Path, course: BaseTraining, seed: int) -> None:
    """A Llama of a million parameters that has read guide pages: it speaks, and has never seen the task."""
    train_text_base(folder, guide(random.Random(seed), course.samples), prompts(data), course, seed)


def make_vision_base(folder: Path, data: Path, course: BaseTraining, seed: int) -> None:
    """A SmolVLM of a million parameters that has learnt to describe images, and has never been asked a question."""
    generator = random.Random(seed)
    pictures = seen(generator, course.samples)
    examples = captioned(pictures, generator)
    texts = spoken([*load("conversations", data / TRAIN), *examples[:2000]])
    classes = [1 + len(names) for names in FEATURES.values()]
    train_vision_base(folder, texts, examples, [contents(scene) for scene, _ in pictures], classes, course, seed)
    DeviceTarget(image_size=SIDE).save(folder)  # from here on everything sees images as llama.cpp will show them


def prompts(data: Path) -> list[str]:
    """What the task's prompts look like: the vocabulary should have words for them, though the base reads none."""
    examples = load("e2e_nlg", data, "train")
    return [sections(example, "").before[-1] for example in examples.items[:300]]


def summary(folder: Path, seconds: float, metrics: Sequence[str]) -> str:
    before, after = (EvaluationResult.load(folder / name) for name in ("before", "after"))
    facts = read_object(folder / "train" / "manifest.json")["stages"]["train"]
    trained, full = facts["trainable_parameters"], facts["total_parameters"]
    lines = [f"{name:<12}{before[name]:6.1f} → {after[name]:5.1f}" for name in metrics]
    lines.append(f"trained {trained:,} parameters of {full:,}: {trained / full:.1%} of full fine-tuning")
    lines.append(f"{duration(seconds)} in all; the report: {folder / 'report.html'}")
    return "\n".join(["", *lines])


def describe(config: DemoConfig) -> list[str]:
    world = WORLDS[config.vision][config.quick]
    rows = f"{world.train_rows} {'conversations about drawings' if config.vision else 'meaning representations'}"
    return [
        f"make a task of {rows} and a base model in {run_folder(config)}",
        f"pretrain the base for {world.course.steps} steps",
        f"run the recipe {recipe_config(config).recipe!r} ({', '.join(stage_names(config))})",
    ]
