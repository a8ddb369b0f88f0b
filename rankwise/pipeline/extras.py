"""Optional packages: which module a command needs beyond the base install, when, and what brings it.

    require_extras("train", config)     UsageError: --report_to wandb: wandb is not installed …

Imports nothing outside the standard library: `rankwise doctor` reads the table where torch is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError, need
from rankwise.options.field import INPUTS, flatten, options_of
from rankwise.options.sections import OF_EXTRA_TRACK, is_harness
from rankwise.pipeline.idle import Told, hands_off
from rankwise.pipeline.table import COMMANDS

DRAWING = ("ranks", "compare", "features compare", "features downstream")
TRAINERS = ("train", "finetune")
READING = (*TRAINERS, "ranks", "advise", "check", "evaluate", "merge", "study", "validate", "bundle")
LLAMA = ("validate", "bundle")
NAMED = "inputs"  # among what the rows below are told: everything that is to be read
ROWS = ("*.json", "*.jsonl", "*.csv")


@dataclass(frozen=True)
class Extra:
    """A module that is not in the minimal install, the commands that need it, and when they do.

    flag: what asks for it, as a command line says it. brings: the extra in brackets, or the package, that brings it
    [the package of the module's name]. instead: an option that does without. by_stage: required by the stage's
    `check_installed`, after it has refused what cannot work with the module either.
    """

    module: str
    commands: tuple[str, ...]
    flag: str
    asked: Callable[[Told], bool] = lambda told: True
    brings: str = ""
    instead: str = ""
    by_stage: bool = False

    def require(self) -> None:
        extra = self.brings[1:-1] if self.brings.startswith("[") else ""
        try:
            need(self.module, extra, "" if extra else self.brings or self.module.replace("_", "-").replace(".", "-"))
        except UsageError as error:
            otherwise = f", or leave it out: {self.instead}" if self.instead else ""
            raise UsageError(f"{self.flag}: {error}{otherwise}") from error


def on(name: str) -> Callable[[Told], bool]:
    """Whether an option is given, or switched on."""
    return lambda told: bool(told.get(name))


def inputs_of(config: Any) -> list[str]:
    """What is given to the options that name something to read."""
    given = [item.default for item in options_of(config) if item.path in INPUTS and item.default]
    return [str(name) for value in given for name in (value if isinstance(value, list) else [value])]


def reads(suffix: str) -> Callable[[Told], bool]:
    return lambda told: any(name.lower().endswith(suffix) for name in told[NAMED])


def opens_7z(told: Told) -> bool:
    """A .7z file, a folder with such a file and no rows beside it, or SAMSum's official file, which is one."""
    folders = [Path(name) for name in told[NAMED] if Path(name).is_dir()]
    packed = any(holds(folder, "*.7z") and not holds(folder, *ROWS) for folder in folders)
    return reads(".7z")(told) or packed or (bool(told.download) and told.task == "samsum")


def holds(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def asks_a_data_set(told: Told) -> bool:
    """Pictures saved by `datasets`, or on the hub, where this name may have `:SPLIT` behind it."""
    folder = Path(str(told.images or "").partition(":")[0])
    return bool(told.images) and (not folder.exists() or holds(folder, "dataset_info.json", "dataset_dict.json"))


def reports_to(tracker: str) -> Callable[[Told], bool]:
    return lambda told: tracker in names(told.report_to) or (tracker == "wandb" and bool(told.use_wandb))


def names(value: Any) -> list[str]:
    """A list, or one text of several names with commas between, in lower case."""
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [str(part).strip().lower() for part in parts]


def of_bitsandbytes(told: Told) -> bool:
    name = str(told.optim or "").lower()
    return name.startswith(("paged_", "ademamix", "lion_")) or "bnb" in name or "adamw_8bit" in name


def reads_gguf(told: Told) -> bool:
    """validate, bundle; of a replay only the one that reads an app's answers, whose tokens may be texts."""
    return not hands_off(told) and bool(not told.replay or told.answers)


def scores(told: Told) -> bool:
    return bool(told.task) and not is_harness(told.task)


def asks_teacher(told: Told) -> bool:
    return not (told.from_folders or told.labels_file)


def runs_llama_cpp(told: Told) -> bool:
    return not hands_off(told) and not told.server and not (told.replay and told.answers)


TRACKERS = {name: name for name in "wandb tensorboard trackio mlflow comet_ml clearml neptune codecarbon".split()}
TRACKERS |= {"dvclive": "dvclive", "swanlab": "swanlab", "dagshub": "dagshub"}
TRACKERS |= {"flyte": "flytekit", "azure_ml": "azureml.core"}
OPTIMIZERS = {
    "galore_torch": ("galore_",),
    "apollo_torch": ("apollo_",),
    "lomo_optim": ("lomo", "adalomo"),
    "grokadamw": ("grokadamw",),
    "schedulefree": ("schedule_free_",),
    "optimi": ("stable_adamw",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "torchdistx": ("adamw_anyprecision",),
    "torch_xla": ("adamw_torch_xla",),
    "torch_npu": ("adamw_torch_npu_fused",),
}


def tracker(name: str, module: str) -> Extra:
    brings = "[track]" if name in OF_EXTRA_TRACK else ""
    return Extra(module, TRAINERS, f"--report_to {name}", reports_to(name), brings, "--report_to none")


def optimizer(module: str, *begin: str) -> Extra:
    def asked(told: Told) -> bool:
        return str(told.optim or "").lower().startswith(begin)

    return Extra(module, TRAINERS, f"--optim {begin[0]}…", asked, "torch-optimi" if module == "optimi" else "")


EXTRAS = (
    Extra("matplotlib", DRAWING, "the pictures", lambda told: not told.no_plots, "[plots]", "--no_plots"),
    Extra("matplotlib", ("features show",), "the pictures", brings="[plots]"),
    *(tracker(name, module) for name, module in TRACKERS.items()),
    *(optimizer(module, *begin) for module, begin in OPTIMIZERS.items()),
    Extra("bitsandbytes", TRAINERS, "--optim of bitsandbytes", of_bitsandbytes, "[quant]"),
    Extra("bitsandbytes", TRAINERS, "--load_in_4bit", on("load_in_4bit"), "[quant]"),
    Extra("bitsandbytes", TRAINERS, "--load_in_8bit", on("load_in_8bit"), "[quant]"),
    Extra("scipy.stats", TRAINERS, "LoftQ", lambda told: told.init_lora_weights == "loftq", "[eval]"),
    Extra("liger_kernel", TRAINERS, "--use_liger_kernel", on("use_liger_kernel")),
    Extra("deepspeed", TRAINERS, "--deepspeed", on("deepspeed")),
    Extra("scipy.stats", ("ranks",), "--gain", on("gain"), "[eval]"),
    Extra("scipy.stats", ("evaluate",), "scores of --task", scores, "[eval]"),
    Extra("lm_eval", ("evaluate",), "--task lm_eval:…", lambda told: is_harness(told.task), "[harness]"),
    Extra("vllm", ("evaluate",), "--engine vllm", lambda told: told.engine == "vllm", "[vllm]", by_stage=True),
    Extra("openai", ("label",), "a teacher model", asks_teacher, "[label]"),
    Extra("scipy.stats", ("advise", "study", *LLAMA), "the command", brings="[eval]"),
    Extra("gguf", ("export",), "the command", lambda told: bool(told.model or told.adapter_gguf), "[device]"),
    Extra("gguf", LLAMA, "the command", reads_gguf, "[device]"),
    Extra("xllamacpp", LLAMA, "llama.cpp", runs_llama_cpp, "[device]", "--server ADDRESS"),
    *(Extra(name, (*READING, "label"), "--download", on("download"), "[data]") for name in ("pooch", "requests")),
    Extra("scipy.stats", ("features compare", "features downstream"), "the command", brings="[eval]"),
    Extra("py7zr", READING, "a .7z file", opens_7z, "[data]"),
    Extra("pyarrow.parquet", tuple(COMMANDS), "a parquet file", reads(".parquet"), "[data]"),
    Extra("datasets", ("features capture",), "a data set", asks_a_data_set, "[data]"),
    Extra("gguf", tuple(COMMANDS), "a GGUF file", reads(".gguf"), "[device]"),
)


def require_extras(command: str, config: Any) -> None:
    """UsageError naming the extra, or the package, of the first module that the options ask for and that is missing."""
    told = Told(flatten(config))
    told[NAMED] = inputs_of(config)
    for extra in EXTRAS:
        if command in extra.commands and not extra.by_stage and extra.asked(told):
            extra.require()
