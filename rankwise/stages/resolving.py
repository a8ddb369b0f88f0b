"""A recipe's stages → configs: every option checked before anything runs.

What `--set` makes idle of the recipe's own options is left out, and said; idle options of `--set` itself are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rankwise.errors import UsageError
from rankwise.stages.commands import COMMANDS, command_options, configured
from rankwise.stages.idle import idle_among, sentences
from rankwise.stages.recipe import Recipe, Stage, without_aliases

FLAG = re.compile(r"--(\w+)")


def resolved(recipe: Recipe, changes: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe without idle options and with a note on each, each stage's config by its name).

    changes: the words of `--set`, which are in the recipe already.
    """
    stages, configs, notes = list[Stage](), dict[str, Any](), list[str]()
    for stage in recipe.stages:
        kept, config, said = acting(stage, options_set(stage, changes), f"{recipe.path}: stage {stage.name}")
        stages.append(kept)
        configs[stage.name] = config
        notes += said
    return replace(recipe, stages=tuple(stages), notes=tuple(notes)), configs


def options_set(stage: Stage, changes: Sequence[str]) -> set[str]:
    """The stage's options that `--set` names, by their first names."""
    named = {change.partition("=")[0].replace("-", "_") for change in changes}
    known = command_options(COMMANDS[stage.command])
    return {item.name for item in known for one in (item.name, *item.aliases) if f"{stage.name}.{one}" in named}


def acting(stage: Stage, asked: set[str], where: str) -> tuple[Stage, Any, list[str]]:
    """(the stage less idle options, its config, notes). UsageError, in the words of `--set`, for an idle option that
    `--set` gave, and for a recipe whose own options are idle."""
    notes = list[str]()
    while True:
        config = configured(stage.command, stage.options, where)
        found = idle_among(config)
        if not found:
            return stage, config, notes
        refused = [bound for bound in found if bound.option in asked] if asked else found
        said = as_set(sentences(refused or found, config), stage.name)
        if refused:
            raise UsageError(f"{where}: {said}; here it would have no effect: leave it out")
        notes.append(f"note: {said}; the recipe's own setting is left out")
        for bound in found:
            stage = replace(stage, options=without_aliases(stage, bound.option))


def as_set(text: str, stage: str) -> str:
    """Flags of a stage's command as `rankwise run --set` takes them: `--round` is `ranks.round`."""
    return FLAG.sub(rf"{stage}.\1", text)
