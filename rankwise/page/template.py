"""A page in HTML or Markdown, from the templates beside this file: pictures held in it, text from files escaped."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from functools import cache
from html import escape
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from rankwise.errors import DataError
from rankwise.files.atomic import read_bytes
from rankwise.page.blocks import Page, SourceFile, Table
from rankwise.page.canvas import DPI
from rankwise.page.svg import NARROW, WIDE

MARKDOWN = re.compile(r"([`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # within a word _ has no meaning
LOADER = PackageLoader("rankwise.page", "templates")
LINE_START = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))(.)")


def html(page: Page, folder: Path) -> str:
    """The page in one file, its pictures, style and script held in it; it links to files as they lie from this folder.

    The security policy of the page allows this one script, by its hash, and nothing from elsewhere.
    """
    script = f"\n{source_text('page.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return compiled("page.html.j2").render(
        page=page, folder=folder, script=Markup(script), digest=digest, widths=(WIDE, NARROW)
    )


def markdown(page: Page, folder: Path) -> str:
    """The page for a file in this folder, its pictures linked from there."""
    return compiled("page.md.j2").render(page=page, folder=folder)


def markdown_table(table: Table) -> list[str]:
    """Lines of a table alone, for a document that is written elsewhere."""
    return compiled("blocks.md.j2").render(blocks=[table]).strip().split("\n") if table.rows else []


@cache
def compiled(template: str) -> Template:
    environment = Environment(
        loader=LOADER,
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "css_size": css_size, "md": escaped, "link": link, "href": href}
    return environment.get_template(template)


def source_text(name: str) -> str:
    """A file beside the templates, as it is."""
    return LOADER.get_source(Environment(), name)[0]


def data_uri(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(read_bytes(picture)).decode()


def css_size(picture: Path) -> tuple[int, int]:
    """Width and height in CSS pixels (96 to the inch) at which the picture's texts have their size on paper."""
    try:
        with Image.open(picture) as image:
            scale = 96 / float(image.info.get("dpi", (DPI, DPI))[0])
            return round(image.width * scale), round(image.height * scale)
    except (OSError, ValueError, SyntaxError, ZeroDivisionError) as error:
        raise DataError(f"{picture}: not a picture ({error}); delete it or draw it again") from error


def link(path: Path, folder: Path) -> str:
    """A file's address relative to the folder of the page."""
    found = Path(os.path.relpath(path, folder)).as_posix()
    return "".join(c if c.isalnum() or c in "/._-" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in found)


def href(source: SourceFile, folder: Path) -> str:
    """The same, for a page that may be sent alone: empty where the way leads through folders outside the run, whose
    names are nobody's business."""
    run = source.path.resolve().parents[source.name.count("/")]
    place = folder.resolve()
    return link(source.path, folder) if place in (run, *run.parents) or run in place.parents else ""


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML inside it, shows as it is, on one line; addresses do not become links."""
    shown = escape(str(text).strip(), quote=False).replace("\\", "&#92;")
    shown = shown.replace("://", "&#58;//").replace("www.", "www&#46;")
    shown = LINE_START.sub(r"\1\\\2", MARKDOWN.sub(r"\\\1", shown))
    return "<br>".join(shown.split("\n"))
