"""Blocks are one value for terminal, Markdown and HTML: the same numbers in all three, and nothing unsafe in any."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from rankwise.page.blocks import Block, Folded, Page, Plot, Table, Words, drawn, into, lines, pictures
from rankwise.page.template import html, markdown, markdown_table

HOSTILE = "a\x1b[31m\u202eb|<script>`"


def dot(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def finding() -> list[Block]:
    table = Table(("arm", "loss"), [("plan", "1.25\n3 seeds"), (HOSTILE, "2.5")], note="mean")
    return [Words("plan is better."), table, Plot("curve", "a curve", dot), Folded("more", [Plot("deep", "", dot)])]


def test_a_terminal_has_words_and_aligned_tables_without_pictures() -> None:
    assert lines(finding()) == [
        "plan is better.",
        "",
        "  arm                    loss",
        "  plan                   1.25",
        "                      3 seeds",
        "  a\ufffd[31m\ufffdb|<script>`      2.5",
        "  mean",
    ]


def test_all_three_tell_the_same_and_nothing_unsafe(tmp_path: Path) -> None:
    blocks = drawn(finding(), into(tmp_path / "plots"))
    assert pictures(blocks) == {name: tmp_path / "plots" / f"{name}.png" for name in ("curve", "deep")}
    page = Page("title", "subtitle", lead=blocks)
    texts = "\n".join(lines(blocks)), markdown(page, tmp_path), html(page, tmp_path)
    for text in texts:
        assert "plan is better." in text and "1.25" in text and "2.5" in text
        assert "\x1b" not in text and "\u202e" not in text
    assert "![a curve](plots/curve.png)" in texts[1] and "<script>" not in texts[1]
    assert texts[2].count("<script>") == 1, "the page's own"


def test_plots_that_are_not_drawn_leave_nothing_behind(tmp_path: Path) -> None:
    blocks = drawn(finding(), None)
    assert [type(block) for block in blocks] == [Words, Table]
    assert "<details>" not in html(Page("title", "", lead=blocks), tmp_path)


def test_a_table_alone_is_the_pages_table() -> None:
    head, rule, _, row, *_ = markdown_table(Table(("a", "b"), [("x_y", "1"), ("_x_", "[2, 3]")]))
    assert (head, rule, row) == ("| a | b |", "|---|---:|", r"| \_x\_ | \[2, 3\] |")
    assert markdown_table(Table(("a",), [])) == []
