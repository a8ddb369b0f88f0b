"""rankwise demo: the whole flow on a model and data that it makes itself. No network, no GPU, about three minutes.

It makes a world (a grammar of restaurants; with --vision, drawings: demo_vision.py), a base model that has read about
it, and a task that the base has never seen, and then runs `recipes/demo.yaml` like anyone would.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.data.dataset import Collator
from rankwise.data.sources import load
from rankwise.data.template import sections
from rankwise.demo import vision
from rankwise.demo.pretrain import pretrain
from rankwise.demo.restaurants import guide, write_task
from rankwise.errors import UsageError, need
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import atomic_folder, read_object
from rankwise.files.run_folder import RunFolder
from rankwise.gguf.converter import find_converter
from rankwise.models.tiny import random_llama, save_tokenizer
from rankwise.options.commands import DemoConfig, RunConfig
from rankwise.page.text import amount, duration
from rankwise.pipeline import run as recipes
from rankwise.pipeline.recipe import find_recipe, load_recipe


@dataclass(frozen=True)
class World:
    """How large everything is. The defaults take about three minutes on two cores."""

    pages: int = 8000
    vocabulary: int = 800
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 3e-3
    train_rows: int = 400
    references: int = 3
    dev_rows: int = 64


QUICK = World(pages=200, vocabulary=400, steps=4, train_rows=24, dev_rows=6)
QUICK_CHANGES = tuple(
    "train.max_steps=4 probe.subset_ratio=0.5 ranks.num_samples=6 before.num_samples=4 after.num_samples=4 "
    "before.max_new_tokens=8 after.max_new_tokens=8 ranks.no_plots=true "
    "validate.num_samples=4 validate.parity_samples=4 validate.max_new_tokens=8".split()
)
SHIPPING = ("merge", "export", "validate")  # stages that lead to llama.cpp and need its parts
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
    """What of llama.cpp is not installed here, as a sentence; nothing where all of it is."""
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
    if config.vision:
        vision.make(folder, vision.QUICK if config.quick else vision.World(), config.seed)
        return
    world = QUICK if config.quick else World()
    make_data(folder / "data", world, config.seed)
    make_base(folder / "base", folder / "data", world, config.seed)


def recipe_config(config: DemoConfig, *, shipping: bool = True) -> RunConfig:
    """shipping: to llama.cpp and back as well."""
    recipe = recipe_name(config).replace("-", "_")
    changes = [f"{name}.seed={config.seed}" for name in ("probe", "ranks", "train", "before", "after", "validate")]
    changes += QUICK_CHANGES if config.quick else ()
    path = find_recipe(recipe)
    names = [stage.name for stage in load_recipe(path, run_folder(config)).stages if stage.name not in SHIPPING]
    only = [] if shipping else names
    return RunConfig(recipe=recipe, output_dir=str(run_folder(config)), set=changes, only=only)


def make_data(folder: Path, world: World, seed: int) -> None:
    """trainset.csv and devset.csv in the official form; names and foods of held-out rows never met in training."""
    if folder.is_dir():
        return
    generator = random.Random(seed)
    with atomic_folder(folder) as made:
        rows, references = world.train_rows, world.references
        write_task(made / "trainset.csv", generator, count=rows, references=references, held_out=False)
        write_task(made / "devset.csv", generator, count=world.dev_rows, references=references, held_out=True)


def make_base(folder: Path, data: Path, world: World, seed: int) -> None:
    """A Llama of a million parameters that has read guide pages: it speaks, and has never seen the task."""
    if folder.is_dir():
        return
    started = time.monotonic()
    pages = guide(random.Random(seed), world.pages)
    with atomic_folder(folder) as made:
        tokenizer = save_tokenizer(made, [*pages[:2000], *prompts(data)], world.vocabulary)
        model = random_llama(tokenizer, seed)
        print(f"base: a Llama of {amount(model.num_parameters())} parameters reads {world.pages:,} pages", flush=True)
        # every page is one sample with an end token, every token a label
        encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(pages)["input_ids"]]
        loss = pretrain(
            model,
            [{"input_ids": ids, "labels": ids, "sample_index": index} for index, ids in enumerate(encoded)],
            Collator.of(tokenizer),
            steps=world.steps,
            batch_size=world.batch_size,
            learning_rate=world.learning_rate,
            seed=seed,
        )
        model.save_pretrained(made)
    print(f"base: loss {loss:.2f} nats per token after {duration(time.monotonic() - started)}", flush=True)


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
    world = QUICK if config.quick else World()
    seen = vision.QUICK if config.quick else vision.World()
    made = f"{seen.train_rows} conversations about drawings" if config.vision else ""
    made = made or f"{world.train_rows} meaning representations"
    return [
        f"make a task of {made} and a base model in {run_folder(config)}",
        f"pretrain the base for {seen.steps if config.vision else world.steps} steps",
        f"run the recipe {recipe_config(config).recipe!r} (finetune, ranks, train, evaluate before and after, merge, "
        "export, validate, report)",
    ]
