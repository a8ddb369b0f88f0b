"""What is asked of a command before it reads or writes anything: libraries, inputs, places of outputs.

    ready("train", config)              UsageError, DataError, or nothing
    ready("train", config, made, run)   in a recipe: earlier stages make what is at or below `made`; `run` is its folder

A command that runs recipes has a `ready(config)` of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import is_adapter
from rankwise.files.checkpoint import HUB_ID
from rankwise.options.field import flatten, neighbours
from rankwise.options.sections import TASKS
from rankwise.pipeline.extras import require_libraries
from rankwise.pipeline.table import stage_of

# Options that name what is there already: files or folders, the same or a hub id, folders of a model or its hub id.
FILES = (
    "val_path gain forget deltas lora_config plan image_folder labels_file adapter_gguf app_pixels depth_maps replay "
    "lm_eval_tasks_path run runs export mmproj first second dev_path test_path ood features llama_cpp_dir probe2"
).split()
WEIGHTS = "base tuned adapter images data_path".split()
MODELS = "model_name base_model base_model_id model".split()
ADAPTERS_TOO = ("evaluate", "features downstream")  # commands whose --model_name may be an adapter or a run folder
# Options that name what is made.
FOLDERS_MADE = "output_dir results_dir log_dir".split()
FILES_MADE = "estimate_out log_file".split()


def ready(command: str, config: Any, made: Sequence[Path] = (), run: Path | None = None) -> None:
    """Raises what can be said beforehand; see the module."""
    own = getattr(stage_of(command), "ready", None)
    values = {name: value for name, value in flatten(config).items() if value}
    require_libraries(command, config)
    for option in FOLDERS_MADE:
        require_folder(option, values.get(option))
    for option in FILES_MADE:
        require_file(option, values.get(option))
    if "out" in values:
        require_file("out", values["out"])
    if own is not None:
        own(config)
    else:
        there = [path.absolute() for path in made]
        require_inputs(command, values, there, run.absolute() if run else None)


def require_inputs(command: str, values: dict[str, Any], made: Sequence[Path], run: Path | None) -> None:
    """DataError for an input that is neither there nor made by an earlier stage."""
    if values.get("synthetic") or values.get("task", TASKS[0]) not in TASKS:  # the harness has data of its own
        values = {name: value for name, value in values.items() if name not in ("images", "data_path")}
    for option in (*FILES, *WEIGHTS, *MODELS):
        for value in as_list(values.get(option)):
            path = Path(value).expanduser()
            if path.absolute() == run or any(path.absolute().is_relative_to(place) for place in made):
                continue
            if not path.exists():
                require_named(option, value, fetched=bool(values.get("download")))
            elif option in MODELS and command not in ADAPTERS_TOO:
                require_model(option, path)


def as_list(value: Any) -> list[str]:
    """The texts of an option, which may be none."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def require_named(option: str, value: str, *, fetched: bool) -> None:
    """A missing path may be a hub id, or a folder that `--download` fills."""
    if option in FILES:
        raise DataError(f"{value}: no such file or folder (--{option}){neighbours(Path(value))}")
    if not HUB_ID.fullmatch(value) and not (fetched and option in ("data_path", "images")):
        raise DataError(
            f"{value}: no such file or folder, nor a hub id of the form org/name (--{option}){neighbours(Path(value))}"
        )


def require_model(option: str, folder: Path) -> None:
    if not (folder / "config.json").is_file() and not is_adapter(folder):  # of which the command itself says more
        raise DataError(f"{folder}: no config.json, so this is not a Hugging Face model folder (--{option})")


def require_folder(option: str, value: str | None) -> None:
    """UsageError where a folder cannot be made or written into."""
    if value:
        place = nearest(Path(value).expanduser())
        if not place.is_dir():
            raise UsageError(f"--{option} {value}: cannot be a run folder, for {place} is a file; choose another one")
        require_writable(option, value, place)


def require_file(option: str, value: str | None) -> None:
    """UsageError where a file cannot be written."""
    if value:
        path = Path(value).expanduser()
        place = nearest(path.parent)
        if path.is_dir():
            raise UsageError(f"--{option} {value}: cannot be written there: it is a folder; give a file's name")
        if not place.is_dir():
            raise UsageError(
                f"--{option} {value}: cannot be written there, for {place} is a file; choose another place"
            )
        require_writable(option, value, place)


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))


def require_writable(option: str, value: str, place: Path) -> None:
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--{option} {value}: no permission to write to {place}; choose another place")
