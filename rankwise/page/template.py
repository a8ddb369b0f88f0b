"""A page in HTML or Markdown, from the templates beside this file: pictures held in it, text from files escaped."""

from __future__ import annotations

import base64
import html
import os
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from rankwise.errors import DataError
from rankwise.files.atomic import read_bytes
from rankwise.page.blocks import Page, Picture
from rankwise.page.canvas import DPI

MARKDOWN = re.compile(r"([`*_\[\]|~#$])")
LINE_START = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))(.)")


def render(page: Page, template: str, folder: Path) -> str:
    return compiled(template).render(page=page, folder=folder)


@cache
def compiled(template: str) -> Template:
    environment = Environment(
        loader=PackageLoader("rankwise.page", "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "css_width": css_width, "md": markdown, "link": link}
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


def markdown(text: str) -> str:
    """Text that Markdown, and the HTML inside it, shows as it is, on one line; addresses do not become links."""
    shown = html.escape(str(text).strip(), quote=False).replace("\\", "&#92;")
    shown = shown.replace("://", "&#58;//").replace("www.", "www&#46;")
    shown = LINE_START.sub(r"\1\\\2", MARKDOWN.sub(r"\\\1", shown))
    return "<br>".join(shown.split("\n"))
