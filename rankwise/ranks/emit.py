"""Convert a rank plan to another trainer's config: exactly the plan, or the reason why it cannot be expressed.

What each trainer takes was read in its package (November 2026): axolotl 0.19.0 and unsloth 2026.10.9 hand
`rank_pattern` and `alpha_pattern` on to PEFT; ms-swift 4.6.0 and LLaMA-Factory 0.9.5 have one rank. Targets are whole
module paths everywhere: a bare projection name would train it in every layer and tower. LLaMA-Factory takes names only,
and its table of model families decides what of a vision tower or projector may train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from rankwise.core.plan import RankPlan
from rankwise.errors import UsageError
from rankwise.files.atomic import write_text
from rankwise.files.checkpoint import resolve
from rankwise.models.load import meta_model
from rankwise.models.sites import EXPERT_NAMES, fused_experts
from rankwise.models.targets import plan_fields
from rankwise.options.commands import RanksConfig
from rankwise.options.field import absolute
from rankwise.ranks.probe import Probe

INSTEAD = "train it with `rankwise train --lora-config`, or emit"
Fields = dict[str, Any]
Targets = str | list[str]


def lora_fields(plan: RankPlan) -> Fields:
    """PEFT's fields as `train` has them, without what is empty or off, and without targets."""
    given = plan_fields(plan)
    fields = {
        "r": given["r"],
        "lora_alpha": whole(given["lora_alpha"]),
        "rank_pattern": given["rank_pattern"],
        "alpha_pattern": {key: whole(alpha) for key, alpha in given["alpha_pattern"].items()},
        "use_rslora": given["use_rslora"],
        "fan_in_fan_out": given["fan_in_fan_out"],
    }
    return {name: value for name, value in fields.items() if value}


def whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def full_paths(plan: RankPlan, trainer: str) -> list[str]:
    """The paths as names, which match every module whose path ends like one. UsageError where another site's does."""
    for path in plan.ranks:
        other = next((row.site.path for row in plan.sites if row.site.path.endswith(f".{path}")), None)
        if other:
            raise UsageError(f"--emit {trainer} matches name suffixes; {path} also matches {other}; {INSTEAD} peft")
    return list(plan.ranks)


def targets(plan: RankPlan, trainer: str, experts: bool) -> Targets:
    """All sites as one anchored regex; as full paths for a model with fused experts, of whose regex PEFT keeps the
    bare names. UsageError for names that it takes for the experts."""
    if not experts:
        return str(plan_fields(plan)["target_modules"])
    taken = [row.site.path for row in plan.sites if row.rank and row.site.projection in EXPERT_NAMES]
    if taken:
        raise UsageError(
            f"--emit {trainer}: the model has fused experts, and PEFT would train those in place of {taken[0]}; make a "
            "plan without such sites (--exclude)"
        )
    return full_paths(plan, trainer)


def peft(plan: RankPlan, experts: bool) -> Fields:
    """`LoraConfig(**json.load(open(...)))`."""
    return {**lora_fields(plan), "target_modules": targets(plan, "peft", experts), "task_type": "CAUSAL_LM"}


def unsloth(plan: RankPlan, experts: bool) -> Fields:
    """`FastLanguageModel.get_peft_model(model, **json.load(open(...)))`; what it does not know goes to LoraConfig."""
    if experts:
        raise UsageError(f"--emit unsloth: it adds a model's fused experts to what trains; {INSTEAD} peft or axolotl")
    return {**lora_fields(plan), "target_modules": targets(plan, "unsloth", experts)}


def axolotl(plan: RankPlan, experts: bool) -> Fields:
    """Whole alphas only."""
    names = {"lora_alpha": "lora_alpha", "use_rslora": "peft_use_rslora"}
    fields = lora_fields(plan)
    require_whole([fields["lora_alpha"], *fields.get("alpha_pattern", {}).values()], "axolotl", "peft or unsloth")
    return {
        **model("base_model", plan),
        "adapter": "lora",
        **{names.get(name, f"lora_{name}"): value for name, value in fields.items()},
        "lora_target_modules": targets(plan, "axolotl", experts),
    }


def swift(plan: RankPlan, experts: bool) -> Fields:
    """`swift sft swift.yaml …`."""
    found = targets(plan, "swift", experts)
    return {
        **model("model", plan),
        "tuner_type": "lora",
        **one_rank(plan, "swift"),
        ("target_regex" if isinstance(found, str) else "target_modules"): found,
    }


def llamafactory(plan: RankPlan, experts: bool) -> Fields:
    """`llamafactory-cli train llamafactory.yaml`."""
    outside = sorted({row.site.tower for row in plan.sites if row.rank} - {"language"})
    if outside:
        raise UsageError(
            f"--emit llamafactory: what trains of a {outside[0]} tower is decided by its own table of model families, "
            f"not by names; {INSTEAD} peft, axolotl, swift or unsloth"
        )
    fields = one_rank(plan, "llamafactory")
    require_whole([fields["lora_alpha"]], "llamafactory", "peft or unsloth")
    found = targets(plan, "llamafactory", experts)
    names = found if isinstance(found, list) else full_paths(plan, "llamafactory")
    return {**model("model_name_or_path", plan), "finetuning_type": "lora", **fields, "lora_target": ",".join(names)}


def model(key: str, plan: RankPlan) -> Fields:
    """The base; a folder of this disk by its absolute path, for the file is used from anywhere."""
    return {key: absolute(plan.model_name)} if plan.model_name else {}


def one_rank(plan: RankPlan, trainer: str) -> Fields:
    """Rank and alpha for a trainer with a single rank. UsageError for a plan with several."""
    fields, ranks = lora_fields(plan), plan.ranks.values()
    if "rank_pattern" in fields or "alpha_pattern" in fields:
        raise UsageError(
            f"--emit {trainer}: it takes one rank for all matrices, and the plan has {min(ranks)} to {max(ranks)}; "
            f"{INSTEAD} peft, axolotl or unsloth"
        )
    rslora = {"use_rslora": True} if plan.use_rslora else {}
    return {"lora_rank": fields["r"], "lora_alpha": fields["lora_alpha"], **rslora}


def require_whole(alphas: list[int | float], trainer: str, instead: str) -> None:
    odd = next((alpha for alpha in alphas if not isinstance(alpha, int)), None)
    if odd is not None:
        raise UsageError(f"--emit {trainer}: it takes whole alphas, and the plan has {odd:g}; {INSTEAD} {instead}")


def as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1)


def as_yaml(fields: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(fields), sort_keys=False, width=1000)


TRAINERS: dict[str, tuple[Callable[[RankPlan, bool], Fields], Callable[[Mapping[str, Any]], str], str]] = {
    "peft": (peft, as_json, "json"),
    "axolotl": (axolotl, as_yaml, "yaml"),
    "swift": (swift, as_yaml, "yaml"),
    "unsloth": (unsloth, as_json, "json"),
    "llamafactory": (llamafactory, as_yaml, "yaml"),
}


# `rankwise train`'s name of a run's option → the trainer's. peft's LoraConfig and unsloth's get_peft_model take the
# adapter only. Read in axolotl/utils/schemas, swift/trainers/arguments.py and, for LLaMA-Factory, transformers' own.
ADAPTER_OPTIONS = {"lora_dropout": "lora_dropout"}
TRANSFORMERS_OPTIONS = {
    **ADAPTER_OPTIONS,
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
}
AXOLOTL_OPTIONS = {"lr_scheduler_type": "lr_scheduler", "batch_size": "micro_batch_size", "num_epochs": "num_epochs"}
RUN_OPTIONS: dict[str, Mapping[str, str]] = {
    "peft": ADAPTER_OPTIONS,
    "axolotl": TRANSFORMERS_OPTIONS | AXOLOTL_OPTIONS,
    "swift": TRANSFORMERS_OPTIONS,
    "unsloth": ADAPTER_OPTIONS,
    "llamafactory": TRANSFORMERS_OPTIONS,
}


def unplaced(trainer: str, options: Mapping[str, Any]) -> str:
    """What a trainer's file has no place for, as a sentence; empty where it takes all."""
    left = [f"{name} {value}" for name, value in options.items() if name not in RUN_OPTIONS[trainer]]
    return f"{trainer} takes the adapter only; set in your training script: {', '.join(left)}" if left else ""


def emit(
    plan: RankPlan, trainer: str, experts: bool = False, options: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, str]:
    """(text, file suffix) of the plan for one trainer. experts: the model has fused experts. options: of the run, by
    `rankwise train`'s names; the trainer's file gets those that it has a place for.

    Raises UsageError, naming what this trainer cannot express and what can, where it would train anything else.
    """
    if trainer not in TRAINERS:
        raise UsageError(f"--emit {trainer}: known trainers are {', '.join(TRAINERS)}")
    plan.require_ranks(f"--emit {trainer}: the plan")
    fields, written, suffix = TRAINERS[trainer]
    names = RUN_OPTIONS[trainer]
    return written(fields(plan, experts) | {names[key]: options[key] for key in options if key in names}), suffix


def write_configs(
    folder: Path, trainers: Sequence[str], plan: RankPlan, experts: bool, options: Mapping[str, Any]
) -> tuple[dict[str, Path], list[str]]:
    """One config per trainer, by name, and what the others cannot express."""
    files, refused = {}, []
    for trainer in trainers:
        try:
            text, suffix = emit(plan, trainer, experts, options)
        except UsageError as error:
            refused.append(str(error))
            continue
        files[trainer] = write_text(folder / "configs" / f"{trainer}.{suffix}", text + "\n")
    return files, refused


def write_emitted(config: RanksConfig, plan: RankPlan, probe: Probe) -> tuple[list[Path], list[str]]:
    """One config per trainer, and why the others cannot take the plan: known only now that it has been measured."""
    files, refused = write_configs(Path(config.output_dir), config.emit, plan, has_experts(config, probe), {})
    return [*files.values()], refused


def has_experts(config: RanksConfig, probe: Probe) -> bool:
    """Whether the model has fused experts, which trainers may add to any target; False where it is not on this disk."""
    folder = resolve(config.base) if config.base else Path(probe.model_name)
    return (folder / "config.json").is_file() and bool(fused_experts(meta_model(str(folder))))
