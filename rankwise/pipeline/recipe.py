"""Recipes: YAML files of stages with variables, found by path or by name, checked strictly.

name: svd_ranks
variables: {MODEL_NAME: org/name}          # the environment overrides them
stages:
  - {name: probe, command: finetune, model_name: "${MODEL_NAME}", output_dir: "${run}/probe"}

`extends: NAME` takes another recipe's content and changes it: variables and options of stages of the same name are
replaced one by one, further stages stand before the stage that they precede in the list, or last. The default of a
variable may name the run folder and variables above it; `NAME: null` takes an inherited one out.

`config: FILE` of a stage names a file of options of its command; the stage's own win. A file that an earlier stage
makes is read when the stage's turn comes (`read_later`), any other before anything runs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, UsageError
from rankwise.options.field import CONFIG_SUFFIXES, load_file, typed_values, unknown
from rankwise.pipeline.idle import idle_among, sentences, written
from rankwise.pipeline.table import ALIASES, COMMANDS, command_options, configured

PACKAGED = Path(__file__).parents[1] / "recipes"
DEFAULT_RUNS = Path("runs")
KEYS = ("extends", "name", "description", "variables", "stages")
STAGE_KEYS = ("name", "command", "nproc", "config")  # of a stage; the others are options of its command
GROUPED = (dict, list)
PIPELINES = ("run", "batch", "demo")  # commands that run recipes themselves
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Stage:
    """One command with its options, variables replaced; `nproc` processes under torchrun.

    config: a file with further options, over which its own win; None where there is none, or once it is read.
    """

    name: str
    command: str
    options: dict[str, Any]
    nproc: int = 1
    config: Path | None = None


@dataclass(frozen=True)
class Recipe:
    name: str
    path: Path
    stages: tuple[Stage, ...]
    description: str = ""
    notes: tuple[str, ...] = ()


def find_recipe(text: str) -> Path:
    """An existing file, else `[recipes/]NAME[.yaml]` among those that come with the package."""
    given = Path(text)
    if given.is_file():
        return given
    found = packaged_recipe(given)
    if found is None:
        names = sorted(path.stem for path in PACKAGED.glob("*.yaml"))
        near = difflib.get_close_matches(given.stem, names) or names
        raise UsageError(f"{text}: no such recipe file; the package has {', '.join(near)}")
    return found


def packaged_recipe(given: Path) -> Path | None:
    """The recipe of the package that a name means which is no file: `[recipes/]NAME[.yaml]`."""
    path = PACKAGED / f"{given.stem}.yaml"
    means = given.parent in (Path("."), Path("recipes")) and given.suffix.lower() in ("", ".yaml")
    return path if means and path.is_file() else None


def packaged_lines() -> list[str]:
    """Name and description of every recipe that comes with the package."""
    found = {path.stem: str(read_content(path).get("description", "")) for path in sorted(PACKAGED.glob("*.yaml"))}
    return [f"  {name:<{2 + max(map(len, found))}}{text}" for name, text in found.items()]


def note_shadowed(text: str) -> str | None:
    """A note where a bare name took the package's recipe although a file of that name lies here."""
    beside = [Path(text + suffix) for suffix in CONFIG_SUFFIXES]
    found = next((path for path in beside if not Path(text).is_file() and path.is_file()), None)
    return f"note: {text} is the packaged recipe; to run the file here: rankwise run {found}" if found else None


def options_for(path: Path, command: str) -> dict[str, Any]:
    """The options of a recipe's one stage of this command, to run it alone, below `runs/<recipe>` as `run` does."""
    recipe = load_recipe(path, DEFAULT_RUNS / path.stem)
    found = [stage for stage in recipe.stages if stage.command == command]
    if len(found) != 1:
        commands = ", ".join(dict.fromkeys(stage.command for stage in recipe.stages))
        raise UsageError(
            f"{path} is a recipe with {len(found)} stages of the command {command!r} (it has {commands}); "
            "`rankwise run` runs all of it"
        )
    return with_file(found[0], f"{path}: stage {found[0].name}").options


def load_recipe(path: Path, run: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe with variables and `--set` changes filled in.

    Raises UsageError, naming file and stage: unknown keys, commands or variables, stages of one name.
    """
    content = read_content(path)
    defaults = {} if content.get("variables") is None else content["variables"]
    if (
        not isinstance(defaults, dict)
        or "run" in defaults
        or any(isinstance(one, GROUPED) for one in defaults.values())
    ):
        raise UsageError(f"{path}: variables: must be a mapping from names to defaults (`run` is the run folder)")
    for key in ("name", "description"):
        if isinstance(content.get(key), GROUPED):
            raise UsageError(f"{path}: {key}: expected text, got {content[key]!r}")
    variables = resolve_variables(defaults, run, str(path))
    rows = content.get("stages")
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path}: no stages; a recipe has a list of them under `stages:`")
    stages = [read_stage(row, variables, str(path)) for row in rows]
    for change in changes:
        stages = change_stage(stages, change)
    return Recipe(str(content.get("name") or path.stem), path, tuple(stages), str(content.get("description", "")))


def read_content(path: Path, below: Sequence[Path] = ()) -> dict[str, Any]:
    """The file's keys, over those of the recipe that it extends (found beside it, or by name in the package)."""
    content = load_file(path)
    for key in content:
        if key not in KEYS:
            raise unknown(key, KEYS, str(path))
    rows = content.get("stages")
    names = [stage_name(row) for row in rows] if isinstance(rows, list) else []
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: duplicate stage name: {', '.join(names)}")
    if path in below:
        raise UsageError(f"{path}: extends itself through {', '.join(str(each) for each in below)}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    beside = path.parent / f"{parent}.yaml"
    return extend(read_content(beside if beside.is_file() else find_recipe(str(parent)), [*below, path]), content)


def extend(parent: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with another's over it. What has not the form of a recipe is left for `load_recipe` to say."""
    merged = {**parent, "name": None, **content}
    for key, value in content.items():
        before = parent.get(key)
        if value is None:
            merged[key] = before
        elif isinstance(value, dict) and isinstance(before, dict):
            merged[key] = {**before, **value}
        elif isinstance(value, list) and isinstance(before, list):
            merged[key] = merge_stages(before, value)
    return merged


def merge_stages(before: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
    """Rows with a stage's name change its options; the others come before the known stage that follows them in the
    list, or after all stages."""
    stages = {stage_name(row): row for row in before}
    order, waiting = list(stages), list[str]()
    for row in rows:
        name = stage_name(row)
        known = stages.get(name)
        stages[name] = {**known, **row} if isinstance(known, dict) and isinstance(row, dict) else row
        waiting.append(name)
        if known is not None:
            place = order.index(name)
            order[place : place + 1], waiting = waiting, []
    return [stages[name] for name in order + waiting]


def stage_name(row: Any) -> str:
    return str(row.get("name", row.get("command"))) if isinstance(row, dict) else repr(row)


def resolve_variables(defaults: Mapping[str, Any], run: Path, where: str) -> dict[str, str]:
    found = {"run": str(run)}
    for name, value in defaults.items():
        if value is not None:
            found[name] = substitute(os.environ.get(name, str(value)), found, f"{where}: variables: {name}")
    return found


def read_stage(row: Any, variables: Mapping[str, str], where: str) -> Stage:
    if not isinstance(row, dict) or "command" not in row:
        raise UsageError(f"{where}: a stage must be a mapping with `command:`; got {row!r}")
    command = ALIASES.get(str(row["command"]), str(row["command"]))
    if command not in COMMANDS or command in PIPELINES:
        raise unknown(command, [name for name in COMMANDS if name not in PIPELINES], where, "command")
    name = str(row.get("name", command))
    options = {
        str(key): substitute(value, variables, f"{where}: stage {name}: {key}")
        for key, value in row.items()
        if key not in STAGE_KEYS
    }
    processes = substitute(row.get("nproc", 1), variables, f"{where}: stage {name}: nproc")
    if not str(processes).isdecimal() or int(processes) < 1:
        raise UsageError(f"{where}: stage {name}: nproc must be a number of processes; got {processes!r}")
    config = substitute(row.get("config"), variables, f"{where}: stage {name}: config")
    if config is not None and not isinstance(config, str):
        raise UsageError(f"{where}: stage {name}: config must be the path of a file with options; got {config!r}")
    return Stage(name, command, options, int(processes), Path(config) if config else None)


def substitute(value: Any, variables: Mapping[str, str], where: str) -> Any:
    if isinstance(value, list):
        return [substitute(item, variables, where) for item in value]
    if isinstance(value, dict):
        return {key: substitute(item, variables, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in variables:
            raise UsageError(f"{where}: ${{{name}}} is not among the recipe's variables: {', '.join(variables)}")
    return VARIABLE.sub(lambda match: variables[match.group(1)], value)


def change_stage(stages: Sequence[Stage], change: str) -> list[Stage]:
    """`STAGE.OPTION=VALUE` applied; the value is converted with the stage's other options."""
    target, equals, value = change.partition("=")
    name, dot, option = target.partition(".")
    if not equals or not dot:
        raise UsageError(f"--set takes STAGE.OPTION=VALUE; got {change!r}")
    if name not in [stage.name for stage in stages]:
        raise unknown(name, [stage.name for stage in stages], "--set", "stage")
    option = option.replace("-", "_")
    return [
        replace(stage, options=without_aliases(stage, option) | {option: value}) if stage.name == name else stage
        for stage in stages
    ]


def without_aliases(stage: Stage, option: str) -> dict[str, Any]:
    """The stage's options less those that are the same one under another name."""
    groups = [{item.name, *item.aliases} for item in command_options(COMMANDS[stage.command])]
    same = next((names for names in groups if option in names), {option})
    return {key: value for key, value in stage.options.items() if key.replace("-", "_") not in same}


FLAG = re.compile(r"--(\w+)")


def resolve_stages(recipe: Recipe, changes: Sequence[str], chosen: Collection[str]) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe without idle options and with a note on each, each stage's config by its name).

    changes: the words of `--set`, which are in the recipe already. chosen: names of the stages that will run. A stage
    whose config file is read later keeps it; its config here is that of its own options.
    """
    stages, configs, notes, made = list[Stage](), dict[str, Any](), list[str](), list[Path]()
    for stage in recipe.stages:
        if stage.config and (stage.name not in chosen or below(stage.config, made)):
            kept, said = stage, list[str]()
            config = configured(stage.command, stage.options, place_of(stage, recipe))
        else:
            kept, config, said = resolve_stage(stage, recipe, changes)
        stages.append(kept)
        configs[stage.name] = config
        notes += said
        made += outputs(config) if stage.name in chosen else []
    return replace(recipe, stages=tuple(stages), notes=tuple(notes)), configs


def resolve_stage(stage: Stage, recipe: Recipe, changes: Sequence[str]) -> tuple[Stage, Any, list[str]]:
    """(the stage with the options of its config file and without idle ones, its config, notes)."""
    where = place_of(stage, recipe)
    return drop_idle(with_file(stage, where), options_set(stage, changes), where)


def place_of(stage: Stage, recipe: Recipe) -> str:
    return f"{recipe.path}: stage {stage.name}"


def below(file: Path, folders: Sequence[Path]) -> bool:
    return any(file.absolute().is_relative_to(folder.absolute()) for folder in folders)


def outputs(config: Any) -> list[Path]:
    """Where a stage writes, as far as its options say so."""
    return [Path(item.default) for item in written(config)]


def with_file(stage: Stage, where: str) -> Stage:
    """The stage with the options of its config file, over which its own win. DataError where the file is missing."""
    if stage.config is None:
        return stage
    if not stage.config.is_file():
        raise DataError(f"{where}: config: {stage.config} does not exist, and no stage before has made it")
    known = command_options(COMMANDS[stage.command])
    given = typed_values(load_file(stage.config), known, f"{where}: {stage.config}")
    return replace(stage, options=given | typed_values(stage.options, known, where), config=None)


def options_set(stage: Stage, changes: Sequence[str]) -> set[str]:
    """The stage's options that `--set` names, by their first names."""
    named = {change.partition("=")[0].replace("-", "_") for change in changes}
    known = command_options(COMMANDS[stage.command])
    return {item.name for item in known for one in (item.name, *item.aliases) if f"{stage.name}.{one}" in named}


def drop_idle(stage: Stage, asked: set[str], where: str) -> tuple[Stage, Any, list[str]]:
    """(the stage less idle options, its config, notes). UsageError, in the words of `--set`, for an idle option that
    `--set` gave, and for a recipe whose own options are idle."""
    notes = list[str]()
    while True:
        config = configured(stage.command, stage.options, where)
        found = idle_among(config)
        if not found:
            return stage, config, notes
        refused = [bound for bound in found if bound.option in asked] if asked else found
        said = as_set(sentences(refused or found, config), stage.name)
        if refused:
            raise UsageError(f"{where}: {said}; here it would have no effect: leave it out")
        notes.append(f"note: {said}; the recipe's own setting is left out")
        for bound in found:
            stage = replace(stage, options=without_aliases(stage, bound.option))


def as_set(text: str, stage: str) -> str:
    """Flags of a stage's command as `rankwise run --set` takes them: `--round` is `ranks.round`."""
    return FLAG.sub(rf"{stage}.\1", text)
