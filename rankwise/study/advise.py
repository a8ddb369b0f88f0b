"""rankwise advise: learning rate, rank and matrices for a LoRA run, answered by short runs within a time limit.

rankwise advise MODEL train.jsonl --minutes 30

    split by groups ─ short runs, rung by rung (`climb`) ─ conclusions (`advice`) ─ advice.json, advice.yaml, one screen
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rankwise.core.allocate import spent
from rankwise.core.site import Site
from rankwise.data.example import one_per_prompt
from rankwise.data.sources.load import check_data, read_examples
from rankwise.data.split import Parts, Sizes
from rankwise.errors import DataError, UsageError
from rankwise.files.ledger import Ledger
from rankwise.files.processes import announce, finish, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.load import load_structure
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites
from rankwise.options.advise import AdviseConfig
from rankwise.options.field import flatten
from rankwise.page.blocks import lines
from rankwise.page.text import command_line, duration
from rankwise.study.advice import first_grid, prior_rate, rounded
from rankwise.study.advice_page import CONFIG, advice_blocks, write_advice
from rankwise.study.climb import Conclusions, Rungs, climb
from rankwise.study.design import digest
from rankwise.study.material import load_material, read_parts
from rankwise.study.results import finite
from rankwise.study.trials import ShortRuns

RANKS, RATIO = (16, 4, 1), 2.5
CHOOSE, CONFIRM, SHARE, LEAST = 100, 150, 5, 20  # held-out items by default, at most a fifth of the prompts each
NOT_THE_RUNS = ("output_dir", "minutes", "ranks", "rates", "rate_points", "placements", "delta", "num_epochs", "emit")
NOT_THE_NUMBERS = ("batch_arms", "no_plots", "device")


def run(config: AdviseConfig) -> Path:
    """Run the command. Returns the run folder."""
    check(config)
    folder = RunFolder(config.output_dir)
    try:
        with held(folder, "advise", inputs(config)) as record:
            skeleton = load_structure(config.model, str(config.model.model_name))
            rungs = rungs_of(config, skeleton)
            material = load_material(config.model, config.data, config.target, config.device, parts_of(config))
            recipe = digest([trial_settings(config), material.inputs(config.model)])[:16]
            bench = ShortRuns(config, material, Ledger(folder.path), recipe, rungs.ranks[0])
            if process_index()[0] == 0:
                folder.save_config(config)
            announce(f"advise: {counts_line(rungs)}")
            found = climb(rungs, bench)
            if process_index()[0] == 0:
                advice = conclude(config, rungs, bench, found)
                record.outputs |= write_advice(folder.path, config, advice, bench.ranks(found.advised))
                record.facts |= {"runs": len(bench.ledger), "rung": found.rung}
                print("\n".join(lines(advice_blocks(advice))))
                if found.learnt:
                    print(f"next: {next_command(config)}")
    finally:
        finish()
    return folder.path


def next_command(config: AdviseConfig) -> str:
    return command_line("train", Path(config.output_dir) / CONFIG)


def check(config: AdviseConfig) -> None:
    """Refuse invalid values before anything is read."""
    check_data(config.data, "advise")
    if not config.model.model_name:
        raise UsageError("advise needs a model: rankwise advise MODEL ROWS")
    if len(set(config.ranks)) == 1:
        raise UsageError(f"--ranks {','.join(map(str, config.ranks))}: give at least two different ranks to compare")
    if len(config.rates) in (1, 2):
        raise UsageError("--rates: give at least three learning rates, or none (they then lie around the prior)")


def inputs(config: AdviseConfig) -> dict[str, Path | str]:
    found = {"model": config.model.model_name, "data": config.data.data_path}
    return {name: value for name, value in found.items() if value}


def parts_of(config: AdviseConfig) -> tuple[Parts, tuple[Path, ...]]:
    """Rows to train on, items that decide (dev) and items kept back for the last comparison (test)."""
    prompts = len(one_per_prompt(read_examples(config.data, str(config.data.data_path)).items))
    share = prompts // SHARE
    if share < LEAST and None in (config.choose_size, config.confirm_size):
        raise DataError(
            f"{config.data.data_path}: {prompts:,} different prompts are too few to hold out items; advise needs "
            f"{LEAST * SHARE:,}, or give --choose_size and --confirm_size (at least {LEAST} each)"
        )
    choose = config.choose_size or min(CHOOSE, share)
    confirm = config.confirm_size or min(CONFIRM, share)
    train = config.train_size or config.steps * config.batch_size
    return read_parts(config.data, Sizes(train, choose, confirm, least=config.batch_size), config.seed)


def trial_settings(config: AdviseConfig) -> dict[str, Any]:
    """What decides how a trial trains and is scored: trials of other settings are not reused."""
    return {name: value for name, value in flatten(config).items() if name not in (*NOT_THE_RUNS, *NOT_THE_NUMBERS)}


def rungs_of(config: AdviseConfig, skeleton: PreTrainedModel) -> Rungs:
    """What is climbed, from the model's sizes. UsageError where the matrices do not fit what is asked."""
    ranks = ranks_of(config, choose_sites(model_sites(skeleton), config.target).values())
    prior, _ = prior_of(skeleton.config)
    seeds = (config.seed * 1000, config.seed * 1000 + 1, config.seed * 1000 + 2, config.seed * 1000 + 3)
    grid = sorted(set(config.rates)) or first_grid(prior, config.rate_points, RATIO)
    return Rungs(tuple(grid), RATIO, ranks, tuple(config.placements), seeds, config.delta)


def prior_of(model_config: Any) -> tuple[float, bool]:
    text = model_config.get_text_config()
    return prior_rate(text.model_type, text.hidden_size)


def ranks_of(config: AdviseConfig, sites: Collection[Site]) -> tuple[int, ...]:
    """Ranks to compare, descending. UsageError for a placement without matrices, and for a rank above ⌊mn/(m+n)⌋ of a
    matrix: there a LoRA pair has more parameters than the matrix."""
    for kind in ("attention", "mlp"):
        if kind in config.placements and all(site.kind != kind for site in sites):
            raise UsageError(f"--placements {kind}: none of the matrices to adapt is of that kind; leave it out")
    narrow = min(sites, key=lambda site: site.largest_rank)
    if config.ranks and max(config.ranks) > narrow.largest_rank:
        raise UsageError(
            f"--ranks {max(config.ranks)} is above ⌊mn/(m+n)⌋ = {narrow.largest_rank} of {narrow.path} "
            f"{narrow.shape[0]}×{narrow.shape[1]}; give ranks up to {narrow.largest_rank}"
        )
    ranks = set(config.ranks) or {min(rank, narrow.largest_rank) for rank in RANKS}
    return tuple(sorted(ranks, reverse=True))


def counts_line(rungs: Rungs) -> str:
    total, words = 0, []
    for rung, count in rungs.counts().items():
        total += count
        words.append(f"{rung} {total}")
    return f"short runs up to each rung: {', '.join(words)} (more where a grid grows)"


def conclude(config: AdviseConfig, rungs: Rungs, bench: ShortRuns, found: Conclusions) -> dict[str, Any]:
    """Content of advice.json."""
    losses, material = bench.choose, bench.material
    prior, calibrated = prior_of(material.model.config)
    return {
        "metric": "nats per answer token",
        "rung": found.rung,
        "learnt": found.learnt,
        "base_loss": float(losses.base.sum() / losses.tokens.sum()),
        "gain": found.gain.as_dict() if found.gain else None,
        "delta": found.delta,
        "prior": {"learning_rate": rounded(prior), "calibrated": calibrated},
        "advised": asdict(found.advised) | {"parameters": spent(bench.ranks(found.advised))},
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
        "open": open_rungs(rungs, found, bench.seconds),
    }


def open_rungs(rungs: Rungs, found: Conclusions, seconds: float) -> list[dict[str, Any]]:
    """Rungs that were not climbed: what they would decide, and the time each takes."""
    left = {rung: count for rung, count in rungs.counts().items() if rung > found.rung}
    return [{"rung": rung, "runs": count, "seconds": round(count * seconds)} for rung, count in left.items()]


def rung_lines(rungs: Rungs, seconds: float, minutes: float) -> list[str]:
    """How far the time reaches, by the time of a run in the folder; nothing is guessed."""
    if not seconds:
        return [counts_line(rungs), "how long that takes is not known before the first runs"]
    totals = list(accumulate(rungs.counts().values()))
    reached = [rung for rung, total in zip(rungs.counts(), totals, strict=True) if total * seconds <= 60 * minutes]
    times = ", ".join(f"{rung} {duration(total * seconds)}" for rung, total in zip(rungs.counts(), totals, strict=True))
    return [
        counts_line(rungs),
        f"{minutes:g} minutes reach rung {reached[-1] if reached else 'A, and take longer'} ({times})",
    ]


def describe(config: AdviseConfig) -> list[str]:
    """The lines of --dry-run."""
    check(config)
    rungs = rungs_of(config, load_structure(config.model, str(config.model.model_name)))
    ledger = Ledger(Path(config.output_dir))
    seconds = [row["seconds"] for row in ledger.rows.values()]
    rates = ", ".join(f"{rate:.3g}" for rate in rungs.grid)
    return [
        f"short runs of {config.model.model_name}: {config.steps} steps of {config.batch_size} rows each",
        f"rung A: learning rates {rates} at rank {rungs.ranks[0]}, then one between the best two",
        *rung_lines(rungs, sum(seconds) / len(seconds) if seconds else 0.0, config.minutes),
        f"write advice.json, advice.yaml, plots in {config.output_dir}",
    ]
