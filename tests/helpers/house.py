"""The house in figures: how large the package is, and what a command imports and enters of it.

    python tests/helpers/house.py                # files, lines, functions, names, static closures: seconds
    python tests/helpers/house.py --run --mypy     # and files that `ranks` and `train` enter, errors of mypy: minutes

`tests/test_architecture.py` holds the closures to their goals; CONTRIBUTING has the table, before and after.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import grimp

import rankwise
from rankwise import cli
from rankwise.pipeline.table import stage_of

PACKAGE = Path(rankwise.__file__).parent
MEASURED = ("ranks", "check", "evaluate", "merge", "validate", "train")


def functions_of(tree: ast.Module) -> Iterator[int]:
    """Lines of each function, decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def classes_of(tree: ast.Module) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def used_twice(names: Sequence[str]) -> int:
    return sum(count > 1 for count in Counter(names).values())


def packages_of(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def closure(graph: grimp.ImportGraph, module: str) -> set[str]:
    """Modules that are imported where this one is, by the imports that stand in the files; packages count as files."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [*graph.find_modules_directly_imported_by(current), *packages_of(current)]
    return seen


def size(graph: grimp.ImportGraph) -> dict[str, int]:
    sources = sorted(PACKAGE.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources]
    trees = [ast.parse(text) for text in texts]
    lengths = [length for tree in trees for length in functions_of(tree)]
    names = [path.name for path in sources if path.name != "__init__.py"]
    return {
        "files": len(sources),
        "lines": sum(text.count("\n") for text in texts),
        "median function": round(median(lengths)),
        "longest function": max(lengths),
        "files with one importer": sum(
            len(graph.find_modules_that_directly_import(module)) == 1 for module in graph.modules
        ),
        "file names used twice": used_twice(names),
        "class names used twice": used_twice([name for tree in trees for name in classes_of(tree)]),
    }


def entered(argv: Sequence[str]) -> int:
    """Files of the package in which a function runs, of one command line in this process."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(argv)
    finally:
        sys.setprofile(None)
    assert code == 0, argv
    return sum(Path(name).is_relative_to(PACKAGE) for name in seen)


def run_files(folder: Path, tiny_llama: Callable[..., Path]) -> dict[str, int]:
    base, tuned = (tiny_llama(folder / name, seed=seed) for seed, name in enumerate(("base", "tuned")))
    (folder / "rows.csv").write_text("mr,ref\n" + "".join(f"name[{name}],{name} is near.\n" for name in "ABCDEFGH"))
    task = ["--task", "e2e_nlg", "--data_path", str(folder / "rows.csv"), "--use_cpu", "--max_steps", "2"]
    return {
        "files entered by ranks": entered(["ranks", str(base), str(tuned), "-o", str(folder / "ranks")]),
        "files entered by train": entered(
            ["train", "--model_name", str(base), *task, "--output_dir", str(folder / "train"), "--no_plots"]
        ),
    }


def mypy_errors() -> int:
    """Of mypy on the whole package, as pyproject sets it."""
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "-p", "rankwise"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    return found.stdout.count(": error:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run `ranks` and `train` on a tiny model")
    parser.add_argument("--mypy", action="store_true", help="count mypy's errors")
    given = parser.parse_args()
    graph = grimp.build_graph("rankwise", cache_dir=None)
    figures = size(graph)
    figures |= {f"import closure of {name}": len(closure(graph, stage_of(name).__name__)) for name in MEASURED}
    if given.run:
        from tiny import tiny_llama

        with tempfile.TemporaryDirectory() as folder:
            figures |= run_files(Path(folder), tiny_llama)
    if given.mypy:
        figures["mypy errors"] = mypy_errors()
    for name, value in figures.items():
        print(f"| {name} | {value:,} |")


if __name__ == "__main__":
    main()
