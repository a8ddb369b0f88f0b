"""Every documented command line is understood: README and all pages. Those of `from-the-scripts` and `recipes` run,
in test_documented_runs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import DOCS, FENCE, LEFT_OUT, PAGES, Line, lines

from rankwise import cli
from rankwise.pipeline.recipe import find_recipe, load_recipe, read_content

ALL = [line for page in PAGES for line in lines(page)]


def test_no_fenced_line_is_overlooked() -> None:
    """Lines that begin with the program's name, counted without the reader of fences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = "".join(re.findall(r"^```(?:bash|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        begun = re.findall(r"^(?:\$ )?(?:\w+=\S+ )*rankwise ", fenced, re.MULTILINE)
        assert len([line for line in ALL if line.page == page.name]) >= len(begun), page
    assert len(ALL) > 120
    assert {line.page for line in ALL} >= {"README.md", "recipes.md", "from-the-scripts.md", "label.md", "bundle.md"}


@pytest.mark.parametrize("line", ALL, ids=lambda line: f"{line.page}: {line.text[:60]}")
def test_a_documented_line_is_understood(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, flags and values; of `run` the recipe with the variables that are set, too."""
    monkeypatch.chdir(tmp_path)
    for file in ("config.json", "runs/advise/advice.yaml", "runs/demo/advise/advice.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    words = list(line.words)
    while LEFT_OUT in words:
        place = words.index(LEFT_OUT)
        del words[place - words[place - 1].startswith("--") : place + 1]
    name, rest = cli.split_command(words)
    config, _ = cli.resolve(name, rest)
    if name == "run":
        recipe = find_recipe(config.recipe)
        given = {name: value for name, value in line.variables.items() if not name.endswith("_KEY")}
        assert set(given) <= set(read_content(recipe).get("variables") or {}), "variables that the recipe lacks"
        for variable, value in given.items():
            monkeypatch.setenv(variable, value)
        load_recipe(recipe, tmp_path, config.set)


def test_the_page_of_the_scripts_has_the_documented_workflow() -> None:
    verbs = {line.words[0] for line in lines(DOCS / "from-the-scripts.md")}
    assert set("finetune ranks run batch compare train evaluate merge label export validate features".split()) <= verbs
    features = {line.words[1] for line in lines(DOCS / "from-the-scripts.md") if line.words[0] == "features"}
    assert features == {"extract", "train", "compare", "show"}


def plain(written: str) -> str:
    """Without quotes, line breaks and comments."""
    return " ".join(re.sub(r"[\"']|#.*", "", written).split())


def test_the_origin_documents_lines_stand_on_the_page(shared_data: Path) -> None:
    """Each shell line of the documents that Rankwise grew from, beside its form here."""
    origin = shared_data.parent / "origin"
    if not origin.is_dir():
        pytest.skip("the origin documents are not here")
    page = plain((DOCS / "from-the-scripts.md").read_text(encoding="utf-8").replace("\\\n", " "))
    wanted = [
        plain(written)
        for document in sorted(origin.glob("*.md"))
        for fence in FENCE.finditer(document.read_text(encoding="utf-8"))
        for written in fence[2].replace("\\\n", " ").splitlines()
        if fence[1] in ("bash", "") and re.match(r"\s*(nohup |export [MDS]|python |bash |\./)", written)
    ]
    assert len(wanted) > 20
    lacking = [line for line in wanted if line not in page and not line.endswith("...") and "pytest" not in line]
    told = [
        "export MODEL_NAME",
        "export DATA_PATH",
        "export SUBSET_RATIO",
        "export SVD_THRESHOLD",
        "--batch_size 2 --grad",
    ]
    assert not [line for line in lacking if not any(part in line for part in told)]


def test_the_readme_is_short() -> None:
    """At most 1,500 words, code and tables counted: what is longer belongs on a page of docs/."""
    assert len((DOCS.parent / "README.md").read_text(encoding="utf-8").split()) <= 1500
