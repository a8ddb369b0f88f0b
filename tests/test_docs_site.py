"""The site of docs/: built strictly, every link and anchor of the built pages checked, nothing loaded from elsewhere.

`mkdocs build --strict` refuses what mkdocs finds itself: pages outside the navigation, links and anchors of Markdown.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from documented import DOCS, REPOSITORY
from test_report_in_browser import PHONE, browser, opened

import rankwise
from rankwise.options.field import options_of
from rankwise.pipeline.table import COMMANDS

pytest.importorskip("mkdocs", reason="the site is built with the extra docs")
__all__ = ["browser"]  # a fixture of this module, too

EXTERNAL = {"arxiv.org", "github.com"}  # hosts; their links are checked for form alone
LEFTOVER = re.compile(r"^(?:#+ |```)|\|---|\*\*\S", re.MULTILINE)  # Markdown that was taken for text
LIST = re.compile(r"^(?:[-*]|\d+\.) ", re.MULTILINE)
CSS_URL = re.compile(r"""url\(\s*["']?(?!data:|#)([^"')]+)|@import\s+["']([^"']+)""")


class Built(HTMLParser):
    """Of one page: ids, links, what is loaded, and its text outside of code."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text: list[str] = []
        self.paragraphs: list[str] = []
        self.inside: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("p", "code", "pre", "script", "style"):
            self.inside.append(tag)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded += [given[name] for name in ("src", "href", "data", "poster") if given.get(name)]

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside in ([], ["p"]):
            (self.paragraphs if self.inside else self.text).append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Built]:
    return {page: Built(page) for page in sorted(site.rglob("*.html"))}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Built]) -> None:
    """Internal ones to a file and, where they name one, to its anchor; external ones are well-formed."""
    broken = []
    for page, built in pages.items():
        for link in {*built.links, *built.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                known = parts.scheme == "https" and re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc)
                ok = bool(known) and not re.search(r"[\s<>\"`]", link)
            elif page.name == "404.html":  # its links start at the host's root
                continue
            else:
                target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
                ok = target.is_file() and (not parts.fragment or target.suffix != ".html" or target in pages)
                ok = ok and (not parts.fragment or unquote(parts.fragment) in pages[target].ids)
            if not ok:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)
    external = {urlsplit(link).netloc for built in pages.values() for link in built.links} - {""}
    assert external == EXTERNAL
    assert sum(len(built.links) for built in pages.values()) > 5000


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Built]) -> None:
    loaded = {f"{page.relative_to(site)}: {link}" for page, built in pages.items() for link in built.loaded}
    for sheet in site.rglob("*.css"):
        found = CSS_URL.findall(sheet.read_text(encoding="utf-8"))
        loaded |= {f"{sheet.relative_to(site)}: {''.join(one)}" for one in found}
    assert not {one for one in loaded if re.search(r": *(?:\w+:)?//", one)}
    assert (site / "search" / "search_index.js").stat().st_size > 100_000  # search in pages opened as files


def test_no_markdown_is_left_over(site: Path, pages: dict[Path, Built]) -> None:
    """What GitHub shows as a list or a table, and mkdocs as text: a blank line is missing."""
    for page, built in pages.items():
        paragraphs = "".join(built.paragraphs)
        marks = LEFTOVER.findall("".join(built.text) + paragraphs) + LIST.findall(paragraphs)
        assert not marks, page.relative_to(site)


def test_commands_and_public_names_have_their_place(site: Path, pages: dict[Path, Built]) -> None:
    for name, row in COMMANDS.items():
        text = (site / "commands" / f"{name.replace(' ', '-')}.html").read_text(encoding="utf-8")
        assert not [
            item.name for item in options_of(row.config) if f'<code class="flag">--{item.name}</code>' not in text
        ], name
    ids = pages[site / "python.html"].ids
    missing = [name for name in rankwise.__all__[1:] if not any(one.split(".")[-1] == name for one in ids)]
    assert not missing
    assert {page.stem for page in DOCS.glob("*.md")} - {"README"} <= {page.stem for page in pages}


def test_a_phone_shows_pages_opened_as_files_and_searches_them(site: Path, browser: Any) -> None:
    for name in ("commands/train.html", "features.html", "index.html"):
        opened(browser, site / name, PHONE, "dark")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0], name
    browser.find_element("css selector", "label[for=__search].md-header__button").click()
    wanted = browser.find_element("css selector", "input.md-search__input")
    waits = importlib.import_module("selenium.webdriver.support.wait").WebDriverWait
    waits(browser, 60).until(lambda _: wanted.is_displayed() and wanted.is_enabled())
    wanted.send_keys("near ties of a router")
    browser.set_script_timeout(60)
    found = browser.execute_async_script(
        """const done = arguments[0]; const look = () => {
             const found = document.querySelector('.md-search-result__item a');
             found ? done(found.href) : setTimeout(look, 50) }; look()"""
    )
    assert "parity.html" in found
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
