"""docs/data.md as it stands: every row on it is read, every command line runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documented import DOCS, FENCE, Line, lines
from test_input_law import samsum
from tiny import CHAT_TEMPLATE, tiny_llama
from tiny_vision import drawn_image, tiny_smolvlm

from rankwise.cli import main
from rankwise.data.sources.conversations import SPEAKERS
from rankwise.data.sources.load import load
from rankwise.data.template import found

PAGE = DOCS / "data.md"
ROWS = [fence[2] for fence in FENCE.finditer(PAGE.read_text(encoding="utf-8")) if fence[1] == "json"]
LINES = lines(PAGE)
TEXT_ONLY = "--task samsum"
SHORT = "--max_steps 2 --eval_strategy no --save_strategy no --use_cpu --no_plots --max_seq_length 1024".split()


def objects(block: str) -> list[dict[str, object]]:
    """The JSON objects of a block, one behind another."""
    found, decoder = [], json.JSONDecoder()
    while block := block.strip():
        row, end = decoder.raw_decode(block)
        found.append(row)
        block = block[end:]
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's lines find: SAMSum, pictures, all rows of the page in train.json, and MODEL, which sees."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "data" / "samsum").mkdir(parents=True)
    samsum(folder / "data" / "samsum")
    (folder / "images").mkdir()
    for name in "ab":
        for place in (folder, folder / "images"):
            drawn_image(ord(name)).save(place / f"{name}.jpg")
    (folder / "train.json").write_text(json.dumps([row for block in ROWS for row in objects(block)]))
    tiny_smolvlm(folder / "MODEL")
    tiny_llama(folder / "TEXT", tokenizer={"chat_template": CHAT_TEMPLATE})
    return folder


def test_every_row_of_the_page_is_read(here: Path) -> None:
    rows = load("conversations", here / "train.json")
    assert len(rows) == sum(len(objects(block)) for block in ROWS) >= 11
    assert {row.answer for row in rows} == {"A swan.", "The first one.", "Its neck.", "A goose."}
    assert sum(row.images == ("a.jpg", "b.jpg") for row in rows) == 3
    assert all(block.count("\n") <= 4 for block in ROWS), "a form in three lines or so"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text[:70])
def test_every_line_of_the_page_runs(
    line: Line, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    words = [word for word in line.words if word != "--download"]  # the downloads are test_download.py's
    words = ["TEXT" if word == "MODEL" and TEXT_ONLY in line.text else word for word in words]
    output = ["-o", str(tmp_path / "out")]
    more = [*SHORT, "--val_fraction", "0"] if words[0] == "train" else ["--workers", "0"]
    assert main([*words, *more, *output]) == 0, capsys.readouterr().err


def test_the_tables_of_the_page_are_the_products() -> None:
    """Roles and placeholders that the page names are those that are read."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*`) \| (system|user|assistant)", text, re.MULTILINE)
    named = {name: role for names, role in table for name in re.findall(r"`(\w+)`", names)}
    assert named == SPEAKERS
    listed = text[text.index("- Placeholders of other programs") :].split("\n- ")[0]
    for marker in re.findall(r"`([^`]+)`", listed):
        assert [one.stands_for for one in found(marker.replace("…", "a.jpg"))] == ["image"], marker
