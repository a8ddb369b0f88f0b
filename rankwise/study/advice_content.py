"""Content of advice.json: conclusions with every number behind them, time and memory, and what they leave open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.core.allocate import spent
from rankwise.models.sites import towers_of
from rankwise.models.targets import LANGUAGE
from rankwise.options.advise import AdviseConfig
from rankwise.options.commands import TrainConfig
from rankwise.study.advice import UNIFORM, TrialRun, long_run, prior_of, rounded
from rankwise.study.climb import Conclusions, Rungs
from rankwise.study.evidence import LEVEL, Effect, student
from rankwise.study.results import finite
from rankwise.study.trials import ShortRuns

OVERFIT = 0.1  # of the gain: held-out loss above the training loss of rows seen more than once


def conclude(config: AdviseConfig, rungs: Rungs, bench: ShortRuns, found: Conclusions, rows: int) -> dict[str, Any]:
    """Content of advice.json. rows: of the data set."""
    losses, material = bench.choose, bench.material
    prior, calibrated = prior_of(material.model.config)
    needed = cost(config, bench, rows)
    return {
        "metric": "nats per answer token",
        "rung": found.rung,
        "learnt": found.learnt,
        "base_loss": float(losses.base.sum() / losses.tokens.sum()),
        "gain": found.gain.as_dict() if found.gain else None,
        "delta": found.delta,
        "seed_deviation": math.sqrt(losses.noise.variance) if losses.noise else None,
        "prior": {"learning_rate": rounded(prior), "calibrated": calibrated},
        "advised": asdict(found.advised) | {"parameters": spent(bench.ranks(found.advised))},
        "real_run": asdict(long_run(found.rates[found.advised.rank], config.steps, needed["steps"])),
        "rates": {str(rank): asdict(rates) for rank, rates in found.rates.items()},
        "rank": asdict(found.rank) if found.rank else None,
        "placements": {name: effect.as_dict() for name, effect in found.tried.items()},
        "too_small": found.too_small,
        "challenger": found.challenger,
        "placement": found.placement.as_dict() if found.placement else None,
        "loss": found.loss.as_dict() if found.loss else None,
        "trials": [
            asdict(trial) | {"rung": row["rung"], "loss": finite(losses.loss(trial)), "seconds": row["seconds"]}
            for trial, row in bench.rows.items()
        ],
        "data": {
            "train": len(material.rows),
            "choose": len(material.dev.groups),
            "confirm": len(material.test.groups),
            "removed": dict(material.parts.removed),
        },
        "steps": config.steps,
        "batch_size": config.batch_size,
        "minutes": config.minutes,
        "seconds_per_run": bench.seconds,
        "in_turn": bench.in_turn,
        "cost": needed,
        "too_few": too_few(config, rungs, bench, found) if found.learnt else {},
        "open": open_rungs(rungs, found, bench.seconds),
        **({"frozen": frozen} if (frozen := frozen_towers(material.model)) else {}),
    }


def frozen_towers(model: PreTrainedModel) -> list[str]:
    """The towers that are not adapted: all but the language tower."""
    return [tower for tower in towers_of(model) if tower not in LANGUAGE]


def frozen_lines(frozen: Sequence[str]) -> list[str]:
    """What to say of them; nothing of a model with one tower."""
    return [f"adapters in the language tower only; frozen: {', '.join(frozen)}"] if frozen else []


def cost(config: AdviseConfig, bench: ShortRuns, rows: int) -> dict[str, Any]:
    """Time and memory of a short run that trained alone, and of the real run by the seconds per token of that one; of
    those that trained together where the lines of others are gone."""
    alone = [row for row in bench.finished if row["batch"] == 1] or bench.finished
    train = bench.material.rows
    per_row = sum(len(row["input_ids"]) for row in train) / len(train)
    per_token = median(row["training_seconds"] / max(1, row["tokens"]) for row in alone)
    usable = len(train) / len(bench.material.parts.train)  # --overlong drop, --skip_bad
    learnt = round(rows * usable * (1 - TrainConfig().val_fraction))  # `train` holds some out
    return {
        "peak_bytes": max(row["peak_bytes"] for row in alone),
        "device": torch.device(bench.material.device).type,
        "seconds_per_token": per_token,
        "tokens_per_row": per_row,
        "rows": learnt,
        "epochs": config.num_epochs,
        "steps": math.ceil(config.num_epochs * math.ceil(learnt / config.batch_size)),
        "seconds": learnt * config.num_epochs * per_row * per_token,
    }


def too_few(config: AdviseConfig, rungs: Rungs, bench: ShortRuns, found: Conclusions) -> dict[str, Any]:
    """Where held-out items or training rows cannot carry the decision; empty where they can.

    items: so many would decide what these leave open, at the same spread. overfit: held-out loss above the training
    loss of rows that were seen more than once, where it passes `margin`.
    """
    assert found.gain is not None
    told: dict[str, Any] = {}
    scores, advised = bench.choose, found.advised
    steps = found.rank.steps if found.rank else ()
    contrasts: list[tuple[Effect, Sequence[float]]] = [(each.excess, [found.delta]) for each in steps if each.excess]
    contrasts += [(each, [found.delta, -found.delta]) for each in found.tried.values()]
    if not contrasts:
        best, second = nearest_rates(scores.curve(advised.rank, UNIFORM, rungs.seeds[0]))
        first = TrialRun(advised.rank, best, rungs.seeds[0])
        further = scores.excess(replace(first, learning_rate=second), first)
        contrasts = [(further, [found.delta])] if further else []
    open_widths = [width for each, limits in contrasts if (width := open_width(each, found.delta, limits))]
    if open_widths:
        count = len(bench.material.dev.groups)
        told |= {"half_width": max(open_widths), "items": math.ceil(count * (max(open_widths) / found.delta) ** 2)}
    trial = replace(advised, placement=UNIFORM, seed=rungs.seeds[0])
    seen = config.steps * config.batch_size / len(bench.material.rows)
    last = bench.rows[trial]["train_losses"][-max(1, config.steps // 8) :]
    margin = max(found.delta, OVERFIT * found.gain.estimate)
    above = scores.loss(trial) - sum(last) / len(last)
    if seen > 1 and above > margin:
        told["overfit"] = {"rows": len(bench.material.rows), "seen": seen, "above": above, "margin": margin}
    return told


def nearest_rates(curve: Mapping[float, float]) -> tuple[float, float]:
    """The best rate and the second best."""
    best, second, *_ = sorted(curve, key=lambda rate: (curve[rate], rate))
    return best, second


def open_width(found: Effect, delta: float, limits: Sequence[float]) -> float:
    """Half of the interval over items alone, where it is above δ and leaves open on which side of one of these limits
    the difference lies; else 0."""
    width = float(student().ppf((1 + LEVEL) / 2, found.groups - 1)) * math.sqrt(found.item_variance)
    return width if width > delta and min(abs(found.estimate - limit) for limit in limits) < width else 0.0


def open_rungs(rungs: Rungs, found: Conclusions, seconds: float) -> list[dict[str, Any]]:
    """Rungs that were not climbed: what they would decide, and the time each takes."""
    left = {rung: count for rung, count in rungs.counts().items() if rung > found.rung}
    return [{"rung": rung, "runs": count, "seconds": round(count * seconds)} for rung, count in left.items()]
