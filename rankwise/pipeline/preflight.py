"""Checks before a command reads or writes anything: libraries, options, inputs, output locations; and its dry run.

    ready("train", config)              UsageError, DataError, or nothing
    run("train", config)                the command
    ready("train", config, made, run)   in a recipe: earlier stages make what is at or below `made`; `run` is its folder
    dry_run("train", config)            the command itself up to its first write; then what it would do

Which option names a path, and of what, stands at the option (`option(path=…)`). A command's `check(config)` refuses
options that do not go together, its `check_installed(config)` what a scored task, say, needs (`evaluate/tasks.py`), its
`describe(config)` says what it does between reading and writing. One that runs recipes has a `ready(config)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import adapter_files, is_adapter
from rankwise.files.atomic import rehearsal
from rankwise.files.checkpoint import HUB_ID, IN_PLACE, refuse_absent, resolve
from rankwise.files.gguf import is_gguf, model_in
from rankwise.options.field import INPUTS, OUTPUTS, Option, flatten, neighbours, options_of, unknown
from rankwise.options.sections import TASKS
from rankwise.pipeline.extras import require_extras
from rankwise.pipeline.idle import Told, written
from rankwise.pipeline.table import COMMANDS, configured, stage_of

MODELS = ("model", "weights", "text")  # kinds of paths (`option(path=…)`) that a GGUF file may be the model of


def ready(command: str, config: Any, made: Sequence[Path] = (), run: Path | None = None) -> None:
    """Raise every error that can be found beforehand; see the module."""
    require_extras(command, config)
    stage, options = stage_of(command), list(options_of(config))
    for check in ("check", "check_installed"):
        if hasattr(stage, check):
            getattr(stage, check)(config)
    require_outputs(config)
    require_device(getattr(config, "device", None))
    if hasattr(stage, "ready"):
        stage.ready(config)
    else:
        require_inputs(options, [path.absolute() for path in made], run.absolute() if run else None)


def run(command: str, config: Any) -> Any:
    """The command itself, on the folders that models in GGUF files are unpacked to. Returns what it makes."""
    return stage_of(command).run(unpacked_models(config))


def run_command(name: str, /, **options: Any) -> Any:
    """Run a command from Python, by the option names of the command line.

        plan = rankwise.run_command("ranks", base="org/base", tuned="org/tuned", budget="uniform:16")

    Args:
        name: of the command, as on the command line: `train`, `ranks diff`.
        options: as `rankwise NAME --help` lists them, with aliases; positional ones by their names there (`base`).

    Returns:
        What the command makes: `ranks` a RankPlan, `evaluate` an EvaluationResult, `merge` and `extract` what they
        verified, most others the folder or file that they wrote. It prints what the command prints, and asks nothing.

    Raises:
        RankwiseError: as the command line does, before anything is made where that can be known: UsageError for an
            unknown command or option, a value out of range, or options that do not go together.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # see `cli.main`
    if name not in COMMANDS:
        raise unknown(name, COMMANDS, "run_command", "command")
    given = {option: plain(value) for option, value in options.items()}
    config = configured(name, given, f"run_command({name!r})")
    ready(name, config)
    return run(name, config)


def plain(value: Any) -> Any:
    """Paths as the texts that options take."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def unpacked_models(config: Any) -> Any:
    """The config with the folder of every model that it names as a GGUF file."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = unpacked_models(value)
        elif field.metadata.get("path") in MODELS and isinstance(value, str) and is_gguf(Path(value)):
            changed[field.name] = str(resolve(value))
    return dataclasses.replace(config, **changed)


def dry_run(command: str, config: Any) -> None:
    """Run the command up to its first write; print the resolved config and what it would do. What it says on the way is
    no part of the config."""
    import yaml

    if not COMMANDS[command].standalone:
        with contextlib.redirect_stdout(sys.stderr), rehearsal():
            run(command, config)
    print(yaml.safe_dump(flatten(config), sort_keys=False, allow_unicode=True), end="")
    for line in describe(command, config):
        print("# would " + line.replace("\n", "\n#   "))


def describe(command: str, config: Any) -> list[str]:
    """What a command reads, does and writes."""
    stage, options = stage_of(command), list(options_of(config))
    does = stage.describe(config) if hasattr(stage, "describe") else []
    return [*named("read", options, INPUTS), *does, *named("write", written(config), OUTPUTS)]


def named(verb: str, options: Sequence[Option], kinds: Sequence[str]) -> list[str]:
    """A line of the paths that options of these kinds give, if any do."""
    given = [(item.name, item.default) for item in options if item.path in kinds and item.default]
    paths = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in given]
    return [f"{verb} {', '.join(paths)}"] if paths else []


def require_inputs(options: Sequence[Option], made: Sequence[Path], run: Path | None) -> None:
    """DataError for an input that is neither there nor made by an earlier stage."""
    told = Told({item.name: item.default for item in options})
    without_rows = told.synthetic or (told.task or TASKS[0]) not in TASKS  # the harness has data of its own
    for kind in INPUTS:
        for item in options:
            if item.path == kind and not (without_rows and item.name in ("images", "data_path")):
                for value in item.default if isinstance(item.default, list) else [item.default]:
                    path = Path(value or "").absolute()
                    if value and path != run and not any(path.is_relative_to(place) for place in made):
                        require_input(item, value, fetched=bool(told.download))


def require_input(item: Option, value: str, *, fetched: bool) -> None:
    """A missing path may be a hub id, or a folder that `--download` fills; of a model's folder the config is asked."""
    path = Path(value)
    refuse_absent(path)
    if is_gguf(path) and item.name == "adapter":
        adapter_files(path)
    elif is_gguf(path) and item.path in MODELS:
        model_in(path)
    elif path.exists():
        if item.path == "model" and not (path / "config.json").is_file() and not is_adapter(path):
            raise DataError(f"{path}: no config.json, so this is not a Hugging Face model folder (--{item.name})")
    elif value.startswith(IN_PLACE) and item.name not in ("data_path", "images"):
        resolve(value)
    elif item.path == "read":
        raise DataError(f"{value}: no such file or folder (--{item.name}){neighbours(Path(value))}")
    elif not HUB_ID.fullmatch(value.removeprefix(IN_PLACE)) and not (fetched and item.name in ("data_path", "images")):
        said = f"{value}: no such file or folder, nor a hub id of the form org/name (--{item.name})"
        raise DataError(f"{said}{neighbours(Path(value))}")


def require_device(name: str | None) -> None:
    """UsageError for a device that PyTorch does not know or cannot use here."""
    if name in (None, "auto", "cpu"):
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not here ({said}); give auto, cpu or cuda") from error


def require_outputs(config: Any) -> None:
    for item in written(config):
        require_output(item, item.default)


def require_output(item: Option, value: str) -> None:
    """UsageError where a folder cannot be made or written into, or a file not be written."""
    path, said = Path(value), f"--{item.name} {value}: cannot be written there"
    place = nearest(path if item.path == "folder" else path.parent)
    if item.path == "file" and path.is_dir():
        raise UsageError(f"{said}: it is a folder; give a file's name")
    if not place.is_dir():
        raise UsageError(f"{said}, for {place} is a file; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{said}: no permission to write to {place}; choose another place")


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
