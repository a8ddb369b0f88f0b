"""From the LoRA options to a PEFT model: which sites, which ranks, which start."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from rankwise.core.plan import RankPlan, recorded_sites
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.atomic import read_object
from rankwise.files.plan import find_plan, read_plan
from rankwise.files.processes import announce
from rankwise.models.adalora import Allocation, adapt_allocated
from rankwise.models.adapt import LANGUAGE, LoraSettings, adapt, check_plan, choose_sites, restricted, uniform_plan
from rankwise.models.depth.encoder import attach_depth
from rankwise.models.load import loaded
from rankwise.models.sites import tower_of
from rankwise.nets.starts import eva_start, input_directions, warm_start
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection
from rankwise.score.likelihood import BESIDE
from rankwise.stages.training import Job
from rankwise.store.deltas import open_deltas
from rankwise.train.arguments import frozen_dtype

EVA_BATCHES, EVA_ROWS = 16, 8
PLAIN_SCALE, LARGE_SCALE = 2, 4


def check_lora(lora: LoraSection) -> None:
    """Combinations of LoRA options that cannot work."""
    settings_of(lora)
    if lora.load_in_8bit and lora.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if lora.warm_start == "delta" and (lora.use_dora or lora.init_lora_weights != "default"):
        raise UsageError("--warm_start delta is an initialisation: leave --use_dora and --init_lora_weights out")


def settings_of(lora: LoraSection, full: Iterable[str] = ()) -> LoraSettings:
    return LoraSettings(lora.lora_dropout, lora.lora_bias, lora.use_dora, lora.init_lora_weights, tuple(full))


def quantization(lora: LoraSection) -> str | None:
    return "8bit" if lora.load_in_8bit else "4bit" if lora.load_in_4bit else None


def described_target(lora: LoraSection) -> str:
    return ", ".join(lora.target_modules) or lora.target or "all attention and MLP projections"


def planned(
    lora: LoraSection, sites: Mapping[str, Site], name: str, towers: Sequence[str] = LANGUAGE
) -> tuple[RankPlan, list[str]]:
    """What is adapted with which rank, in these towers, checked against the model; and what of a plan is left out."""
    if not lora.lora_config:
        chosen = choose_sites(sites, lora.target, lora.target_modules, towers)
        plan = uniform_plan(chosen, lora.lora_r, lora.lora_alpha, lora.use_rslora, name)
        say_scale(plan)
        return plan, []
    plan = checked_plan(Path(lora.lora_config), sites, towers)
    left_out: list[str] = []
    if lora.target or lora.target_modules:
        plan, left_out = restricted(plan, choose_sites(sites, lora.target, lora.target_modules, towers))
        announce(f"note: {len(left_out)} sites of the plan are outside the targets and are left out")
    for tower in towers:
        if all(row.site.tower != tower for row in plan.sites if row.rank):
            announce(f"note: the plan has nothing of the {tower} tower, which stays frozen")
    for row in plan.sites:
        if row.clipped and "above min" in row.clipped:
            announce(f"note: {row.site.path}: rank {row.clipped}; cut to it")
    if plan.doubt:
        announce(f"warning: {lora.lora_config}: {plan.doubt}")
    say_scale(plan)
    return plan, left_out


def say_scale(plan: RankPlan) -> None:
    """rsLoRA's scale, which is often several times plain LoRA's, with the learning rate that goes with it."""
    if not plan.use_rslora:
        return
    low, high = (plan.scale(rank) for rank in (plan.largest, min(plan.ranks.values())))
    span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    announce(f"rsLoRA: alpha {plan.alpha(plan.largest):g} at every site, scale alpha/√r = {span}")
    if high > LARGE_SCALE:
        announce(
            f"note: a scale above {LARGE_SCALE} makes every step larger: lower --learning_rate, to about "
            f"{PLAIN_SCALE / high:.2g} of what plain LoRA takes (scale {PLAIN_SCALE})"
        )


def checked_plan(path: Path, sites: Mapping[str, Site], towers: Sequence[str] = LANGUAGE) -> RankPlan:
    """A plan from its file, for this model and within these towers."""
    file = find_plan(path)
    recorded = recorded_sites(read_object(file))
    if any(site.tower == "unknown" for site in recorded.values()):
        raise UsageError(
            f"{file} was made from files without a config.json: its sites are named by checkpoint keys and their tower "
            "is unknown. Make it again with `rankwise ranks` from Hugging Face model folders"
        )
    plan = read_plan(file, sites)
    check_plan(plan, towers)
    return plan


def adapted(
    config: TrainConfig, job: Job, plan: RankPlan, full: Iterable[str] = (), allocation: Allocation | None = None
) -> PeftModel:
    """The base with its adapter at the planned start, and copies of the `full` modules. The one seed decides the random
    part. allocation: the plan is where AdaLoRA starts."""
    dtype = frozen_dtype(config.model.dtype, job.arguments)
    settings = settings_of(config.lora, full)
    check_precision(settings, dtype, job.arguments)
    base = loaded(config.model, job.name, dtype, quantization(config.lora))
    if job.depth:
        attach_depth(base, job.depth)
    set_seed(config.seed)
    if allocation is not None:
        return adapt_allocated(base, plan, settings, allocation)
    if settings.init == "eva":
        directions = input_directions(base, plan, eva_batches(job, config.seed))
        model = adapt(base, plan, settings)
        eva_start(model, directions)
        return model
    model = adapt(base, plan, settings)
    if config.lora.deltas:
        generator = torch.Generator().manual_seed(config.seed)
        warm_start(model, plan, open_deltas(Path(config.lora.deltas)), generator)
    return model


def check_precision(settings: LoraSettings, dtype: torch.dtype, arguments: TrainingArguments) -> None:
    """Modules trained in full are float32: among half-precision ones only autocast lets them work. A depth gate sees
    to that itself."""
    whole = [path for path in settings.full if tower_of(path, {}) != "depth"]
    if whole and dtype != torch.float32 and not (arguments.bf16 or arguments.fp16):
        raise UsageError(f"--full among weights in {dtype} needs mixed precision: --bf16 or --fp16, or --dtype float32")


def eva_batches(job: Job, seed: int) -> list[dict[str, torch.Tensor]]:
    """A few batches of training rows, drawn with the seed, as model inputs without labels."""
    rows, collator = job.rows, job.collator
    count = min(len(rows), EVA_BATCHES * EVA_ROWS)
    chosen = random.Random(seed).sample(range(len(rows)), count)
    parts = [chosen[start : start + EVA_ROWS] for start in range(0, count - count % EVA_ROWS or count, EVA_ROWS)]
    batches = [collator([rows[index] for index in part]) for part in parts]
    return [{name: value for name, value in batch.items() if name not in BESIDE} for batch in batches]
