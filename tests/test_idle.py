"""Options that act only beside others are refused alone, by the command, before anything is read or made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rankwise import cli
from rankwise.config import (
    CaptureConfig,
    EvaluateConfig,
    ExtractConfig,
    FactorTrainConfig,
    FinetuneConfig,
    RanksConfig,
    StudyConfig,
    TrainConfig,
)
from rankwise.options import Option, options_of
from rankwise.stages.commands import COMMANDS, assemble, command_options
from rankwise.stages.idle import TABLES, Bound, refuse_idle

NAMES = {
    TrainConfig: "train",
    FinetuneConfig: "finetune",
    RanksConfig: "ranks",
    ExtractConfig: "extract",
    StudyConfig: "study",
    FactorTrainConfig: "features train",
    CaptureConfig: "features capture",
    EvaluateConfig: "evaluate",
}
MODEL_AND_ROWS = {"model_name": "base", "task": "e2e_nlg", "data_path": "rows.csv"}
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "train": MODEL_AND_ROWS,
    "finetune": MODEL_AND_ROWS,
    "ranks": {"deltas": "probe"},
    "extract": {"deltas": "probe", "rank": 2},
    "study": MODEL_AND_ROWS,
    "features train": {},
    "features capture": {"model_name": "base", "images": "photos"},
    "evaluate": {"model_path": "base", "task": "e2e_nlg", "data_path": "rows.csv"},
}
ROWS = [
    pytest.param(NAMES[kind], row, id=f"{NAMES[kind]} {row.option}") for kind, rows in TABLES.items() for row in rows
]


def needed(name: str, among: Mapping[str, Any]) -> dict[str, Any]:
    """What the command wants besides, without another source than the one in `among`."""
    found = dict(NEEDED[name]) | dict(among)
    if name == "ranks" and {"adapter", "tuned"} & among.keys():
        del found["deltas"]
    if name == "features capture" and "synthetic" in among:
        found = dict(among)
    return found


def another(item: Option) -> Any:
    """A value that is not the default."""
    if item.is_bool:
        return not item.default
    if item.choices:
        default = item.default if item.is_list else [item.default]
        return next(choice for choice in item.choices if choice not in (*default, "none"))
    kind = str(item.annotation)
    if "dict" in kind:
        return '{"a": 1}'
    if "int" in kind or "float" in kind:
        return (item.default or 0) + 1 if "int" in kind else (item.default or 1.0) / 2
    return "other"


def options(name: str) -> dict[str, Option]:
    return {item.name: item for item in command_options(COMMANDS[name])}


def flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in values.items()]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_alone_it_is_refused(
    name: str, row: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = needed(name, row.idle) | {row.option: another(options(name)[row.option])}
    for more in ([], ["--dry-run"]):
        assert cli.main([*name.split(), *flags(values), *more]) == 2
        assert f"--{row.option} acts only {row.only}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_beside_what_it_needs_it_is_not(name: str, row: Bound) -> None:
    item = options(name)[row.option]
    values = needed(name, row.acting) | {row.option: another(item)}
    refuse_idle(assemble(COMMANDS[name], values))


@pytest.mark.parametrize("kind", TABLES)
def test_defaults_are_no_wish(kind: type) -> None:
    refuse_idle(kind())
    known = {item.name for item in command_options(COMMANDS[NAMES[kind]])}
    assert {row.option for row in TABLES[kind]} <= known
    assert {item.name for item in options_of(kind())} <= known
