"""Every proof has a test that turns it red: the table in CONTRIBUTING.md, held to the code and to the tests."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from rankwise.device.parity.rungs import RUNGS

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (?P<proof>[^|]+) \| (?P<catches>[^|]+) \| `(?P<file>test_\w+\.py)::(?P<test>test_\w+)` \|")
RUNG = re.compile(r"rung `(?P<name>[\w ]+)`")


def table() -> list[re.Match[str]]:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Proofs\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith(("| proof", "|---"))]
    rows = [ROW.fullmatch(line) for line in lines]
    assert all(rows), [line for line, row in zip(lines, rows, strict=True) if row is None]
    return [row for row in rows if row]


@cache
def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    """Name within the module → function, methods with their class."""
    return list(parsed(path))


def parsed(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))


@cache
def product() -> dict[str, int]:
    """`module:function` → how often it raises a VerificationError."""
    found = {}
    for path in (ROOT / "rankwise").rglob("*.py"):
        for name, function in functions(path):
            raised = [ast.dump(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
            found[f"{module_of(path)}:{name}"] = sum("VerificationError" in one for one in raised)
    return found


def test_every_proof_and_every_rung_has_a_row() -> None:
    rows = Counter(row["proof"].strip("`") for row in table() if not RUNG.fullmatch(row["proof"]))
    short = {name: count for name, count in product().items() if count > rows[name]}
    assert not short, "a row in CONTRIBUTING.md for each raise of a VerificationError, with a test that turns it red"
    gone = [name for name in rows if name not in product()]
    assert not gone, "proofs of the table that the product does not have"
    assert [match["name"] for row in table() if (match := RUNG.fullmatch(row["proof"]))] == list(RUNGS)


def test_raises_outside_functions_would_not_be_seen() -> None:
    seen: Counter[str] = Counter()
    for name, count in product().items():
        seen[name.split(":")[0]] += count
    for path in (ROOT / "rankwise").rglob("*.py"):
        assert path.read_text(encoding="utf-8").count("raise VerificationError") == seen[module_of(path)], path


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "rankwise").with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("row", table(), ids=lambda row: row["proof"])
def test_the_named_test_exists(row: re.Match[str]) -> None:
    path = next((ROOT / "tests").rglob(row["file"]), ROOT)
    assert path.is_file()
    assert row["test"] in dict(functions(path)), f"{row['file']} has no {row['test']}"
