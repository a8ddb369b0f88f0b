"""Is the advice of `rankwise advise` good? Against a sweep of rates × ranks, and against the prior's rate alone.

    python benchmarks/advise.py --pair e2e --model stories260K --data e2e_nlg --work FOLDER [--stage sweep]
    python benchmarks/advise.py --stage table --work FOLDER [--out benchmarks/results]

    sweep    every rate × rank × 2 seeds, scored on *choose*; its best cell is the reference
    advise   the product's own climb, rungs A to C, as far as a fifth of the sweep's tokens goes; the rate is the one
             that it gives for a run of the sweep's steps
    judge    best cell, advised cell, prior's rate at rank 16: fresh seeds, scored once on *test*, paired
    plans    ranks from the change of an advise run against ranks from a full probe's, both trained
    table    advise.json and advise.md, of all pairs that have got anywhere

Passed: the regret against the best cell is at most m, and its upper one-sided 95 % bound at most 2m, where m is 0.02
nats or 1 % of the best cell's gain. Every run is kept (`Ledger`): a benchmark that was stopped goes on. One thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from advise_table import SHARE, write_table
from workload import command, machine

from rankwise.core.allocate import spent
from rankwise.core.site import Site
from rankwise.data.split import Sizes
from rankwise.errors import DivergedError, need
from rankwise.files.atomic import read_if_there, write_json
from rankwise.options.advise import AdviseConfig
from rankwise.options.sections import DataSection, ModelSection
from rankwise.options.study import ProbeSection, StudyConfig
from rankwise.ranks.deltas import open_deltas
from rankwise.study.advice import UNIFORM, TrialLosses, TrialRun, long_run, prior_of, rounded, upper_bound
from rankwise.study.advise import recipe_of, rungs_of
from rankwise.study.arms import Gains, ranks_within
from rankwise.study.climb import Conclusions, climb
from rankwise.study.material import Material, is_of, load_material, read_parts, train_probe
from rankwise.study.results import finite
from rankwise.study.trials import ShortRuns, short_runs
from rankwise.train.together.starts import row_order

LEAST, PART = 0.02, 0.01  # m: at least so many nats, and so much of the best cell's gain
SWEPT, FRESH = (1, 2), 101  # seeds of the sweep, and the first one of the judgement
SCORED = "E"  # a rung of which `ShortRuns` scores the test part too
STAGES = ("sweep", "advise", "judge", "plans", "table")


@dataclass(frozen=True)
class Extent:
    """How much is run.

    advise_steps: of the runs of `advise`, fewer than the sweep's. confirm: items of its rung C, which the judgement
    (`test`) does not take. fresh: seeds of the judgement. plan_rank: uniform rank whose parameters plans spend.
    """

    rates: tuple[float, ...]
    ranks: tuple[int, ...]
    steps: int
    batch_size: int
    advise_steps: int
    fresh: int
    choose: int
    confirm: int
    test: int
    plan_rank: int
    probe_steps: int
    probe_rate: float

    @property
    def cells(self) -> list[TrialRun]:
        """Of the sweep: all of the first seed, then of the second."""
        return [TrialRun(rank, rate, seed) for seed in SWEPT for rank in self.ranks for rate in self.rates]


STORIES = Extent(
    (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), (1, 2, 4, 8, 16), 100, 8, 40, 6, 100, 40, 200, 4, 100, 1e-3
)
SMOLLM2 = Extent((2.6e-4, 6.4e-4, 1.6e-3, 4e-3, 1e-2), (1, 4, 16), 60, 4, 20, 3, 60, 20, 130, 4, 32, 2e-5)
QUICK = Extent((3e-3, 1e-2, 3e-2), (1, 2, 4), 22, 4, 8, 2, 20, 20, 20, 2, 4, 1e-2)
PAIRS = {
    "e2e": ("stories260K × E2E", "e2e_nlg", STORIES),
    "samsum": ("stories260K × SAMSum", "samsum", STORIES),
    "wikisql": ("stories260K × WikiSQL", "wikisql", replace(STORIES, choose=60, test=120)),
    "smollm2": ("SmolLM2-135M × E2E (weights dequantised from Q4_1)", "e2e_nlg", SMOLLM2),
}


@dataclass
class MeteredRuns(ShortRuns):
    """Short runs whose limit is tokens, not minutes, and whose placements may come from given gains."""

    limit: float = math.inf
    gains: dict[str, Gains] = field(default_factory=dict)

    def affords(self, rung: str, trials: int) -> bool:
        made = self.tokens(self.asked)
        return made * (1 + trials / len(self.asked)) <= self.limit

    def placed(self, placement: str, budget: int, tolerance: float) -> dict[Site, int]:
        if placement not in self.gains:
            return super().placed(placement, budget, tolerance)
        gains = self.gains[placement]
        return ranks_within(gains, budget, max(site.largest_rank for site in gains), tolerance)

    def tokens(self, trials: Iterable[TrialRun]) -> int:
        """Trained on. A run that diverged has seen those up to where it left."""
        return sum(int(self.ledger[self.key(trial)]["tokens"]) for trial in trials)

    def planned(self, trial: TrialRun) -> int:
        """Tokens of a run that goes to its end."""
        order = row_order(len(self.material.rows), self.config.steps * self.config.batch_size, trial.seed)
        return sum(len(self.material.rows[row]["input_ids"]) for row in order)

    def took(self, trials: Iterable[TrialRun]) -> float:
        return float(sum(self.ledger[self.key(trial)]["seconds"] for trial in trials))

    def on(self, trials: Sequence[TrialRun], part: str) -> TrialLosses:
        scored = {"dev": self.material.dev, "test": self.material.test}[part]
        return self.losses(trials, part, scored, self.base_of_choose if part == "dev" else self.base_of_confirm)


@dataclass
class Contest:
    """One model on one data set: its stages, and what each has found (`found`, kept in result.json)."""

    title: str
    task: str
    extent: Extent
    model: str
    data: str
    folder: Path

    def config(self, steps: int) -> AdviseConfig:
        extent = self.extent
        return AdviseConfig(
            model=ModelSection(model_name=self.model),
            data=DataSection(task=self.task, data_path=self.data, overlong="drop"),
            steps=steps,
            batch_size=extent.batch_size,
            ranks=[rank for rank in (1, 4, 16) if rank <= max(extent.ranks)],
            placements=[],
            train_size=extent.steps * extent.batch_size,
            choose_size=extent.choose,
            confirm_size=extent.confirm + extent.test,
        )

    @cached_property
    def material(self) -> Material:
        config, extent = self.config(self.extent.steps), self.extent
        sizes = Sizes(extent.steps * extent.batch_size, extent.choose, extent.confirm + extent.test, extent.batch_size)
        parts = read_parts(config.data, sizes, config.seed)
        return load_material(config.model, config.data, config.target, config.device, parts)

    def runs(self, name: str, steps: int, tested: slice, limit: float = math.inf) -> MeteredRuns:
        """name: of the folder of their ledger. tested: items of the test part that they are scored on, if at all."""
        config, parts = self.config(steps), self.material.parts
        material = replace(self.material, parts=replace(parts, test=parts.test[tested]))
        recipe = recipe_of(config, self.material.renderer, self.material.files)
        return MeteredRuns(
            config, material, short_runs(self.folder / name), recipe, max(self.extent.ranks), limit=limit
        )

    @cached_property
    def swept(self) -> MeteredRuns:
        return self.runs("sweep", self.extent.steps, slice(self.extent.confirm, None))

    @cached_property
    def advised(self) -> MeteredRuns:
        limit = SHARE * sum(map(self.swept.planned, self.extent.cells))
        return self.runs("advise", self.extent.advise_steps, slice(self.extent.confirm), limit)

    def sweep(self) -> dict[str, Any]:
        cells, started, made = self.extent.cells, time.monotonic(), 0
        for first in range(0, len(cells), len(self.extent.rates)):
            batch = cells[first : first + len(self.extent.rates)]
            made += sum(self.swept.key(cell) not in self.swept.ledger for cell in batch)
            self.swept.run(batch, "sweep")
            minutes = (time.monotonic() - started) / 60
            say(f"sweep: {first + len(batch)} of {len(cells)} runs; {made} in {minutes:.1f} minutes")
        best, losses = self.best_cell(), self.cell_losses()
        return {
            "losses": {
                str(rank): {f"{rate:g}": finite(losses[rank, rate]) for rate in self.extent.rates}
                for rank in self.extent.ranks
            },
            "best": asdict(best) | {"loss": losses[best.rank, best.learning_rate]},
            "at_edge": best.learning_rate in (min(self.extent.rates), max(self.extent.rates)),
            "runs": len(cells),
            "tokens": self.swept.tokens(cells),
            "seconds": self.swept.took(cells),
        }

    def cell_losses(self) -> dict[tuple[int, float], float]:
        """Mean of the seeds on *choose*; infinite where one of them diverged."""
        losses = self.swept.on(self.extent.cells, "dev")
        return {
            (rank, rate): sum(losses.loss(TrialRun(rank, rate, seed)) for seed in SWEPT) / len(SWEPT)
            for rank in self.extent.ranks
            for rate in self.extent.rates
        }

    def best_cell(self, rank: int | None = None) -> TrialRun:
        losses = {cell: loss for cell, loss in self.cell_losses().items() if rank in (None, cell[0])}
        if not any(map(math.isfinite, losses.values())):
            raise DivergedError("every cell of the sweep diverged")
        return TrialRun(*min(losses, key=lambda cell: (losses[cell], cell)), seed=0)

    @cached_property
    def conclusions(self) -> Conclusions:
        try:
            return climb(rungs_of(self.advised.config, self.material.model), self.advised)
        except DivergedError as error:
            say(f"no advice: {error}")
            return Conclusions()

    @property
    def cell(self) -> TrialRun:
        """What is advised for a run of the sweep's steps."""
        found, extent = self.conclusions, self.extent
        rates = found.rates[found.advised.rank]
        return TrialRun(found.advised.rank, long_run(rates, extent.advise_steps, extent.steps).learning_rate, seed=0)

    def advise(self) -> dict[str, Any]:
        found, runs = self.conclusions, self.advised
        cell = {"rank": self.cell.rank, "learning_rate": self.cell.learning_rate} if found.learnt else None
        made = list(runs.asked)
        return {
            "advised": cell,
            "rung": min(found.rung, "C"),  # without placements D and E are empty
            "rank_by_estimate": found.rank.by_estimate if found.rank else None,
            "delta": finite(found.delta),
            "steps": self.extent.advise_steps,
            "runs": len(made),
            "tokens": runs.tokens(made),
            "seconds": runs.took(made),
            "share": runs.tokens(made) / self.swept.tokens(self.extent.cells),
        }

    def judge(self) -> dict[str, Any]:
        """All of it is run before the test part is read."""
        prior = rounded(prior_of(self.material.model.config)[0])
        cells = {"best": self.best_cell(), "prior": TrialRun(max(self.extent.ranks), prior, 0)}
        if self.conclusions.learnt:
            cells["advised"] = self.cell
        losses = self.retrained(list(cells.values()))
        best = cells["best"]
        gain = float(losses.base.sum() / losses.tokens.sum()) - losses.mean(best).estimate
        margin = max(LEAST, PART * gain)
        return {
            "seeds": self.extent.fresh,
            "items": len(losses.tokens),
            "gain": gain,
            "margin": margin,
            "best_diverged": self.extent.fresh - len(losses.seeds(best)),
            "cells": {name: self.regret(losses, cell, best, margin) for name, cell in cells.items() if name != "best"},
            "advised_to_prior": contrast(losses, cells["advised"], cells["prior"]) if "advised" in cells else None,
        }

    def retrained(self, cells: Sequence[TrialRun], runs: MeteredRuns | None = None) -> TrialLosses:
        """With fresh seeds, seed after seed, scored on the test part."""
        runs = runs or self.swept
        seeds = range(FRESH, FRESH + self.extent.fresh)
        for seed in seeds:
            runs.run([replace(cell, seed=seed) for cell in cells], SCORED)
            say(f"fresh seeds: {seed - FRESH + 1} of {len(seeds)}")
        return runs.on([replace(cell, seed=seed) for seed in seeds for cell in cells], "test")

    def regret(self, losses: TrialLosses, cell: TrialRun, best: TrialRun, margin: float) -> dict[str, Any]:
        """Against the best cell, and how far from it on the grid, which is not judged."""
        found = contrast(losses, cell, best)
        diverged = self.extent.fresh - len(losses.seeds(cell))
        estimate, bound = found["estimate"], found["bound"]
        step = math.log(self.extent.rates[1] / self.extent.rates[0])
        return {
            "rank": cell.rank,
            "learning_rate": cell.learning_rate,
            **found,
            "diverged": diverged,
            "passed": not diverged and estimate is not None and estimate <= margin and bound <= 2 * margin,
            "rate_steps": math.log(cell.learning_rate / best.learning_rate) / step,
            "rank_doublings": math.log2(cell.rank / best.rank),
        }

    def plans(self) -> dict[str, Any] | None:
        """Of the parameters of one uniform rank, at its best rate of the sweep. None where nothing was learnt."""
        extent = self.extent
        if not self.conclusions.learnt:
            return None
        best = self.best_cell(extent.plan_rank)
        runs = self.runs("plans", extent.steps, slice(extent.confirm, None))
        runs.gains = {"arm": self.advised.energy_gains(), "probe": self.probe_gains()}
        arms = {name: replace(best, placement=name) for name in (UNIFORM, *runs.gains)}
        maps = {name: runs.ranks(arm) for name, arm in arms.items()}
        ranks = {name: [found.get(site, 0) for site in self.material.sites] for name, found in maps.items()}
        of_both = need("scipy.stats", extra="eval").spearmanr(ranks["arm"], ranks["probe"]).statistic
        losses = self.retrained(list(arms.values()), runs)
        pairs = (("arm", "probe"), ("arm", UNIFORM), ("probe", UNIFORM))
        return {
            "uniform_rank": extent.plan_rank,
            "learning_rate": best.learning_rate,
            "parameters": {name: spent(found) for name, found in maps.items()},
            "ranks": ranks,
            "rank_correlation": finite(float(of_both)),
            "differences": {f"{one} − {other}": contrast(losses, arms[one], arms[other]) for one, other in pairs},
        }

    def probe_gains(self) -> Gains:
        """σ² of the change of a full fine-tune of a few steps."""
        extent, recipe = self.extent, self.swept.recipe
        config = StudyConfig(
            model=self.swept.config.model,
            data=self.swept.config.data,
            probe=ProbeSection(
                probe_rows=len(self.material.rows),
                probe_steps=extent.probe_steps,
                probe_batch_size=extent.batch_size,
                probe_learning_rate=extent.probe_rate,
            ),
        )
        place = self.folder / "probe"
        if not is_of(place, recipe):
            train_probe(self.material, config, place / "deltas", 0, recipe)
        source = open_deltas(place)
        return {s: torch.linalg.svdvals(source.read(s).matrix.double()).square() for s in self.material.sites}

    def facts(self) -> dict[str, Any]:
        material = self.material
        taken = sum(len(part) for part in (material.parts.train, material.parts.dev, material.parts.test))
        left = len(material.rows) + len(material.dev.groups) + len(material.test.groups)
        return {
            "title": self.title,
            "date": str(date.today()),
            "machine": machine(),
            "command": command(),
            "extent": asdict(self.extent),
            "train_rows": len(material.rows),
            "choose_items": len(material.dev.groups),
            "dropped": 1 - left / taken,
        }


def contrast(losses: TrialLosses, one: TrialRun, other: TrialRun) -> dict[str, Any]:
    """one − other on the test part, paired; nothing where they share no seed that trained."""
    if one.arm == other.arm:
        return {"estimate": 0.0, "bound": 0.0, "low": 0.0, "high": 0.0, "seeds": len(losses.seeds(one))}
    found = losses.excess(one, other)
    if found is None:
        return {"estimate": None, "bound": None, "low": None, "high": None, "seeds": 0}
    low, high = found.interval()
    return {"estimate": found.estimate, "bound": upper_bound(found), "low": low, "high": high, "seeds": found.seeds}


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pair", choices=PAIRS)
    parser.add_argument("--model", help="folder of the pair's model")
    parser.add_argument("--data", help="the pair's data: folder of the official files, or the file of training rows")
    parser.add_argument("--stage", choices=STAGES, help="only this one [all, in turn]")
    parser.add_argument("--work", type=Path, required=True, help="finished runs are kept below it, by pair")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    stages = [options.stage] if options.stage else list(STAGES)
    if stages != ["table"] and not (options.pair and options.model and options.data):
        parser.error("--pair, --model and --data are needed for all stages but table")
    torch.set_num_threads(1)
    for stage in stages:
        if stage == "table":
            write_table(options.out, {name: read_if_there(options.work / name / "result.json") for name in PAIRS})
            continue
        title, task, extent = PAIRS[options.pair]
        folder = options.work / options.pair
        if options.quick:
            title, extent = f"{title}, a few steps: the numbers mean nothing", QUICK
        contest = Contest(title, task, extent, options.model, options.data, folder)
        found = getattr(contest, stage)()
        write_json(folder / "result.json", read_if_there(folder / "result.json") | contest.facts() | {stage: found})
        say(f"{stage}: done")


if __name__ == "__main__":
    main()
