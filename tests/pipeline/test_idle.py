"""Options that act only beside others are refused alone, by the command, before anything is read or made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rankwise import cli
from rankwise.options.advise import AdviseConfig
from rankwise.options.commands import (
    CheckConfig,
    EvaluateConfig,
    ExtractConfig,
    FinetuneConfig,
    RanksConfig,
    RunConfig,
    TrainConfig,
    ValidateConfig,
)
from rankwise.options.features import CaptureConfig, FactorTrainConfig
from rankwise.options.field import Option, options_of
from rankwise.options.study import StudyConfig
from rankwise.pipeline.idle import TABLES, Bound, idle_among, refuse_idle
from rankwise.pipeline.run import prepare
from rankwise.pipeline.table import COMMANDS, assemble, command_options
from rankwise.train import command as train

NAMES = {
    TrainConfig: "train",
    FinetuneConfig: "finetune",
    RanksConfig: "ranks",
    ExtractConfig: "extract",
    StudyConfig: "study",
    AdviseConfig: "advise",
    FactorTrainConfig: "features train",
    CaptureConfig: "features capture",
    EvaluateConfig: "evaluate",
    CheckConfig: "check",
    ValidateConfig: "validate",
}
MODEL_AND_ROWS = {"model_name": "base", "task": "e2e_nlg", "data_path": "rows.csv"}
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "train": MODEL_AND_ROWS,
    "finetune": MODEL_AND_ROWS,
    "ranks": {"deltas": "probe"},
    "extract": {"deltas": "probe", "rank": 2},
    "study": MODEL_AND_ROWS,
    "advise": MODEL_AND_ROWS,
    "features train": {},
    "features capture": {"model_name": "base", "images": "photos"},
    "evaluate": {"model_path": "base", "task": "e2e_nlg", "data_path": "rows.csv"},
    "check": {"task": "e2e_nlg", "data_path": "rows.csv"},
    "validate": {"export": "export", "task": "e2e_nlg", "data_path": "rows.csv"},
}
IMAGES = ({"task": "conversations"}, {"task": "e2e_nlg"})
PHASES_3 = "with --dynamic_lora or a --phase_strategy of three"
BY_STEPS = {"early_stopping": 2, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
# How the condition begins: (options among which it holds, options among which it does not). Where none is named, the
# condition's own words are followed: `with --select accuracy`.
EXAMPLES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "on rows that may have images": IMAGES,
    "on conversations": IMAGES,
    "on rows: with --gain": ({"gain": "dev"}, {}),
    "on two checkpoints": ({"base": "a", "tuned": "b"}, {}),
    "where no validation rows": ({}, {"val_path": "dev.csv"}),
    "where rows validate": ({}, {"val_fraction": 0}),
    "where a checkpoint is chosen": ({"load_best_model_at_end": True}, {}),
    "with --dynamic_lora or a --phase_strategy of several": ({"phase_strategy": "early-late"}, {}),
    PHASES_3: ({"dynamic_lora": True}, {"phase_strategy": "early-late"}),
    "with phases": ({"schedule": "mlp"}, {}),
    "with --save_strategy steps (and": (BY_STEPS, {"early_stopping": 2}),
    "with --deltas FINETUNE_RUN": ({"deltas": "probe"}, {}),
    "with --gradient_checkpointing": ({"activation_checkpointing": True}, {}),
    "with --load_in_4bit": ({"load_in_4bit": True}, {}),
    "with --metric activation|loss": ({"metric": "activation"}, {}),
    "with a threshold": ({}, {"budget": "uniform:4"}),
    "with --budget, on": ({"budget": "uniform:4"}, {}),
    "with ranks that differ": ({}, {"signal": "uniform", "budget": "uniform:4"}),
    "with two checkpoints": ({"tuned": True}, {}),
    "with the arm `full`": ({"arms": ["uniform", "energy", "full"]}, {"arms": ["uniform", "energy"]}),
    "with --use_rank_allocator": ({"use_rank_allocator": True, "arch": "AdaLoRA"}, {}),
    "with --arch AdaLoRA": ({"arch": "AdaLoRA"}, {}),
    "with --arch ResMLP": ({"arch": "MLP"}, {"arch": "Subspace"}),
    "with --synthetic N": ({"synthetic": True}, {}),
    "with --num_beams above 1": ({"num_beams": 2}, {}),
    "with --task lm_eval:NAME": ({"task": "lm_eval:arc"}, {}),
    "with --run_model": ({"run_model": True, "model_name": "base"}, {}),
    "without --lora_config": ({}, {"lora_config": "plan.json"}),
    "without --budget": ({}, {"budget": "uniform:4"}),
    "with --calibration_samples": ({"sweep": ["q8_0"], "calibration_samples": 4}, {}),
    "without --adapter_gguf": ({}, {"adapter_gguf": ["lora.gguf"]}),
    "without --adapter": ({}, {"adapter": "run"}),
    "without --deltas": ({}, {"deltas": "probe"}),
    "without --synthetic": ({}, {"synthetic": 8}),
    "on what answers": ({"write_cases": "cases", "server": "http://HOST/v1"}, {"write_cases": "cases"}),
    "where a server or a file is run": ({}, {"cases": "cases", "answers": "got.jsonl"}),
    "on files or a server of llama.cpp": ({}, {"write_cases": "cases"}),
    "without --cases": ({"server": "http://HOST/v1"}, {"cases": "cases"}),
}
FOLLOWED = re.compile(r"with --(\w+)(?: (\S+))?")
ROWS = [
    pytest.param(NAMES[kind], row, id=f"{NAMES[kind]} {row.option}") for kind, rows in TABLES.items() for row in rows
]


def example(name: str, row: Bound) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Options among which the row's option acts, and among which it does not."""
    found = [one for begin, one in EXAMPLES.items() if row.only.startswith(begin)]
    if not found:
        followed = FOLLOWED.fullmatch(row.only)
        assert followed, f"an example for {row.option}, which acts only {row.only}"
        found = [({followed[1]: followed[2] or True}, {})]
    acting, idle = found[0]
    return (dict(acting) | {"gain": "dev"} if name == "ranks" and "task" in acting else acting), idle


def test_every_example_is_of_a_row() -> None:
    said = [row.only for rows in TABLES.values() for row in rows]
    assert [begin for begin in EXAMPLES if not any(only.startswith(begin) for only in said)] == []


def needed(name: str, among: Mapping[str, Any]) -> dict[str, Any]:
    """What the command wants besides, without another source than the one in `among`."""
    found = dict(NEEDED[name]) | dict(among)
    if name == "ranks" and {"adapter", "tuned"} & among.keys():
        del found["deltas"]
    if name == "features capture" and "synthetic" in among:
        found = dict(among)
    if name == "validate" and {"server", "cases"} & among.keys():
        del found["export"]
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
    return "bot=user" if item.name == "roles" else "other"


def options(name: str) -> dict[str, Option]:
    return {item.name: item for item in command_options(COMMANDS[name])}


def flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in values.items()]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_alone_it_is_refused(
    name: str, row: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = needed(name, example(name, row)[1]) | {row.option: another(options(name)[row.option])}
    for more in ([], ["--dry-run"]):
        assert cli.main([*name.split(), *flags(values), *more]) == 2
        assert f"--{row.option} acts only {row.only.format(**values)}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_beside_what_it_needs_it_is_not(name: str, row: Bound) -> None:
    item = options(name)[row.option]
    values = needed(name, example(name, row)[0]) | {row.option: another(item)}
    assert row not in idle_among(assemble(COMMANDS[name], values))


@pytest.mark.parametrize("kind", TABLES)
def test_defaults_are_no_wish(kind: type) -> None:
    refuse_idle(kind())
    known = {item.name for item in command_options(COMMANDS[NAMES[kind]])}
    assert {row.option for row in TABLES[kind]} <= known
    assert {item.name for item in options_of(kind())} <= known


def test_all_idle_options_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --model_name base --task e2e_nlg --data_path rows.csv --select_by generation --deltas probe"
    assert cli.main([*line.split(), "--image_folder", "x"]) == 2
    said = capsys.readouterr().err
    assert all(f"--{name} acts only" in said for name in ("select_by", "deltas", "image_folder"))
    assert "--select_by likelihood" in said and "--deltas none" in said, "how a file's own setting is taken back"


def test_rows_that_were_found_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No --val_path was given: the labelled data set brought its own rows."""
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image_id": "a", "image_path": "a.png", "element": "fire"}))
    line = ["train", "--model_name", "base", "--task", "labels", "--data_path", str(tmp_path)]
    assert cli.main([*line, "--val_fraction", "0.2"]) == 2
    assert f"{tmp_path} (--val_path, or val.jsonl" in capsys.readouterr().err


IDLE_LINES = (
    "ranks --deltas probe --image_folder x",
    "ranks --deltas probe --allow_urls",
    "train --model_name base --task e2e_nlg --data_path rows.csv --save_strategy none --save_steps 5",
    "train --model_name base --task e2e_nlg --data_path rows.csv --early_stopping 2 --save_steps 5",
    "evaluate base --task e2e_nlg --data_path rows.csv --image_folder x",
    "evaluate base --task lm_eval:arc --image_folder x",
    "check --task e2e_nlg --data_path rows.csv --image_folder x",
    "check --task conversations --data_path rows.json --max_seq_length 8",
    "validate export --task e2e_nlg --data_path rows.csv --image_folder x",
)


@pytest.mark.parametrize("line", IDLE_LINES)
def test_what_would_do_nothing_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*line.split(), "--dry-run"]) == 2
    assert "would have no effect" in capsys.readouterr().err


def test_the_advice_for_save_steps_is_not_refused_in_turn() -> None:
    line = (
        "train --model_name base --task e2e_nlg --data_path rows.csv --early_stopping 2 --save_steps 5 --eval_steps 5"
    )
    config, _ = cli.resolve("train", [*line.split()[1:], "--save_strategy", "steps", "--eval_strategy", "steps"])
    refuse_idle(config)
    assert train.arguments_of(config).save_steps == 5


@pytest.mark.parametrize(
    ("recipe", "change", "left"),
    [
        ("demo", "ranks.signal=uniform", "ranks.min_rank"),
        ("demo_vision", "train.warm_start=none", "train.deltas"),
        ("qwen_vl_ranks", "ranks.signal=uniform", "ranks.min_rank"),
    ],
)
def test_a_recipes_own_setting_gives_way_to_set(
    recipe: str,
    change: str,
    left: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, configs = prepare(RunConfig(recipe, set=[change]))
    (said,) = found.notes
    assert f"note: {left} acts only" in said and "--" not in said
    stage, option = left.split(".")
    assert option not in next(each for each in found.stages if each.name == stage).options
    assert not idle_among(configs[stage])


def test_what_set_itself_gives_without_effect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of `--set`, the option by any of its names."""
    assert cli.main(["run", "svd_ranks", "--set", "train.select-by=generation", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "train.select_by acts only with train.select accuracy" in said and "--select" not in said


def test_a_recipe_whose_own_options_are_idle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = "{command: evaluate, model_path: base, task: e2e_nlg, data_path: x, temperature: 0.5}"
    (tmp_path / "own.yaml").write_text(f"stages: [{stage}]")
    assert cli.main(["run", str(tmp_path / "own.yaml"), "--dry-run"]) == 2
    assert "evaluate.temperature acts only with evaluate.do_sample" in capsys.readouterr().err
