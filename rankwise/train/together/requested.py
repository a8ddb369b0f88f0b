"""The arms that `train --arms FILE` asks for: read, held against what arms in one batch can do, given ranks.

arms = read_arms(config)                 # [ArmSection(name="r8", rank=8, learning_rate=2e-4), …]
refuse(config, arguments)                # UsageError that names the option: dropout, accumulation, packing, …
planned = [plan_arm(config, arm, skeleton, name) for arm in arms]
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from rankwise.core.phase import Norm
from rankwise.core.plan import RankPlan
from rankwise.errors import UsageError
from rankwise.files.run_folder import CONFIG, MANIFEST
from rankwise.options.commands import TrainConfig
from rankwise.options.field import options_of, read_values, typed_values
from rankwise.options.sections import ArmSection, LoraSection
from rankwise.train.adapter import choose_plan, sites_for
from rankwise.train.checkpoints import NEWEST, NO
from rankwise.train.phases import schedule_of
from rankwise.train.towers import train_use

FOLDER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
TAKEN = ("arms.json", CONFIG, MANIFEST, "input.json", "con", "nul", "aux", "prn")
STARTS = ("default", "gaussian", "orthogonal")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
Test = Callable[[Any], bool]

# Option → when it is refused, and why. Options of ours first, then training arguments.
OWN: Mapping[str, tuple[Test, str]] = {
    "lora_dropout": (bool, "arms in one batch train without dropout: give --lora_dropout 0"),
    "packing": (bool, "arms take plain rows"),
    "use_dora": (bool, "arms are plain LoRA"),
    "loraplus_lr_ratio": (lambda ratio: ratio is not None, "an arm has one rate for A and B"),
    "lora_bias": (lambda bias: bias != "none", "arms train factors alone"),
    "init_lora_weights": (lambda start: start not in STARTS, f"arms start as {', '.join(STARTS)}"),
    "warm_start": (lambda start: start != "none", "arms start as PEFT draws"),
    "allocator": (lambda name: name != "none", "the ranks of an arm are fixed"),
    "use_depth": (bool, "arms take text rows"),
    "full": (bool, "arms train adapters alone"),
    "select": (lambda metric: metric == "accuracy", "an arm's best factors are chosen by loss: --select loss"),
    "early_stopping": (bool, "all arms take as many steps; --select loss keeps the best"),
    "estimate": (bool, "estimate one of the arms without --arms"),
    "adapter_folder": (lambda folder: folder != ".", "every arm has a folder of its own"),
    "allow_partial_resume": (bool, "finished arms are kept whole"),
    "resume_from_checkpoint": (
        lambda asked: asked is not None and asked.lower() not in (*NEWEST, *NO),
        "arms have no checkpoints: `true` keeps the finished ones",
    ),
}
TRAINING: Mapping[str, tuple[Test, str]] = {
    "gradient_accumulation_steps": (lambda count: count > 1, "raise --per_device_train_batch_size"),
    "max_steps": (lambda steps: steps < 1, "arms take a number of steps, not epochs: give --max_steps N"),
    "optim": (lambda name: str(getattr(name, "value", name)) not in OPTIMIZERS, "arms are trained by AdamW"),
    "fp16": (bool, "arms have no gradient scaler: --bf16 or float32"),
    "label_smoothing_factor": (bool, "the loss of an arm is plain cross-entropy"),
    "neftune_noise_alpha": (lambda alpha: alpha is not None, "arms train without noise"),
    "activation_checkpointing": (bool, "lower --per_device_train_batch_size"),
    "train_sampling_strategy": (lambda name: name == "batch_rebalance", "take random, sequential or group_by_length"),
    "fsdp": (bool, "every process holds the whole base and trains arms of its own"),
    "deepspeed": (bool, "every process holds the whole base and trains arms of its own"),
    "torch_compile": (bool, "arms run through hooks"),
    "report_to": (bool, "each arm has its losses in its folder, in training_log.csv"),
    "use_liger_kernel": (bool, "arms run the model's own code"),
    "auto_find_batch_size": (bool, "all arms share one batch size"),
    "eval_on_start": (bool, "leave it out: the base's loss is the same for all arms"),
    "save_strategy": (lambda name: str(name) not in ("no", "none", "None"), "arms write no checkpoints"),
}


def read_arms(config: TrainConfig) -> list[ArmSection]:
    """The arms of the file, each whole: what one does not say is as the command says.

    UsageError, naming the file and the arm: not a list of arms, unknown keys (with near names), values out of range,
    rank and plan at once, names that two have or that no folder can have.
    """
    assert config.arms is not None
    path = Path(config.arms)
    content, known = read_values(path), list(options_of(ArmSection()))
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        keys = ", ".join(option.name for option in known)
        raise UsageError(f"{path}: expected a list of arms, each with some of: {keys}")
    arms = []
    for number, row in enumerate(content, 1):
        where = f"{path}: arm {number}" + (f" ({row['name']})" if row.get("name") else "")
        arm = ArmSection(**typed_values({str(key): value for key, value in row.items()}, known, where))
        check_arm(arm, where)
        arms.append(arm)
    repeated = [name for name, count in Counter(arm.name.lower() for arm in arms).items() if count > 1]
    if repeated:
        raise UsageError(f"{path}: {repeated[0]} is the name of several arms; each writes a folder of its own name")
    return arms


def check_arm(arm: ArmSection, where: str) -> None:
    if not arm.name:
        raise UsageError(f"{where}: name is missing; it becomes the arm's folder")
    if not FOLDER_NAME.fullmatch(arm.name) or arm.name.lower() in TAKEN or arm.name.startswith("checkpoint-"):
        raise UsageError(
            f"{where}: {arm.name!r} cannot be the arm's folder: take letters, digits, `.`, `_` and `-`, and no name "
            "that files of the run have"
        )
    if arm.rank is not None and arm.plan is not None:
        raise UsageError(f"{where}: rank and plan both give the ranks; give one of them")


def refuse(config: TrainConfig, arguments: TrainingArguments) -> None:
    """UsageError naming the option that arms in one batch cannot do."""
    use, form, given = train_use(config.towers), schedule_of(config.phases), config.training
    own: dict[str, Any] = {"resume_from_checkpoint": config.resume_from_checkpoint, "packing": config.packing}
    own |= {name: getattr(config, name) for name in ("adapter_folder", "allow_partial_resume")}
    sections = (config.lora, config.allocation, config.depth, config.towers, config.selection, config.estimate)
    own |= {name: value for section in sections for name, value in vars(section).items()}
    own["lora_dropout"] = config.lora.dropout
    told = {name: getattr(arguments, name, None) for name in TRAINING} | {"save_strategy": given.get("save_strategy")}
    for values, table in ((own, OWN), (told, TRAINING)):
        for name, (refused, why) in table.items():
            if values[name] is not None and refused(values[name]):
                raise UsageError(f"--arms does not go with --{name} {shown(values[name])}: {why}")
    if set(use.lora) != {"language"} or use.rates or use.routers:
        raise UsageError("--arms adapts the language tower, each arm at its own rate: leave other towers and rates out")
    if isinstance(form, Norm):
        raise UsageError(
            f"--arms does not go with the phases {form}, which are chosen on the way; give a fixed schedule"
        )


def shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(getattr(value, "value", value))


@dataclass(frozen=True)
class PlannedArm:
    """An arm with all that its run is told. config: of this arm alone, as `rankwise train` takes it."""

    arm: ArmSection
    config: TrainConfig
    plan: RankPlan
    left_out: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def learning_rate(self) -> float:
        return float(self.config.training["learning_rate"])

    def line(self) -> str:
        """`r8: rank 8, learning rate 0.0002, seed 42, scale 2`"""
        ranks = sorted(set(self.plan.ranks.values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        scales = sorted({self.plan.scale(each) for each in ranks})
        scale = f"{scales[0]:.4g}" + (f" to {scales[-1]:.4g}" if len(scales) > 1 else "")
        return f"{self.arm.name}: {rank}, learning rate {self.learning_rate:g}, seed {self.config.seed}, scale {scale}"


def config_of(config: TrainConfig, arm: ArmSection, rate: float) -> TrainConfig:
    """The config of an arm alone. rate: the command's learning rate."""
    lora = config.lora
    if arm.plan is not None:
        lora = replace(lora, lora_config=arm.plan, lora_r=LoraSection().lora_r, lora_alpha=None, use_rslora=False)
    elif arm.rank is not None:
        lora = replace(lora, lora_config=None, lora_r=arm.rank)
    if arm.scale is not None and lora.lora_config is None:
        lora = replace(lora, lora_alpha=arm.scale * (math.sqrt(lora.lora_r) if lora.use_rslora else lora.lora_r))
    own = {"learning_rate": rate if arm.learning_rate is None else arm.learning_rate}
    return replace(
        config,
        lora=lora,
        arms=None,
        seed=config.seed if arm.seed is None else arm.seed,
        output_dir=str(Path(config.output_dir) / arm.name),
        training={**config.training, **own},
    )


def plan_arm(config: TrainConfig, arm: ArmSection, skeleton: PreTrainedModel, name: str, rate: float) -> PlannedArm:
    """Ranks and scale of an arm, checked against the model.

    UsageError for ranks above ⌊mn/(m+n)⌋ of a matrix, where a pair would have more parameters than the matrix itself,
    and for one scale of a plan that has several.
    """
    own = config_of(config, arm, rate)
    plan, left_out = choose_plan(own.lora, sites_for(own.lora, skeleton), name)
    if arm.scale is not None and own.lora.lora_config is not None:
        if plan.use_rslora:
            raise UsageError(f"arm {arm.name}: the scale of an rsLoRA plan follows each rank; leave scale out")
        plan = replace(plan, alpha_over_rank=arm.scale)
    check_ranks(arm, plan, own.lora.lora_r if own.lora.lora_config is None else 0)
    return PlannedArm(arm, own, plan, left_out)


def check_ranks(arm: ArmSection, plan: RankPlan, asked: int) -> None:
    """asked: the one rank of all matrices, which the plan may have cut."""
    above = [(row.site.largest_rank, row) for row in plan.sites if max(row.rank, asked) > row.site.largest_rank]
    if above:
        largest, row = min(above, key=lambda pair: pair[0])
        m, n = row.site.shape
        raise UsageError(
            f"arm {arm.name}: rank {max(row.rank, asked)} is above ⌊mn/(m+n)⌋ = {largest} of {row.site.path} "
            f"({m}×{n}): the pair would have more parameters than the matrix"
        )


def refuse_model(model: PreTrainedModel) -> None:
    """UsageError for dropout of the base's own, which the Trainer would apply."""
    dropped = {
        f"{path or 'the model'} ({rate:g})"
        for path, module in model.named_modules()
        for rate in [dropout_of(module)]
        if rate > 0
    }
    if dropped:
        raise UsageError(
            f"--arms trains without dropout, and the base drops out at {min(dropped)}: set its rates to 0 in its "
            "config.json"
        )


def dropout_of(module: nn.Module) -> float:
    """Of a dropout layer, or of an attention that drops out itself."""
    found = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return found if isinstance(found, float) else 0.0
