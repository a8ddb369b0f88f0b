"""From finished runs to study.json: verdicts first, then every number behind them. Reads the test items, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rankwise.study.arms import INVERTED, REFERENCES, RULES, STATIC, UNIFORM, VERSUS, rule_of
from rankwise.study.design import Contender, Design
from rankwise.study.evidence import Effect, assay_works, judge
from rankwise.study.execution import Bench
from rankwise.study.predictions import PredictedOutcome, predicted
from rankwise.study.protocol import Reported, Tuned, effect_of, report_run
from rankwise.study.registration import Registration


@dataclass(frozen=True)
class FinishedStudy:
    """A study with all runs finished."""

    design: Design
    bench: Bench
    tuned: dict[Contender, Tuned]
    reported: Reported

    def effect(self, *pair: Contender) -> Any:
        return effect_of(self.design, self.bench, self.tuned, pair, self.reported.seeds, "test")

    def row(self, contender: Contender, seed: int) -> Mapping[str, Any]:
        return self.bench.ledger[report_run(self.design, self.bench, self.tuned, contender, seed).key]


def conclude(outcome: FinishedStudy, registration: Registration) -> dict[str, Any]:
    """The content of study.json. The test items are read here and nowhere else."""
    design, config = outcome.design, outcome.design.config
    seeds = design.report_seeds(outcome.reported.seeds)
    runs = [
        report_run(design, outcome.bench, outcome.tuned, contender, seed).key
        for contender in design.contenders
        for seed in seeds
    ]
    registration.read_test(runs, outcome.bench.ledger.heads(), config.deviation)
    return {
        "question": config.question,
        "kind": config.kind,
        "metric": "nats per answer token",
        "lower_is_better": True,
        "smallest_effect": config.smallest_effect,
        "registration": registered(registration),
        "verdicts": verdicts(outcome),
        "assay": assays(outcome),
        "arms": [arm_row(outcome, contender) for contender in design.contenders],
        "differences": differences(outcome),
        "tuning": [tuning_row(outcome, *each) for each in outcome.tuned.items()],
        "seeds": {"reported": len(seeds), "stopped": outcome.reported.reason, "tuning": config.grid.tuning_seeds},
        "data": data(outcome),
        "notes": notes(outcome),
    }


def registered(registration: Registration) -> dict[str, Any]:
    first = registration.first
    kept = ("time", "why", "changed", "test_read_again", "runs_finished", "test_was_read", "sha256")
    told = [{name: row[name] for name in kept if name in row} for row in registration.deviations]
    return {"sha256": first["sha256"], "time": first["time"], "deviations": told}


def setting(contender: Contender, other: Contender | None = None) -> dict[str, str]:
    """Budget and scheduler of a contender, or common to a pair: a reference has no budget, the base no scheduler."""
    told = other if other is not None and contender.is_reference else contender
    return {"budget": told.budget, "scheduler": told.scheduler, "state": told.state}


def verdicts(outcome: FinishedStudy) -> list[dict[str, Any]]:
    """One row per primary contrast and setting, Holm over all of them."""
    design = outcome.design
    effects = {pair: outcome.effect(*pair) for pair in design.pairs()}
    known = {str(number): effect for number, effect in enumerate(effects.values()) if effect is not None}
    found = judge(known, design.config.smallest_effect)
    rows = []
    for number, (first, second) in enumerate(effects):
        names = {"contrast": f"{design.label(first)}{VERSUS}{design.label(second)}", **setting(first, second)}
        names |= {"first": design.label(first), "second": design.label(second)}
        verdict = found.get(str(number))
        row = names | (verdict.as_dict() if verdict else {"verdict": "diverged"})
        prediction = expected(design).get((first.arm, second.arm))
        rows.append(row | (prediction.beside(row["verdict"]) if prediction else {}))
    return rows


def expected(design: Design) -> dict[tuple[str, str], PredictedOutcome]:
    return predicted(design.config, design.arms, design.contrasts)


def assays(outcome: FinishedStudy) -> list[dict[str, Any]]:
    """Per budget: whether an inverted plan does harm, against the plan itself or against uniform rank."""
    design, rows = outcome.design, []
    everything = {(each.arm, each.budget): each for each in design.contenders}
    for contender in design.contenders:
        if contender.arm.partition(":")[0] != INVERTED:
            continue
        guesses = {second: found for (first, second), found in expected(design).items() if first == contender.arm}
        others = [everything.get((name, contender.budget)) for name in (rule_of(contender.arm), UNIFORM)]
        effects = {other.arm: outcome.effect(contender, other) for other in others if other is not None}
        known = {name: effect for name, effect in effects.items() if effect is not None}
        if known:
            against = {name: effect.as_dict() for name, effect in known.items()}
            works = assay_works(list(known.values()))
            told = {name: found.beside(side_of(known[name])) for name, found in guesses.items() if name in known}
            rows.append({"arm": contender.arm, **setting(contender), "works": works, "against": against})
            rows[-1] |= {"predictions": told} if told else {}
    return rows


def side_of(effect: Effect) -> str:
    """In a word of verdicts, one-sided and by itself."""
    return "worse" if assay_works([effect]) else "undecided"


def arm_row(outcome: FinishedStudy, contender: Contender) -> dict[str, Any]:
    """An arm's mean over seeds and items with its interval, and what it is made of."""
    design, seeds = outcome.design, outcome.design.report_seeds(outcome.reported.seeds)
    rows = [outcome.row(contender, seed) for seed in seeds]
    effect, tuned = outcome.effect(contender), outcome.tuned.get(contender)
    low, high = effect.interval() if effect else (None, None)
    return {
        "arm": contender.arm,
        "label": design.label(contender),
        **setting(contender),
        "parameters": round(fmean(row["parameters"] for row in rows)),
        "steps": rows[0]["steps"],
        "learning_rate": design.grid(contender).rate(tuned.k) if tuned else None,
        "scale": tuned.scale if tuned else None,
        "loss": effect.estimate if effect else None,
        "low": low,
        "high": high,
        "diverged": sum(row["diverged"] for row in rows),
    }


def differences(outcome: FinishedStudy) -> list[dict[str, Any]]:
    """Every arm but the references against the one that all are compared with, primary or not, and the primary
    contrasts at budgets where they are not judged; without verdicts."""
    design = outcome.design
    common = UNIFORM if design.config.kind == "plans" else STATIC
    primary, asked = set(design.pairs()), list[tuple[Contender, Contender]]()
    rows = []
    for arm in design.arms:
        if arm not in (common, *REFERENCES):
            asked += design.paired(arm, common)
    unjudged = [pair for names in design.contrasts for pair in design.paired(*names) if pair not in primary]
    for first, second in dict.fromkeys([*asked, *unjudged]):
        effect = outcome.effect(first, second)
        if effect is not None:
            labels = {"first": design.label(first), "second": design.label(second)}
            judged = {"primary": (first, second) in primary}
            rows.append({**labels, **setting(first, second), **judged, **effect.as_dict()})
    return rows


def tuning_row(outcome: FinishedStudy, contender: Contender, tuned: Tuned) -> dict[str, Any]:
    grid = outcome.design.grid(contender)
    curves = {
        scale: [{"learning_rate": grid.rate(k), "losses": [finite(loss) for loss in curve[k]]} for k in sorted(curve)]
        for scale, curve in tuned.curves.items()
    }
    chosen = {"scale": tuned.scale, "learning_rate": grid.rate(tuned.k), "at_edge": tuned.at_edge}
    return {
        "arm": contender.arm,
        "label": outcome.design.label(contender),
        **setting(contender),
        **chosen,
        "curves": curves,
    }


def same_as_uniform(outcome: FinishedStudy) -> list[tuple[str, str]]:
    """(arm, budget) of the rules whose plan turned out to be uniform rank."""
    plans, seed = outcome.bench.plans, outcome.design.report_seeds(1)[0]
    return [
        (each.arm, each.budget)
        for each in outcome.design.contenders
        if each.arm in RULES and plans.ranks(each, seed) == plans.uniform(each.budget)
    ]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def data(outcome: FinishedStudy) -> dict[str, Any]:
    material = outcome.bench.material
    parts = {"dev": material.dev, "test": material.test}
    sizes = {
        name: {"items": len(part.groups), "groups": len(set(part.groups)), "tokens": int(np.sum(part.tokens))}
        for name, part in parts.items()
    }
    return {"train": {"items": len(material.rows)}, **sizes, "removed": dict(material.parts.removed)}


def notes(outcome: FinishedStudy) -> list[str]:
    """Caveats for reading the numbers."""
    design, config = outcome.design, outcome.design.config
    found = []
    if "compress" in design.arms:
        found.append("compress trains four times the budget and is cut to it: equal in final, not trained, parameters")
    if "uniform+compute" in design.arms:
        found.append(f"uniform+compute trains {outcome.bench.extra_steps} steps more: as many rows as the probe saw")
    if config.probe.deltas:
        found.append(
            "the deltas come from runs outside this study: that their rows are not in dev or test is not checked"
        )
    found += [
        f"{arm} has the ranks of uniform at {budget}: the two are one arm" for arm, budget in same_as_uniform(outcome)
    ]
    edges = [f"{design.label(each)} {each.budget}" for each, tuned in outcome.tuned.items() if tuned.at_edge]
    if edges:
        some = ", ".join(edges[:3]) + (f" and {len(edges) - 3} more" if len(edges) > 3 else "")
        found.append(f"the best learning rate is still at the edge of the grid for {some}")
    return found
