"""The protocol's two loops: the same learning-rate grid for every arm, then seeds up to the required precision.

tuned    = tune(design, bench)               # contender → learning rate and scale, by the loss on dev of tuning seeds
reported = report(design, bench, tuned)      # as many seeds as the stop rule asks for, looking at dev only
effect_of(design, bench, tuned, (first, second), reported.seeds, "test")     # paired by seed and item
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from rankwise.errors import DivergedError
from rankwise.files.processes import announce
from rankwise.options.study import StudyConfig
from rankwise.study.design import Contender, Design, Run, another_seed, further_counts
from rankwise.study.evidence import Array, Effect, by_group, decides, measure_effect
from rankwise.study.execution import Bench, batches_of
from rankwise.study.material import Material, ScoredItems
from rankwise.study.plans import Plans
from rankwise.train.together.starts import scales_of

Curve = dict[int, list[float]]
Wanted = dict[tuple[Contender, str], list[int]]


@dataclass(frozen=True)
class Tuned:
    """Tuning results of a contender: dev losses per token of each point of the grid and seed, by scale.

    at_edge: the best point is still the outermost one, and the grid was not to grow further.
    """

    curves: dict[str, Curve]
    scale: str
    k: int
    at_edge: bool


def tune(design: Design, bench: Bench) -> dict[Contender, Tuned]:
    """The same grid for every arm and scale, grown beyond an edge that is best."""
    wanted = whole_grid(design, bench)
    curves: dict[tuple[Contender, str], Curve] = {each: {} for each in wanted}
    while wanted:
        runs = tuning_runs(design, bench, wanted)
        bench.finish([run for group in runs.values() for run in group], "tuning")
        for (contender, scale, k), group in runs.items():
            curves[contender, scale][k] = [dev_loss(bench, run) for run in group]
        wanted = {each: more for each, curve in curves.items() if (more := growth(curve, design.config))}
    return {
        contender: best_of(contender, {scale: curve for (one, scale), curve in curves.items() if one == contender})
        for contender in dict.fromkeys(contender for contender, _ in curves)
    }


def whole_grid(design: Design, bench: Bench) -> Wanted:
    """Every point for every contender that trains, in every scale."""
    return {
        (contender, scale): list(range(design.config.grid.grid_points))
        for contender in design.contenders
        if contender.arm != "base"
        for scale in telling_scales(design, bench.plans, contender)
    }


def tuning_runs(design: Design, bench: Bench, wanted: Wanted) -> dict[tuple[Contender, str, int], list[Run]]:
    """The runs of each point, one per tuning seed."""
    return {
        (contender, scale, k): [
            tuning_run(Run(contender, scale, design.grid(contender).rate(k), seed, "tune", bench.recipe), design)
            for seed in design.tuning_seeds()
        ]
        for (contender, scale), points in wanted.items()
        for k in points
    }


def tuning_run(run: Run, design: Design) -> Run:
    """A yoked one replays the choices of another tuning seed at its own rate and scale."""
    replayed = run.contender.replayed
    if replayed is None:
        return run
    seed = another_seed(run.seed, design.tuning_seeds()[0])
    return replace(run, source=replace(run, contender=replayed, seed=seed))


def tuning_batch(design: Design, bench: Bench) -> list[Run]:
    """The first batch of the tuning that is not done; empty where all are."""
    runs = [run for group in tuning_runs(design, bench, whole_grid(design, bench)).values() for run in group]
    return next((batch for batch in batches_of(runs, bench) if any(run.key not in bench.ledger for run in batch)), [])


def telling_scales(design: Design, plans: Plans, contender: Contender) -> list[str]:
    """The scales that make a difference: at equal ranks all of them give the same factors."""
    if contender.is_reference:
        return ["constant"]
    ranks = plans.checked_ranks(contender, design.tuning_seeds()[0])
    found: list[tuple[str, dict[str, float]]] = []
    for scale in design.config.grid.scales:
        factors = scales_of(ranks, scale, plans.uniform(contender.budget))
        if factors not in [known for _, known in found]:
            found.append((scale, factors))
    return [scale for scale, _ in found]


def dev_loss(bench: Bench, run: Run) -> float:
    """Nats per token on dev; infinite for a run that diverged."""
    total = float(bench.ledger.numbers(run.key, "dev").sum()) / float(bench.material.dev.tokens.sum())
    return total if math.isfinite(total) else math.inf


def best_point(curve: Curve) -> int:
    return min(curve, key=lambda k: (fmean(curve[k]), k))


def growth(curve: Curve, config: StudyConfig) -> list[int]:
    """The next point beyond an edge that is best, as far as the grid may grow."""
    k, points = best_point(curve), config.grid.grid_points
    if not math.isfinite(fmean(curve[k])):
        return [min(curve) - 1] if -min(curve) < config.grid.grid_growth else []
    if k == min(curve) and -k < config.grid.grid_growth:
        return [k - 1]
    if k == max(curve) and k - (points - 1) < config.grid.grid_growth:
        return [k + 1]
    return []


def best_of(contender: Contender, curves: dict[str, Curve]) -> Tuned:
    """The best scale and point. DivergedError where no point stayed finite for all seeds."""
    best = {scale: fmean(curve[best_point(curve)]) for scale, curve in curves.items()}
    scale = min(best, key=lambda name: best[name])
    if not math.isfinite(best[scale]):
        raise DivergedError(
            f"{contender.arm} at {contender.budget or 'all weights'}: every learning rate of the grid diverged for "
            "some seed; lower --grid_low and --grid_high"
        )
    k = best_point(curves[scale])
    return Tuned(curves, scale, k, at_edge=k in (min(curves[scale]), max(curves[scale])))


@dataclass(frozen=True)
class Reported:
    """Number of reported seeds, and the reason for stopping."""

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


def scored(material: Material, part: str) -> ScoredItems:
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
    return measure_effect(sums, weights, resamples=design.config.resamples, seed=design.config.seed)
