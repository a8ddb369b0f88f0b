"""The reported runs: seeds are added until the answer is sharp enough, and differences are paired by seed and item.

reported = report(design, bench, tuned)      # as many seeds as the stop rule asks for, looking at dev only
effect_of(design, bench, tuned, (first, second), reported.seeds, "test")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.files.processes import announce
from rankwise.study.design import Contender, Design, Run, another_seed, further_counts
from rankwise.study.evidence import Array, Effect, by_group, decides, measured
from rankwise.study.execution import Bench
from rankwise.study.material import Material, Scored
from rankwise.study.tuning import Tuned


@dataclass(frozen=True)
class Reported:
    """How many seeds are reported, and why no more."""

    seeds: int
    reason: str


def report_run(design: Design, bench: Bench, tuned: dict[Contender, Tuned], contender: Contender, seed: int) -> Run:
    """A contender at its tuned rate and scale; the base needs neither, nor a seed. A yoked one replays what was chosen
    for another seed at the rate that is best for choosing."""
    if contender.arm == "base":
        return Run(contender, "constant", 0.0, design.report_seeds(1)[0], "report", bench.recipe)
    found, replayed, source = tuned[contender], contender.replayed, None
    if replayed is not None:
        source = report_run(design, bench, tuned, replayed, another_seed(seed, design.report_seeds(1)[0]))
    return Run(contender, found.scale, design.grid(contender).rate(found.k), seed, "report", bench.recipe, source)


def report(design: Design, bench: Bench, tuned: dict[Contender, Tuned]) -> Reported:
    """Seeds until every primary contrast's half-width on dev is at most δ/2. Test is not looked at."""
    config = design.config
    for count in further_counts(config):
        seeds = design.report_seeds(count)
        runs = [report_run(design, bench, tuned, each, seed) for each in design.contenders for seed in seeds]
        bench.finish(list(dict.fromkeys(runs)), f"{count} seeds")
        effects = [effect_of(design, bench, tuned, pair, count, "dev") for pair in design.pairs()]
        known = [effect for effect in effects if effect is not None]
        widest = max((effect.half_width() for effect in known), default=math.inf)
        announce(f"study: {count} seeds, widest half-width on dev {widest:.4f}, aim {config.smallest_effect / 2:g}")
        if known and len(known) == len(effects) and decides(known, config.smallest_effect):
            return Reported(count, f"every half-width on dev is at most δ/2 = {config.smallest_effect / 2:g}")
    return Reported(config.most_seeds, f"the cap of {config.most_seeds} seeds")


def sums_of(
    design: Design, bench: Bench, tuned: dict[Contender, Tuned], contender: Contender, count: int, part: str
) -> Array:
    """(seeds, groups): summed losses of a contender's reported runs; nan where one diverged."""
    runs = [report_run(design, bench, tuned, contender, seed) for seed in design.report_seeds(count)]
    rows = np.stack([bench.ledger.numbers(run.key, part).numpy() for run in runs])
    return by_group(rows, scored(bench.material, part).groups)


def scored(material: Material, part: str) -> Scored:
    return material.dev if part == "dev" else material.test


def effect_of(
    design: Design, bench: Bench, tuned: dict[Contender, Tuned], pair: Sequence[Contender], count: int, part: str
) -> Effect | None:
    """first − second, paired by seed and item; of one contender, its mean. None where fewer than two seeds are left
    that stayed finite."""
    sums = sums_of(design, bench, tuned, pair[0], count, part)
    if len(pair) == 2:
        sums = sums - sums_of(design, bench, tuned, pair[1], count, part)
    sums = sums[np.isfinite(sums).all(1)]
    if len(sums) < 2:
        return None
    weights = by_group(scored(bench.material, part).tokens, scored(bench.material, part).groups)
    return measured(sums, weights, resamples=design.config.resamples, seed=design.config.seed)
