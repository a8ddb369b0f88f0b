"""What makes the site of docs/ and of the package. mkdocs calls the functions `on_…` (mkdocs.yml).

Navigation is the tables of docs/README.md. README, changelog, contributing page and benchmarks join from the
repository's root, where their links and those of docs/ already point. Pages of commands come from the option table, the
page of the Python API from `rankwise.__all__`. Needs no torch: nothing heavy is imported, and signatures are parsed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import rankwise  # noqa: E402
from rankwise.options.field import Option, options_of  # noqa: E402
from rankwise.options.flags import spellings  # noqa: E402
from rankwise.options.help import continued, default_text, grouped  # noqa: E402
from rankwise.pipeline.table import ALIASES, COMMANDS, DRY_RUN, GROUPS, Command  # noqa: E402

LINK = re.compile(r"""(\]\(|\b(?:src|href)=")([^)"#\s]*)(?=[#)"])""")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| \[([^]]+)\]\(([^)]+)\) \|", re.MULTILINE)
MOVED = {"README.md": "index.md", "docs/README.md": "contents.md", "benchmarks/results": "benchmarks/README.md"}
GUIDES = {  # how-to pages of commands whose name is not the page's
    "extract": "adapters",
    "compress": "adapters",
    "merge": "adapters",
    "check": "data",
    "run": "recipes",
    "batch": "recipes",
    "report": "recipes",
    "compare": "recipes",
    "tiny": "android",
    "schema": "shell",
    "completion": "shell",
}


# --- navigation ------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    parts = dict(section(contents, "## "))
    parts["Reference"] += [
        {"All pages": "contents.md"},
        {"Commands": ["commands/index.md", *({name: f"commands/{slug(name)}.md"} for name in COMMANDS)]},
        {"Python": "python.md"},
        {"Measurements": ["benchmarks/README.md", *map(repository_path, results())]},
        {"Changelog": "CHANGELOG.md"},
        {"Contributing": "CONTRIBUTING.md"},
        {"Security": "SECURITY.md"},
    ]
    config.nav = [{"Rankwise": "index.md"}, *({part: pages} for part, pages in parts.items())]


def section(text: str, mark: str) -> Iterator[tuple[str, list[Any]]]:
    """Headings with the pages of the tables below them; headings without pages are prose."""
    for part in re.split(f"^{mark}", text, flags=re.MULTILINE)[1:]:
        above, *_ = re.split(f"^#{mark}", part, maxsplit=1, flags=re.MULTILINE)
        pages = [{title: page} for title, page in ROW.findall(above)]
        pages += [{title: below} for title, below in section(part, f"#{mark}")] if mark == "## " else []
        if pages:
            yield part.partition("\n")[0], pages


def slug(name: str) -> str:
    return name.replace(" ", "-")


def results() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("*.md"))


# --- files -----------------------------------------------------------------------------------------------------------


def repository_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def site_path(path: str) -> str:
    """Where a file of the repository stands on the site."""
    return MOVED.get(path, path.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.remove(files.src_uris["README.md"])  # mkdocs would take it for the home page
    pages = [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "benchmarks" / "README.md",
    ]
    pages += [*results(), *(ROOT / "docs").rglob("*.md")]
    linked = {path for page in pages for path in targets(page)}
    for path in dict.fromkeys([*map(repository_path, pages), *sorted(linked)]):
        if site_path(path) not in files.src_uris and (ROOT / path).is_file():
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for name, content in generated().items():
        files.append(File.generated(config, name, content=content))
    return files


def targets(page: Path) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for _, target in LINK.findall(page.read_text(encoding="utf-8")):
        if target and ":" not in target:
            yield normpath(f"{repository_path(page.parent)}/{target}")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between places of the repository become links between places of the site."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # one entry, itself
    source = page.file.abs_src_path
    if source is None:  # made here, with the site's links
        return markdown
    here = PurePosixPath(repository_path(Path(source))).parent
    there = PurePosixPath(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        if not found[2] or ":" in found[2] or not (ROOT / here / found[2]).exists():
            return found[0]
        return found[1] + relpath(site_path(normpath(f"{here}/{found[2]}")), str(there))

    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    commands = [name for name in COMMANDS if guide(name) == page.file.src_uri]
    if commands:
        links = ", ".join(f"[`rankwise {name}`](commands/{slug(name)}.md)" for name in commands)
        parts.append(f"\n\nEvery option: {links}.\n")
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Flags are not broken behind their dashes."""
    return re.sub(r"<code>(?=--[^<]{1,36}</code>)", '<code class="flag">', html)


def guide(name: str) -> str:
    return f"{GUIDES.get(name, name.split()[0])}.md"


# --- pages made of the package ---------------------------------------------------------------------------------------


def generated() -> dict[str, str]:
    pages = {f"commands/{slug(name)}.md": command_page(name, row) for name, row in COMMANDS.items()}
    return pages | {"commands/index.md": commands_page(), "python.md": python_page()}


def commands_page() -> str:
    lines = ["# Commands", "", "`rankwise COMMAND [FILE] [--option value …]`. Generated from the table of options."]
    for group in GROUPS:
        lines += ["", f"## {group.capitalize()}", "", "| command | |", "|---|---|"]
        rows = {name: row for name, row in COMMANDS.items() if row.group == group}
        lines += [f"| [`{name}`]({slug(name)}.md) | {plain(row.help)} |" for name, row in rows.items()]
    return "\n".join(lines)


def command_page(name: str, row: Command) -> str:
    words = [f"[{word.upper()}]" for word in row.positionals]
    words = ["rankwise", name, *["[CONFIG]"] * row.takes_file, *words, *["…"] * row.repeated, "[--option VALUE …]"]
    lines = [f"# rankwise {name}", "", plain(row.about), "", "```", " ".join(words), "```", "", "For example:"]
    lines += ["", "```bash", *(line.removeprefix("  ") for line in continued(row.example, 100).splitlines()), "```"]
    lines += ["", f"How to use it: [{guide(name).removesuffix('.md')}](../{guide(name)})."]
    lines += [f"Also as `rankwise {short}`." for short, full in ALIASES.items() if full == name]
    if row.takes_file:
        lines += ["", "`CONFIG`: option names with values, as YAML, JSON or TOML; flags override it."]
    if row.trainer:
        lines += [
            "",
            "Every option of `transformers.TrainingArguments` is one here, too, under its own name (`--help-all`).",
        ]
    for title, items in grouped([*options_of(row.config), DRY_RUN]).items():
        group, _, about = title.partition(":")
        lines += [
            "",
            f"## {group.capitalize()}{f':{about}' * bool(about)}",
            "",
            "| option | |",
            "|---|---|",
        ]
        lines += map(option_row, items)
    return "\n".join(lines)


def option_row(item: Option) -> str:
    names = ", ".join(f"`{flag}`" for flag in spellings(item))
    default = default_text(item).strip(" []")
    default = f"; default `{default}`" if default else ""
    choices = f": {', '.join(f'`{choice}`' for choice in item.choices)}" if item.choices else ""
    return f"| {names} | {plain(item.help)}{choices}{plain(item.range.shown)}{default} |"


def plain(text: str) -> str:
    """Text, with code in backquotes, as Markdown that shows it."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_\[\]|])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "".join(parts)


def python_page() -> str:
    lines = ["# Python", "", str(rankwise.__doc__).partition("\n\n")[2]]
    rooms: dict[str, list[str]] = {}
    for home, names in rankwise._HOMES.items():
        rooms.setdefault(home.split(".")[0], []).extend(f"::: rankwise.{home}.{name}" for name in names)
    for room, names in rooms.items():
        lines += ["", f"## {room.capitalize()}", *(f"\n{name}" for name in names)]
    return "\n".join(lines)
