"""rankwise demo: the whole flow on a model and data that it makes itself. No network, no GPU, about four minutes.

It makes a world (a grammar of restaurants; with --vision, drawings), a base model that knows it (with --experts, a
mixture), and a task that the base has never met, and then runs `recipes/demo.yaml` (or demo_vision.yaml,
demo_experts.yaml) like anyone would. With --model a chat model of one's own takes the place of the base
(`chat_model.py`, demo_model.yaml).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.data.device import DeviceTarget
from rankwise.data.sources.load import load
from rankwise.data.template import sections
from rankwise.demo.base import BaseTraining, spoken, train_text_base, train_vision_base
from rankwise.demo.chat_model import fitting, require_template
from rankwise.demo.drawings import FEATURES, captioned, contents, seen, write_conversations
from rankwise.demo.restaurants import guide, write_task
from rankwise.errors import UsageError, need
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import atomic_folder, read_object
from rankwise.files.gguf import ENDING
from rankwise.files.run_folder import RunFolder
from rankwise.gguf.converter import find_converter
from rankwise.models.tiny import SIDE, random_llama, random_mixtral
from rankwise.options.commands import DemoConfig, RunConfig
from rankwise.page.text import duration
from rankwise.pipeline import run as recipes
from rankwise.pipeline.recipe import find_recipe, load_recipe


@dataclass(frozen=True)
class World:
    """How large everything is. course: of the base, where one is made."""

    train_rows: int
    held_out_rows: int
    course: BaseTraining | None = None


REFERENCES, TURNS = 3, 3  # wordings per meaning representation, questions per image
TRAIN, HELD_OUT = "train.json", "heldout.json"
QUICK_CHANGES = tuple(
    "train.max_steps=4 probe.subset_ratio=0.5 before.num_samples=4 after.num_samples=4 before.max_new_tokens=8 "
    "after.max_new_tokens=8 validate.num_samples=4 validate.parity_samples=4 validate.max_new_tokens=8".split()
)
MINUTES = 15.0
EXAMPLE = World(200, 24, BaseTraining(200, 400, 12, batch_size=8))
PARTS = (("advise", "model_name"), ("before", "model_path"), ("after", "base_model_id"), ("merge", "base_model"))
QUICK_GAIN = ("ranks.num_samples=6", "ranks.no_plots=true")
QUICK_ADVICE = tuple(
    f"advise.{change}" for change in "steps=8 ranks=4,2 choose_size=20 confirm_size=20 no_plots=true".split()
)
SHIPPING = ("merge", "export", "validate")  # stages that lead to llama.cpp and need its parts
SEEDED = ("probe", "ranks", "advise", "train", "before", "after", "validate")


def run(config: DemoConfig) -> Path:
    """Make the base and the data where they are not there yet, run the recipe, and sum up."""
    started = time.monotonic()
    folder = run_folder(config)
    if config.model:
        require_template(config.model)
    make(config, folder)
    lacking = lacking_parts()
    if lacking:
        RunFolder(folder).record("demo", {}, {}, 0.0, left_out=f"{', '.join(SHIPPING)}: {lacking}")
    recipes.run(recipe_config(config, shipping=not lacking, sized=sized(config, folder)))
    if lacking:
        print(f"left out: {', '.join(SHIPPING)}: {lacking}")
    print(summary(folder, time.monotonic() - started, kind_of(config).metrics))
    return folder / "report.html"


def check(config: DemoConfig) -> None:
    if config.vision and config.experts:
        raise UsageError("--vision and --experts are two demos: give one of them")
    if config.model and (config.vision or config.experts):
        raise UsageError("--vision and --experts make models of their own; leave them out, or --model")
    if config.minutes is not None and not config.model:
        raise UsageError("--minutes is for --model; the other demos take as long as they take")
    if config.minutes is not None and config.quick:
        raise UsageError("--quick takes a few steps of everything, whatever the time: leave out --minutes, or --quick")


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
    own = f"-{Path(config.model).name.removesuffix(ENDING)}" if config.model else ""
    return Path(config.output_dir or f"runs/{recipe_name(config).removesuffix('-model')}{own}")


def recipe_name(config: DemoConfig) -> str:
    """The recipe, whose name the run folder has too."""
    return kind_of(config).name


def make(config: DemoConfig, folder: Path) -> None:
    """What the demo starts from."""
    make_world(kind_of(config), kind_of(config).world(config), folder, config.seed)


def make_world(kind: Demonstration, world: World, folder: Path, seed: int) -> None:
    """`data` and `base` in the folder, each where it is not there yet."""
    if not (folder / "data").is_dir():
        with atomic_folder(folder / "data") as made:
            kind.data_of(made, world, random.Random(seed))
    if world.course is not None and not (folder / "base").is_dir():
        with atomic_folder(folder / "base") as made:
            kind.base_of(made, folder / "data", world.course, seed)


def tiny_example(folder: Path | str, seed: int = 42) -> tuple[Path, Path]:
    """A tiny base model and rows to try things with: made offline on a CPU in a few seconds, and kept in the folder.

    Returns:
        The folder of a Llama of 650,000 parameters that has read a little about restaurants, and one with trainset.csv
        (200 meaning representations, three wordings each) and devset.csv (24 others) for the task `e2e_nlg`, which the
        model has never met.
    """
    make_world(TEXT, EXAMPLE, Path(folder), seed)
    return Path(folder) / "base", Path(folder) / "data"


def sized(config: DemoConfig, folder: Path) -> list[str]:
    """Changes of the recipe for a chat model of one's own: the sizes that fit the time."""
    if not config.model or config.quick:
        return []
    minutes = config.minutes or MINUTES
    rows = len(load("e2e_nlg", folder / "data", "train").items)
    return fitting(config.model, folder / "data", folder, minutes).changes(minutes, rows)


def recipe_config(config: DemoConfig, *, shipping: bool = True, sized: Sequence[str] = ()) -> RunConfig:
    """shipping: to llama.cpp and back as well. sized: further changes."""
    recipe = recipe_name(config).replace("-", "_")
    names = stage_names(config)
    changes = [f"{name}.seed={config.seed}" for name in names if name in SEEDED]
    if config.model:
        changes += [f"{stage}.{option}={config.model}" for stage, option in PARTS] + list(sized)
    if config.quick:
        changes += kind_of(config).quick_changes
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
    train_text_base(folder, guide(random.Random(seed), course.samples), prompts(data), course, seed, random_llama)


def make_expert_base(folder: Path, data: Path, course: BaseTraining, seed: int) -> None:
    """A Mixtral of three million parameters that has read the same pages."""
    train_text_base(folder, guide(random.Random(seed), course.samples), prompts(data), course, seed, random_mixtral)


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


@dataclass(frozen=True)
class Demonstration:
    """One of the demos. name: of its recipe and run folder. rows: what they are. data_of, base_of: make data and base.
    quick_changes: of the recipe, with --quick. The whole of one takes about four minutes on two cores."""

    name: str
    rows: str
    metrics: tuple[str, ...]
    whole: World
    quick: World
    data_of: Callable[[Path, World, random.Random], None]
    base_of: Callable[[Path, Path, BaseTraining, int], None]
    quick_changes: tuple[str, ...]

    def world(self, config: DemoConfig) -> World:
        return self.quick if config.quick else self.whole


TEXT = Demonstration(
    "demo",
    "meaning representations",
    ("bleu", "rouge_l"),
    World(400, 64, BaseTraining(8000, 800, 800)),
    World(64, 6, BaseTraining(200, 400, 4)),
    make_rows,
    make_text_base,
    (*QUICK_CHANGES, *QUICK_GAIN, *QUICK_ADVICE),
)
MIXTURE = replace(
    TEXT,
    name="demo-experts",
    whole=replace(TEXT.whole, course=BaseTraining(8000, 800, 400)),
    base_of=make_expert_base,
    quick_changes=(*QUICK_CHANGES, "ranks.no_plots=true"),
)
VISION = Demonstration(
    "demo-vision",
    "conversations about drawings",
    ("exact_match", "token_f1"),
    World(800, 200, BaseTraining(6000, 400, 1400, eye_steps=180)),
    World(24, 10, BaseTraining(60, 340, 4, eye_steps=2)),
    make_conversations,
    make_vision_base,
    (*QUICK_CHANGES, *QUICK_GAIN),
)


OWN = replace(
    TEXT,
    name="demo-model",
    whole=World(400, 64),
    quick=World(64, 30),
    quick_changes=(
        *(change for change in QUICK_CHANGES if not change.startswith("probe")),
        "validate.threads=1",
        *(change for change in QUICK_ADVICE if not change.startswith("advise.ranks")),
    ),
)


def kind_of(config: DemoConfig) -> Demonstration:
    return OWN if config.model else VISION if config.vision else MIXTURE if config.experts else TEXT


def summary(folder: Path, seconds: float, metrics: Sequence[str]) -> str:
    before, after = (EvaluationResult.load(folder / name) for name in ("before", "after"))
    facts = read_object(folder / "train" / "manifest.json")["stages"]["train"]
    trained, full = facts["trainable_parameters"], facts["total_parameters"]
    lines = [f"{name:<12}{before[name]:6.1f} → {after[name]:5.1f}" for name in metrics]
    lines.append(f"trained {trained:,} parameters of {full:,}: {trained / full:.1%} of full fine-tuning")
    lines.append(f"{duration(seconds)} in all; the report: {folder / 'report.html'}")
    return "\n".join(["", *lines])


def describe(config: DemoConfig) -> list[str]:
    kind, world = kind_of(config), kind_of(config).world(config)
    made, base = f"make a task of {world.train_rows} {kind.rows}", f"and a base model in {run_folder(config)}"
    sizes = f"measure a step and an answer of {config.model}; choose sizes for {config.minutes or MINUTES:g} minutes"
    return [
        *([f"{made} {base}", f"pretrain the base for {world.course.steps} steps"] if world.course else [made, sizes]),
        f"run the recipe {recipe_config(config).recipe!r} ({', '.join(stage_names(config))})",
    ]
