"""The `rankwise` command. Imports nothing heavy: `rankwise --help` and every `--help` answer at once.

rankwise ranks BASE TUNED --budget uniform:16 --dry-run
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankwise import __version__
from rankwise.errors import RankwiseError, UsageError
from rankwise.options.field import CONFIG_SUFFIXES, Option, load_file, options_of, typed_values, unknown
from rankwise.options.flags import build_parser, parse_flags
from rankwise.options.help import HELPS, bold, columns, fill, help_text, table
from rankwise.page import terminal
from rankwise.pipeline.recipe import PIPELINES, options_for, packaged_recipe
from rankwise.pipeline.table import ALIASES, COMMANDS, DRY_RUN, GROUPS, Command, assemble, command_options, stage_of

RECIPES = Path(__file__).parent / "recipes"
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
QUOTED = re.compile(r"(`[^`]*`|pip install \S+|rankwise [a-z].*)")  # command lines of their own
VERSION, VERBOSE = {"-V", "--version"}, {"-v", "--verbose"}
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)  # of a path where nothing can be looked for, or made
OVERVIEW_NOTE = (
    "`rankwise COMMAND --help` shows a command's options. A YAML, JSON or TOML file may come first; flags win."
)
FILE_NOTE = "A YAML, JSON or TOML file of these options, or a recipe with this command, may come first; flags win."
TRAINER_NOTE = "Options of transformers.TrainingArguments are taken too, such as {}: `--help-all` shows them."
OFTEN = "learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_steps".split()
NO_CONFIG = ("", ".txt", ".cfg", ".conf", ".ini", ".json5", ".jsonc")  # suffixes that no file a command takes has


def overview() -> str:
    lines = [
        f"{bold('usage:')} rankwise COMMAND [FILE] [--option VALUE …]",
        "",
        fill("Find where a model needs rank, train exactly that, prove it, ship it.", columns()),
    ]
    indent = 4 + max(map(len, COMMANDS))
    for group in GROUPS:
        rows = {name: row.help for name, row in COMMANDS.items() if row.group == group}
        lines += ["", bold(group), *table(rows, indent)]
    return "\n".join([*lines, "", fill(OVERVIEW_NOTE, columns())])


def members(word: str) -> list[str]:
    """The commands of two words that begin with this one, short names of some included."""
    return [name for name in (*COMMANDS, *ALIASES) if name.startswith(f"{word} ")]


def group_overview(word: str) -> str:
    return "\n".join([f"{bold('usage:')} rankwise {word} COMMAND [FILE] [--option VALUE …]", "", *member_lines(word)])


def command_help(name: str, whole: bool) -> str:
    """The help of one command; whole: with the options of transformers' Trainer, whose import takes seconds."""
    command = COMMANDS[name]
    below = member_lines(name)
    notes = [FILE_NOTE] * command.takes_file
    known = [*(command_options(command) if whole else options_of(command.config)), DRY_RUN]
    if command.trainer and not whole:
        own = {one for item in known for one in (item.name, *item.aliases)}
        notes.append(TRAINER_NOTE.format(", ".join(f"--{one}" for one in OFTEN if one not in own)))
    notes += ["\n".join([f"  commands below {name}:", *(f"  {line}" for line in below)])] if below else []
    usage = f"{name} {positionals_text(command)}[--option VALUE …]"
    return help_text(usage, command.about, command.example, known, notes)


def positionals_text(command: Command) -> str:
    words = ["CONFIG"] * command.takes_file + [word.upper() for word in command.positionals]
    return "".join(f"[{word}] " for word in words) + "… " * command.repeated


def member_lines(word: str) -> list[str]:
    rows = {name: COMMANDS[name].help for name in members(word) if name in COMMANDS}
    return table(rows, 4 + max(map(len, rows), default=0))


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name (one word or two) and the rest."""
    for words in (2, 1):
        given = " ".join(argv[:words])
        name = ALIASES.get(given, given)
        if len(argv) >= words and name in COMMANDS:
            return name, list(argv[words:])
    group = members(argv[0])
    if group and len(argv) == 1:
        raise UsageError(f"rankwise {argv[0]}: which one? {', '.join(group)}")
    if group:
        raise unknown(" ".join(argv[:2]), group, "rankwise", "command")
    raise unknown(argv[0], [name.split()[0] for name in COMMANDS], "rankwise", "command")


def packaged_file(folder: str, name: str, prog: str) -> Path:
    """A config file that comes with the package, by its name."""
    found = {path.stem: path for path in sorted((RECIPES / folder).glob("*.yaml"))}
    if name not in found:
        raise unknown(name, list(found), prog, "config file (.yaml, .json, .toml), nor one of the package's")
    return found[name]


def config_file(given: Path) -> Path:
    """The file itself where it exists, else the package's recipe of that name, which is said."""
    found = None if given.is_file() else packaged_recipe(given)
    if found:
        print(f"note: no {given} here; taking the package's recipe {found}", file=sys.stderr)
    return found or given


def take_positionals(command: Command, words: list[str], prog: str) -> tuple[Path | None, dict[str, Any]]:
    """A leading config file, if any, and the fields that the other words fill."""
    path = None
    if command.takes_file and words and words[0].lower().endswith(CONFIG_SUFFIXES):
        path, words = config_file(Path(words[0])), words[1:]
    elif command.takes_file and words and Path(words[0]).suffix.lower() in NO_CONFIG and Path(words[0]).is_file():
        raise UsageError(
            f"{prog}: {words[0]}: the name of a config file ends in {', '.join(CONFIG_SUFFIXES)}; rename it"
        )
    elif command.packaged and words:
        path, words = packaged_file(command.packaged, words[0], prog), words[1:]
    if command.repeated and words:
        before = len(command.positionals) - 1
        return path, dict(zip(command.positionals, [*words[:before], words[before:]], strict=False))
    if len(words) > len(command.positionals):
        expected = " ".join(name.upper() for name in command.positionals) or "no positional arguments"
        raise UsageError(f"{prog}: too many arguments: {' '.join(words)}; expected {expected}")
    return path, dict(zip(command.positionals, words, strict=False))


def file_values(path: Path, name: str, known: Sequence[Option]) -> dict[str, Any]:
    """The options that a config file sets, or a recipe in its stage of this command."""
    content = load_file(path)
    return typed_values(options_for(path, name) if "stages" in content else content, known, str(path))


def resolve(name: str, argv: Sequence[str]) -> tuple[Any, bool]:
    """The command's config from file and flags, and whether this is a dry run."""
    command = COMMANDS[name]
    prog = f"rankwise {name}"
    known = [*command_options(command), DRY_RUN]
    words, given = parse_flags(build_parser(prog, known), known, argv)
    path, positionals = take_positionals(command, words, prog)
    twice = [name for name in positionals if name in given]
    if twice:
        raise UsageError(f"{prog}: {twice[0]} is given twice: as {positionals[twice[0]]} and as --{twice[0]}")
    values = (file_values(path, name, known) if path else {}) | positionals | given
    return assemble(command, values), bool(values.get("dry_run"))


def dispatch(argv: Sequence[str]) -> None:
    """Run one command line. Raises RankwiseError; `main` turns that into an exit code."""
    name, rest = split_command(argv)
    if not COMMANDS[name].standalone and not set(HELPS) & set(rest):  # before any library that has bars
        importlib.import_module("rankwise.page.progress").adopt_libraries()
    config, dry_run = resolve(name, rest)
    if COMMANDS[name].standalone and not dry_run:
        stage_of(name).run(config)
        return
    preflight = importlib.import_module("rankwise.pipeline.preflight")
    preflight.ready(name, config)
    if dry_run:
        preflight.dry_run(name, config)
    else:
        preflight.run(name, config)


def explain_flags(words: Sequence[str], message: str) -> str:
    """The message, with flags that only other commands have named as what they are: layers below know flags, not which
    command is asked. What stands in backquotes is a command line of its own; a recipe's stages have flags of theirs."""
    flags_named = FLAG.findall(message)
    try:
        name, _ = split_command(words)
    except UsageError:
        return message
    if not flags_named or name in PIPELINES:
        return message
    given = {flag.replace("-", "_") for flag in FLAG.findall(" ".join(words))}
    own = option_names(name) | given | {"help", "dry_run"}
    if {flag.replace("-", "_") for flag in flags_named} <= own:
        return message
    elsewhere = {one for other in COMMANDS for one in option_names(other)} - own
    parts = QUOTED.split(message)
    parts[::2] = [FLAG.sub(partial(mark_unknown, elsewhere), part) for part in parts[::2]]
    return "".join(parts)


def option_names(name: str) -> set[str]:
    return {one for item in command_options(COMMANDS[name]) for one in (item.name, *item.aliases)}


def mark_unknown(elsewhere: set[str], found: re.Match[str]) -> str:
    return f"{found[1]} (no option here)" if found[1].replace("-", "_") in elsewhere else found[0]


def version_text(*, verbose: bool) -> str:
    """The package's version; verbose: also Python's and those of the libraries that results depend on."""
    lines = [f"rankwise {__version__}"]
    if verbose:
        versions = importlib.import_module("rankwise.files.versions")
        lines += [f"Python {platform.python_version()} on {platform.platform()}"]
        lines += [f"{name} {found}" for name, found in versions.installed(versions.SHOWN).items()]
    return "\n".join(lines)


def answer_help(words: Sequence[str]) -> bool:
    """Whether the line asks for help or the version only, which is then printed."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in HELPS:
        print(overview())
    elif any(word in HELPS for word in words):
        asked = [word for word in words if word not in HELPS]
        if len(asked) == 1 and asked[0] not in COMMANDS and members(asked[0]):
            print(group_overview(asked[0]))
        else:
            print(command_help(split_command(asked)[0], whole=not {*words}.isdisjoint(HELPS[2:])))
    elif set(words) <= {*VERSION, *VERBOSE} and not VERSION.isdisjoint(words):
        print(version_text(verbose=not VERBOSE.isdisjoint(words)))
    else:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `rankwise` command. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    terminal.readable()
    # bitsandbytes says on every import, quantized model or not, that a kernel from the hub is missing on the CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        if not answer_help(words):
            dispatch(words)
        sys.stdout.flush()
    except RankwiseError as error:
        if os.environ.get("RANKWISE_DEBUG"):
            traceback.print_exc()
        print(f"rankwise: {terminal.harmless(explain_flags(words, str(error)))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head`: nobody reads on, and Python's own last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in NO_PATH or not isinstance(error.filename, str):
            raise
        print(f"rankwise: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        return UsageError.exit_code
    except KeyboardInterrupt:
        print("rankwise: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
