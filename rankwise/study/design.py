"""The design of a study: arms, contrasts, grids, seeds. Checked before anything is read.

design = design_study(config)
design.contenders        arm × budget × scheduler × phase state
design.contrasts         (first, second) pairs that get a verdict
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankwise.data.sources.load import check_data
from rankwise.errors import UsageError
from rankwise.files.atomic import digest
from rankwise.options.field import Options, flatten, unknown
from rankwise.options.study import StudyConfig
from rankwise.pipeline.idle import refuse_idle
from rankwise.study.arms import (
    BASE,
    REFERENCES,
    VERSUS,
    check_arm,
    chooses,
    contrast,
    default_arms,
    default_contrasts,
    has_state,
    recorded,
    yoked_to,
)
from rankwise.study.predictions import predicted

NOT_DESIGN = ("output_dir", "batch_arms", "device", "deviation", "time_only")
# The options of the first registrations, which are in every hash. One that is added later must not make a study of
# before another one: it is in the hashes only where it is not at its default, which therefore never changes.
FIRST_OPTIONS = frozenset(
    """question kind model_name revision trust_remote_code dtype attn_implementation task data_path prompt chat_template
    chat_template_kwargs max_seq_length overlong skip_bad image_folder allow_outside allow_urls repeat_image image_first
    roles aux_reason download device_target deltas probes probe_rows probe_steps probe_batch_size probe_learning_rate
    grid_low grid_high grid_points grid_growth full_grid_low full_grid_high tuning_seeds scales lr_schedulers
    phase_states dev_path test_path train_size dev_size test_size target budgets arms primary metric smallest_effect
    schedule_plan steps batch_size warmup_steps weight_decay max_grad_norm max_rank first_seeds more_seeds most_seeds
    resamples seed""".split()
)
# Options that are registered, but change no run: a ledger's keys do not depend on them.
ASKED = ("question", "arms", "primary", "budgets", "smallest_effect", "resamples", "kind", "metric")
ASKED_LATER = ("primary_budgets", "predictions", "assumed_seed_sd", "assumed_item_sd")
TUNING_OFFSET = 500


@dataclass(frozen=True)
class Contender:
    """An arm at one budget, in one way of training; its learning rate and scale are still to be tuned.

    `budget` is empty for references, which have none.
    """

    arm: str
    budget: str
    scheduler: str
    state: str

    @property
    def is_reference(self) -> bool:
        return self.arm in REFERENCES

    @property
    def trains_alone(self) -> bool:
        """Whether it trains separately (all weights, or phases chosen during training) instead of in a stack."""
        return self.is_reference or chooses(self.arm)

    @property
    def replayed(self) -> Contender | None:
        """The contender whose choices a yoked arm replays."""
        arm = yoked_to(self.arm)
        return replace(self, arm=arm) if arm is not None else None


@dataclass(frozen=True)
class Run:
    """One training run, as the ledger keeps it. purpose: tune or report. source: the run that a yoked one replays."""

    contender: Contender
    scale: str
    learning_rate: float
    seed: int
    purpose: str
    recipe: str
    source: Run | None = None

    @property
    def key(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("contender", "source")}
        told = ("scale", "learning_rate", "seed")
        replays = {"replays": {name: vars(self.source)[name] for name in told}} if self.source is not None else {}
        return vars(self.contender) | {"arm": recorded(self.contender.arm)} | own | replays


@dataclass(frozen=True)
class RateGrid:
    """Learning rates low·ratio^k; k below 0 and above the last point continue it."""

    low: float
    high: float
    points: int

    def rate(self, k: int) -> float:
        ratio = (self.high / self.low) ** (1 / (self.points - 1))
        return float(f"{self.low * ratio**k:.6g}")


@dataclass(frozen=True)
class Design:
    """A checked study."""

    config: StudyConfig
    arms: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]

    @property
    def contenders(self) -> list[Contender]:
        """Every arm at every budget, with every scheduler and phase state that matters to it; references last."""
        grid = self.config.grid
        found = []
        for budget, scheduler, arm in itertools.product(self.config.budgets, grid.lr_schedulers, self.arms):
            states = grid.phase_states if has_state(arm, self.config) else ["keep"]
            way = grid.lr_schedulers[0] if arm == BASE else scheduler
            found += [Contender(arm, "" if arm in REFERENCES else budget, way, state) for state in states]
        return sorted(dict.fromkeys(found), key=lambda each: each.is_reference)

    def grid(self, contender: Contender) -> RateGrid:
        own = self.config.grid
        if contender.arm == "full":
            return RateGrid(own.full_grid_low, own.full_grid_high, own.grid_points)
        return RateGrid(own.grid_low, own.grid_high, own.grid_points)

    def pairs(self) -> list[tuple[Contender, Contender]]:
        """The primary contrasts in every primary budget and way of training: those that get a verdict."""
        budgets = ("", *(self.config.primary_budgets or self.config.budgets))
        found = [pair for first, second in self.contrasts for pair in self.paired(first, second)]
        return [pair for pair in found if all(each.budget in budgets for each in pair)]

    def paired(self, first: str, second: str) -> list[tuple[Contender, Contender]]:
        """first and second in the same budget and scheduler; phase states are matched where they matter to both."""
        return [
            (one, other)
            for one, other in itertools.product(self.contenders, repeat=2)
            if (one.arm, other.arm) == (first, second)
            and (one.scheduler == other.scheduler or BASE in (one.arm, other.arm))
            and (one.budget == other.budget or not one.budget or not other.budget)
            and (one.state == other.state or not (has_state(first, self.config) and has_state(second, self.config)))
        ]

    def label(self, contender: Contender) -> str:
        """The arm, with its phase state where there are several."""
        several = len(self.config.grid.phase_states) > 1 and has_state(contender.arm, self.config)
        return f"{contender.arm}, {contender.state}" if several else contender.arm

    def tuning_seeds(self) -> list[int]:
        return [self.config.seed * 1000 + TUNING_OFFSET + i for i in range(self.config.grid.tuning_seeds)]

    def report_seeds(self, count: int) -> list[int]:
        return [self.config.seed * 1000 + i for i in range(count)]

    @property
    def content(self) -> dict[str, Any]:
        """All preregistered decisions: the content that is hashed. Options that are newer than the first registrations
        are left out at their default."""
        rest = hashed_options(self.config, FIRST_OPTIONS, NOT_DESIGN)
        pairs = [VERSUS.join(map(recorded, pair)) for pair in self.contrasts]
        return rest | {"arms": [recorded(arm) for arm in self.arms], "primary": pairs}

    @property
    def recipe(self) -> str:
        """Hash of the settings that determine a run's training and scoring: runs of another recipe are not reused."""
        grids = tuple(flatten(self.config.grid))
        counts = ("first_seeds", "more_seeds", "most_seeds")
        left_out = (*ASKED, *ASKED_LATER, *grids, *counts)
        rest = {name: value for name, value in self.content.items() if name not in left_out}
        return digest(rest)[:16]


def hashed_options(config: Options, first: Collection[str], left_out: Collection[str]) -> dict[str, Any]:
    """Name → value of the options that a hash is of: the first ones always, later ones only where they are not at their
    default, so that what was recorded before they existed keeps its hash."""
    defaults = flatten(type(config)())
    return {
        name: value
        for name, value in flatten(config).items()
        if name not in left_out and (name in first or value != defaults[name])
    }


def design_study(config: StudyConfig) -> Design:
    """The design of a config. UsageError for invalid values."""
    arms = arms_of(config)
    contrasts = tuple(contrast(text, arms) for text in config.primary) or default_contrasts(arms, config)
    if not contrasts:
        raise UsageError(f"no primary contrast among the arms {', '.join(arms)}; name them, as in --primary 'a vs b'")
    predicted(config, arms, contrasts)
    return Design(config, arms, contrasts)


def arms_of(config: StudyConfig) -> tuple[str, ...]:
    """The arms, each once. UsageError for invalid values."""
    check(config)
    arms = tuple(dict.fromkeys(config.arms or default_arms(config)))
    for arm in arms:
        check_arm(arm, config)
    check_yoked(arms, config)
    return arms


def check_yoked(arms: tuple[str, ...], config: StudyConfig) -> None:
    """What is replayed must be made, and for another seed."""
    for arm in arms:
        if config.kind == "phases" and yoked_to(arm) not in (None, *arms):
            raise UsageError(f"{arm} replays the runs of {yoked_to(arm)}: name that arm as well")
        if config.kind == "phases" and yoked_to(arm) and config.grid.tuning_seeds < 2:
            raise UsageError(f"{arm} replays the run of another seed, in tuning as well: --tuning_seeds at least 2")


def another_seed(seed: int, first: int) -> int:
    """The seed whose run a yoked one replays: the one before, of the first the second. Seeds that are added later
    change nothing about it."""
    return seed - 1 if seed > first else seed + 1


def check(config: StudyConfig) -> None:
    """Refuse invalid numbers and combinations."""
    check_data(config.data, "study")
    refuse_idle(config)
    grid = config.grid
    if not config.model.model_name:
        raise UsageError("study needs a model: --model_name FOLDER_OR_HUB_ID")
    if not config.first_seeds <= config.most_seeds < TUNING_OFFSET:
        raise UsageError(
            f"seeds need --first_seeds ≤ --most_seeds < {TUNING_OFFSET}; got {config.first_seeds} and "
            f"{config.most_seeds}"
        )
    for low, high in ((grid.grid_low, grid.grid_high), (grid.full_grid_low, grid.full_grid_high)):
        if not low < high:
            raise UsageError(f"a grid of learning rates needs low < high; got {low:g} and {high:g}")
    if config.kind == "plans" and (len(grid.lr_schedulers) > 1 or len(grid.phase_states) > 1):
        raise UsageError("--lr_schedulers and --phase_states are crossed in a study of phases; give one of each")
    if not config.budgets:
        raise UsageError("study needs --budgets: parameter budgets of every arm")
    if other := next((budget for budget in config.primary_budgets if budget not in config.budgets), None):
        raise unknown(other, config.budgets, "--primary_budgets", "budget")
    if (config.assumed_seed_sd is None) != (config.assumed_item_sd is None):
        raise UsageError("the power needs both, --assumed_seed_sd and --assumed_item_sd, or neither")


def run_counts(design: Design) -> Mapping[str, int]:
    """How many runs the plan has: for tuning without growth, and for reporting at least and at most."""
    config, tuned = design.config, [each for each in design.contenders if each.arm != "base"]
    scales = {each: 1 if each.is_reference else len(config.grid.scales) for each in tuned}
    tuning = sum(scales.values()) * config.grid.grid_points * config.grid.tuning_seeds
    base = len(design.contenders) - len(tuned)
    return {
        "tuning": tuning,
        "least": tuning + base + len(tuned) * config.first_seeds,
        "most": tuning + base + len(tuned) * config.most_seeds,
    }


def further_counts(config: StudyConfig) -> list[int]:
    """Numbers of seeds at which the stop rule is asked."""
    steps = math.ceil((config.most_seeds - config.first_seeds) / config.more_seeds)
    return [min(config.first_seeds + i * config.more_seeds, config.most_seeds) for i in range(steps + 1)]
