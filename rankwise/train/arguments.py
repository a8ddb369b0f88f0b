"""TrainingArguments as flags: every field of the installed transformers, the older names, and our defaults.

The command line asks `training_options` for flags; a stage turns what was given into `build_arguments`' result.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rankwise.errors import UsageError, need
from rankwise.files.processes import announce
from rankwise.models.load import warn_if_slow
from rankwise.options.field import Option, Range, hints_of, plain_types, unknown
from rankwise.options.sections import OF_EXTRA_TRACK, LoraSection

SECTION = "training arguments (transformers)"
OLDER = "older names"
SHARE, AGAIN = Range(least=0, below=1), ("overwrite_output_dir",)

# New name → names that mean exactly the same.
ALIASES = {
    "per_device_train_batch_size": ("batch_size", "per_gpu_train_batch_size", "train_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "gradient_accumulation_steps": ("gradient_accumulation",),
    "num_train_epochs": ("num_epochs", "epochs"),
    "learning_rate": ("lr",),
    "eval_strategy": ("evaluation_strategy",),
    "use_cpu": ("no_cuda",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "activation_checkpointing_kwargs": ("gradient_checkpointing_kwargs",),
}
# Names that say something else than the field they set: see `translated`.
TRANSLATED = {
    row.name: dataclasses.replace(row, group=OLDER)
    for row in (
        Option("warmup_ratio", float, None, "share of the optimizer steps: warmup_steps below 1", range=SHARE),
        Option("group_by_length", bool, False, "train_sampling_strategy group_by_length"),
        Option("adafactor", bool, False, "optim adafactor"),
        Option("use_wandb", bool, False, "report_to wandb (extra: track)"),
        Option("overwrite", bool, False, "delete the checkpoints of an earlier run there and start over", AGAIN),
    )
}
# Names that no longer do anything, with what to say about them.
NO_LONGER = {
    "logging_dir": "TensorBoard writes below the output folder (or TENSORBOARD_LOGGING_DIR)",
    "save_safetensors": "weights are always safetensors",
    "fp16_opt_level": "Apex is gone; --fp16 is torch's autocast",
    "fp16_backend": "--fp16 is torch's autocast",
    "half_precision_backend": "--fp16 and --bf16 are torch's autocast",
    "use_mps_device": "the Apple GPU is used where there is one",
    "jit_mode_eval": "transformers dropped it",
    "past_index": "transformers dropped it",
    "ray_scope": "transformers dropped it",
    "use_legacy_prediction_loop": "transformers dropped it",
    "include_tokens_per_second": "transformers dropped it",
    "do_train": "the command trains",
    "do_eval": "--eval_strategy says when the command validates",
    "do_predict": "`rankwise evaluate` scores",
    "torchdynamo": "use --torch_compile",
}

TRAIN_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "eval_strategy": "epoch",
    "logging_steps": 10,
    "report_to": "none",
    "project": "rankwise",
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
}
FINETUNE_DEFAULTS: Mapping[str, Any] = {
    **TRAIN_DEFAULTS,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def training_options(own: Iterable[Option]) -> list[Option]:
    """Every TrainingArguments field and older name that is not one of the command's `own` options or aliases."""
    rows = list(own)
    taken = {name for row in rows for name in (row.name, *row.aliases)}
    defaults = FINETUNE_DEFAULTS if any(row.name == "subset_ratio" for row in rows) else TRAIN_DEFAULTS
    hints = hints_of(TrainingArguments)
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    replaced = {old for new, names in ALIASES.items() if new in fields for old in names}
    found = [
        as_option(field, hints[name], defaults, taken) for name, field in fields.items() if name not in taken | replaced
    ]
    known = taken | {name for row in found for name in (row.name, *row.aliases)}
    return found + [row for row in older_options() if row.name not in known]


def as_option(field: Any, annotation: Any, defaults: Mapping[str, Any], taken: set[str]) -> Option:
    """One field as a flag: enums become their values, and text is tried last (`str | bool` takes True as a boolean)."""
    default = field.default if field.default is not dataclasses.MISSING else None
    default = defaults.get(field.name, default)
    kinds = plain_types(annotation)
    members = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    ordered = tuple(kind for kind in sorted(kinds, key=lambda kind: kind is str) if kind not in members)
    return Option(
        name=field.name,
        annotation=typing.Union[ordered or (str,)] if members or len(kinds) > 1 else annotation,  # noqa: UP007
        default=default.value if isinstance(default, enum.Enum) else default,
        help=first_sentence(field.metadata.get("help") or ""),
        aliases=tuple(name for name in ALIASES.get(field.name, ()) if name not in taken),
        choices=tuple(member.value for member in members[0]) if members else None,
        group=SECTION,
    )


def first_sentence(text: str) -> str:
    plain = " ".join(text.replace("%%", "%").split())
    return plain.split(". ")[0].rstrip(".")


def older_options() -> list[Option]:
    gone = [Option(name, str, None, f"no effect: {why}", group=OLDER) for name, why in NO_LONGER.items()]
    return [*TRANSLATED.values(), *gone]


def translated(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate given options to the installed version's names, with a note for each that no longer has an effect."""
    values = {name: value for name, value in given.items() if name not in TRANSLATED and name not in NO_LONGER}
    notes = [f"note: --{name} has no effect: {NO_LONGER[name]}" for name in given if name in NO_LONGER]
    for name, (field, value) in translations(given).items():
        if field in values:
            raise UsageError(f"--{name} and --{field} set the same option; give one of them")
        values[field] = value
    return values, notes


def translations(given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Older name → the field it sets and the value, for those given."""
    switches: dict[str, tuple[str, Any]] = {
        "group_by_length": ("train_sampling_strategy", "group_by_length"),
        "adafactor": ("optim", "adafactor"),
        "use_wandb": ("report_to", ["wandb"]),
    }
    ratio = given.get("warmup_ratio")
    found = {} if ratio is None else {"warmup_ratio": ("warmup_steps", ratio)}
    return found | {name: field for name, field in switches.items() if given.get(name)}


def build_arguments(
    output_dir: Path | str,
    seed: int,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] = TRAIN_DEFAULTS,
    dtype: str = "auto",
) -> TrainingArguments:
    """TrainingArguments from what was given, over our defaults; prints a note for whatever has no effect.

    dtype: the command's --dtype, which decides autocast where --bf16 and --fp16 don't. UsageError for values that
    TrainingArguments refuses, and where one process sees several GPUs.
    """
    values, notes = translated(without_none(given))
    of_the_hub = [name for name in values if name.startswith("hub_") or (name == "push_to_hub" and values[name])]
    if of_the_hub:
        raise UsageError(
            f"--{of_the_hub[0]}: training uploads nothing, for nothing is proven yet; afterwards `rankwise card RUN "
            "--push_to_hub ORG/NAME` uploads the adapter, the merged model or the export, with a model card"
        )
    values = {**defaults, "disable_tqdm": False, **values}
    values["report_to"] = check_trackers(values["report_to"])
    values["use_cpu"] = bool(values.get("use_cpu")) or not torch.accelerator.is_available()
    precision, more = autocast(dtype, values, on_cpu=values["use_cpu"])
    values |= precision
    if values.get("activation_checkpointing"):  # reentrant checkpointing sees no gradient behind a frozen prefix
        values["activation_checkpointing_kwargs"] = {"use_reentrant": False} | dict(
            values.get("activation_checkpointing_kwargs") or {}
        )
    for note in notes + more:
        announce(note)
    if values["use_cpu"] and (values["bf16"] or dtype == "bfloat16"):
        warn_if_slow(torch.bfloat16, "--bf16 false" if given.get("bf16") else "--dtype float32")
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), seed=seed, **values)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        raise UsageError(f"training arguments: {error}") from error
    refuse_data_parallel(arguments)
    return arguments


def check_trackers(asked: str | list[str]) -> list[str]:
    """The names, of which one text may hold several. UsageError for a name that transformers does not know, and for a
    tracker that cannot begin here: not installed, or not set up (an API key, say)."""
    names = [
        name.strip().lower() for each in ([asked] if isinstance(asked, str) else asked) for name in each.split(",")
    ]
    for name in names if names not in (["all"], ["none"]) else []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown(name, [*INTEGRATION_TO_CALLBACK, "all", "none"], "--report_to", "tracker")
        if name in OF_EXTRA_TRACK:
            need(name, extra="track")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UsageError(f"--report_to {name}: {error}; or leave it out: --report_to none") from error
    return names


def without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    """`none` in a file or flag: no tracker, no evaluation, no saving; elsewhere the default."""
    nothing = {"report_to": "none", "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    values = {name: nothing.get(name) if value is None else value for name, value in given.items()}
    return {name: value for name, value in values.items() if value is not None}


def autocast(dtype: str, given: Mapping[str, Any], *, on_cpu: bool) -> tuple[dict[str, Any], list[str]]:
    """The mixed precision that applies, and a note about it: trained weights stay float32 in every case.

    An accelerator defaults to bf16 where it has it; a CPU computes in float32, and --fp16 there is only a warning.
    """
    fp16 = bool(given.get("fp16", dtype == "float16"))
    bf16 = bool(given.get("bf16", dtype == "bfloat16"))
    if on_cpu:
        asked = fp16 or bool(given.get("fp16_full_eval"))
        notes = ["warning: float16 is for GPUs; on this CPU everything is computed in float32"] if asked else []
        return {"fp16": False, "bf16": bf16, "fp16_full_eval": False}, notes
    if dtype == "auto" and "fp16" not in given and "bf16" not in given:
        bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        notes = [] if bf16 else ["note: this GPU has no bf16; computing in float32 (--fp16 is faster)"]
        return {"bf16": bf16}, notes
    return {"fp16": fp16, "bf16": bf16}, []


def frozen_dtype(dtype: str, arguments: TrainingArguments) -> torch.dtype:
    """Precision of weights that do not train: as asked, else float32 on a CPU and the autocast type on a GPU."""
    if dtype != "auto":
        return torch.float32 if dtype == "float16" and arguments.use_cpu else getattr(torch, dtype)
    if arguments.use_cpu:
        return torch.float32
    return torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 else torch.float32


def refuse_data_parallel(arguments: TrainingArguments) -> None:
    """One process with several GPUs would train through torch's DataParallel, which is slow and drops hooks."""
    if arguments.n_gpu > 1:
        words = " ".join(sys.argv[1:]) or "train …"
        raise UsageError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one process per GPU:\n"
            f"  torchrun --nproc-per-node {arguments.n_gpu} -m rankwise.cli {words}\n"
            "or use one GPU: CUDA_VISIBLE_DEVICES=0 in front of the command"
        )


def quantization(lora: LoraSection) -> str | None:
    return "8bit" if lora.load_in_8bit else "4bit" if lora.load_in_4bit else None
