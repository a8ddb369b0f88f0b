"""What is not in the minimal install and which options ask for it: one table, asked before anything is read.

    require_extras("train", config)     UsageError: --report_to wandb: wandb is not installed …; it comes with: …

A scored task knows its own libraries (`evaluate/tasks.py`); a stage's `check_installed` asks for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankwise.errors import UsageError, need
from rankwise.options.field import flatten
from rankwise.pipeline.idle import Told
from rankwise.pipeline.table import stage_of

DRAWING = ("ranks", "compare", "features compare", "features downstream")
TRAINERS = ("train", "finetune")
READING = (*TRAINERS, "ranks", "check", "evaluate", "merge", "study", "validate", "bundle")
LLAMA = ("validate", "bundle")


@dataclass(frozen=True)
class Part:
    """An optional module, the commands that need it, and when.

    asked: whether these options do [always]. flag: what asks for it, as a command line says it. extra or package: what
    brings it.
    """

    module: str
    commands: tuple[str, ...]
    flag: str
    asked: Callable[[Told], bool] = lambda told: True
    extra: str = ""
    package: str = ""
    instead: str = ""


def reports_to(name: str) -> Callable[[Told], bool]:
    def asked(told: Told) -> bool:
        return name in names(told.report_to) or (name == "wandb" and bool(told.use_wandb))

    return asked


def names(value: Any) -> list[str]:
    """A list, or one text of several names with commas between, in lower case."""
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [str(part).strip().lower() for part in parts]


def optim(*beginnings: str) -> Callable[[Told], bool]:
    def asked(told: Told) -> bool:
        return str(told.optim or "").lower().startswith(beginnings)

    return asked


def of_bitsandbytes(told: Told) -> bool:
    name = str(told.optim or "").lower()
    return name.startswith(("paged_", "ademamix", "lion_")) or "bnb" in name or name in ("adamw_8bit",)


def on(name: str) -> Callable[[Told], bool]:
    """Whether an option is given, or switched on."""

    def asked(told: Told) -> bool:
        return bool(told.get(name))

    return asked


def of_parquet(told: Told) -> bool:
    return str(told.images or "").endswith(".parquet")


TRACKERS = {
    "wandb": ("wandb", "track", ""),
    "tensorboard": ("tensorboard", "track", ""),
    "trackio": ("trackio", "", "trackio"),
    "mlflow": ("mlflow", "", "mlflow"),
    "comet_ml": ("comet_ml", "", "comet-ml"),
    "clearml": ("clearml", "", "clearml"),
    "neptune": ("neptune", "", "neptune"),
    "codecarbon": ("codecarbon", "", "codecarbon"),
    "dvclive": ("dvclive", "", "dvclive"),
    "swanlab": ("swanlab", "", "swanlab"),
    "flyte": ("flytekit", "", "flytekit"),
    "dagshub": ("dagshub", "", "dagshub"),
    "azure_ml": ("azureml.core", "", "azureml-core"),
}
OPTIMIZERS = {
    ("galore_",): ("galore_torch", "galore-torch"),
    ("apollo_",): ("apollo_torch", "apollo-torch"),
    ("lomo", "adalomo"): ("lomo_optim", "lomo-optim"),
    ("grokadamw",): ("grokadamw", "grokadamw"),
    ("schedule_free_",): ("schedulefree", "schedulefree"),
    ("stable_adamw",): ("optimi", "torch-optimi"),
    ("adamw_torch_4bit", "adamw_torch_8bit"): ("torchao", "torchao"),
}
PARTS = (
    Part(
        "matplotlib",
        DRAWING,
        "the pictures",
        lambda told: not told.no_plots,
        extra="plots",
        instead="--no_plots",
    ),
    Part("matplotlib", ("features show",), "the pictures", extra="plots"),
    *(
        Part(module, TRAINERS, f"--report_to {name}", reports_to(name), extra, package, "--report_to none")
        for name, (module, extra, package) in TRACKERS.items()
    ),
    *(
        Part(module, TRAINERS, f"--optim {beginnings[0]}…", optim(*beginnings), package=package)
        for beginnings, (module, package) in OPTIMIZERS.items()
    ),
    Part("bitsandbytes", TRAINERS, "this --optim", of_bitsandbytes, extra="quant"),
    Part("bitsandbytes", TRAINERS, "--load_in_4bit", on("load_in_4bit"), extra="quant"),
    Part("bitsandbytes", TRAINERS, "--load_in_8bit", on("load_in_8bit"), extra="quant"),
    Part("scipy.stats", TRAINERS, "LoftQ", lambda told: told.init_lora_weights == "loftq", extra="eval"),
    Part("liger_kernel", TRAINERS, "--use_liger_kernel", on("use_liger_kernel"), package="liger-kernel"),
    Part("deepspeed", TRAINERS, "--deepspeed", on("deepspeed"), package="deepspeed"),
    Part("scipy.stats", ("ranks",), "--gain", on("gain"), extra="eval"),
    Part("scipy.stats", ("study", *LLAMA), "the command", extra="eval"),
    Part("gguf", ("export",), "the command", lambda told: bool(told.model or told.adapter_gguf), extra="device"),
    Part("gguf", LLAMA, "the command", lambda told: not told.replay, extra="device"),
    Part("xllamacpp", LLAMA, "llama.cpp", lambda told: not told.server, extra="device", instead="--server ADDRESS"),
    Part("pooch", (*READING, "label"), "--download", on("download"), extra="data"),
    Part("py7zr", READING, "a .7z file", lambda told: str(told.data_path or "").endswith(".7z"), extra="data"),
    Part("pyarrow.parquet", ("features capture",), "a parquet file", of_parquet, extra="data"),
)


def require_extras(command: str, config: Any) -> None:
    """UsageError naming the extra, or the package, of the first part that the options ask for and that is missing."""
    told = Told(flatten(config))
    for part in PARTS:
        if command in part.commands and part.asked(told):
            try:
                need(part.module, part.extra, part.package)
            except UsageError as error:
                otherwise = f", or leave it out: {part.instead}" if part.instead else ""
                raise UsageError(f"{part.flag}: {error}{otherwise}") from error


def require_libraries(command: str, config: Any) -> None:
    """What the stage itself says it needs (a task's scorers, llama.cpp's converter), of options that go together."""
    installed = getattr(stage_of(command), "check_installed", None)
    if installed is not None:
        installed(config)
