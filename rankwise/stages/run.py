"""rankwise run: a pipeline of stages from one recipe; skips what is done, goes on where it was stopped.

MODEL_NAME=… DATA_PATH=… rankwise run recipes/svd_ranks.yaml --set train.learning_rate=1e-3
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.config import RunConfig
from rankwise.errors import UsageError
from rankwise.options import flatten
from rankwise.stages.commands import COMMANDS, configured, stage_of
from rankwise.stages.recipe import Recipe, Stage, find_recipe, load_recipe
from rankwise.stages.torchrun import run_in_processes
from rankwise.store.files import fingerprint, read_object, write_json

STATE = ".stages.json"
OUTPUTS = ("output_dir", "out", "run")


def run(config: RunConfig) -> Path:
    """Run the stages in order. Returns the run folder."""
    recipe, configs = prepared(config)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    state = read_object(folder / STATE) if (folder / STATE).is_file() else {}
    chosen, forced = selection(config, recipe)
    for number, stage in enumerate(recipe.stages, 1):
        if stage.name not in chosen:
            continue
        title = f"[{number}/{len(recipe.stages)}] {stage.name}"
        mark = fingerprint_of(stage, configs[stage.name])
        if not forced and state.get(stage.name, {}).get("done") == mark:
            print(f"{title}: done already, skipped")
            continue
        forced = True
        started = time.monotonic()
        print(f"{title}: rankwise {stage.command}", flush=True)
        ready = resuming(stage, configs[stage.name], state.get(stage.name, {}), mark)
        write_json(folder / STATE, state := state | {stage.name: {"started": mark}})
        execute(stage, ready, folder)
        seconds = time.monotonic() - started
        # What the stage read may have been made by an earlier one just now: the mark is that of the finished run.
        done = fingerprint_of(stage, configs[stage.name])
        write_json(folder / STATE, state := state | {stage.name: {"done": done, "seconds": round(seconds, 1)}})
        print(f"{title}: {seconds:.0f} s", flush=True)
    print(f"{recipe.name}: everything is in {folder}")
    return folder


def prepared(config: RunConfig) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and every stage's config: all of it is checked before anything runs."""
    if not config.recipe:
        raise UsageError("run needs a recipe: rankwise run RECIPE.yaml, or the name of one that comes with the package")
    recipe = load_recipe(find_recipe(config.recipe), run_folder(config), config.set)
    configs = {
        stage.name: configured(stage.command, stage.options, f"{recipe.path}: stage {stage.name}")
        for stage in recipe.stages
    }
    selection(config, recipe)
    return recipe, configs


def run_folder(config: RunConfig) -> Path:
    assert config.recipe is not None
    return Path(config.output_dir or Path("runs") / Path(config.recipe).stem)


def selection(config: RunConfig, recipe: Recipe) -> tuple[set[str], bool]:
    """The stages to look at, and whether they run whatever was done before."""
    names = [stage.name for stage in recipe.stages]
    for name in [*config.only, *([config.from_] if config.from_ else [])]:
        if name not in names:
            raise UsageError(f"{recipe.path}: no stage {name!r}; it has {', '.join(names)}")
    chosen = names[names.index(config.from_) :] if config.from_ else names
    return {name for name in chosen if not config.only or name in config.only}, bool(config.force or config.from_)


def fingerprint_of(stage: Stage, config: Any) -> str:
    """Hash of a stage's resolved options and of the files that they name; outputs are not among them."""
    options = flatten(config)
    inputs = {
        name: fingerprint(Path(value))
        for name, value in options.items()
        if name not in OUTPUTS and isinstance(value, str) and value and Path(value).exists()
    }
    content = json.dumps([stage.command, options, inputs], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def resuming(stage: Stage, config: Any, before: Mapping[str, Any], mark: str) -> Any:
    """A training stage that was stopped in the middle goes on from its newest complete checkpoint; one whose options
    or inputs have changed since starts over."""
    if not COMMANDS[stage.command].trainer or config.resume_from_checkpoint:
        return config
    if not any(Path(config.output_dir).glob("checkpoint-*")):
        return config
    if before.get("started") == mark:
        return replace(config, resume_from_checkpoint="true")
    return replace(config, training=config.training | {"overwrite_output_dir": True})


def execute(stage: Stage, config: Any, folder: Path) -> None:
    if stage.nproc > 1:
        run_in_processes(stage.command, flatten(config), stage.nproc, folder / f".{stage.name}.json")
    else:
        stage_of(stage.command).run(config)
    sys.stdout.flush()


def describe(config: RunConfig) -> list[str]:
    recipe, configs = prepared(config)
    lines = [f"run {recipe.path} in {run_folder(config)}"]
    for stage in recipe.stages:
        lines.append(f"{stage.name}: rankwise {stage.command} {shown(stage.options)}")
        lines += [f"  {line}" for line in stage_of(stage.command).describe(configs[stage.name])]
    return lines


def shown(options: Mapping[str, Any] | Sequence[Any]) -> str:
    assert isinstance(options, Mapping)
    return " ".join(f"--{name} {value}" for name, value in options.items())
