"""Laws of `--help`: one line of usage, purpose, an example, options in groups; as wide as the terminal."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from rankwise import cli
from rankwise.options.field import GROUPS, options_of
from rankwise.options.help import spellings


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_commands_help_is_usage_purpose_example_and_groups_in_order(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = cli.COMMANDS[name]
    for width in (40, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = told(capsys, *name.split(), "--help")
        lines = shown.splitlines()
        assert lines[0].startswith(f"usage: rankwise {name} ") and lines[1] == "", "usage in one line"
        assert " ".join(shown.partition("example:")[0].split()).endswith(row.about)
        example = shown.partition("example:\n")[2].partition("\n\n")[0].replace("\\\n", "")
        assert shlex.split(example) == shlex.split(row.example)
        headings = re.findall(r"^([A-Z]+)(?::.*)?$", shown, re.MULTILINE)
        assert headings == sorted(headings, key=lambda word: GROUPS.index(word.lower())), "model, data, method, output"
        too_long = [line for line in lines if len(line) > width and len(line.split()) > 1 and not is_flags(line)]
        assert too_long[:1] in ([], [lines[0]]), (width, too_long)
    flags = re.findall(r"^  (?:-\w, )?--(\w+)", shown, re.MULTILINE)
    assert sorted(flags) == sorted([item.name.strip("_") for item in options_of(row.config)] + ["dry_run"]), (
        "each of ours, once"
    )


def is_flags(line: str) -> bool:
    return line.startswith("  -") or not line.startswith(" " * 12)


def test_the_trainers_flags_are_behind_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    short, whole = told(capsys, "train", "--help"), told(capsys, "train", "--help-all")
    assert "`--help-all`" in short and "`--help-all`" not in whole
    missing = {
        flag
        for item in cli.command_options(cli.COMMANDS["train"])
        for flag in spellings(item)
        if flag.rstrip("_") not in whole
    }
    assert missing == set() and "--learning_rate" in whole and "  --learning_rate" not in short
    assert len(whole.splitlines()) > 1.5 * len(short.splitlines())


def test_help_is_asked_for_in_every_usual_way(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = told(capsys, "ranks", "--help")
    assert "--svd_threshold" in ranks and "  ranks diff " in ranks, "its own options, and the commands below it"
    assert ranks == told(capsys, "ranks", "-h") == told(capsys, "help", "ranks") == told(capsys, "ranks", "a", "--help")
    assert told(capsys, "help", "ranks", "diff").startswith("usage: rankwise ranks diff ")
    assert told(capsys, "help") == told(capsys, "-h") == told(capsys)
    assert cli.main(["rnks", "--help"]) == 2 and "did you mean ranks?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "bold"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_headings_are_bold_at_a_terminal_that_shows_it(environment: dict[str, str], bold: bool) -> None:
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM", "COLUMNS")}
    line = [sys.executable, "-m", "rankwise", "report", "--help"]
    done = subprocess.run(line, env=kept | environment, stdout=theirs, check=True)
    os.close(theirs)
    with os.fdopen(ours, "rb", closefd=True) as stream:
        shown = b""
        while b"flags win." not in shown:
            shown += os.read(stream.fileno(), 1 << 16)
    assert done.returncode == 0
    assert (b"\x1b[1musage:\x1b[0m rankwise report" in shown, b"\x1b" in shown) == (bold, bold)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_overviews_are_as_wide_as_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ([], ["features", "--help"]):
        shown = told(capsys, *words)
        assert max(map(len, shown.splitlines())) <= width
        kept = " ".join(shown.split())
        assert all(row.help in kept for name, row in cli.COMMANDS.items() if not words or name.startswith("features "))


def test_no_escape_sequence_reaches_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in told(capsys, "train", "--help") + told(capsys, "--help")
