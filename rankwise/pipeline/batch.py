"""rankwise batch: several recipes, one after the other; one that fails does not stop the next.

rankwise batch e2e_attention e2e_mlp -o runs/batch --set train.max_steps=200
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import Interrupted, RankwiseError, UsageError
from rankwise.options.commands import BatchConfig, RunConfig
from rankwise.page.text import command_line, duration
from rankwise.pipeline import run as recipes
from rankwise.pipeline.recipe import packaged_lines


@dataclass(frozen=True)
class RecipeOutcome:
    """Result of one recipe."""

    name: str
    folder: Path
    seconds: float
    error: RankwiseError | None = None

    def line(self) -> str:
        said = "done" if self.error is None else f"failed with exit code {self.error.exit_code}: {self.error}"
        return f"{self.name}: {said}, {duration(self.seconds)}, {self.folder}"


def run(config: BatchConfig) -> list[Path]:
    """Run all recipes, each in a folder of its own; what is done already is skipped. Returns the run folders.

    Raises RankwiseError after the last one where any failed, with the first one's exit code; a signal stops the batch.
    """
    if config.list_:
        print("\n".join(packaged_lines()))
        return []
    jobs = runs_of(config)
    outcomes = [attempt(name, job) for name, job in jobs.items()]
    print("\n" + "\n".join(outcome.line() for outcome in outcomes))
    done = [outcome.folder for outcome in outcomes if not outcome.error]
    if len(done) > 1:
        print(f"next: {next_command(config, done)}")
    raise_first([outcome for outcome in outcomes if outcome.error], len(outcomes))
    return done


def next_command(config: BatchConfig, done: Sequence[Path]) -> str:
    return command_line("compare", *done, output_dir=Path(config.output_dir) / "comparison")


def raise_first(failed: Sequence[RecipeOutcome], total: int) -> None:
    """Raise an error that names the failed recipes, with the first one's exit code, if any failed."""
    for outcome in failed[:1]:
        assert outcome.error is not None
        error = RankwiseError(f"{len(failed)} of {total} recipes failed: {', '.join(each.name for each in failed)}")
        error.exit_code = outcome.error.exit_code
        raise error


def runs_of(config: BatchConfig) -> dict[str, RunConfig]:
    """A run for each recipe, by name; all of them are checked before the first one starts."""
    if not config.recipes:
        raise UsageError(
            "batch needs recipes: rankwise batch RECIPE RECIPE … -o FOLDER; `rankwise batch --list` names the package's"
        )
    names = [Path(recipe).stem for recipe in config.recipes]
    if len(set(names)) < len(names):
        raise UsageError(f"duplicate recipe name: {', '.join(names)}; each recipe needs a folder name of its own")
    jobs = {
        name: RunConfig(recipe, str(Path(config.output_dir) / name), set=list(config.set), force=config.force)
        for name, recipe in zip(names, config.recipes, strict=True)
    }
    for job in jobs.values():
        recipes.prepare(job)
    return jobs


def ready(config: BatchConfig) -> None:
    """Check every stage of every recipe before the first one starts."""
    jobs = [] if config.list_ else list(runs_of(config).values())
    for job in jobs:
        recipes.ready(job)


def attempt(name: str, job: RunConfig) -> RecipeOutcome:
    print(f"\n== {name}", flush=True)
    started, error = time.monotonic(), None
    try:
        recipes.run(job)
    except Interrupted:
        raise
    except RankwiseError as failure:
        error = failure.with_traceback(None)  # its frames hold the model
        print(f"{name} failed: {error}", flush=True)
    gc.collect()
    return RecipeOutcome(name, recipes.run_folder(job), time.monotonic() - started, error)


def describe(config: BatchConfig) -> list[str]:
    if config.list_:
        return ["list the recipes that come with the package"]
    lines = []
    for job in runs_of(config).values():
        lines += recipes.describe(job)
    return [*lines, "go on after a recipe that fails, and end with the exit code of the first that did"]
