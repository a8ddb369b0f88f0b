"""`rankwise schema [COMMAND]`: the JSON Schema of a command's config files, or of recipes, for editors.

The schema of recipes comes with the package (`recipes/recipe.schema.json`), that of a study's files beside them; both
are what this command prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from rankwise.files.atomic import write_or_print
from rankwise.options.commands import SchemaConfig
from rankwise.options.field import unknown
from rankwise.options.schema import (
    DRAFT,
    SCALAR,
    VARIABLE,
    Definitions,
    Schema,
    any_of,
    options_schema,
    schema_text,
    text,
)
from rankwise.pipeline.recipe import KEYS, PIPELINES, STAGE_KEYS
from rankwise.pipeline.table import ALIASES, COMMANDS, DRY_RUN, command_options

NOTHING: Schema = {"type": "null"}
WORD: Schema = SCALAR | {"type": [*SCALAR["type"], "null"]}


def run(config: SchemaConfig) -> None:
    write_or_print(config.out, schema_text(schema_of(" ".join(config.command))))


def check(config: SchemaConfig) -> None:
    name = " ".join(config.command)
    if name and ALIASES.get(name, name) not in COMMANDS:
        raise unknown(name, COMMANDS, "schema", "command")


def describe(config: SchemaConfig) -> list[str]:
    return [f"make the JSON Schema of {'config files of ' + ' '.join(config.command) if config.command else 'recipes'}"]


def schema_of(name: str) -> Schema:
    """Of a command's config files, by its name; of recipes without one."""
    return recipe_schema() if not name else command_schema(ALIASES.get(name, name))


def command_schema(name: str) -> Schema:
    definitions = Definitions()
    found = options_schema([*command_options(COMMANDS[name]), DRY_RUN], definitions)
    title = f"Config file of rankwise {name}"
    return {"$schema": DRAFT, "title": title, "description": COMMANDS[name].about, **found, "$defs": definitions.found}


def recipe_schema() -> Schema:
    """A stage has the options of its command; one that changes a stage of the recipe that is extended need not name
    the command, and may have those of any."""
    definitions = Definitions(variables=True)
    commands = {name: row for name, row in COMMANDS.items() if name not in PIPELINES}
    stages = {name: stage_schema(options_schema(command_options(row), definitions)) for name, row in commands.items()}
    named = {
        **{name: name for name in commands},
        **{short: name for short, name in ALIASES.items() if name in commands},
    }
    rules = [
        {
            "if": {"properties": {"command": {"const": word}}, "required": ["command"]},
            "then": {"$ref": f"#/$defs/stage {name}"},
        }
        for word, name in named.items()
    ]
    stage = {
        "type": "object",
        "properties": {"command": {"enum": list(named), "description": "command that the stage runs"}},
        "anyOf": [{"required": ["command"]}, {"required": ["name"]}],
        "allOf": [*rules, {"if": {"not": {"required": ["command"]}}, "then": {"$ref": "#/$defs/stage"}}],
    }
    described = {f"stage {name}": {"description": commands[name].about, **schema} for name, schema in stages.items()}
    keys: Mapping[str, Schema] = {
        "extends": {"description": "recipe that this one changes: beside this file, or of the package", **WORD},
        "name": {"description": "name of the recipe [the file's]", **WORD},
        "description": {"description": "one line for `rankwise run --list`", **WORD},
        "variables": {
            "description": "names and defaults; the environment overrides them; ${NAME} in the stages",
            "type": ["object", "null"],
            "propertyNames": {"not": {"const": "run"}},
            "additionalProperties": WORD,
        },
        "stages": {
            "description": "commands with their options, in order",
            "type": ["array", "null"],
            "items": stage,
        },
    }
    return {
        "$schema": DRAFT,
        "$comment": f"transformers {version('transformers')}",  # whose TrainingArguments it has
        "title": "Recipe of rankwise run",
        "type": "object",
        "properties": {key: keys[key] for key in KEYS},
        "additionalProperties": False,
        "if": {"properties": {"extends": {"not": NOTHING}}, "required": ["extends"]},
        "else": {
            "properties": {"stages": {"type": "array", "minItems": 1, "items": {"required": ["command"]}}},
            "required": ["stages"],
        },
        "$defs": definitions.found | described | {"stage": change_schema(list(stages.values()))},
    }


def stage_schema(options: Schema) -> Schema:
    """Of a stage: the options of its command, less those that a stage's own keys hide, and these keys."""
    keys: Mapping[str, Schema] = {
        "name": {"description": "name of the stage [the command]", **WORD},
        "command": {"description": "command that the stage runs"},
        "nproc": {
            "description": "processes under torchrun",
            "default": 1,
            "anyOf": [{"type": "integer", "minimum": 1}, text(r"0*[1-9]\d*"), VARIABLE],
        },
        "config": {
            "description": "file with further options, over which the stage's own win",
            "type": ["string", "null"],
        },
    }
    return options | {"properties": options["properties"] | {key: keys[key] for key in STAGE_KEYS}}


def change_schema(stages: list[Schema]) -> Schema:
    """Of a change to a stage whose command the file does not say."""
    found: Schema = {"type": "object", "additionalProperties": False}
    for part in ("properties", "patternProperties"):
        names = {name: None for stage in stages for name in stage[part]}
        found[part] = {name: any_of([stage[part][name] for stage in stages if name in stage[part]]) for name in names}
    return found
