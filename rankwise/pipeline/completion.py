"""`rankwise completion SHELL`: the table of commands and options as a completion script, written by shtab.

The Trainer's options are among them, whose import takes seconds: the script is made once and kept in a file.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import shtab

from rankwise.errors import UsageError
from rankwise.files.atomic import write_or_print
from rankwise.options.commands import SHELLS, CompletionConfig
from rankwise.options.field import Option
from rankwise.options.flags import spellings
from rankwise.options.help import HELPS
from rankwise.pipeline.recipe import PACKAGED
from rankwise.pipeline.table import COMMANDS, DRY_RUN, Command, command_options

NO_FILES = {
    "schema": list(dict.fromkeys(word for name in COMMANDS for word in name.split())),
    "completion": list(SHELLS),
}
NAMED = {"run": ".", "batch": "."}  # commands that take a recipe of the package by name, and the folder of these


def check(config: CompletionConfig) -> None:
    if config.shell is None:
        raise UsageError(f"completion: which shell? {', '.join(SHELLS)}")


def run(config: CompletionConfig) -> None:
    write_or_print(config.out, shtab.complete(parser_of_all(str(config.shell)), str(config.shell)) + "\n")


def describe(config: CompletionConfig) -> list[str]:
    return [f"make a completion script for {config.shell}"]


def parser_of_all(shell: str) -> ArgumentParser:
    """All commands as argparse's subcommands, those of two words below the first one."""
    root = plain_parser("rankwise")
    commands = root.add_subparsers(title="commands")
    for word in dict.fromkeys(name.split()[0] for name in COMMANDS):
        below = {name.split()[1]: row for name, row in COMMANDS.items() if name.startswith(f"{word} ")}
        row = COMMANDS.get(word)
        about = row.help if row else f"{word} …: {', '.join(below)}"
        parser = commands.add_parser(word, help=about, description=about, add_help=False)
        if row:
            add_options(parser, word, row, list(below))
        if below and not (row and shell == "zsh"):  # _arguments completes nothing behind a file and a subcommand
            members = parser.add_subparsers()
            for second, one in below.items():
                member = members.add_parser(second, help=one.help, description=one.help, add_help=False)
                add_options(member, f"{word} {second}", one, [])
    return root


def plain_parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show the commands")
    return parser


def add_options(parser: ArgumentParser, name: str, row: Command, below: Sequence[str]) -> None:
    """below: words that may stand in place of the first file."""
    places: list[Any] = [None] * row.takes_file + list(row.positionals)
    for place, positional in enumerate(places):
        action: Any = parser.add_argument(
            f"place_{place}",
            nargs="*" if row.repeated and place == len(places) - 1 else "?",
            help=str(positional or "config").upper(),
        )
        if name in NO_FILES:
            action.choices = NO_FILES[name]
        else:
            action.complete = files_or([*below, *packaged(row, name)] if place == 0 else [], name)
    parser.add_argument(*HELPS[:2], action="store_true", help="show the options")
    parser.add_argument(HELPS[2], action="store_true", help="show the options, those of the Trainer too")
    for item in [*command_options(row), DRY_RUN]:
        add_option(parser, item)


def packaged(row: Command, name: str) -> list[str]:
    folder = row.packaged or NAMED.get(name)
    return sorted(path.stem for path in (PACKAGED / folder).glob("*.yaml")) if folder else []


def add_option(parser: ArgumentParser, item: Option) -> None:
    told: dict[str, Any] = {"dest": f"option_{item.name}", "help": item.help.replace("%", "%%") or item.name}
    if item.is_bool:
        parser.add_argument(*spellings(item), action="store_true", **told)
        return
    action: Any = parser.add_argument(*spellings(item), action="append" if item.is_list else "store", **told)
    if item.choices:
        action.choices = [choice for choice in item.choices if choice]
    elif item.path:
        action.complete = shtab.DIRECTORY if item.path == "folder" else shtab.FILE


def files_or(words: Sequence[str], name: str) -> Any:
    """How each shell completes these words and files."""
    if not words:
        return shtab.FILE
    function, listed = f"_rankwise_files_{shtab.wordify(name)}", " ".join(words)
    return {
        "bash": function,
        "zsh": f"{{compadd -- {listed}; _files}}",
        "fish": f"(string split ' ' '{listed}'; __fish_complete_path (commandline -ct))",
        "preamble": {"bash": f'{function}() {{ compgen -W "{listed}" -- "$1"; compgen -f -- "$1"; }}'},
    }
