"""JSON Schema (draft 2020-12) of options, as config files hold them: what `field.convert` takes, and no more.

Of what a schema cannot say, it takes more than the loader: numbers as text outside their range, an option given twice,
once with dashes. Only keywords that draft 7 has, too, beside `$defs`: editors know those best.
"""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rankwise.options.field import FALSE, OUTPUTS, TRUE, Option, plain_types

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
WHOLE = r"[-+]?\d+(_\d+)*"
NUMBER = r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d[\d_]*)?"
SCALAR: Schema = {"type": ["string", "number", "boolean"]}
USER = r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?[^/?#]*@"  # of an address


def any_case(words: Iterable[str]) -> str:
    """A pattern of these words, in lower and upper case."""
    return "|".join("".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in word) for word in sorted(words))


def text(pattern: str) -> Schema:
    return {"type": "string", "pattern": rf"^({pattern})$"}


NONE = text(any_case(("none", "null")))
SHARED: Schema = {
    "unset": {"anyOf": [{"type": "null"}, NONE]},
    "switch": {"anyOf": [{"type": "boolean"}, {"enum": [0, 1]}, text(any_case(TRUE | FALSE))]},
    "variable": {"type": "string", "pattern": r"\$\{\w+\}"},  # in a recipe
}
UNSET, SWITCH, VARIABLE = ({"$ref": f"#/$defs/{name}"} for name in SHARED)


class Definitions:
    """Schemas of options by name under `$defs`; equal ones stand there once.

    variables: `${NAME}` may stand for any value, or in it, as in recipes.
    """

    def __init__(self, *, variables: bool = False) -> None:
        self.variables = variables
        self.found: dict[str, Schema] = dict(SHARED)

    def refer(self, item: Option) -> Schema:
        schema = self.of(item)
        for place in itertools.count(1):
            name = item.name if place == 1 else f"{item.name}_{place}"
            if self.found.setdefault(name, schema) == schema:
                return {"$ref": f"#/$defs/{name}"}
        raise AssertionError("unreachable")

    def of(self, item: Option) -> Schema:
        """Description, default and values of one option."""
        told: Schema = {"description": item.help} if item.help else {}
        if item.default is not None and item.default != "":
            told["default"] = item.default
        return told | any_of(self.values(item))

    def values(self, item: Option) -> list[Schema]:
        if item.secret and self.variables:  # a recipe is saved with its values
            return [UNSET]
        more = [VARIABLE] if self.variables else []
        empty = [UNSET] if item.nullable else []
        if item.is_list:
            kind = next((kind for each in plain_types(item.annotation) for kind in typing.get_args(each)), str)
            items = listed(item, kind)
            alone = [one if item.nullable else unlike(one, NONE) for one in items]
            return [{"type": "array", "items": any_of([*items, *more])}, *alone, *more, *empty]
        plain = [one for kind in plain_types(item.annotation) for one in typed(item, kind)]
        return [*plain, *more, *empty]


def any_of(schemas: Sequence[Schema]) -> Schema:
    different = [one for place, one in enumerate(schemas) if one not in schemas[:place]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def unlike(schema: Schema, other: Schema) -> Schema:
    """The schema without texts of another's pattern."""
    return schema | {"not": other} if "string" in schema.get("type", ()) else schema


def typed(item: Option, kind: Any) -> list[Schema]:
    """The forms that a value of one plain type may have in a file."""
    if kind is bool:
        return [SWITCH]
    if kind in (int, float):
        return [numeric(item, kind), text(rf"\s*{numeral(item, kind)}\s*")]
    if kind is dict or typing.get_origin(kind) is dict:
        return [{"type": "object"}, {"type": "string", "pattern": r"^\s*\{"}]
    if item.choices:
        return chosen(item.choices)
    if item.address:
        return [SCALAR | {"pattern": "^[^?#]*$", "not": {"type": "string", "pattern": USER}}]
    found = SCALAR | ({"minLength": 1} if item.path in OUTPUTS else {})
    return [found if item.nullable else unlike(found, NONE)]


def numeric(item: Option, kind: type) -> Schema:
    bounds = item.range
    limits = {
        "minimum": bounds.least,
        "maximum": bounds.most,
        "exclusiveMinimum": bounds.above,
        "exclusiveMaximum": bounds.below,
    }
    return {"type": "integer" if kind is int else "number"} | {
        key: limit for key, limit in limits.items() if limit is not None
    }


def numeral(item: Option, kind: type) -> str:
    """Pattern of a number as text."""
    endless = "" if item.range else f"|[-+]?({any_case(('inf', 'infinity', 'nan'))})"
    return f"({WHOLE if kind is int else NUMBER + endless})"


def chosen(choices: Sequence[str]) -> list[Schema]:
    """The choices; YAML reads a bare `no` or `off` as false, which is taken back where it can mean one of them only."""
    forms: list[Schema] = [{"enum": list(choices)}]
    for words, value in ((FALSE, False), (TRUE, True)):
        if len([choice for choice in choices if choice in words]) == 1:
            forms += [{"const": value}, text(any_case([str(value).lower()]))]
    return forms


def listed(item: Option, kind: Any) -> list[Schema]:
    """The forms of a list's item; texts hold several with commas between, where the option takes them."""
    if kind in (int, float):
        forms, one = [numeric(item, kind)], rf"\s*{numeral(item, kind)}\s*"
    elif item.choices:
        forms, one = chosen(item.choices), rf"\s*({'|'.join(item.choices)})\s*"
    else:
        return [SCALAR]
    return [*forms, text(rf"({one}|\s*)(,({one}|\s*))*" if item.commas else one)]


def options_schema(options: Sequence[Option], definitions: Definitions) -> Schema:
    """An object of options: dashes for underscores, other names, unknown ones refused, one of several names only."""
    properties: Schema = {}
    spelled: Schema = {}
    twice: list[Schema] = []
    for item in options:
        names = (item.name, *item.aliases)
        schema = definitions.refer(item)
        properties[item.name] = schema
        properties |= {other: schema | {"description": f"another name of {item.name}"} for other in item.aliases}
        spelled |= {f"^(?=.*-){name.replace('_', '[-_]')}$": schema for name in names if "_" in name}
        twice += [{"not": {"required": list(pair)}} for pair in itertools.combinations(names, 2)]
    found: Schema = {"type": "object", "properties": properties, "patternProperties": spelled}
    return found | {"additionalProperties": False} | ({"allOf": twice} if twice else {})


def schema_text(schema: Schema) -> str:
    """As a file holds it: a line for every key and for every definition."""
    dump = partial(json.dumps, ensure_ascii=False)
    rows = [f"{dump(key)}: {dump(value)}" for key, value in schema.items() if key != "$defs"]
    named = ",\n".join(f"  {dump(name)}: {dump(value)}" for name, value in schema["$defs"].items())
    return "{\n " + ",\n ".join([*rows, f'"$defs": {{\n{named}\n }}']) + "\n}\n"
