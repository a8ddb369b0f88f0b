"""From a command line to the values of options: the one builder behind every command.

Abbreviations are off, `--foo-bar` and `--foo_bar` are the same flag, booleans work bare and with True/False. What
`--help` shows is in `help.py`.

argparse rather than tyro or jsonargparse: those take a boolean bare or with a value, not both, and want the
400 fields of TrainingArguments up front, which costs seconds at every `--help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from rankwise.errors import UsageError
from rankwise.options.field import FALSE, TRUE, Option, convert, unknown


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see `{self.prog} --help`")


def build_parser(prog: str, options: Sequence[Option]) -> _Parser:
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("positionals", nargs="*")
    for item in options:
        parser.add_argument(
            *spellings(item),
            dest=item.name,
            action="append" if item.is_list else "store",
            default=argparse.SUPPRESS,
        )
    return parser


def spellings(item: Option) -> list[str]:
    """The option's flags: short one, name, other names."""
    return [*([item.short] if item.short else []), *(f"--{name}" for name in (item.name, *item.aliases))]


def normalise(argv: Sequence[str], bools: set[str]) -> list[str]:
    """`--foo-bar` → `--foo_bar`; a bare boolean flag → `--flag=true`; `--flag False` → `--flag=False`."""
    result: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            result.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in bools and not equals:
            takes_next = bool(words) and words[0].lower() in TRUE | FALSE
            equals, value = "=", words.pop(0) if takes_next else "true"
        result.append(f"--{name}{equals}{value}")
    return result


def parse_flags(parser: _Parser, options: Sequence[Option], argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Positional words, and the values of the flags that were given (converted, by canonical name)."""
    by_name = {item.name: item for item in options}
    bools = {name for item in options if item.is_bool for name in (item.name, *item.aliases)}
    namespace, rest = parser.parse_known_intermixed_args(normalise(argv, bools))
    for word in rest:
        if word.startswith("-"):
            known = [name for item in options for name in (item.name, *item.aliases)]
            raise unknown(word.lstrip("-").split("=")[0], known, parser.prog)
    given = {name: value for name, value in vars(namespace).items() if name != "positionals"}
    return [*namespace.positionals, *rest], {
        name: convert(by_name[name], value, f"--{name}") for name, value in given.items()
    }
