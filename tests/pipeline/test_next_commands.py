"""Every command that is printed runs as printed: quoted for the shell, read by the real parser, flags that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_extract import tuned_from
from test_merge import adapter_on
from tiny import tiny_llama

import rankwise
from rankwise.cli import main, resolve, split_command
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.device import bundle
from rankwise.features import capture
from rankwise.features import train as factor_outcome
from rankwise.files.adapter import LoraAdapter
from rankwise.labels import command as label
from rankwise.options.commands import (
    BatchConfig,
    BundleConfig,
    CompressConfig,
    ExtractConfig,
    FinetuneConfig,
    RanksConfig,
    TrainConfig,
)
from rankwise.options.features import CaptureConfig, FactorTrainConfig
from rankwise.options.field import flatten
from rankwise.options.flags import normalise
from rankwise.options.label import LabelConfig
from rankwise.options.sections import DataSection, ModelSection, SitesSection, TowersSection
from rankwise.page.text import command_line
from rankwise.pipeline import batch
from rankwise.pipeline.table import ALIASES, COMMANDS, command_options
from rankwise.ranks import command as ranks
from rankwise.ranks import compress, extract
from rankwise.ranks.probe import Probe
from rankwise.ranks.summary import command_lines
from rankwise.train import finetune, results

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PACKAGE = Path(rankwise.__file__).parent
ODD = 'runs/it\'s a "run" & more (1); $HOME'
SOURCES = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """(command, its options) of a line, as the shell and then `rankwise` read it."""
    program, *words = shlex.split(command)
    assert program == "rankwise"
    name, rest = split_command(words)
    config, _ = resolve(name, rest)
    return name, flatten(config)


def plan_of(tower: str, rank: int = 4) -> RankPlan:
    return RankPlan((PlannedSite(describe("model.layers.0.mlp.up_proj", (8, 4), tower), rank),))


def after_ranks(tower: str = "language", model: str = "org/base", **options: Any) -> str:
    config = RanksConfig(**options)
    found = ranks.next_command(config, plan_of(tower), Probe("x", None, {}, model), Path(ODD) / "plan.json")  # type: ignore[arg-type]
    assert found is not None
    return found


ADAPTER = LoraAdapter({"base_model_name_or_path": "org/base"}, {})
DATA = DataSection(task="e2e_nlg", data_path=f"{ODD}/rows", image_folder=f"{ODD}/images")
TRAINED = TrainConfig(output_dir=ODD, data=DATA)
# What each stage prints: the command, and options that it must come out with.
PRINTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "extract": (
        extract.next_command(ExtractConfig(base=f"{ODD}/base", output_dir=ODD)),
        "merge",
        {"adapter": ODD, "base_model": f"{ODD}/base"},
    ),
    "compress": (compress.next_command(CompressConfig(output_dir=ODD), ADAPTER), "merge", {"adapter": ODD}),
    "compress without a base": (
        compress.next_command(CompressConfig(output_dir=ODD), replace(ADAPTER, config={})),
        "merge",
        {"adapter": ODD, "base_model": "BASE"},
    ),
    "train": (results.next_command(TRAINED), "evaluate", {"model_name": ODD, "data_path": f"{ODD}/rows"}),
    "train, own validation rows": (
        results.next_command(replace(TRAINED, val_path=f"{ODD}/val")),
        "evaluate",
        {"data_path": f"{ODD}/val", "image_folder": f"{ODD}/images"},
    ),
    "train, a task without scores": (
        results.next_command(replace(TRAINED, data=replace(DATA, task=None))),
        "merge",
        {"adapter": ODD},
    ),
    "label": (label.next_command(LabelConfig(output_dir=ODD)), "train", {"task": "labels", "data_path": ODD}),
    "bundle": (bundle.next_command(BundleConfig(output_dir=ODD)), "bundle", {"replay": ODD}),
    "features capture": (capture.next_command(CaptureConfig(output_dir=ODD)), "features train", {"features": ODD}),
    "features train": (
        factor_outcome.next_command(FactorTrainConfig(results_dir=ODD)),
        "features compare",
        {"results_dir": ODD},
    ),
    "batch": (
        batch.next_command(BatchConfig(output_dir=ODD), [Path(ODD), Path("b")]),
        "compare",
        {"runs": [ODD, "b"], "output_dir": f"{ODD}/comparison"},
    ),
    "finetune": (finetune.next_command(FinetuneConfig(output_dir=ODD)), "ranks", {"deltas": ODD}),
    "finetune of the projector": (
        finetune.next_command(FinetuneConfig(output_dir=ODD, towers=TowersSection(full=["projector"]))),
        "ranks",
        {"towers": ["language", "projector"]},
    ),
    "finetune with checkpoints": (
        finetune.next_command(FinetuneConfig(output_dir=ODD, save="checkpoints")),
        "ranks",
        {"base": f"{ODD}/pretrained", "tuned": f"{ODD}/finetuned"},
    ),
    "finetune as a LoRA": (
        finetune.next_command(FinetuneConfig(output_dir=ODD, method="lora", model=ModelSection(model_name=ODD))),
        "ranks",
        {"adapter": ODD, "model_name": ODD},
    ),
    "ranks": (after_ranks(data=DATA), "train", {"lora_config": f"{ODD}/plan.json", "data_path": f"{ODD}/rows"}),
    "ranks, nothing known": (after_ranks(model=""), "train", {"model_name": "MODEL", "data_path": "ROWS"}),
    "ranks of a vision tower": (after_ranks("vision"), "train", {"lora": ["vision"], "freeze": ["language"]}),
    "ranks of a pair without config": (
        after_ranks("unknown", base=ODD, tuned="b", sites=SitesSection(rename=["^a\\.=b c.", "x=y"])),
        "extract",
        {"base": ODD, "tuned": "b", "plan": f"{ODD}/plan.json", "rename": ["^a\\.=b c.", "x=y"]},
    ),
    "ranks of an adapter without a model": (after_ranks("unknown", adapter=ODD), "compress", {"adapter": ODD}),
}


@pytest.mark.parametrize("stage", PRINTED)
def test_it_means_what_it_should_after_the_shell_and_the_parser(stage: str) -> None:
    command, name, options = PRINTED[stage]
    found, values = parsed(command)
    assert found == name
    assert {key: values[key] for key in options} == options


@cache
def calls(name: str) -> list[tuple[Path, ast.Call]]:
    return [
        (path, node)
        for path, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name
    ]


def test_there_is_no_other_way_to_print_one() -> None:
    """Every stage that builds a command does so with `command_line`, and is tried above."""
    written = [str(path) for path, text in SOURCES.items() if re.search(r"next: (?:rankwise|\{shlex)", text)]
    assert written == []
    own = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path, _ in calls("command_line")}
    # Run in test_input_record, test_export and test_advise.
    elsewhere = {"rankwise.merge.command", "rankwise.gguf.command", "rankwise.study.advise"}
    assert own - elsewhere == {module.__name__ for module in TRIED}


TRIED = (extract, compress, results, label, bundle, capture, factor_outcome, batch, finetune, ranks)


def test_words_and_flags_are_those_of_a_command() -> None:
    for path, call in calls("command_line"):
        words = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        names = [" ".join(words[:count]) for count in (2, 1)] or [""]
        choices = [name for name in names if name in COMMANDS]
        if not choices:
            assert isinstance(call.args[0], ast.IfExp), (path, ast.unparse(call))  # one of two commands, run elsewhere
            continue
        known = {one for item in command_options(COMMANDS[choices[0]]) for one in (item.name, *item.aliases)}
        assert {key.arg for key in call.keywords if key.arg} <= known, (path, ast.unparse(call))


def test_commands_named_in_messages_have_these_flags() -> None:
    """In backquotes, or after a colon: `rankwise compress --uniform --energy 1`."""
    named = {
        (path, match[1])
        for path, text in SOURCES.items()
        for match in re.finditer(r"\brankwise ([a-z][^`\"\n]*)", text)
    }
    tried = 0
    for path, text in named:
        words = text.replace("{", " ").split()
        name = next((ALIASES.get(n, n) for n in (" ".join(words[:2]), words[0]) if n in {**COMMANDS, **ALIASES}), None)
        flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)
        if name is None or not flags:
            continue
        known = {one for item in command_options(COMMANDS[name]) for one in (item.name, *item.aliases)}
        given = {word[2:].split("=")[0] for word in normalise([f"--{flag}" for flag in flags], set())}
        assert given <= known | {"dry_run", "help"}, (path, text)
        tried += 1
    assert tried > 10


def test_a_long_command_is_broken_between_its_words_only() -> None:
    command = command_line("extract", ODD, "b" * 60, rename=["a b c " * 9, "x=y"], plan=f"{ODD}/plan.json")
    lines = [line[11:] for line in command_lines([command], most=9)]
    assert len(lines) > 2
    assert shlex.split(" ".join(line.removesuffix(" \\") for line in lines)) == shlex.split(command)
    pasted = "\n".join(lines)
    assert shlex.split(pasted.replace("\\\n", "")) == shlex.split(command), "as a shell joins the lines"


# --- run as printed --------------------------------------------------------------------------------------------------


def following(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words after the program's name, of the last command that was printed."""
    shown = capsys.readouterr().out.replace("\\\n", "")
    found = [line.strip() for line in re.findall(r"^(?:next:|Next) +(rankwise .*)$", shown, re.MULTILINE)]
    return shlex.split(found[-1])[1:]


def test_the_chain_from_a_pair_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """extract → merge; ranks without a config → extract; an adapter's spectrum → compress → merge."""
    folder = tmp_path / 'it\'s a "run" & more'
    folder.mkdir()
    monkeypatch.chdir(folder)
    tiny_llama(folder / "the base")
    tuned_from(folder / "the base", folder / "the tuned")
    assert main(["extract", "the base", "the tuned", "--rank", "8", "-o", "an adapter"]) == 0
    words = following(capsys)
    assert words[:2] == ["merge", "an adapter"]
    assert main([*words, "-o", "a merge"]) == 0
    assert following(capsys) == ["export", "a merge"]
    for name in ("the base", "the tuned"):
        (folder / f"bare {name}").mkdir()
        save_file(load_file(folder / name / "model.safetensors"), folder / f"bare {name}" / "model.safetensors")
    assert main(["ranks", "bare the base", "bare the tuned", "--rename", r"^model\.=a b.", "--no-plots"]) == 0
    words = following(capsys)
    assert words[0] == "extract" and main([*words, "-o", "from keys"]) == 0
    capsys.readouterr()
    adapter_on(folder / "the base", folder / "lora")
    assert main(["ranks", "--adapter", "lora", "--no-plots", "--out", "spectra"]) == 0
    words = following(capsys)
    assert words[0] == "compress" and main([*words, "-o", "the smaller"]) == 0
    words = following(capsys)
    assert words[0] == "merge" and main([*words, "-o", "again"]) == 0


def test_rows_are_those_of_the_run_that_was_measured_or_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama(tmp_path / "base")
    run = adapter_on(base, tmp_path / "a run", ["q_proj"])
    rows = {"task": "e2e_nlg", "data_path": "my rows.csv", "image_folder": None, "skip_bad": True}
    (run / "resolved_config.json").write_text(json.dumps(rows))
    (run / "manifest.json").write_text(json.dumps({"stages": {"train": {"stage": "train"}}}))
    assert main(["compress", "a run", "--energy", "1", "-o", "small"]) == 0
    name, values = parsed(shlex.join(["rankwise", *following(capsys)]))
    assert name == "evaluate" and values["model_name"] == "small"
    assert (values["task"], values["data_path"], values["skip_bad"]) == ("e2e_nlg", "my rows.csv", True)
    assert main(["merge", "small", "-o", "merged"]) == 0
    assert following(capsys)[:2] == ["evaluate", "merged"], "through the compressed adapter's record"
    assert main(["ranks", "--adapter", "a run", "--model_name", "base", "--out", "out", "--no-plots"]) == 0
    name, values = parsed(shlex.join(["rankwise", *following(capsys)]))
    assert name == "train" and values["data_path"] == "my rows.csv" and values["model_name"] == "base"
    assert torch.is_tensor(load_file(tmp_path / "small" / "adapter_model.safetensors").popitem()[1])
