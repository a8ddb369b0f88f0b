"""What an option is: from dataclasses to typed values, from config files to values, and back to what can be saved.

A command is a frozen dataclass whose fields are options or sections (dataclasses again); flags and file keys
are flat. Precedence: flag > file > default. Strict: unknown names are errors with a suggestion. `flags.py` reads
command lines into the same options.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from rankwise.errors import UsageError

PARSERS = {".json": lambda text: json.loads(text, object_pairs_hook=unique), ".toml": tomllib.loads}
CONFIG_SUFFIXES = (".yaml", ".yml", *PARSERS)
# Names of what is secret, variables and options alike; `max_tokens`, `tokenizer` and `pad_token` are none of them.
SECRET = re.compile(
    r"(api|access|private|auth)_?key|passw|secret|credential|(?<!(bos|eos|pad|unk|sep|cls)_)(?<!mask_)token(?!s|iz|_id)",
    re.IGNORECASE,
)
hints_of = cache(typing.get_type_hints)  # milliseconds each, and a recipe asks for every stage of every change
INPUTS, OUTPUTS = ("read", "weights", "model"), ("folder", "file")  # kinds of paths (`option(path=…)`)
GROUPS = ("model", "data", "method", "output")  # of options, in the order in which `--help` shows them
GROUP_OF_PATH = {
    "weights": "model",
    "read": "data",
    "text": "data",
    **dict.fromkeys(OUTPUTS, "output"),
    "model": "model",
}
SEEDS = 2**32  # seeds are below: numpy takes no others
TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of the numbers that an option takes. None: no bound on that side."""

    least: float | None = None
    most: float | None = None
    below: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __bool__(self) -> bool:
        return self != Range()

    def __str__(self) -> str:
        """As it follows "a number": "above 0", "from 0 to 1"."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        named = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in named.items() if bound is not None)

    @property
    def shown(self) -> str:
        """Text of the range for the help; empty where it is obvious."""
        guessed = self.most is None and self.below in (None, SEEDS) and self.least in (None, 0, 1)
        return "" if guessed else f" ({str(self).removeprefix('of ')})"

    def check(self, name: str, value: Any) -> None:
        """UsageError, in which `name` is the option's, for a number, or one of a list, outside. None is no number."""
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (int, float)) and self and one not in self:
                raise UsageError(f"{name} is {one}; give a number {self}")


def option(
    default: Any = None,
    *,
    help: str,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    short: str | None = None,
    commas: bool = True,
    secret: bool = False,
    address: bool = False,
    path: str = "",
    group: str = "",
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field that becomes a flag. A list default is copied for every instance.

    Numbers outside the range (least and most belong to it, below and above do not), and words that are not among the
    choices, are refused where they are converted, and where a config is built (`Options`).

    A list takes commas and repeated flags; with `commas=False` (regexes, assignments) repeated flags only. What is
    secret is in no saved or printed config, and configs that differ in nothing else are equal. An address is saved and
    printed: one with a password or a query, which may hold a key, is refused.

    path: what the text is the path of, if of anything. "read": a file or folder to read; "weights": the same, or a hub
    id; "model": a model's folder, or a hub id; "text": a file, or what could stand for it; "folder" or "file": one to
    write. A leading `~` of a path is the home folder.

    group: one of GROUPS, under which the help shows it [that of its section, else by what it is the path of, else
    method].
    """
    metadata: dict[str, Any] = {"help": help, "aliases": tuple(aliases), "choices": choices, "short": short}
    metadata |= {"commas": commas, "secret": secret, "address": address, "path": path, "group": group}
    metadata |= {"range": Range(least, most, below, above)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret, compare=not secret)


reads, reads_or_hub, reads_model = (partial(option, path=kind) for kind in ("read", "weights", "model"))
reads_or_text = partial(option, path="text")
output = partial(option, short="-o", path="folder")  # where a command's product goes
seeded = partial(option, least=0, below=SEEDS)


@dataclasses.dataclass(frozen=True)
class Options:
    """What commands, their sections and settings derive from: no number outside its option's range, and no word that is
    not among its choices, can be built in."""

    group: ClassVar[str] = ""  # of all its options in the help

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "range" not in field.metadata:
                continue
            name, value = f"--{field.name}", getattr(self, field.name)
            field.metadata["range"].check(name, value)
            choices = field.metadata["choices"]
            if not choices or (value is None and may_be_unset(type(self), field)):
                continue
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if one not in choices:
                    raise no_choice(name, one, choices)


def may_be_unset(kind: Any, field: dataclasses.Field[Any]) -> bool:
    return field.default is None or type(None) in typing.get_args(hints_of(kind)[field.name])


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: its name, annotation, default and how it is shown."""

    name: str
    annotation: Any
    default: Any
    help: str = ""
    aliases: tuple[str, ...] = ()
    choices: Sequence[str] | None = None
    short: str | None = None
    commas: bool = True
    secret: bool = False
    address: bool = False
    path: str = ""
    range: Range = Range()
    section: str = "options"
    nullable: bool = True
    group: str = "method"
    about: str = ""  # what its section says of itself

    @property
    def is_bool(self) -> bool:
        return bool in plain_types(self.annotation) and str not in plain_types(self.annotation)

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(kind) is list or kind is list for kind in plain_types(self.annotation))


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union without None: `float | None` → (float,)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return (annotation,)


def options_of(defaults: Any, section: str = "options") -> Iterator[Option]:
    """All options of a command (given as an instance: its defaults), sections flattened, as declared."""
    kind: Any = type(defaults)
    about = "" if section == "options" else str(kind.__doc__).partition("\n")[0]
    hints = hints_of(kind)
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            yield from options_of(default, field.name)
        elif "help" in field.metadata:
            told = dict(field.metadata)
            told["group"] = told["group"] or kind.group or GROUP_OF_PATH.get(told["path"], "method")
            told["nullable"] = type(None) in typing.get_args(hints[field.name])
            yield Option(field.name, hints[field.name], default, section=section, about=about, **told)


def convert(option: Option, value: Any, where: str) -> Any:
    """A value from a flag (text) or a file (any JSON type) as the option's type; errors name the place.

    `none` and `null` mean "not set" unless they are among the choices; what always has a value refuses them.
    """
    converted = as_typed(option, value, where)
    converted = each(os.path.expanduser, converted) if option.path else converted
    if converted == "" and option.path in ("folder", "file"):  # of a variable that is not set, say
        raise UsageError(f"{named(option, where)} is empty; give a path")
    option.range.check(named(option, where), converted)
    return converted


def named(option: Option, where: str) -> str:
    """An option in the place where it was set: `--name`, `FILE: name`."""
    return where if where == f"--{option.name}" else f"{where}: {option.name}"


def anywhere(option: Option, value: Any) -> Any:
    """The value as it means the same from any folder: an absolute path of what lies on this disk; hub ids and texts as
    they are."""
    return each(absolute, value) if option.path else value


def absolute(path: str) -> str:
    there = os.path.expanduser(path)
    return os.path.abspath(there) if os.path.exists(there) else path


def each(change: Callable[[str], str], value: Any) -> Any:
    """A text, or the texts of a list, changed; all else as it is."""
    if isinstance(value, list):
        return [each(change, item) for item in value]
    return change(value) if isinstance(value, str) else value


def as_typed(option: Option, value: Any, where: str) -> Any:
    """The value in the option's type and among its choices."""
    chosen = option.choices is not None and value in option.choices
    if not chosen and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        if not option.nullable:
            raise UsageError(f"{where}: {option.name} needs a value; got {value!r}")
        return None
    if option.is_list:
        return convert_list(option, value, where)
    failures = []
    for kind in plain_types(option.annotation):
        try:
            converted = convert_plain(kind, value)
        except (ValueError, TypeError) as error:
            failures.append(str(error))
            continue
        if option.address:
            return check_address(converted, f"{where}: {option.name}")
        return check_choice(option, converted, where)
    raise UsageError(f"{where}: {option.name}: {'; '.join(dict.fromkeys(failures))}")


def check_address(given: str, where: str) -> str:
    """An address without user, password, query and fragment. UsageError, which does not repeat it, for any other."""
    try:
        parts = urlsplit(given if "://" in given else f"//{given}")
        extra = "@" in parts.netloc or "?" in given or "#" in given
    except ValueError as error:
        raise UsageError(f"{where}: not a server address") from error
    if extra:
        raise UsageError(
            f"{where}: an address is saved and printed, so it must have no user, password or query; keys come from "
            "the environment (OPENAI_API_KEY, LLAMA_API_KEY)"
        )
    return given


def convert_list(option: Option, value: Any, where: str) -> list[Any]:
    """A list from a file, or from repeated flags, each of which may hold several items with commas between.

    Its items are numbers where the option says so (`list[int]`), else texts.
    """
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, (dict, list)) or part is None:
            raise UsageError(f"{where}: {option.name}: expected a list of texts, got {value!r}")
    texts = [text for part in parts for text in (split_list(str(part)) if option.commas else [str(part)])]
    kind = next((kind for each in plain_types(option.annotation) for kind in typing.get_args(each)), str)
    try:
        items = texts if kind is str else [convert_plain(kind, text) for text in texts]
    except ValueError as error:
        raise UsageError(f"{where}: {option.name}: {error}") from error
    return [check_choice(option, item, where) for item in items]


def check_choice(option: Option, value: Any, where: str) -> Any:
    """The value, once it is one of the choices. YAML reads a bare `no` or `off` as false: it is taken back."""
    choices = option.choices
    if not choices or value in choices:
        return value
    words = FALSE if str(value).lower() == "false" else TRUE if str(value).lower() == "true" else set()
    found = [choice for choice in choices if choice in words]
    if len(found) != 1:
        raise no_choice(named(option, where), value, choices)
    return found[0]


def no_choice(name: str, value: Any, choices: Sequence[str]) -> UsageError:
    """Error, in which `name` is the option's, for what is not one of its choices."""
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UsageError(f"{name} takes {', '.join(choices)}; got {value!r}{hint}")


def split_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def convert_plain(kind: Any, value: Any) -> Any:
    """One value as one plain type. Text may become a number; a number never becomes another kind silently."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUE | FALSE:
            return str(value).lower() in TRUE
        raise ValueError(f"expected true or false, got {value!r}")
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError(f"expected a number, got {value!r}")
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError(f"expected a whole number, got {value!r}")
        try:
            return kind(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"expected a {'whole ' if kind is int else ''}number, got {value!r}") from None
    if kind is dict or typing.get_origin(kind) is dict:
        return convert_object(value)
    if isinstance(value, (dict, list)):
        raise ValueError(f"expected text, got {value!r}")
    return str(value)


def convert_object(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {value!r} ({error.msg})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, got {value!r}")
    return parsed


OF_TRACKERS = ("report_to", "use_wandb", "run_name")


def unknown(name: str, known: Iterable[str], where: str, what: str = "option") -> UsageError:
    """Error for an unknown name, with the nearest known names."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6) or [n for n in names if n.startswith(name)][:3]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if what == "option" and name in OF_TRACKERS:
        hint = "; `rankwise train` and `rankwise finetune` report to trackers, others leave their figures in files"
    return UsageError(f"{where}: unknown {what} {name!r}{hint}")


def load_file(path: Path) -> dict[str, Any]:
    """The names and values of a YAML, JSON or TOML file. `2e-4` is a number once its option says so (`convert`)."""
    loaded = read_values(path)
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: expected option names with values, got {type(loaded).__name__}")
    return {str(name): value for name, value in loaded.items()}


def read_values(path: Path) -> Any:
    """What a file holds, by its suffix; without one it is read as YAML. UsageError, with the line, for what cannot be
    read, and for a name that one mapping holds twice: parsers keep the last one, silently."""
    import yaml

    suffix = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
        return PARSERS[suffix](text) if suffix in PARSERS else yaml.load(text, strict_loader())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}{neighbours(path)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    except RepeatedName as error:
        raise UsageError(f"{path}: {error} is set twice") from error


class RepeatedName(ValueError):
    """A name that a mapping holds twice."""


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """`object_pairs_hook` of json."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedName(next(name for name in names if names.count(name) > 1))
    return found


@cache
def strict_loader() -> Any:
    """A YAML loader whose mappings hold each name once."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            unique([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
            return super().construct_mapping(node, deep)

    return Strict


def neighbours(path: Path) -> str:
    """Files beside a missing one whose names look like it."""
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def typed_values(
    raw: Mapping[str, Any] | Iterable[tuple[str, Any]], options: Sequence[Option], where: str
) -> dict[str, Any]:
    """Canonical name → converted value; an option named twice under two aliases is an error."""
    canonical = {name: item for item in options for name in (item.name, *item.aliases)}
    values: dict[str, Any] = {}
    for name, value in raw.items() if isinstance(raw, Mapping) else raw:
        plain = name.replace("-", "_")
        if plain not in canonical:
            raise unknown(name, list(canonical), where)
        item = canonical[plain]
        if item.name in values:
            raise UsageError(f"{where}: {item.name} is set twice (as {name} and under another name)")
        values[item.name] = convert(item, value, where)
    return values


def build(defaults: Any, values: Mapping[str, Any]) -> Any:
    """The command's dataclass, sections filled, from its defaults and flat values."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            changes[field.name] = build(default, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(defaults, **changes)


def flatten(config: Any) -> dict[str, Any]:
    """A config as the flat mapping that, saved as a file, reproduces it; what is secret is left out."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value)
        elif field.name == "training":
            flat |= value
        elif not field.metadata.get("secret"):
            flat[field.name] = value
    return flat
