"""Execute runs in batches: train together, score on dev (and on test for the report), enter in the ledger.

What is scored on test lies in the same file and is looked at by nothing before `results` reads it once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rankwise.core.phase import BoundNorm, bind
from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.atomic import digest, read_if_there, read_object, write_json
from rankwise.files.document import typed
from rankwise.files.ledger import Ledger, Row
from rankwise.files.processes import gathered, own_share, process_index
from rankwise.options.study import StudyConfig
from rankwise.page.progress import progress
from rankwise.study.arms import STATIC, compress_pairs, schedule_of, timed_like
from rankwise.study.design import Design, Run
from rankwise.study.material import Material, ScoredItems
from rankwise.study.plans import Plans
from rankwise.train.finetune import language_parameters
from rankwise.train.together.alone import borrowed, train_alone, train_weights
from rankwise.train.together.fit import score
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import random_start, row_order, scales_of
from rankwise.train.together.train import Arm, TrainedArm, train_together

LAST = 0.1
Matrices = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """Where runs are made. recipe: hash of everything that decides how a run trains, beside its key."""

    config: StudyConfig
    material: Material
    plans: Plans
    ledger: Ledger
    recipe: str
    extra_steps: int

    def settings(self, run: Run) -> ArmSettings:
        config, contender = self.config, run.contender
        steps, rest = self.plans.steps(contender, self.extra_steps), (config.warmup_steps, config.weight_decay)
        found = ArmSettings(steps, config.batch_size, contender.scheduler, *rest)
        return replace(found, max_grad_norm=config.max_grad_norm, phase_state=contender.state)

    @property
    def in_turn(self) -> bool:
        """Whether some arms adapt experts, which no stack does: all of them then train one after the other."""
        return any(site.experts for site in self.material.sites)

    def order(self, run: Run, settings: ArmSettings) -> list[int]:
        return row_order(len(self.material.rows), settings.steps * settings.batch_size, run.seed)

    def finish(self, runs: Sequence[Run], what: str) -> None:
        """Make those of the runs that are not in the ledger, and before them what some of them replay."""
        sources = [run.source for run in runs if run.source is not None]
        self.share([*dict.fromkeys([*sources, *(run for run in runs if run.source is None)])], what)
        if sources:
            self.share([run for run in runs if run.source is not None], what)

    def share(self, runs: Sequence[Run], what: str) -> None:
        """Processes share the batches; all of them wait for the last, and read what the others have made."""
        batches = batches_of(runs, self)
        mine = own_share(batches, [cost(batch, self) for batch in batches])
        left = [batch for batch in mine if any(run.key not in self.ledger for run in batch)]
        for batch in progress(left, desc=what, unit="batch", leave=True):
            self.make([run for run in batch if run.key not in self.ledger])
        gathered({})  # all have finished theirs
        self.ledger.refresh()

    def make(self, runs: Sequence[Run]) -> None:
        """One batch, from start to ledger."""
        started = time.monotonic()
        reference = runs[0].contender.is_reference
        facts, matrices = self.reference(runs[0]) if reference else self.together(runs)
        seconds = round((time.monotonic() - started) / len(runs), 3)
        rows = [{"key": run.key, **fact, "seconds": seconds} for run, fact in zip(runs, facts, strict=True)]
        self.ledger.add(rows, matrices)

    def together(self, runs: Sequence[Run]) -> tuple[list[Row], Matrices]:
        """Adapters: trained in one stack but where phases are chosen on the way, scored in one stack; one after the
        other where they adapt experts."""
        material, settings = self.material, self.settings(runs[0])
        arms = [self.plans.arm(run, settings.steps, self.order(run, settings), self.replay(run)) for run in runs]
        trained, replays = self.trained(runs, arms, settings)
        results = [self.final(run, result, arm.scales) for run, result, arm in zip(runs, trained, arms, strict=True)]
        parts = {name: part.batches for name, part in self.parts(runs[0]).items()}
        matrices = score(material.model, results, [arm.scales for arm in arms], parts, in_turn=self.in_turn)
        facts = [
            {
                "parameters": sum(a.numel() + b.numel() for a, b in result.pairs.values()),
                "ranks": self.rank_map(runs[index]),
                "diverged": bool(matrices["dev"][index].isnan().any()),
                "train_loss": last_loss(result.losses),
                "steps": settings.steps,
                **replay,
            }
            for index, (result, replay) in enumerate(zip(results, replays, strict=True))
        ]
        return facts, matrices

    def rank_map(self, run: Run) -> str:
        """Hash of the ranks that a run trains, which are kept under it."""
        ranks = {site.path: rank for site, rank in self.plans.ranks(run.contender, run.seed).items()}
        whole = {site.path: ranks.get(site.path, 0) for site in self.plans.sites}
        name = digest(whole)
        if not (path := self.ledger.folder / RANKS / f"{name[:16]}.json").is_file():
            write_json(path, whole)
        return name

    def replay(self, run: Run) -> str | None:
        """The choices of the run that a yoked one replays."""
        return None if run.source is None else str(self.ledger[run.source.key]["replay"])

    def trained(
        self, runs: Sequence[Run], arms: Sequence[Arm], settings: ArmSettings
    ) -> tuple[list[TrainedArm], list[dict[str, str]]]:
        """What came of them; and of one that chooses its phases, which is alone, the schedule that it amounts to."""
        material, shared = self.material, (self.material.rows, self.material.collate, settings)
        schedule = self.plans.schedule(runs[0], settings.steps, self.replay(runs[0]))
        if self.in_turn and schedule is None:
            return [train_alone(material.model, arm, None, *shared)[0] for arm in arms], [{}] * len(runs)
        if not isinstance(schedule, BoundNorm):
            return train_together(material.model, arms, *shared), [{}] * len(runs)
        result, replay = train_alone(material.model, arms[0], schedule, *shared)
        return [result], [{"replay": str(replay)}]

    def final(self, run: Run, result: TrainedArm, scales: Mapping[str, float]) -> TrainedArm:
        """What is scored: as trained, or for `compress` cut to the budget."""
        if run.contender.arm != "compress" or result.diverged:
            return result
        by_path = {site.path: site for site in self.plans.sites}
        pairs = {by_path[path]: pair for path, pair in result.pairs.items()}
        return replace(result, pairs=compress_pairs(pairs, scales, self.plans.budget(run.contender.budget)))

    def reference(self, run: Run) -> tuple[list[Row], Matrices]:
        """All weights trained, or none."""
        material, settings = self.material, self.settings(run)
        if run.contender.arm == "base":
            return [{"parameters": 0, "diverged": False, "train_loss": None, "steps": 0}], self.scores(run)
        parameters = language_parameters(material.model)
        with borrowed(material.model, parameters) as trained:
            order = self.order(run, settings)
            data = (material.rows, order, material.collate)
            finite = train_weights(material.model, trained, *data, settings, run.learning_rate)
            matrices = self.scores(run)
        finite = finite and all(bool(matrix.isfinite().all()) for matrix in matrices.values())
        if not finite:
            matrices = {name: torch.full_like(matrix, torch.nan) for name, matrix in matrices.items()}
        count = sum(parameter.numel() for parameter in trained)
        return [{"parameters": count, "diverged": not finite, "train_loss": None, "steps": settings.steps}], matrices

    def scores(self, run: Run) -> Matrices:
        """Losses (1, items) of the model as it is now."""
        return {
            name: answer_losses(self.material.model, part.batches)[0][None] for name, part in self.parts(run).items()
        }

    def parts(self, run: Run) -> dict[str, ScoredItems]:
        """The splits a run is scored on: tuning never uses test."""
        dev = {"dev": self.material.dev}
        return dev if run.purpose == "tune" else dev | {"test": self.material.test}


def batches_of(runs: Sequence[Run], bench: Bench) -> list[list[Run]]:
    """Runs that can train together, in their order: equal settings. What differs much in rank is kept apart, for ranks
    are padded to the widest; what trains alone is one by one."""
    kinds: dict[Any, list[Run]] = {}
    for run in runs:
        contender = run.contender
        alone = run if contender.trains_alone else None
        kind = (run.purpose, bench.settings(run), contender.budget, contender.arm == "compress", alone)
        kinds.setdefault(kind, []).append(run)
    most = bench.config.batch_arms
    return [group[start : start + most] for group in kinds.values() for start in range(0, len(group), most)]


def cost(batch: Sequence[Run], bench: Bench) -> float:
    return float(len(batch) * bench.settings(batch[0]).steps)


def last_loss(losses: Sequence[float]) -> float | None:
    """Mean training loss of the last tenth; None where it is not finite."""
    mean = fmean(losses[-max(1, round(LAST * len(losses))) :])
    return mean if math.isfinite(mean) else None


STEP_TIMES, RANKS = "step_times.json", "ranks"


def matched_steps(design: Design, plans: Plans) -> dict[str, int]:
    """Steps of the `static@SCHEDULE` arms: as many as take the schedule's measured time.

    Measured once, one arm at a time, by the first process, and kept beside the plans: a time is never twice the same.
    """
    path = plans.folder / STEP_TIMES
    timed = [arm for arm in design.arms if timed_like(arm) is not None]
    if timed and process_index()[0] == 0:
        times = read_if_there(path) or {STATIC: step_time(design, plans, None)}
        new = [arm for arm in timed if arm not in times]
        write_json(path, times | {arm: step_time(design, plans, timed_like(arm)) for arm in new})
    gathered({})  # the others wait for the first
    times = read_object(path) if timed else {}
    return {arm: max(1, round(design.config.steps * times[arm] / times[STATIC])) for arm in timed}


def step_time(design: Design, plans: Plans, schedule: str | None) -> float:
    """Seconds per step of one arm alone over the whole schedule, after a few steps of warming up."""
    config, material = design.config, plans.material
    ranks = plans.uniform(config.budgets[0])
    start, scales = random_start(ranks, config.seed, plans.max_rank), scales_of(ranks, "constant", ranks)
    form = schedule_of(schedule, config.steps, config.seed) if schedule else None
    active = bind(form, {site.path: site for site in ranks}, config.seed).active if form else None
    order = row_order(len(material.rows), config.steps * config.batch_size, config.seed)
    arm = Arm(start, scales, design.grid(design.contenders[0]).low, order, active)
    settings = ArmSettings(config.steps, config.batch_size)
    shared = (material.model, [arm], material.rows, material.collate)
    train_together(*shared, replace(settings, steps=min(5, config.steps)))
    started = time.perf_counter()
    train_together(*shared, settings)
    return (time.perf_counter() - started) / config.steps


def finished_runs(folder: Path, start: Mapping[str, Any] | None = None) -> Ledger:
    """The ledger of a study's folder; start: what its chain is bound to. DataError for entries of another command."""
    return Ledger(folder, check_row, start)


def check_row(row: Row) -> None:
    """KeyError or TypeError for a ledger's row that is none of a study's run."""
    for name in ("purpose", "recipe", "arm"):
        typed(row["key"][name], str)
    typed(row["seconds"], float)
