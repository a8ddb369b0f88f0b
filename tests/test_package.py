"""What is built of the package: the wheel and the source archive hold what they must, and the wheel works by itself."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from installs import EXTRAS, PACKAGE, PROJECT
from test_android_recipe import can_convert

import rankwise
from rankwise import cli
from rankwise.files.versions import SHOWN, versions

ROOT = PACKAGE.parent
GENERATED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def sources(*folders: str) -> set[str]:
    """Files of the source tree, as git would have them."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in found if GENERATED.isdisjoint(path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, as `python -m build` makes them: the wheel from the unpacked source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == sources("rankwise") | {"rankwise/constraints.txt"}  # the tested versions, for doctor
    assert {name.partition("/")[2] for name in about} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}
    assert "rankwise/py.typed" in names


def test_the_wheel_says_what_the_project_does(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    told = Parser().parsestr(archive.read(name).decode())
    assert told["Version"] == rankwise.__version__ == wheel.name.split("-")[1]
    assert set(told.get_all("Provides-Extra", [])) == {*EXTRAS, "dev"}
    assert told["License-Expression"] == "Apache-2.0" and told["Requires-Python"] == PROJECT["requires-python"]
    assert told["Description-Content-Type"] == "text/markdown"


def test_the_source_archive_has_what_tests_and_benchmarks_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    wanted = set(tracked) & sources(".") or sources("rankwise", "tests", "benchmarks", "docs")
    missing = {name for name in wanted - names if not name.startswith(".ci/")}
    assert not missing, "in the repository, and not in the archive"


def test_from_the_wheel_alone_commands_run_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Without the source tree: unpacked beside the libraries that are installed here."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import contextlib, io, sys, rankwise\n"
        "assert rankwise.__file__.startswith(sys.argv[1]), rankwise.__file__\n"
        "from rankwise.cli import main\n"
        "for line in sys.argv[2:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        code = main(line.split())\n"
        "    assert code == 0 and said.getvalue(), (line, code, said.getvalue()[-500:])\n"
    )
    lines = ["--help", "--version -v", "run --list", "demo --dry-run", "tiny --dry-run"]
    lines += ["run quickstart --dry-run"] if can_convert() else []
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), *lines],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("line", [["--version"], ["-V"], ["--version", "-v"], ["-v", "--version"]])
def test_the_version_is_that_of_the_code(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"rankwise {rankwise.__version__}"
    assert bool(others) == ("-v" in line)
    if others:
        assert {f"{name} {importlib.metadata.version(name)}" for name in SHOWN[:7]} <= set(others)


def test_a_run_records_the_version_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of what happens to be installed."""
    assert "version" in PROJECT["dynamic"]
    versions.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert versions() == {"rankwise": rankwise.__version__} | dict.fromkeys(("torch", "transformers", "peft"), "0.0.1")
    versions.cache_clear()
