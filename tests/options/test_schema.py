"""Laws of `rankwise schema`: the schema takes what the loader takes, and refuses what it refuses for its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import LIGHT, values_of

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.options import field
from rankwise.options.schema import Definitions, schema_text
from rankwise.pipeline.recipe import PACKAGED, load_recipe
from rankwise.pipeline.schema import schema_of
from rankwise.pipeline.table import DRY_RUN, command_options, configured

SHIPPED = {"recipe.schema.json": "", "studies/study.schema.json": "study"}  # file → what `rankwise schema` takes for it


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def taken(load: Callable[[], Any]) -> bool:
    try:
        load()
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_commands_schema_is_one_and_takes_its_defaults(name: str) -> None:
    row = cli.COMMANDS[name]
    found = validator(name)
    found.validate(json.loads(json.dumps(field.flatten(row.config))))
    known = [*command_options(row), DRY_RUN]
    for item in known:
        for spelled in (item.name, *item.aliases, item.name.replace("_", "-", 1)):
            found.validate({spelled: item.default} if item.default is not None else {})
            assert not found.is_valid({spelled: {"a": 1}}) or "dict" in str(item.annotation)
        assert set(item.aliases) < set(found.schema["properties"])
        for other in item.aliases:
            assert not found.is_valid({item.name: item.default, other: item.default}), "one option, twice"
    assert not found.is_valid({"no_such_option": 1}) and not found.is_valid([])


FORMS = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        8.0,
        0.5,
        -0.5,
        1.5,
        1e9,
        2**33,
        "",
        " ",
        "x",
        "none",
        "NULL",
        "true",
        "False",
        "no",
    ),
    *(
        "off",
        "1",
        "2",
        "-1",
        "0.5",
        "1e-4",
        " 8 ",
        "1_000",
        "8.0",
        "nan",
        "inf",
        "a,b",
        "2,4",
        "2,,4 ,",
        "2,x",
        "http://h/v1",
    ),
    *("http://u:p@h/v1", "http://h/v1?key=x", "h:8080", "{}", '{"a": 1}', "[]", "~/x", "language", "language, vision"),
    *(
        [],
        [1],
        [0.5],
        ["x"],
        ["2", 4],
        ["2,4"],
        [None],
        [[]],
        [{}],
        [True],
        ["language"],
        ["language,vision"],
        ["none"],
    ),
    *({}, {"a": 1}),
]


def test_every_option_takes_the_forms_that_the_loader_takes() -> None:
    """Every kind of option × forms of values, but those of which a schema cannot say that they are wrong."""
    rows = {
        item
        for name in cli.COMMANDS
        for item in [*command_options(cli.COMMANDS[name]), DRY_RUN]
        for item in [Row(item)]
    }
    differing = []
    for row in rows:
        schema = Definitions()
        reference = schema.refer(row.item)
        valid = jsonschema.Draft202012Validator(reference | {"$defs": schema.found}).is_valid
        choices = [
            form for choice in row.item.choices or () for form in (choice, [choice], choice.upper(), f"{choice}_")
        ]
        for form in [*FORMS, *choices]:
            loaded = taken(lambda form=form, item=row.item: field.convert(item, form, "here"))  # type: ignore[misc]
            if valid(form) != loaded and not (valid(form) and beyond(row.item, form)):
                differing.append((row.item.name, form, loaded))
    assert differing == [] and len(rows) > 60


class Row:
    """An option by what decides which values it takes."""

    def __init__(self, item: field.Option) -> None:
        self.item = item
        self.key = (
            *map(str, (item.annotation, item.choices, item.range)),
            item.commas,
            item.address,
            item.path,
            item.nullable,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def beyond(item: field.Option, form: Any) -> bool:
    """Whether the form is one of which a schema cannot say that it is wrong."""
    texts = form if isinstance(form, list) else [form]
    number = all(isinstance(one, str) and one.strip() for one in texts) and bool(item.range)
    whole = item.is_list and any(isinstance(one, float) for one in texts)  # 8.0 of a list of whole numbers
    return (
        number or whole or ("dict" in str(item.annotation) and isinstance(form, str)) or (item.address and form == "[]")
    )


@pytest.mark.parametrize("name", LIGHT)
@settings(max_examples=15)
@given(data=st.data())
def test_a_saved_config_is_taken(name: str, data: st.DataObject) -> None:
    rows = list(field.options_of(cli.COMMANDS[name].config))
    places = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=6))
    values = {rows[place].name: data.draw(values_of(rows[place]), label=rows[place].name) for place in places}
    config = field.build(cli.COMMANDS[name].config, values)
    saved = json.loads(json.dumps(field.flatten(config)))
    assert taken(lambda: field.typed_values(saved, rows, "saved"))
    validator(name).validate(saved)


STAGE = "stages: [{command: report, run: a}]"
RECIPES = {  # text → whether it is a recipe
    STAGE: True,
    "{extends: demo, stages: [{name: train, num_epochs: 1}]}": True,
    "{extends: demo}": True,
    "{name: x, description: y, variables: {A: 1, B: none}, " + STAGE + "}": True,
    "{variables: {A: 2}, stages: [{command: train, lora_r: '${A}', nproc: '${A}', lr: 2e-4}]}": True,
    "stages: [{command: features extract, images: a}]": True,
    "stages: [{command: export, model: a, file-name: b, name: c}]": True,
    "stages: [{command: evaluate, name: 1, model_path: a, num-samples: '5'}]": True,
    "{variables: null, " + STAGE + "}": True,
    "stages: []": False,
    "name: x": False,
    "stages: {command: report}": False,
    "stages: [report]": False,
    "stages: [{run: a}]": False,
    "stages: [{name: report}]": False,
    "stages: [{command: reprot}]": False,
    "stages: [{command: run, recipe: demo}]": False,
    "stages: [{command: report, run: a, nproc: 0}]": False,
    "stages: [{command: report, run: a, nproc: 1.5}]": False,
    "stages: [{command: report, run: a, config: [x]}]": False,
    "stages: [{command: report, rnu: a}]": False,
    "stages: [{command: report, 1: a}]": False,
    "stages: [{command: report, run: a, dry_run: true}]": False,
    "stages: [{command: ranks, max_rank: 0}]": False,
    "stages: [{command: ranks, per: sites}]": False,
    "stages: [{command: evaluate, model_path: a, adapter: b}]": False,
    "stages: [{command: label, images: a, openai_api_key: sk}]": False,
    "stages: [{command: label, images: a, openai_api_key: null}]": True,
    "{extends: demo, stages: [{name: train, num_epoch: 1}]}": False,
    "{extends: demo, stages: [{num_epochs: 1}]}": False,
    "{extends: demo, stagse: []}": False,
    "{variables: [a], " + STAGE + "}": False,
    "{variables: {run: a}, " + STAGE + "}": False,
    "{variables: {A: [1, 2]}, " + STAGE + "}": False,
    "{name: [x], " + STAGE + "}": False,
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_is_taken_by_both_or_by_neither(text: str, tmp_path: Path) -> None:
    def load() -> None:
        for stage in load_recipe(file, tmp_path / "run").stages:
            configured(stage.command, stage.options, "here")

    file = tmp_path / "own.yaml"
    file.write_text(text)
    assert (taken(load), validator("").is_valid(yaml.safe_load(text))) == (RECIPES[text], RECIPES[text])


def test_the_shipped_recipes_name_their_schema_and_follow_it() -> None:
    files = sorted([*PACKAGED.glob("*.yaml"), *PACKAGED.glob("studies/*.yaml")])
    assert len(files) > 15
    for file in files:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        path = file.parent / first.removeprefix("# yaml-language-server: $schema=")
        validator(SHIPPED[str(path.relative_to(PACKAGED))]).validate(field.load_file(file))


@pytest.mark.parametrize("file", SHIPPED)
def test_the_shipped_schema_is_what_the_command_prints(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever changed an option: `rankwise schema -o rankwise/recipes/recipe.schema.json`, and the same for study."""
    kept = (PACKAGED / file).read_text(encoding="utf-8")
    made_with = json.loads(kept).get("$comment", "")
    if made_with and made_with != f"transformers {transformers.__version__}":
        pytest.skip(f"the options of TrainingArguments in it are those of {made_with}")
    assert cli.main(["schema", *SHIPPED[file].split()]) == 0
    assert capsys.readouterr().out == kept


def test_a_schema_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "features", "train", "-o", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == schema_text(schema_of("features train"))
    assert cli.main(["schema", "rank"]) == 2 and "did you mean ranks" in capsys.readouterr().err


def test_recipes_in_the_docs_follow_the_schema() -> None:
    pages = sorted((PACKAGED.parents[1] / "docs").glob("*.md"))
    texts = [block for page in pages for block in page.read_text(encoding="utf-8").split("```yaml\n")[1:]]
    contents = [yaml.safe_load(text.partition("```")[0]) for text in texts]
    recipes = [content for content in contents if isinstance(content, dict) and "stages" in content]
    assert recipes
    for recipe in recipes:
        validator("").validate(recipe)
