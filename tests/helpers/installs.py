"""What each extra brings, by the metadata of what is installed here, and installs with less than that."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import sys
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rankwise
from rankwise import errors
from rankwise.pipeline import extras as pipeline_extras
from rankwise.pipeline import preflight

PACKAGE = Path(rankwise.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = {
    name: needed for name, needed in PROJECT["optional-dependencies"].items() if name != "dev"
}
# What a command does without, and says so: a GPU's numbers, a rung of validate, the pictures of a result.
DONE_WITHOUT = {"pynvml", "skia", "llama_cpp", "matplotlib"}
OF_PACKAGE = {"nvidia-ml-py": "pynvml", "llama-cpp-python": "llama_cpp"}  # where it may not be installed here


@functools.cache
def distributions(extras: frozenset[str]) -> frozenset[str]:
    """Names of what the base install and these extras bring, as far as it is installed here; else what they name."""
    open_, found = [Requirement(line) for line in PROJECT["dependencies"]], set()
    open_ += [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    while open_:
        needed = open_.pop()
        name = canonicalize_name(needed.name)
        if (name, *sorted(needed.extras)) in found:
            continue
        found.add((name, *sorted(needed.extras)))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, requires):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)):
                open_.append(one)
    return frozenset(name for name, *_ in found)


@functools.cache
def owners() -> dict[str, set[str]]:
    """Top-level module → the installed distributions that hold it."""
    pairs = importlib.metadata.packages_distributions().items()
    return {module: {canonicalize_name(name) for name in names} for module, names in pairs}


@functools.cache
def modules(extras: frozenset[str] = frozenset()) -> frozenset[str]:
    """Top-level modules on the base install with these extras."""
    brought = distributions(extras)
    named = {OF_PACKAGE.get(name, name.replace("-", "_")) for name in brought}
    return frozenset(named | {module for module, names in owners().items() if names & brought})


def missing(extras: Collection[str] = ()) -> frozenset[str]:
    """Top-level modules of the extras that these ones do not bring."""
    return modules(frozenset(EXTRAS)) - modules(frozenset(extras))


def hide_modules(monkeypatch: pytest.MonkeyPatch, names: Collection[str]) -> None:
    """Make modules unimportable, as on an install without them."""

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return None if name.split(".")[0] in names else super().find_spec(name, path, target)

    for loaded in [name for name in sys.modules if name.split(".")[0] in names]:
        monkeypatch.delitem(sys.modules, loaded)
    finders = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)


def answer_needs(monkeypatch: pytest.MonkeyPatch, extras: Collection[str]) -> None:
    """Let `errors.need` answer as on an install with these extras, without importing anything."""
    present = modules(frozenset(extras))

    def imported(name: str) -> None:
        if name.split(".")[0] not in present:
            raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(errors, "importlib", SimpleNamespace(import_module=imported))


@contextmanager
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Optional modules that commands come to need without having asked for them before they read anything."""
    asked, found, depth = set(DONE_WITHOUT), [], [0]

    def imported(name: str) -> Any:
        if depth[0]:
            asked.add(name.split(".")[0])
        elif name.split(".")[0] not in asked:
            found.append(name)
        return importlib.import_module(name)

    def ready(*given: Any, check: Any = preflight.ready) -> None:
        depth[0] += 1
        try:
            check(*given)
        finally:
            depth[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(errors, "importlib", SimpleNamespace(import_module=imported))
        patch.setattr(preflight, "ready", ready)
        yield found


# --- as the code has it ---------------------------------------------------------------------------------------------


def needs() -> Iterator[tuple[str, str, str, str]]:
    """(place, function, module, extra or package) of every `need(…)` in the package."""
    for path in sorted(set(PACKAGE.rglob("*.py")) - {Path(pipeline_extras.__file__)}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need":
                    place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    given = [*node.args, *(word.value for word in node.keywords)]
                    names = (
                        [written(given[0], texts)] if not isinstance(given[0], ast.Name) else looped(loops, function)
                    )
                    for name in names:
                        yield place, function.name, name, next(filter(None, (written(one, texts) for one in given[1:])))


def written(node: ast.expr, texts: dict[str, Any]) -> str:
    if isinstance(node, ast.Name):
        return str(texts[node.id])
    assert isinstance(node, ast.Constant), ast.unparse(node)
    return str(node.value)


def looped(loops: list[ast.For], function: ast.FunctionDef) -> list[str]:
    """Texts that a loop over names goes through: those in it, or in the list that it is given."""
    within = [loop.iter for loop in loops]
    named = {one.id for one in within if isinstance(one, ast.Name)}
    within += [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id in named for one in node.targets)
    ]
    found = [node.value for one in within for node in ast.walk(one) if isinstance(node, ast.Constant)]
    return [text for text in found if isinstance(text, str) and text not in ("all", "none")]  # words of --report_to
