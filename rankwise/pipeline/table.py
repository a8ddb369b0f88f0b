"""The table of commands, and how values become a command's config: for the command line and for recipes alike.

Imports nothing heavy; a stage is imported when it runs.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from rankwise.errors import UsageError
from rankwise.options import commands, features
from rankwise.options.advise import AdviseConfig
from rankwise.options.field import Option, build, options_of, typed_values
from rankwise.options.label import LabelConfig
from rankwise.options.study import StudyConfig

EXAMPLE = "rankwise "  # how the command line in a config's docstring begins


@dataclass(frozen=True)
class Command:
    """One row of the table: where it stands in the help, what it is told, and which stage runs it.

    packaged: a folder of the package's recipes whose files can be given by name, as the command's config file.
    repeated: the last positional takes all further words. standalone: needs nothing but the standard library, so that
    it runs in an installation that is broken; nothing is checked beforehand.
    """

    group: str
    stage: str
    config: Any
    positionals: tuple[str, ...] = ()
    takes_file: bool = True
    trainer: bool = False
    packaged: str = ""
    repeated: bool = False
    standalone: bool = False

    @property
    def about(self) -> str:
        """What its config says of it, less the example."""
        return " ".join(text for text in documented(self.config) if not text.startswith(EXAMPLE))

    @property
    def example(self) -> str:
        """What its config says that is a command line; it runs after `rankwise demo` and `rankwise tiny`."""
        return next(text for text in documented(self.config) if text.startswith(EXAMPLE))

    @property
    def help(self) -> str:
        """The first paragraph of what its config says."""
        return documented(self.config)[0].rstrip(".")


def documented(config: Any) -> list[str]:
    """The paragraphs of its docstring, each as one line."""
    return [" ".join(text.split()) for text in str(type(config).__doc__).split("\n\n")]


COMMANDS = {
    "ranks": Command("MEASURE", "ranks.command", commands.RanksConfig(), ("base", "tuned")),
    "ranks diff": Command("MEASURE", "ranks.diff", commands.DiffConfig(), ("first", "second"), takes_file=False),
    "advise": Command("MEASURE", "study.advise", AdviseConfig(), ("model_name", "data_path")),
    "extract": Command("MEASURE", "ranks.extract", commands.ExtractConfig(), ("base", "tuned")),
    "compress": Command("MEASURE", "ranks.compress", commands.CompressConfig(), ("adapter",)),
    "finetune": Command("TRAIN", "train.finetune", commands.FinetuneConfig(), trainer=True),
    "train": Command("TRAIN", "train.command", commands.TrainConfig(), trainer=True),
    "check": Command("TRAIN", "data.check.command", commands.CheckConfig()),
    "label": Command("TRAIN", "labels.command", LabelConfig(), ("images",)),
    "evaluate": Command("PROVE", "evaluate.command", commands.EvaluateConfig(), ("model_name",)),
    "study": Command("PROVE", "study.command", StudyConfig(), packaged="studies"),
    "compare": Command("PROVE", "report.compare", commands.CompareConfig(), ("runs",), takes_file=False, repeated=True),
    "report": Command("PROVE", "report.report", commands.ReportConfig(), ("run",)),
    "merge": Command("SHIP", "merge.command", commands.MergeConfig(), ("adapter",)),
    "export": Command("SHIP", "gguf.command", commands.ExportConfig(), ("model",)),
    "validate": Command("SHIP", "device.validate", commands.ValidateConfig(), ("export",)),
    "bundle": Command("SHIP", "device.bundle", commands.BundleConfig(), ("export",)),
    "card": Command("SHIP", "report.card", commands.CardConfig(), ("run",)),
    "features capture": Command("MORE", "features.capture", features.CaptureConfig(), ("images",)),
    "features train": Command("MORE", "features.train", features.FactorTrainConfig()),
    "features compare": Command("MORE", "features.compare", features.FactorCompareConfig()),
    "features show": Command("MORE", "features.show", features.FactorShowConfig()),
    "features downstream": Command("MORE", "features.downstream", features.DownstreamConfig(), ("model_name",)),
    "run": Command("MORE", "pipeline.run", commands.RunConfig(), ("recipe",), takes_file=False),
    "batch": Command("MORE", "pipeline.batch", commands.BatchConfig(), ("recipes",), takes_file=False, repeated=True),
    "schema": Command(
        "MORE", "pipeline.schema", commands.SchemaConfig(), ("command",), takes_file=False, repeated=True
    ),
    "completion": Command("MORE", "pipeline.completion", commands.CompletionConfig(), ("shell",), takes_file=False),
    "tiny": Command("MORE", "demo.tiny", commands.TinyConfig()),
    "demo": Command("MORE", "demo.command", commands.DemoConfig()),
    "doctor": Command("MORE", "doctor.command", commands.DoctorConfig(), takes_file=False, standalone=True),
}
ALIASES = {"features extract": "features capture"}
GROUPS = ("MEASURE", "TRAIN", "PROVE", "SHIP", "MORE")
ASKS, GO_ON = ("label",), "yes"  # commands that ask at a terminal, and their option to go on
DRY_RUN = Option("dry_run", bool, False, "print the resolved config and what would be done, and stop", group="output")


def command_options(command: Command) -> list[Option]:
    """Our own options, and those of TrainingArguments where the command trains (that import takes seconds)."""
    own = list(options_of(command.config))
    if command.trainer:
        own += imported("rankwise.train.arguments").training_options(own)
    return own


def assemble(command: Command, values: dict[str, Any]) -> Any:
    """The config object; what is TrainingArguments' own goes to its `training` mapping."""
    own = {item.name for item in options_of(command.config)} | {"dry_run"}
    built = build(command.config, values)
    if command.trainer:
        built = replace(built, training={name: value for name, value in values.items() if name not in own})
    return built


def configured(name: str, raw: Mapping[str, Any], where: str) -> Any:
    """A command's config from the options of a recipe, strictly: unknown ones are errors that name the place.

    What is secret is refused: a recipe is saved beside what it makes. A recipe asks nothing at the terminal: it may
    run for hours, and nobody looks.
    """
    command = COMMANDS[name]
    known = command_options(command)
    values = typed_values(raw, known, where)
    for item in known:
        if item.secret and values.get(item.name) is not None:
            raise UsageError(f"{where}: {item.name}: recipes are saved with their values; {item.help}")
        if name in ASKS and item.name == GO_ON:
            values.setdefault(GO_ON, True)
    return assemble(command, values)


def stage_of(name: str) -> ModuleType:
    """The module whose `run(config)` and `describe(config)` are the command."""
    return imported(f"rankwise.{COMMANDS[name].stage}")


def imported(name: str) -> ModuleType:
    """A module of the package. Garbage collection waits: what is imported stays, and searching it again and again takes
    a fifth of a command's start."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collecting:
            gc.enable()
