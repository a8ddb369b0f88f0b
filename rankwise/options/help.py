"""What `--help` shows of a command: usage, description, example, and its options in groups.

The groups stand at the options (`option(group=…)`, the sections' `group`, what an option is the path of). The same text
under every Python: as wide as the terminal or COLUMNS says, bold headings at a terminal unless NO_COLOR is set.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial

from rankwise.options.field import GROUPS, Option
from rankwise.options.flags import spellings

HELPS = ("-h", "--help", "--help-all", "--help_all")
fill = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
NARROWEST, WIDEST = 40, 120  # longer lines are hard to read


def columns() -> int:
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))


def bold(text: str) -> str:
    """The text as a heading where standard output is a terminal that shows it; see no-color.org."""
    styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[1m{text}\033[0m" if styled else text


def help_text(usage: str, about: str, example: str, options: Sequence[Option], notes: Sequence[str]) -> str:
    """usage: the line behind the program's name. notes: paragraphs at the end; what is indented stays as it is."""
    width = columns()
    lines = [f"{bold('usage:')} rankwise {usage}", "", fill(about, width)]
    lines += ["", bold("example:"), continued(example, width - 6)]
    for title, items in grouped(options).items():
        lines += ["", *map(bold, textwrap.wrap(title, width)), *(option_text(item, width) for item in items)]
    for note in notes:
        lines += ["", note if note.startswith(" ") else fill(note, width)]
    return "\n".join(lines)


def grouped(options: Sequence[Option]) -> dict[str, list[Option]]:
    """Options under their headings, in the order model → data → method → output."""
    found: dict[str, list[Option]] = {}
    for item in sorted(options, key=lambda item: (*GROUPS, item.group).index(item.group)):
        found.setdefault(heading(item), []).append(item)
    return found


def table(rows: Mapping[str, str], indent: int) -> list[str]:
    """Names, and beside them what they are, from column `indent` on."""
    width = columns()
    return [
        fill(text, width, initial_indent=f"  {name:<{indent - 2}}", subsequent_indent=" " * indent)
        for name, text in rows.items()
    ]


def continued(line: str, width: int) -> str:
    """A command line, on several lines where it is too long; a flag and its value stay together."""
    kept = re.sub(r"(?<= )(-\S+) (?!-)", "\\1\0", line)
    lines = textwrap.wrap(kept, width, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n    ".join(lines).replace("\0", " ")


def heading(item: Option) -> str:
    """ "METHOD: from a delta to a rank"."""
    about = item.about.rstrip(".").partition(". ")[0]
    first = about.partition(" ")[0]
    about = about[:1].lower() + about[1:] if first[1:] == first[1:].lower() else about  # but AdaLoRA's
    return item.group.upper() + (f": {about}" if about else "")


def option_text(item: Option, width: int) -> str:
    """Flags, and beside or below them what they do, their choices, range and default."""
    names = [flag for flag in spellings(item) if not flag.endswith("_")]  # that Python has a word of: --from
    flags, indent = f"  {', '.join(names)}{value_text(item)}", 28 if width < 100 else 36
    shown = (
        item.help + (f" ({', '.join(item.choices)})" if item.choices else "") + item.range.shown + default_text(item)
    )
    lines = textwrap.wrap(shown, max(width - indent, 12), break_long_words=False, break_on_hyphens=False) or [""]
    if len(flags) > indent - 2:
        return "\n".join([flags, *(" " * indent + line for line in lines)])
    return "\n".join([f"{flags:<{indent}}{lines[0]}", *(" " * indent + line for line in lines[1:])])


def value_text(item: Option) -> str:
    """What stands behind a flag: nothing where it is a switch."""
    if not item.is_bool:
        return f" {item.name.strip('_').split('_')[-1].upper()}"
    return "" if item.default is False else " BOOL" if item.default else " [BOOL]"


def default_text(item: Option) -> str:
    if item.default is False or item.default in (None, "", []):
        return ""
    return f" [{', '.join(map(str, item.default)) if isinstance(item.default, list) else item.default}]"
