"""Laws of the package's form: layers, no cycles, imports on the minimal install, public names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest
from house import classes_of, closure

import rankwise
from rankwise.options.field import options_of
from rankwise.pipeline.table import COMMANDS

PACKAGE = Path(rankwise.__file__).parent
REPOSITORY = PACKAGE.parent
STANDARD_ONLY = ("errors.py", "options", "cli.py", "__main__.py", "__init__.py")
OWN_LIBRARIES = {"core": {"torch"}, "files": {"torch", "numpy", "safetensors", "filelock", "psutil"}}
# Models come from a hub or out of a GGUF file where paths are resolved: what reads those is imported there when asked.
WHEN_ASKED = {"files/checkpoint.py": {"huggingface_hub"}, "files/gguf.py": {"transformers"}}
# What the extras bring: none of it may be needed to import a module.
EXTRAS = (
    "matplotlib sacrebleu rouge_score nltk scipy sklearn pandas bitsandbytes wandb deepspeed openai pydantic "
    "aiolimiter gguf xllamacpp llama_cpp datasets trl tensorboard statsmodels pooch py7zr lm_eval vllm pynvml"
).split()


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, nested: bool) -> Iterator[str]:
    """Modules that a file imports: at its top level, or inside its functions."""
    tree = parsed(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if (id(node) in inside) is nested:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                yield str(node.module)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)


def test_imports_point_inward() -> None:
    """In a process of its own: import-linter reconfigures logging, which silences loggers that exist already."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("rankwise", cache_dir=None)


def test_no_cycle_of_modules(graph: grimp.ImportGraph) -> None:
    open_modules = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while open_modules:
        leaves = {module for module, needed in open_modules.items() if not needed & set(open_modules)}
        assert leaves, f"a cycle among {sorted(open_modules)}"
        open_modules = {module: needed for module, needed in open_modules.items() if module not in leaves}


def test_no_function_imports_our_own_package() -> None:
    found = {
        str(path): name for path in sources() for name in imports(path, nested=True) if name.startswith("rankwise")
    }
    assert not found


def test_inner_layers_need_no_more_than_they_say() -> None:
    for path in sources():
        place = path.relative_to(PACKAGE)
        if place.parts[0] in STANDARD_ONLY or place.parts[0] in OWN_LIBRARIES:
            known = OWN_LIBRARIES.get(place.parts[0], set()) | set(sys.stdlib_module_names) | {"rankwise"}
            outside = {name.split(".")[0] for name in imports(path, nested=False)} - known
            assert not outside, f"{place} imports {outside}"
        if place.parts[0] in OWN_LIBRARIES:
            inside = {name.split(".")[0] for name in imports(path, nested=True)} - known
            assert inside == WHEN_ASKED.get(place.as_posix(), set()), f"{place} imports {inside} in its functions"


def test_progress_is_shown_in_one_way() -> None:
    """A bar of its own would overwrite lines in a log."""
    found = {path for path in sources() for nested in (False, True) if "tqdm" in set(imports(path, nested=nested))}
    assert [path.relative_to(PACKAGE).as_posix() for path in found] == ["page/progress.py"]


TRAIN = (
    "finetune",
    "train",
    "study",
    "advise",
    "features train",
    "tiny",
    "demo",
)  # the last two make a model to begin with
IMPORT_ALL = """
import gc, importlib, json, pkgutil, sys
from importlib.machinery import PathFinder

gc.disable()
extras, commands = map(json.loads, sys.argv[1:])

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in extras else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
import rankwise
assert "torch" not in sys.modules, "import rankwise loads torch"
from rankwise.pipeline.table import stage_of
for command in commands:
    stage_of(command)
    assert not {"rankwise.train.trainer", "transformers.trainer"} & set(sys.modules), f"{command} imports the Trainer"
for module in pkgutil.walk_packages(rankwise.__path__, "rankwise."):
    importlib.import_module(module.name)
    print(module.name)
assert not set(extras) & set(sys.modules)
"""


def test_every_module_imports_on_the_minimal_install_and_only_commands_that_train_import_the_trainer() -> None:
    """In one process of its own: its imports take seconds."""
    commands = [name for name in COMMANDS if name not in TRAIN]
    lists = (json.dumps(names) for names in (EXTRAS, commands))
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *lists], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.split()) >= len(sources()) - 1


def test_public_names_resolve_and_explain_themselves() -> None:
    for name in rankwise.__all__:
        found = getattr(rankwise, name)
        assert name.startswith("__") or (found.__doc__ or "").strip(), f"{name} has no docstring"
    assert set(rankwise.__all__) == set(dir(rankwise))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rankwise.nonsense  # noqa: B018


def test_every_module_opens_with_its_place_in_the_flow() -> None:
    assert not [str(path) for path in sources() if path.stat().st_size and not ast.get_docstring(parsed(path))]


def test_a_class_name_stands_for_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in sources():
        for name in classes_of(parsed(path)):
            homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def words_in(path: Path) -> Iterator[tuple[str, ...]]:
    """The tuples, lists and sets of at least two texts that a file spells out."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)) and len(node.elts) > 1:
            texts = [each.value for each in node.elts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if len(texts) == len(node.elts):
                yield tuple(texts)


def test_the_choices_of_an_option_stand_there_only() -> None:
    options = [option for name in COMMANDS for option in options_of(COMMANDS[name].config)]
    choices = {tuple(option.choices) for option in options if option.choices}
    repeated = {
        str(path.relative_to(PACKAGE)): words
        for path in sources()
        if path.relative_to(PACKAGE).parts[0] != "options"
        for words in words_in(path)
        if words in choices
    }
    assert repeated == {}


GOALS = {
    "report": 80,
    "ranks": 66,
    "check": 66,
    "evaluate": 87,
    "merge": 71,
    "validate": 104,
    "export": 65,
    "bundle": 103,
}


def test_a_command_imports_no_more_than_it_needs(graph: grimp.ImportGraph) -> None:
    found = {name: len(closure(graph, f"rankwise.{COMMANDS[name].stage}")) for name in GOALS}
    assert {name: size for name, size in found.items() if size > GOALS[name]} == {}


CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_tree_in_contributing_is_the_house() -> None:
    tree = re.findall(r"^[├└]── ([\w.]+)(/?) ", CONTRIBUTING, re.MULTILINE)
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name, folder in tree if folder} == rooms
    assert all((PACKAGE / name).exists() for name, _ in tree)


def test_every_file_that_contributing_or_the_package_names_is_there() -> None:
    """In backticks, whole or from any folder on; `rankwise/scripts` names files of the older scripts."""
    files = [
        path for folder in ("rankwise", "tests", "benchmarks", "docs") for path in (REPOSITORY / folder).rglob("*.py")
    ]
    known = {"/".join(path.parts[-depth:]) for path in files for depth in range(1, 6)}
    texts = [CONTRIBUTING, *(path.read_text(encoding="utf-8") for path in sources() if "scripts" not in path.parts)]
    named = [name for text in texts for name in re.findall(r"`((?:\w+/)*\w+\.py)\b", text)]
    assert len(named) > 80
    assert not set(named) - known
