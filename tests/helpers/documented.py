"""The command lines of README and docs: every `rankwise …` in a fenced block, with the variables set before it.

for line in lines(DOCS / "recipes.md"): line.words, line.variables, line.section
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = (REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELLS = ("bash", "sh", "console", "")
ASSIGNED = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
LEFT_OUT = "…"  # stands for words that a page leaves out


@dataclass(frozen=True)
class Line:
    """words: after `rankwise`. variables: exported before it in its block, or put in front of it."""

    page: str
    section: str
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def text(self) -> str:
        return " ".join(["rankwise", *map(shlex.quote, self.words)])


def lines(page: Path) -> list[Line]:
    return list(_lines(page))


def _lines(page: Path) -> Iterator[Line]:
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        if fence[1] not in SHELLS:
            continue
        section = re.findall(r"^## (.*)$", text[: fence.start()], re.MULTILINE)[-1:]
        exported: dict[str, str] = {}
        for written in fence[2].replace("\\\n", " ").splitlines():
            for words in commands(written.removeprefix("$ ")):
                front = [word for word in words if ASSIGNED.fullmatch(word)] if words[0] == "export" else leading(words)
                variables = dict(word.split("=", 1) for word in front)
                if words[0] == "export":
                    exported |= variables
                elif words[len(front)] == "rankwise":
                    yield Line(page.name, "".join(section), tuple(words[len(front) + 1 :]), exported | variables)


def commands(written: str) -> Iterator[list[str]]:
    """The commands of a line of shell; nothing of what is no shell, as what a program has printed."""
    try:
        words = shlex.split(written, comments=True)
    except ValueError:
        return
    command: list[str] = []
    for word in [*words, "&&"]:
        if word != "&&":
            command.append(word)
        elif len(leading(command)) < len(command):
            yield command
            command = []


def leading(words: list[str]) -> list[str]:
    """The assignments before a command."""
    return words[: next((place for place, word in enumerate(words) if not ASSIGNED.fullmatch(word)), len(words))]
