"""Laws of `rankwise completion`: each real shell offers commands of one and two words, options, choices and files."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rankwise import cli

LINES = {  # typed so far → some of what is offered; "!" before what is not
    "fea": ["features"],
    "features ": ["capture", "compare", "downstream", "show", "train"],
    "features train --ep": ["--epochs"],
    "ranks ": ["diff", "tuned", "a-file"],
    "ranks tun": ["tuned", "!diff"],
    "ranks tuned --round ": ["none", "power-of-two", "multiple-of-8"],
    "ranks --exact --svd": ["--svd_threshold"],
    "train --learning_r": ["--learning_rate"],
    "train --lora_config a-": ["a-file"],
    "train -o tu": ["tuned"],
    "train -o ": ["tuned", "!a-file"],
    "run qu": ["quickstart"],
    "study re": ["referee"],
    "completion ": ["bash", "zsh", "fish"],
    "schema ra": ["ranks", "!tuned"],
}
NESTED = {"ranks diff --f": ["--first"]}  # a command below one that takes files itself: not in zsh


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shell")
    (folder / "tuned").mkdir()
    (folder / "a-file").write_text("")
    for shell, name in (("bash", "rankwise.bash"), ("zsh", "_rankwise"), ("fish", "rankwise.fish")):
        assert cli.main(["completion", shell, "-o", str(folder / name)]) == 0
    return folder


def present(shell: str) -> str:
    """The shell's program; the test is skipped where it is missing."""
    found = shutil.which(shell)
    if not found:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    return found


def check(lines: dict[str, list[str]], offered: Callable[[str], list[str]]) -> None:
    for line, wanted in lines.items():
        found = offered(line)
        missing = [word for word in wanted if (word.removeprefix("!") in found) == word.startswith("!")]
        assert not missing, (line, found)


def test_bash(here: Path) -> None:
    def offered(line: str) -> list[str]:
        words = ["rankwise", *shlex.split(line), *[""] * line.endswith(" ")]
        asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_rankwise"
        script = f'source rankwise.bash; {asked}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run([program, "--norc", "-c", script], cwd=here, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    program = present("bash")
    check(LINES | NESTED, offered)


def test_fish(here: Path) -> None:
    def offered(line: str) -> list[str]:
        script = f"source rankwise.fish; complete -C {shlex.quote('rankwise ' + line)}"
        done = subprocess.run([program, "-N", "-c", script], cwd=here, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [row.split("\t")[0].rstrip("/") for row in done.stdout.splitlines()]

    program = present("fish")
    check(LINES | NESTED, offered)


def test_zsh(here: Path) -> None:
    """At a terminal: completion is the line editor's."""
    program = present("zsh")
    with terminal(program, here) as ask:
        check(LINES, ask)


@contextlib.contextmanager
def terminal(program: str, here: Path) -> Iterator[Callable[[str], list[str]]]:
    """A zsh at a terminal of its own: what it shows, in words, once a line is typed and Tab is pressed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "ZDOTDIR": str(here), "COLUMNS": "200", "LINES": "500"}
    process = subprocess.Popen(
        [program, "-f", "-i"],
        cwd=here,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)

    def until(mark: str) -> str:
        shown, end = "", time.monotonic() + 60
        while mark not in shown:
            assert time.monotonic() < end and process.poll() is None, shown
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 1 << 16).decode(errors="replace")
        return shown

    def ask(line: str) -> list[str]:
        """Listed without being inserted; what is printed then says that the list is whole."""
        os.write(ours, f"rankwise {line}".encode() + b"\x18\x04\x18\x05")
        shown = until("THE-END")
        return re.split(r"[\s/]+", shown)

    setup = [
        "PS1=",
        "fpath=($PWD $fpath)",
        "autoload -Uz compinit",
        "compinit -u -D",
        "LISTMAX=9999",
        "zstyle ':completion:*' list-prompt ''",
        "ended() { zle kill-buffer; zle -M THE-''END }",
        "zle -N ended",
        "bindkey '^X^D' list-choices",
        "bindkey '^X^E' ended",
        "zle-line-init() { zle -M RE''ADY }",  # once the line editor reads
        "zle -N zle-line-init",
    ]
    try:
        os.write(ours, ("; ".join(setup) + "\n").encode())
        until("READY")
        yield ask
    finally:
        process.kill()
        process.wait()
        os.close(ours)
