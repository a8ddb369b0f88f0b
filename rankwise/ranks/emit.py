"""Convert a rank plan to another trainer's config: exactly the plan, or the reason why it cannot be expressed.

What each trainer takes was read in its package (November 2026): axolotl 0.19.0 and unsloth 2026.10.9 hand
`rank_pattern` and `alpha_pattern` on to PEFT; ms-swift 4.6.0 and LLaMA-Factory 0.9.5 have one rank. Targets are whole
module paths everywhere: a bare projection name would train it in every layer and tower. LLaMA-Factory takes names only,
and its table of model families decides what of a vision tower or projector may train. Of a model with fused experts
the experts, and dense matrices of their names, are targets by parameter, which PEFT, axolotl and ms-swift take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from rankwise.core.plan import RankPlan
from rankwise.errors import UsageError
from rankwise.files.atomic import write_text
from rankwise.files.checkpoint import resolve
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import plan_fields
from rankwise.options.commands import RanksConfig
from rankwise.options.field import absolute
from rankwise.ranks.probe import Probe

INSTEAD = "train it with `rankwise train --lora-config`, or emit"
Fields = dict[str, Any]


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


def full_paths(plan: RankPlan, paths: Iterable[str], trainer: str) -> list[str]:
    """The paths as names, which match every module whose path ends like one. UsageError where another site's does."""
    paths = list(paths)
    for path in paths:
        other = next((row.site.path for row in plan.sites if row.site.path.endswith(f".{path}")), None)
        if other:
            raise UsageError(f"--emit {trainer} matches name suffixes; {path} also matches {other}; {INSTEAD} peft")
    return paths


def has_experts(plan: RankPlan) -> bool:
    """Whether the plan's model has fused experts, of which PEFT takes no regex."""
    return any(row.site.peft != "pattern" for row in plan.sites)


def targets(plan: RankPlan, trainer: str) -> Fields:
    """`target_modules`: all sites as one anchored regex, or as full paths where the model has fused experts; there
    `target_parameters` as well, if there are any."""
    given = plan_fields(plan)
    modules, parameters = given["target_modules"], given["target_parameters"] or []
    if not has_experts(plan):
        return {"target_modules": modules}
    found = {"target_modules": full_paths(plan, modules, trainer)}
    return found | ({"target_parameters": full_paths(plan, parameters, trainer)} if parameters else {})


def peft(plan: RankPlan) -> Fields:
    """`LoraConfig(**json.load(open(...)))`."""
    return {**lora_fields(plan), **targets(plan, "peft"), "task_type": "CAUSAL_LM"}


def unsloth(plan: RankPlan) -> Fields:
    """`FastLanguageModel.get_peft_model(model, **json.load(open(...)))`; what it does not know goes to LoraConfig."""
    if has_experts(plan):
        raise UsageError(f"--emit unsloth: it adds a model's fused experts to what trains; {INSTEAD} peft or axolotl")
    return {**lora_fields(plan), **targets(plan, "unsloth")}


def axolotl(plan: RankPlan) -> Fields:
    """Whole alphas only."""
    names = {"lora_alpha": "lora_alpha", "use_rslora": "peft_use_rslora"}
    fields = lora_fields(plan)
    require_whole([fields["lora_alpha"], *fields.get("alpha_pattern", {}).values()], "axolotl", "peft or unsloth")
    return {
        **model("base_model", plan),
        "adapter": "lora",
        **{names.get(name, f"lora_{name}"): value for name, value in fields.items()},
        **{f"lora_{name}": value for name, value in targets(plan, "axolotl").items()},
    }


def swift(plan: RankPlan) -> Fields:
    """`swift sft swift.yaml …`."""
    found = targets(plan, "swift")
    if isinstance(found["target_modules"], str):
        found = {"target_regex": found["target_modules"]}
    undropped = {"lora_dropout": 0.0} if "target_parameters" in found else {}  # its own default is none for parameters
    return {**model("model", plan), "tuner_type": "lora", **one_rank(plan, "swift"), **found, **undropped}


def llamafactory(plan: RankPlan) -> Fields:
    """`llamafactory-cli train llamafactory.yaml`."""
    outside = sorted({row.site.tower for row in plan.sites if row.rank} - {"language"})
    if outside:
        raise UsageError(
            f"--emit llamafactory: what trains of a {outside[0]} tower is decided by its own table of model families, "
            f"not by names; {INSTEAD} peft, axolotl, swift or unsloth"
        )
    fields = one_rank(plan, "llamafactory")
    require_whole([fields["lora_alpha"]], "llamafactory", "peft or unsloth")
    parameters = targets(plan, "llamafactory").get("target_parameters")
    if parameters:
        raise UsageError(
            f"--emit llamafactory: it takes names of modules, and PEFT adapts {parameters[0]} by parameter; {INSTEAD} "
            "peft, axolotl or swift"
        )
    names = full_paths(plan, plan.ranks, "llamafactory")
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


TRAINERS: dict[str, tuple[Callable[[RankPlan], Fields], Callable[[Mapping[str, Any]], str], str]] = {
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


def emit(plan: RankPlan, trainer: str, options: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, str]:
    """(text, file suffix) of the plan for one trainer. options: of the run, by `rankwise train`'s names; the trainer's
    file gets those that it has a place for.

    Raises UsageError, naming what this trainer cannot express and what can, where it would train anything else.
    """
    if trainer not in TRAINERS:
        raise UsageError(f"--emit {trainer}: known trainers are {', '.join(TRAINERS)}")
    plan.require_ranks(f"--emit {trainer}: the plan")
    fields, written, suffix = TRAINERS[trainer]
    names = RUN_OPTIONS[trainer]
    return written(fields(plan) | {names[key]: options[key] for key in options if key in names}), suffix


def write_configs(
    folder: Path, trainers: Sequence[str], plan: RankPlan, options: Mapping[str, Any]
) -> tuple[dict[str, Path], list[str]]:
    """One config per trainer, by name, and what the others cannot express."""
    files, refused = {}, []
    for trainer in trainers:
        try:
            text, suffix = emit(plan, trainer, options)
        except UsageError as error:
            refused.append(str(error))
            continue
        files[trainer] = write_text(folder / "configs" / f"{trainer}.{suffix}", text + "\n")
    return files, refused


def write_emitted(config: RanksConfig, plan: RankPlan, probe: Probe) -> tuple[list[Path], list[str]]:
    """One config per trainer, and why the others cannot take the plan: known only now that it has been measured."""
    files, refused = write_configs(Path(config.output_dir), config.emit, of_model(plan, config, probe), {})
    return [*files.values()], refused


def of_model(plan: RankPlan, config: RanksConfig, probe: Probe) -> RankPlan:
    """The plan with its sites as the model describes them, where that is on this disk: the files of an adapter do not
    tell whether their model has fused experts."""
    folder = resolve(config.base) if config.base else Path(probe.model_name)
    if not config.emit or not (folder / "config.json").is_file():
        return plan
    known = model_sites(meta_model(str(folder)))
    rows = (replace(row, site=known.get(row.site.path, row.site)) for row in plan.sites)
    return replace(plan, sites=tuple(rows))
