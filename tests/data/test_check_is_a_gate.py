"""What passes `check` trains, and what it refuses, training refuses in the same words: rows damaged at random.

`make rows` tries many more.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from mutated_rows import mutated_rows, pictures, written
from tiny import CHAT_TEMPLATE, tiny_llama
from tiny_vision import tiny_qwen25vl, tiny_smolvlm
from transformers import AutoTokenizer

from rankwise.cli import main
from rankwise.data.render import Rendered
from rankwise.data.sources.load import load
from rankwise.files.atomic import read_json

EXAMPLES = int(os.environ.get("RANKWISE_ROWS", "0"))  # 0: the suite's few, always the same
MODELS: dict[str, Callable[[Path], Path]] = {
    "text": lambda folder: tiny_llama(folder, tokenizer={"chat_template": CHAT_TEMPLATE}, max_position_embeddings=1024),
    "smolvlm": tiny_smolvlm,
    "qwen": tiny_qwen25vl,
}
SUITE = ("text", "qwen")
SKIPPED = ("row", "text", "template")  # kinds that --skip_bad leaves out
GOOD = [
    {"conversations": [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": "A number."}]}
    for number in range(2)
]


class Gate:
    """The two commands on rows, in a folder of their own."""

    def __init__(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = model.parent
        self.flags = ["--model_name", str(model), "--image_folder", str(pictures(self.folder / "images"))]
        self.flags += ["--task", "conversations", "--prompt", "chat", "--max_seq_length", "1000"]
        self.capsys = capsys

    def file(self, rows: list[Any]) -> Path:
        file = self.folder / "rows.jsonl"
        file.write_text("".join(f"{written(row)}\n" for row in rows), encoding="utf-8")
        return file

    def check(self, rows: list[Any], *more: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Exit code, report and bad samples."""
        out = self.folder / "check"
        argv = ["check", "--data_path", str(self.file(rows)), "-o", str(out), "--workers", "0", *self.flags, *more]
        code = main(argv)
        self.said = self.capsys.readouterr()
        listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
        return code, read_json(out / "check.json"), listed

    def train(self, rows: list[Any], *more: str) -> int:
        """Exit code of two steps that see every row."""
        size = str(-(-len(rows) // 2))
        own = f"--max_steps 2 --batch_size {size} --val_fraction 0 --save_strategy no --no_plots --use_cpu --lora_r 2"
        with tempfile.TemporaryDirectory() as out:
            code = main(["train", "--data_path", str(self.file(rows)), "-o", out, *self.flags, *own.split(), *more])
        self.said = self.capsys.readouterr()
        return code


def law(gate: Gate, rows: list[Any]) -> None:
    """Every bad row is named, what is left passes and trains, and training refuses the rest in the same words."""
    code, report, bad = gate.check(rows)
    assert code == (3 if bad else 0), gate.said.err
    assert all(one.get("line") and one["reason"] for one in bad), bad
    lines = {one["line"] for one in bad}
    assert len(rows) - len(lines) == report["usable"]
    passed = without(rows, lines)
    if bad:
        assert gate.check(passed)[0] == 0, gate.said.err
        assert gate.train(rows) == 3, gate.said.err
        first = next((one for one in bad if one["kind"] == "row"), None)  # rows are read before anything is rendered
        assert first is None or first["reason"].split(": ")[-1][:60] in gate.said.err
    assert gate.train(passed) == 0, gate.said.err
    skippable = {one["line"] for one in bad if one["kind"] in SKIPPED}
    if skippable:
        kept = without(rows, lines - skippable)
        assert gate.check(kept, "--skip_bad")[0] == 0, gate.said.err
        assert gate.train(kept, "--skip_bad") == 0, gate.said.err
        counts = re.findall(r"^warning: (\d+) bad (?:rows|samples) skipped", gate.said.out, re.MULTILINE)
        assert sum(map(int, counts)) == len(skippable)


def without(rows: list[Any], lines: set[int]) -> list[Any]:
    return [row for number, row in enumerate(rows, 1) if number not in lines]


@pytest.mark.parametrize("name", MODELS if EXAMPLES else SUITE)
def test_what_passes_trains_and_what_does_not_is_refused_alike(
    name: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(MODELS[name](tmp_path_factory.mktemp("gate") / "model"), capsys)

    @settings(
        max_examples=EXAMPLES or 3,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated_rows(16))
    def found(damaged: list[Any]) -> None:
        rows = [*GOOD, *damaged]
        note("\n".join(f"{number}: {written(row)}" for number, row in enumerate(rows, 1)))
        law(gate, rows)

    found()


@pytest.mark.parametrize("kind", ["row", "text", "overlong", "image"])
def test_a_gate_that_lets_a_kind_pass_is_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The product's own code is broken: what is bad of one kind is not listed."""
    name = "smolvlm" if kind == "image" else "text"
    gate = Gate(MODELS[name](tmp_path / "model"), capsys)
    turns = {"row": [("human", "?")], "text": [("human", "?"), ("gpt", "a</s>b")]}
    long = [("human", "word " * 2000), ("gpt", "a")]
    said = [{"from": who, "value": text} for who, text in turns.get(kind, long if kind == "overlong" else long[1:])]
    row: dict[str, Any] = {"conversations": said}
    if kind == "image":
        row = {"image": "cut.png", "conversations": [{"from": "human", "value": "<image>"}, *said]}
    rows = [*GOOD, row]
    law(gate, rows)
    assert [one["kind"] for one in gate.check(rows)[2]] == [kind]
    if kind == "row":
        monkeypatch.setattr(
            "rankwise.data.check.command.load", lambda *at, **how: replace(load(*at, **how), skipped=())
        )
    monkeypatch.setattr(
        "rankwise.data.check.examine.outcomes", lambda example, _: [(example, Rendered([1, 2], [1, 2]))]
    )
    monkeypatch.setattr("rankwise.data.check.examine._undecodable", lambda *_: {})
    monkeypatch.setattr("rankwise.data.check.examine._Comparison.add", lambda *_: None)
    assert gate.check(rows)[0] == 0
    with pytest.raises(AssertionError):
        law(gate, rows)


def test_a_token_beyond_the_embeddings_is_a_bad_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token was added to the tokenizer, and the model was not resized: training would fail at that row."""
    model = MODELS["text"](tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    gate = Gate(model, capsys)
    rows = [*GOOD, {"prompt": "What is <new>?", "completion": "A token."}]
    law(gate, rows)
    [bad] = gate.check(rows)[2]
    assert (
        bad["kind"] == "text" and "its token '<new>' is number 384, and the model has 384 embeddings" in bad["reason"]
    )


REFUSED = {
    "a quantizer that is not installed": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}},
        2,
        "the base is stored quantized: .*gptqmodel",
    ),
    "heads that do not divide the width": ({"num_attention_heads": 3}, 3, r"config.json: .*number of attention heads"),
    "a width that is a word": ({"hidden_size": "wide"}, 3, r"config.json: "),
    "an activation that does not exist": ({"hidden_act": "silly"}, 3, r"config.json: cannot build a model from it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_loaded_is_refused_by_both(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, code, reason = REFUSED[name]
    if "quantization_config" in changed and find_spec("gptqmodel"):
        pytest.skip("the quantizer is installed")
    gate = Gate(MODELS["text"](tmp_path / "model"), capsys)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(read_json(config) | changed))
    flags = ["--data_path", str(gate.file(GOOD)), *gate.flags, "-o", str(tmp_path / "out")]
    for command in (["check"], ["train", "--use_cpu", "--max_steps", "1"]):
        assert main([*command, *flags]) == code
        assert re.search(reason, capsys.readouterr().err, re.DOTALL)
