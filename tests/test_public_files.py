"""Files for the public: workflows, forms, hooks, citation, security. Checked by the tools that read them, offline.

actionlint is in no package that these tests can install: zizmor and the schemas of check-jsonschema stand for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankwise

REPOSITORY = Path(rankwise.__file__).parents[1]
BIN = Path(sys.executable).parent
GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")]
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "dependabot": [GITHUB / "dependabot.yml"],
    "github-issue-forms": FORMS,
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "citation-file-format": [REPOSITORY / "CITATION.cff"],
}
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def tool(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    line = [str(word) for word in words]
    return subprocess.run(line, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, **how)


def steps() -> list[tuple[str, dict[str, Any]]]:
    """(workflow/job, step) of every workflow."""
    found = []
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            found += [(f"{path.stem}/{name}", step) for step in job["steps"]]
    return found


RUNS = [(where, step) for where, step in steps() if "run" in step]


def test_files_fit_their_schemas() -> None:
    for schema, files in SCHEMAS.items():
        done = tool(BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
        assert done.returncode == 0, done.stdout


def test_a_wrong_workflow_does_not(tmp_path: Path) -> None:
    wrong = tmp_path / "ci.yml"
    wrong.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("runs-on", "run-on"))
    done = tool(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", wrong)
    assert done.returncode == 1 and "run-on" in done.stdout


def test_workflows_are_safe(tmp_path: Path) -> None:
    done = tool(BIN / "zizmor", "--offline", "--no-progress", "--persona", "pedantic", ".github")
    assert done.returncode == 0, done.stdout
    shutil.copytree(GITHUB, tmp_path / ".github")
    wrong = re.sub(r"checkout@\w+ #.*", "checkout@main", WORKFLOWS[0].read_text(encoding="utf-8"))
    (tmp_path / ".github" / "workflows" / WORKFLOWS[0].name).write_text(wrong)
    done = tool(BIN / "zizmor", "--offline", "--no-progress", tmp_path / ".github")
    assert done.returncode != 0 and "unpinned-uses" in done.stdout


def test_actions_are_pinned_by_commit_with_their_version_beside_it() -> None:
    lines = [
        line.split("uses: ")[1] for path in WORKFLOWS for line in path.read_text().splitlines() if "uses: " in line
    ]
    assert len(lines) >= 10 and [line for line in lines if not PINNED.fullmatch(line)] == []
    assert len(set(lines)) == len({line.partition("@")[0] for line in lines}), "one version of each"


def test_only_what_must_may_write() -> None:
    granted = set()
    for path in WORKFLOWS:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert content["permissions"] == {}, path
        for name, job in content["jobs"].items():
            granted |= {
                f"{path.stem}/{name}: {scope}" for scope, right in job["permissions"].items() if right == "write"
            }
    wanted = {"docs/deploy: pages", "docs/deploy: id-token", "release/attest: attestations", "release/attest: id-token"}
    assert granted == {*wanted, "release/publish: id-token"}


@pytest.mark.parametrize(("where", "step"), RUNS, ids=[where for where, _ in RUNS])
def test_the_commands_of_a_step_are_commands(where: str, step: dict[str, Any], tmp_path: Path) -> None:
    """The shell reads it; of `make` the recipe is printed; of ours the command line is taken; of uv, where it is here,
    its options are known."""
    assert "${{" not in step["run"], "a value from outside reaches the shell by its environment only"
    done = tool("bash", "-n", "-c", step["run"])
    assert done.returncode == 0, done.stderr
    for line in step["run"].splitlines():
        words = line.split()
        if words[0] == "make":
            known = {**os.environ, "PYTHON_VERSION": "3.13"}
            done = tool("bash", "-c", line.replace("make", f"make -n VENV={tmp_path}", 1), env=known)
            assert done.returncode == 0 and "constraints.txt" in done.stdout, done.stderr
        elif words[0].endswith("rankwise"):
            done = tool(sys.executable, "-m", "rankwise", *words[1:], "--help")
            assert done.returncode == 0 and done.stdout.startswith("usage"), done.stderr
        elif words[0] == "uv" and shutil.which("uv"):
            verb = words[1:3] if words[1] == "pip" else words[1:2]
            shown = tool("uv", *verb, "--help").stdout
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= set(
                re.findall(r"--[\w-]+", shown)
            )


def test_a_tag_that_is_not_the_version_is_not_released() -> None:
    (step,) = [step for where, step in RUNS if step.get("name") == "The tag is the version"]
    for tag, code in ((f"v{rankwise.__version__}", 0), ("v9.9.9", 1)):
        found = tool("bash", "-c", step["run"], env={**os.environ, "TAG": tag}).returncode
        assert found == code, tag


def test_the_workflows_pythons_are_those_of_the_package() -> None:
    matrix = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


def test_a_bug_is_reported_with_what_doctor_says_first() -> None:
    first = yaml.safe_load(FORMS[0].read_text(encoding="utf-8"))["body"][0]
    assert first["id"] == "doctor" and first["validations"]["required"]
    assert "rankwise doctor --json" in first["attributes"]["description"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == rankwise.__version__


def test_every_promise_of_security_names_a_test_that_is_there() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_hooks_are_programs_of_the_test_environment() -> None:
    """None is fetched; `pre-commit run --all-files` runs them."""
    (repo,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        program, *options = hook["entry"].split()
        assert hook["language"] == "system" and program.startswith(".venv/bin/")
        done = tool(BIN / Path(program).name, *options, "--help")
        assert done.returncode == 0, done.stderr


def test_words_are_spelled_right() -> None:
    names = tool("git", "ls-files", "-co", "--exclude-standard")
    files = [name for name in names.stdout.splitlines() if (REPOSITORY / name).is_file()]
    if names.returncode:  # an unpacked sdist
        files = ["rankwise", "docs", "benchmarks", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    done = tool(BIN / "codespell", *files)
    assert done.returncode == 0, done.stdout
