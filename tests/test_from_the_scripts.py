"""Every documented command line that this version covers is understood: docs/from-the-scripts.md through --dry-run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rankwise.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "from-the-scripts.md"


def documented_commands() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").split("## Not in this version")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    joined = [block.replace("\\\n", " ").strip() for block in blocks]
    return [" ".join(block.split()) for block in joined if block.startswith("rankwise ")]


def test_the_page_has_the_documented_workflow() -> None:
    verbs = {command.split()[1] for command in documented_commands()}
    assert {"finetune", "ranks", "run", "batch", "compare", "train", "evaluate", "merge"} <= verbs


@pytest.mark.parametrize("command", documented_commands())
def test_dry_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([*shlex.split(command)[1:], "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "would " in printed.out
    assert not any(tmp_path.rglob("*.safetensors")), "a dry run writes nothing"
