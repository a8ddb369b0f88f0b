"""Pictures in the report: with question and every answer, marked, small, embedded, and never from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from rankwise.evaluate.predictions import EvaluationResult
from rankwise.report.report import build_report
from rankwise.report.scores import MOST_SHOTS, THUMBNAIL

ANSWERS = {"before": ["a picture", "blue", ""], "after": ["Red.", "blue", "two <b>dogs</b>"]}
WANTED = ["red", "blue", "two"]


def rows(answers: list[str], images: list[list[str]]) -> str:
    made = [
        {
            "id": f"row-{number}",
            "prompt": "<|im_start|>User:<image><image>",
            "prediction": answer,
            "references": [WANTED[number % 3]],
            "images": images[number],
            "question": f"Question {number}?",
        }
        for number, answer in enumerate(answers)
    ]
    return "".join(json.dumps(row) + "\n" for row in made)


def seen_run(run: Path, images: list[list[str]], metric: str = "exact_match") -> Path:
    """Two evaluations of pictures that lie in data/ beside them."""
    for number, (name, answers) in enumerate(ANSWERS.items()):
        folder = run / name
        folder.mkdir(parents=True)
        settings = {"image_folder": "../data"}
        EvaluationResult("conversations", {metric: 33.3 * (1 + number)}, {}, len(images), settings).save(folder)
        (folder / "predictions.jsonl").write_text(rows((answers * len(images))[: len(images)], images))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for number, size in enumerate([(64, 64), (900, 300), (20, 40)]):
        Image.new("RGB", size, (40 * number, 90, 10)).save(tmp_path / "data" / f"{number}.png")
    return seen_run(tmp_path, [[f"{number}.png"] for number in range(3)])


def embedded(page: str) -> list[Image.Image]:
    gallery = page[page.index('<div class="gallery">') :]
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', gallery)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def test_every_picture_has_its_question_and_all_answers_marked(run: Path) -> None:
    page = build_report(run).read_text(encoding="utf-8")
    cards = re.findall(r"<figure><img src=.*?</figure>", page[page.index('<div class="gallery">') :], flags=re.DOTALL)
    assert len(cards) == 3
    for number, card in enumerate(cards):
        assert f"Question {number}?" in card
        assert WANTED[number] in card
        for name, answers in ANSWERS.items():
            assert html.escape(answers[number] or "(nothing)") in card
            assert name in card
    assert [card.count('class="right"') for card in cards] == [1, 2, 0]
    assert [card.count('class="wrong"') for card in cards] == [1, 0, 2]
    assert "<b>dogs" not in page


def test_pictures_are_small_embedded_and_keep_their_shape(run: Path) -> None:
    images = embedded(build_report(run).read_text(encoding="utf-8"))
    assert [image.size for image in images] == [(64, 64), (THUMBNAIL, THUMBNAIL // 3), (20, 40)]
    assert images[0].convert("RGB").getpixel((5, 5)) == (0, 90, 10)


def test_markdown_names_the_same_pictures(run: Path) -> None:
    markdown = build_report(run).with_suffix(".md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]*\]\((report_files/seen[^)]+)\)", markdown)
    assert len(named) == 3
    assert all((run / name).is_file() for name in named)
    assert markdown.count("✓") == 3
    assert markdown.count("✗") == 3


def test_a_picture_out_of_the_folder_or_gone_is_counted_not_shown(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    seen_run(tmp_path, [["0.png"], ["../secret.png"], ["gone.png"]])
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert len(embedded(page)) == 1
    assert "2 pictures could not be read" in page


def test_a_dozen_spread_over_the_file_and_of_several_pictures_the_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    count = 2 * MOST_SHOTS + 5
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "data" / f"{number}.png")
    seen_run(tmp_path, [[f"{number}.png", "0.png"] for number in range(count)])
    page = build_report(tmp_path).read_text(encoding="utf-8")
    shown = [int(image.getpixel((0, 0))[0]) for image in embedded(page)]
    assert len(shown) == MOST_SHOTS
    assert shown[0] == 0
    assert {later - earlier for earlier, later in pairwise(shown)} == {2, 3}
    assert f"{MOST_SHOTS} pictures of {count}, spread evenly" in page
    assert "(the first of 2)" in page


def test_nothing_is_marked_where_answers_are_not_right_or_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "0.png")
    page = build_report(seen_run(tmp_path, [["0.png"]], metric="bleu")).read_text(encoding="utf-8")
    assert len(embedded(page)) == 1
    assert not re.search(r'class="(right|wrong)"', page)
    assert "✗" not in page


def test_runs_without_pictures_have_no_gallery(tmp_path: Path) -> None:
    page = build_report(seen_run(tmp_path, [[]])).read_text(encoding="utf-8")
    assert 'class="gallery"' not in page
    assert 'class="examples"' in page, "their items are shown as text"
