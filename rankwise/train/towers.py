"""Trainable modules and learning rate of each tower: from the tower options to modules and groups of the optimizer.

    --lora language,projector --full vision --vision_lr 1e-5     a tower that is not named keeps its default
    [A, B of all towers] ─ split_by_tower(…, {"vision": 1e-5}) ─▶ [all other towers: 2e-4] [vision: 1e-5]

Weight decay and LoRA+ have made groups of their own by then; each is split, and keeps its ratio to the common rate. The
scheduler multiplies all rates by one factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from rankwise.core.plan import RankPlan
from rankwise.core.site import ROUTER
from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.models.sites import check_towers, full_modules, tower_of, tower_prefixes, towers_of
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import TowersSection
from rankwise.page.text import plural

LORA, FULL, FROZEN = "lora", "full", "freeze"


@dataclass(frozen=True)
class TowerUse:
    """Which towers get an adapter, which train in full, and the rates of those that have their own."""

    lora: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    routers: bool = False  # what chooses the experts of the adapted towers gets adapters, too

    @property
    def trained(self) -> tuple[str, ...]:
        return (*self.lora, *self.full)


def tower_use(section: TowersSection, language: str) -> TowerUse:
    """The options, over the defaults: `language` (lora or full) for the language tower, the rest frozen.

    UsageError where a tower stands in two lists, nothing trains, or a frozen tower has a learning rate.
    """
    adapted = [name for name in section.lora if name != ROUTER]
    lists = ((FROZEN, section.freeze), (LORA, adapted), (FULL, section.full))
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
    rates = {"language": section.language_lr, "vision": section.vision_lr, "projector": section.projector_lr}
    own = {tower: rate for tower, rate in rates.items() if rate is not None}
    found = TowerUse(chosen[LORA], chosen[FULL], own, ROUTER in section.lora)
    for tower in found.rates:
        if tower not in found.trained:
            raise UsageError(f"--{tower}_lr: the {tower} tower is frozen; --lora {tower} or --full {tower} trains it")
    return found


def default_towers(config: TrainConfig, model: Any) -> TrainConfig:
    """With the towers that the guide of a model family adapts, where neither towers, nor a target, nor a plan is given.

    model: its config (Isaac: all linear layers of language tower and projector).
    """
    own = getattr(model, "adapted_towers", None)
    lora, towers = config.lora, config.towers
    given = [lora.lora_config, lora.target, *lora.target_modules, *towers.freeze, *towers.lora, *towers.full]
    if own is None or any(given):
        return config
    return replace(config, towers=replace(towers, lora=list(own)))


def check_rates(rates: Mapping[str, float], training: Mapping[str, Any]) -> None:
    """UsageError where DeepSpeed makes the optimizer, which knows one rate."""
    if rates and training.get("deepspeed"):
        raise UsageError("learning rates per tower do not work under DeepSpeed; use FSDP2 (--fsdp) instead")


def train_use(section: TowersSection) -> TowerUse:
    """Towers of `train`: adapters, and other towers in full.

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
            f"no tower gets an adapter; `rankwise finetune --freeze language --full {towers} --save both` trains "
            f"{' and '.join(use.full)} alone"
        )
    return use


def finetune_use(section: TowersSection, method: str) -> TowerUse:
    """Towers of `finetune`: in full with `--method full`, adapters with `--method lora`."""
    use = tower_use(section, FULL if method == "full" else LORA)
    if use.routers:
        raise UsageError("--lora router goes with `rankwise train`; `finetune` makes no plan for routers")
    odd, way = (use.lora, LORA) if method == "full" else (use.full, FULL)
    if odd:
        raise UsageError(f"--{way} {','.join(odd)} goes with --method {way}, and this is --method {method}")
    return use


def describe_towers(use: TowerUse) -> str:
    """`adapters in language, projector; in full: vision (rate 1e-05)`, for --dry-run."""
    rated = {tower: tower + (f" (rate {use.rates[tower]:g})" if tower in use.rates else "") for tower in use.trained}
    parts = {"adapters in": use.lora, "in full:": use.full}
    lists = {how: ", ".join(rated[tower] for tower in towers) for how, towers in parts.items() if towers}
    if use.routers:
        lists["adapters in"] += " with its routers"
    return "train " + "; ".join(f"{how} {towers}" for how, towers in lists.items())


def full_of(model: PreTrainedModel, use: TowerUse) -> dict[str, str]:
    """Path → tower of the modules to train in full beside an adapter, after a look at what the model has."""
    check_towers(model, use.trained)
    found = full_modules(model, use.full)
    if found.loose:
        announce(f"note: {', '.join(found.loose)}: held by no module that PEFT can carry, so it stays frozen")
    prefixes = tower_prefixes(model)
    return {path: tower_of(path, prefixes) for path in found.paths}


def describe_trained(model: PreTrainedModel, plan: RankPlan, full: Mapping[str, str]) -> list[str]:
    """One line per tower: adapted modules and ranks, modules trained in full, frozen modules."""
    adapted = [row.site.tower for row in plan.sites if row.rank]
    lines = [sites_line(plan, tower) for tower in dict.fromkeys(adapted)]
    for tower in dict.fromkeys(full.values()):
        lines.append(full_line(model, [path for path, its in full.items() if its == tower], tower))
    frozen = [tower for tower in towers_of(model) if tower not in {*adapted, *full.values()}]
    return [*lines, f"frozen: {', '.join(frozen)}"] if frozen else lines


def sites_line(plan: RankPlan, tower: str) -> str:
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


RATE_COLUMN = "learning_rate_{}"


def split_by_tower(optimizer: Optimizer, towers: Mapping[int, str], rates: Mapping[str, float], common: float) -> None:
    """Give the parameters of these towers groups of their own, at the rate of their tower, before the first step.

    towers: id of a parameter → tower. rates, common: peak learning rates, of these towers and of all groups so far.
    """
    optimizer.param_groups[:] = [
        part for group in optimizer.param_groups for part in split_group(group, towers, rates, common)
    ]


def split_group(
    group: Mapping[str, Any], towers: Mapping[int, str], rates: Mapping[str, float], common: float
) -> list[dict[str, Any]]:
    """The group without these towers, though it be empty (the log reads the common rate there), and one for each."""
    rest = [parameter for parameter in group["params"] if towers[id(parameter)] not in rates]
    found = [{**group, "params": rest}]
    for tower, rate in rates.items():
        own = [parameter for parameter in group["params"] if towers[id(parameter)] == tower]
        scaled = rate if group["lr"] == common else rate * group["lr"] / common
        if own:
            found.append({**group, "params": own, "lr": scaled, "tower": tower})
    return found


def full_at_common_rate(optimizer: Optimizer, full: Collection[int], common: float) -> None:
    """Set back to the common rate what LoRA+ raises beside B: vectors of modules trained in full (ids: `full`)."""
    groups = []
    for group in optimizer.param_groups:
        whole = [parameter for parameter in group["params"] if id(parameter) in full]
        others = [parameter for parameter in group["params"] if id(parameter) not in full]
        groups.append({**group, "params": others})
        if whole:
            groups.append({**group, "params": whole, "lr": common})
    optimizer.param_groups[:] = groups


class RateWatch(TrainerCallback):
    """Remembers the rates of the last step, `learning_rate_vision` … (with LoRA+: of A), of towers that have their own:
    by the time it is logged, the scheduler has moved on."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates = {}
        for group in optimizer.param_groups:
            if "tower" in group:
                self.rates.setdefault(RATE_COLUMN.format(group["tower"]), float(group["lr"]))
