"""What passes `check` trains, and what it refuses, training refuses in the same words: rows damaged at random.

`make rows` tries many more.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from mutated_rows import mutated_rows, pictures, written
from tiny import CHAT_TEMPLATE, tiny_llama
from tiny_vision import tiny_qwen25vl, tiny_smolvlm

from rankwise.cli import main
from rankwise.store.files import read_json

EXAMPLES = int(os.environ.get("RANKWISE_ROWS", "0"))  # 0: the suite's few, always the same
MODELS: dict[str, Callable[[Path], Path]] = {
    "text": lambda folder: tiny_llama(folder, tokenizer={"chat_template": CHAT_TEMPLATE}, max_position_embeddings=1024),
    "smolvlm": tiny_smolvlm,
    "qwen": tiny_qwen25vl,
}
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


@pytest.mark.parametrize("name", MODELS)
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
    def law(damaged: list[Any]) -> None:
        rows = [*GOOD, *damaged]
        code, report, bad = gate.check(rows)
        note("\n".join(f"{number}: {written(row)}" for number, row in enumerate(rows, 1)))
        note(gate.said.err)
        assert code == (3 if bad else 0), gate.said.err
        assert all(one.get("line") and one["reason"] for one in bad), bad
        lines = {one["line"] for one in bad}
        assert len(rows) - len(lines) == report["usable"]
        passed = [row for number, row in enumerate(rows, 1) if number not in lines]
        if bad:
            assert gate.check(passed)[0] == 0, gate.said.err
            assert gate.train(rows) == 3
            refused = next((one for one in bad if one["kind"] == "row"), None)
            reasons = [refused] if refused else bad
            assert any(one["reason"].split(": ")[-1][:60] in gate.said.err for one in reasons) or not refused
        assert gate.train(passed) == 0, gate.said.err
        skippable = [one for one in bad if one["kind"] in ("row", "text", "template")]
        others = {one["line"] for one in bad} - {one["line"] for one in skippable}
        kept = [row for number, row in enumerate(rows, 1) if number not in others]
        if skippable:
            assert gate.check(kept, "--skip_bad")[0] == 0
            assert gate.train(kept, "--skip_bad") == 0, gate.said.err
            skipped = sum(
                int(line.split()[1])
                for line in gate.said.out.splitlines()
                if line.startswith("warning:") and "skipped" in line
            )
            assert skipped == len({one["line"] for one in skippable})

    law()
