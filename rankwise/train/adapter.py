"""What trains of each tower: from the tower options to sites, whole modules and learning rates.

--lora language,projector --full vision --vision_lr 1e-5     (train; a tower that is not named keeps its default)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments, set_seed

from rankwise.core.plan import RankPlan, recorded_sites
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import BESIDE
from rankwise.files.atomic import read_object
from rankwise.files.plan import find_plan, read_plan
from rankwise.files.processes import announce
from rankwise.models.adapt import Allocation, LoraSettings, adapt, adapt_allocated
from rankwise.models.depth.encoder import attach_depth
from rankwise.models.load import load_weights
from rankwise.models.sites import check_towers, full_modules, tower_of, tower_prefixes, towers_of
from rankwise.models.targets import LANGUAGE, check_plan, choose_sites, restrict_plan, uniform_plan
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import LoraSection, TowersSection
from rankwise.page.text import plural
from rankwise.ranks.deltas import open_deltas
from rankwise.train.arguments import frozen_dtype
from rankwise.train.job import Job
from rankwise.train.starts import eva_start, input_directions, warm_start

LORA, FULL, FROZEN = "lora", "full", "freeze"


@dataclass(frozen=True)
class TowerUse:
    """Which towers get an adapter, which train in full, and the rates of those that have their own."""

    lora: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, ...]:
        return (*self.lora, *self.full)


def tower_use(section: TowersSection, language: str) -> TowerUse:
    """The options, over the defaults: `language` (lora or full) for the language tower, the rest frozen.

    UsageError where a tower stands in two lists, nothing trains, or a frozen tower has a learning rate.
    """
    lists = ((FROZEN, section.freeze), (LORA, section.lora), (FULL, section.full))
    uses = {"language": language, "vision": FROZEN, "projector": FROZEN}
    given: dict[str, str] = {}
    for use, towers in lists:
        for tower in towers:
            if given.setdefault(tower, use) != use:
                raise UsageError(f"--{given[tower]} {tower} and --{use} {tower} exclude each other; give one of them")
    uses |= given
    chosen = {use: tuple(tower for tower, its in uses.items() if its == use) for use in (LORA, FULL)}
    if not any(chosen.values()):
        raise UsageError("every tower is frozen: name one with --lora or --full")
    found = TowerUse(chosen[LORA], chosen[FULL], rates_of(section))
    for tower in found.rates:
        if tower not in found.trained:
            raise UsageError(f"--{tower}_lr: the {tower} tower is frozen; --lora {tower} or --full {tower} trains it")
    return found


def documented(config: TrainConfig, model: Any) -> TrainConfig:
    """With the towers that the guide of a model family adapts, where neither towers, nor a target, nor a plan is given.

    model: its config (Isaac: all linear layers of language tower and projector).
    """
    own = getattr(model, "adapted_towers", None)
    lora, towers = config.lora, config.towers
    given = [lora.lora_config, lora.target, *lora.target_modules, *towers.freeze, *towers.lora, *towers.full]
    if own is None or any(given):
        return config
    return replace(config, towers=replace(towers, lora=list(own)))


def rates_of(section: TowersSection) -> dict[str, float]:
    rates = {"language": section.language_lr, "vision": section.vision_lr, "projector": section.projector_lr}
    return {tower: rate for tower, rate in rates.items() if rate is not None}


def check_rates(rates: Mapping[str, float], training: Mapping[str, Any]) -> None:
    """UsageError where DeepSpeed makes the optimizer, which knows one rate."""
    if rates and training.get("deepspeed"):
        raise UsageError("learning rates per tower do not work under DeepSpeed; use FSDP2 (--fsdp) instead")


def train_use(section: TowersSection) -> TowerUse:
    """Of `train`: adapters, and other towers in full beside them.

    UsageError for the language tower in full: PEFT would keep a copy of nearly the whole model beside the model, could
    not tie it to its embeddings, and what comes out is no adapter. Also where there is no adapter at all.
    """
    use = tower_use(section, LORA)
    if "language" in use.full:
        raise UsageError(
            "train adapts the language tower; `rankwise finetune --full language` trains it in full, without a second "
            "copy of it in memory and in the adapter"
        )
    if not use.lora:
        towers = ",".join(use.full)
        raise UsageError(
            f"nothing gets an adapter; `rankwise finetune --freeze language --full {towers} --save both` trains "
            f"{' and '.join(use.full)} alone"
        )
    return use


def finetune_use(section: TowersSection, method: str) -> TowerUse:
    """Of `finetune`: towers in full with `--method full`, adapters with `--method lora`."""
    use = tower_use(section, FULL if method == "full" else LORA)
    odd, way = (use.lora, LORA) if method == "full" else (use.full, FULL)
    if odd:
        raise UsageError(f"--{way} {','.join(odd)} goes with --method {way}, and this is --method {method}")
    return use


def words(use: TowerUse) -> str:
    """`adapters in language, projector; in full: vision (rate 1e-05)`, for --dry-run."""
    rated = {tower: tower + (f" (rate {use.rates[tower]:g})" if tower in use.rates else "") for tower in use.trained}
    parts = {"adapters in": use.lora, "in full:": use.full}
    lists = {how: ", ".join(rated[tower] for tower in towers) for how, towers in parts.items() if towers}
    return "train " + "; ".join(f"{how} {towers}" for how, towers in lists.items())


def full_of(model: PreTrainedModel, use: TowerUse) -> dict[str, str]:
    """Path → tower of the modules to train in full beside an adapter, after a look at what the model has."""
    check_towers(model, use.trained)
    found = full_modules(model, use.full)
    if found.loose:
        announce(f"note: {', '.join(found.loose)}: held by no module that PEFT can carry, so it stays frozen")
    prefixes = tower_prefixes(model)
    return {path: tower_of(path, prefixes) for path in found.paths}


def trained_lines(model: PreTrainedModel, plan: RankPlan, full: Mapping[str, str]) -> list[str]:
    """One line per tower: what is adapted with which ranks, what trains in full, what is frozen."""
    adapted = [row.site.tower for row in plan.sites if row.rank]
    lines = [sites_line(plan, tower) for tower in dict.fromkeys(adapted)]
    for tower in dict.fromkeys(full.values()):
        lines.append(full_line(model, [path for path, its in full.items() if its == tower], tower))
    frozen = [tower for tower in towers_of(model) if tower not in {*adapted, *full.values()}]
    return [*lines, f"frozen: {', '.join(frozen)}"] if frozen else lines


def sites_line(plan: RankPlan, tower: str) -> str:
    """What is adapted of a tower: counts per projection and the span of ranks."""
    rows = [row for row in plan.sites if row.rank and row.site.tower == tower]
    counts = Counter(row.site.projection for row in rows)
    ranks = sorted(row.rank for row in rows)
    span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    named = ", ".join(f"{name} ×{count}" for name, count in counts.items())
    return f"adapting {plural(len(rows), 'site')} of the {tower} tower: {named}; rank {span}"


def full_line(model: PreTrainedModel, paths: Sequence[str], tower: str) -> str:
    count = sum(parameter.numel() for path in paths for parameter in model.get_submodule(path).parameters())
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"training the {tower} tower in full: {shown} ({plural(count, 'parameter')})"


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
        plan, left_out = restrict_plan(plan, choose_sites(sites, lora.target, lora.target_modules, towers))
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
    base = load_weights(config.model, job.name, dtype, quantization(config.lora))
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
