"""rankwise run: a pipeline of stages from one recipe; skips what is done, goes on where it was stopped.

MODEL_NAME=… DATA_PATH=… rankwise run recipes/svd_ranks.yaml --set train.learning_rate=1e-3
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.config import RunConfig
from rankwise.errors import UsageError
from rankwise.options import flatten, unknown
from rankwise.stages.commands import COMMANDS, configured, stage_of
from rankwise.stages.recipe import Recipe, Stage, find_recipe, load_recipe
from rankwise.stages.torchrun import run_in_processes
from rankwise.store.files import fingerprint, read_object, write_json
from rankwise.store.run import RunFolder

STATE, MARKS = ".stages", "done.json"
RECORD = "resolved_config.recipe.json"  # a stage may write into the run folder itself, and its config beside this one
PREDICTIONS = "predictions*.json*"
OUTPUTS = ("output_dir", "out", "run")


def run(config: RunConfig) -> Path:
    """Run the stages in order. Returns the run folder."""
    recipe, configs = prepared(config)
    folder = RunFolder(run_folder(config))
    with RunFolder(folder / STATE).lock():
        folder.save_config(record_of(recipe), RECORD)
        chosen, again = selection(config, recipe)
        for index, stage in enumerate(recipe.stages):
            if stage.name in chosen:
                again = step(folder, recipe, index, configs[stage.name], again) or again
                gc.collect()
    print(f"{recipe.name}: everything is in {folder.path}")
    return folder.path


def step(folder: RunFolder, recipe: Recipe, index: int, config: Any, again: bool) -> bool:
    """One stage, unless it is done and nothing asks for it again; whether it ran."""
    stage, title = recipe.stages[index], f"[{index + 1}/{len(recipe.stages)}] {recipe.stages[index].name}"
    before = marks(folder).get(stage.name, {})
    previous = marks(folder).get(recipe.stages[index - 1].name, {}).get("done") if index else None
    mark = fingerprint_of(stage, config, previous)
    if not again and before.get("done") == mark and all(path.exists() for path in outputs(config)):
        print(f"{title}: done already in {before['seconds']:.0f} s, skipped")
        return False
    started = time.monotonic()
    print(f"{title}: rankwise {stage.command}", flush=True)
    ready = resuming(stage, config, before, mark)
    remember(folder, stage, {"started": mark})
    execute(stage, ready, folder / STATE)
    seconds = round(time.monotonic() - started, 1)
    # A stage may write beside what it reads: the mark is that of the finished run.
    remember(folder, stage, {"done": fingerprint_of(stage, config, previous), "seconds": seconds})
    print(f"{title}: {seconds:.0f} s", flush=True)
    return True


def marks(folder: RunFolder) -> dict[str, Any]:
    """What the run folder knows of each stage: {"started": mark}, or {"done": mark, "seconds"}."""
    file = folder / STATE / MARKS
    return read_object(file) if file.is_file() else {}


def remember(folder: RunFolder, stage: Stage, entry: Mapping[str, Any]) -> None:
    write_json(folder / STATE / MARKS, marks(folder) | {stage.name: entry})


def record_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it was resolved, for the run folder."""
    stages = [{"name": stage.name, "command": stage.command, **stage.options} for stage in recipe.stages]
    return {"recipe": str(recipe.path), "description": recipe.description, "stages": stages}


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
            error = unknown(name, names, str(recipe.path), "stage")
            raise UsageError(f"{error}; the stages are {', '.join(names)}")
    chosen = names[names.index(config.from_) :] if config.from_ else names
    return {name for name in chosen if not config.only or name in config.only}, bool(config.force or config.from_)


def outputs(config: Any) -> list[Path]:
    """Where a stage writes, as far as its options say so."""
    options = flatten(config)
    return [Path(options[name]) for name in OUTPUTS if options.get(name)]


def fingerprint_of(stage: Stage, config: Any, previous: str | None) -> str:
    """Hash of a stage's resolved options, of the files that they name (outputs are not among them), and of the mark
    of the stage before it: what changes one, changes all after it."""
    options = flatten(config)
    named = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    inputs = {
        f"{name} {value}": fingerprint(Path(value))
        for name, values in named.items()
        for value in values
        if name not in OUTPUTS and isinstance(value, str) and value and Path(value).exists()
    }
    content = json.dumps([stage.command, options, inputs, previous], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def resuming(stage: Stage, config: Any, before: Mapping[str, Any], mark: str) -> Any:
    """A training stage that was stopped in the middle goes on from its newest complete checkpoint; one whose options
    or inputs have changed since starts over. So does an evaluation, whose answers of before are deleted."""
    if stage.command == "evaluate" and before and before.get("started") != mark:
        for file in stage_of(stage.command).output_folder(config).path.glob(PREDICTIONS):
            file.unlink()
    if not COMMANDS[stage.command].trainer or config.resume_from_checkpoint:
        return config
    if not any(Path(config.output_dir).glob("checkpoint-*")):
        return config
    if before.get("started") == mark:
        return replace(config, resume_from_checkpoint="true")
    return replace(config, training=config.training | {"overwrite_output_dir": True})


def execute(stage: Stage, config: Any, scratch: Path) -> None:
    if stage.nproc > 1:
        run_in_processes(stage.command, flatten(config), stage.nproc, scratch / f"{stage.name}.json")
    else:
        stage_of(stage.command).run(config)
    sys.stdout.flush()


def describe(config: RunConfig) -> list[str]:
    """Every stage with its resolved options, then what it would do."""
    recipe, configs = prepared(config)
    lines = [f"run {recipe.path} in {run_folder(config)}"]
    for stage in recipe.stages:
        lines.append(f"{stage.name}: rankwise {stage.command} {shown(configs[stage.name])}")
        lines += [f"  {line}" for line in stage_of(stage.command).describe(configs[stage.name])]
    return lines


def shown(config: Any) -> str:
    """The resolved options as flags, less those that are unset or off."""
    given = {name: value for name, value in flatten(config).items() if value not in (None, "", [], False)}
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    return " ".join(f"--{name} {value}" for name, value in values.items())
