"""The rows that a command is told to read: their task, their files, what was left out said aloud."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from accelerate import PartialState

from rankwise.data.example import Examples
from rankwise.data.sources import kind_of, load
from rankwise.data.sources.conversations import speakers_of
from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.options.commands import CheckConfig, EvaluateConfig, FinetuneConfig, TrainConfig, ValidateConfig
from rankwise.options.sections import DataSection

Configured = TypeVar("Configured", FinetuneConfig, TrainConfig, CheckConfig, EvaluateConfig, ValidateConfig)


def settle(config: Configured) -> Configured:
    """The config with the task that its data show, where none is given."""
    return replace(config, data=replace(config.data, task=task_of(config.data)))


def task_of(data: DataSection) -> str | None:
    """The task as given, else as the data show it (`kind_of`)."""
    return data.task or (kind_of(data.data_path) if data.data_path else None)


def check_data(data: DataSection, command: str) -> None:
    if not data.task:
        where = f", and {data.data_path} does not show it" if data.data_path else ""
        raise UsageError(f"{command}: --task says how rows become text; it is missing{where}")
    if not data.data_path:
        raise UsageError(f"{command}: --data_path is missing: where are the rows?")
    speakers_of(data.roles)


def read_examples(data: DataSection, path: str, split: str = "train", *, sees_images: bool = False) -> Examples:
    """The rows of a data set, with what was left out said aloud. `--download` fills the folder of --data_path; a file
    named beside it is read as it is. Of several processes the first one downloads while the others wait."""
    fetches = data.download and path == data.data_path
    with PartialState().local_main_process_first() if fetches else nullcontext():
        examples = load(
            data.task or "",
            path,
            split,
            download=fetches,
            **reading(data),
        )
    for note in examples.notes(sees_images=sees_images):
        announce(note)
    return examples


def reading(data: DataSection) -> dict[str, Any]:
    """How rows are read, as `load` takes it."""
    return {
        "skip_bad": data.skip_bad,
        "repeat_image": data.repeat_image,
        "image_first": data.image_first,
        "roles": data.roles,
        "aux_reason": data.aux_reason,
    }


def reading_scored(data: DataSection) -> dict[str, Any]:
    """The same for items to answer, whose reasons are nothing that is asked for."""
    return reading(data) | {"aux_reason": False}
