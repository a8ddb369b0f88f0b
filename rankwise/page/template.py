"""A page in HTML or Markdown, from the templates beside this file: pictures held in it, text from files escaped."""

from __future__ import annotations

import base64
import os
import re
from functools import cache
from html import escape
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from rankwise.errors import DataError
from rankwise.files.atomic import read_bytes
from rankwise.page.blocks import Page, Picture, Table
from rankwise.page.canvas import DPI

MARKDOWN = re.compile(r"([`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # within a word _ has no meaning
LINE_START = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))(.)")


def html(page: Page) -> str:
    """The page in one file, its pictures held in it."""
    return compiled("page.html.j2").render(page=page)


def markdown(page: Page, folder: Path) -> str:
    """The page for a file in this folder, its pictures linked from there."""
    return compiled("page.md.j2").render(page=page, folder=folder)


def markdown_table(table: Table) -> list[str]:
    """Lines of a table alone, for a document that is written elsewhere."""
    return compiled("blocks.md.j2").render(blocks=[table]).strip().split("\n") if table.rows else []


@cache
def compiled(template: str) -> Template:
    environment = Environment(
        loader=PackageLoader("rankwise.page", "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "css_width": css_width, "md": escaped, "link": link}
    return environment.get_template(template)


def data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(read_bytes(picture.path)).decode()


def css_width(picture: Picture) -> int:
    """Width in CSS pixels (96 to the inch) at which the picture's texts have their size on paper."""
    try:
        with Image.open(picture.path) as image:
            return round(image.width * 96 / float(image.info.get("dpi", (DPI, DPI))[0]))
    except (OSError, ValueError, SyntaxError, ZeroDivisionError) as error:
        raise DataError(f"{picture.path}: not a picture ({error}); delete it or draw it again") from error


def link(picture: Picture, folder: Path) -> str:
    """The image's path as Markdown takes it, relative to the page."""
    path = Path(os.path.relpath(picture.path, folder)).as_posix()
    return "".join(c if c.isalnum() or c in "/._-" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in path)


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML inside it, shows as it is, on one line; addresses do not become links."""
    shown = escape(str(text).strip(), quote=False).replace("\\", "&#92;")
    shown = shown.replace("://", "&#58;//").replace("www.", "www&#46;")
    shown = LINE_START.sub(r"\1\\\2", MARKDOWN.sub(r"\\\1", shown))
    return "<br>".join(shown.split("\n"))
