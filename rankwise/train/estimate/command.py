"""rankwise train --estimate: peak memory, time, cost and the largest batch that fits, before anything is loaded.

    skeleton + plan ─ adapt ─▶ model of shapes ─ trace a few steps ─▶ Profile, Work ─▶ one table

Four ways are compared: as given, with checkpointed activations, on a 4-bit base, and both. Not counted: validation,
loading and saving; phases and frozen prefixes (everything that is adapted is taken to train all the time).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from rankwise.core.plan import RankPlan
from rankwise.errors import UsageError
from rankwise.files.atomic import write_json
from rankwise.models.adapt import LoraSettings
from rankwise.models.load import load_structure
from rankwise.models.sites import model_sites
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import EstimateSection
from rankwise.train.adalora import starting
from rankwise.train.adapter import full_of, planned, quantization, settings_of, train_use
from rankwise.train.estimate.cost import Length, Speed, Work, run_length, run_seconds, widths
from rankwise.train.estimate.gpus import cards
from rankwise.train.estimate.page import Column, EstimatePage, page
from rankwise.train.estimate.shapes import (
    CHECKPOINTING,
    Measured,
    Place,
    Rows,
    Shapes,
    Way,
    measured,
    place_of,
    rows_of,
    ways_of,
)

MOST_ROWS = 4096  # the largest batch that is looked for
ALLOWED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", None)


def estimated(config: TrainConfig, name: str, arguments: TrainingArguments) -> Path:
    """Print what the run would take instead of running it; returns the folder that it would have."""
    skeleton, towers = load_structure(config.model, name), train_use(config.towers)
    full = full_of(skeleton, towers)
    plan, _ = planned(starting(config), model_sites(skeleton), name, towers.lora)
    settings = settings_of(config.lora, full)
    rows = rows_of(config, name, skeleton)
    show(estimate(config, name, arguments, skeleton, plan, settings, rows), config.estimate)
    return Path(config.output_dir)


def check_estimate(section: EstimateSection, config: TrainConfig) -> None:
    """UsageError for runs that --estimate does not know."""
    if not section.estimate:
        return
    if section.gpu is not None:
        cards(section.gpu)
    if config.training.get("deepspeed") or config.training.get("fsdp"):
        raise UsageError("--estimate is for one GPU that holds the whole model: leave --deepspeed and --fsdp out")
    if config.depth.use_depth:
        raise UsageError("--estimate does not know --use_depth: leave it out; the depth gate adds next to nothing")
    if config.model.attn_implementation not in ALLOWED:
        raise UsageError(f"--estimate knows sdpa, flash and eager attention, not {config.model.attn_implementation}")


def estimate(
    config: TrainConfig,
    name: str,
    arguments: TrainingArguments,
    base: PreTrainedModel,
    plan: RankPlan,
    settings: LoraSettings,
    rows: Rows,
) -> EstimatePage:
    """Everything that is printed; `base` is on the meta device and becomes part of the adapted model."""
    place = place_of(config.estimate, config, arguments)
    shapes = Shapes(base, plan, settings, config.model.attn_implementation)
    checkpointing = bool(getattr(arguments, CHECKPOINTING))
    ways = ways_of(quantization(config.lora), checkpointing)
    first = measured(shapes, ways[0], place, rows, arguments)
    others = [measured(shapes, way, place, rows, arguments, first) for way in ways[1:]]
    columns = [
        column(way, found, place, rows, config, arguments) for way, found in zip(ways, [first, *others], strict=True)
    ]
    trained, total = shapes.counts
    return EstimatePage(
        model=name,
        what=described(plan.ranks, settings.full),
        trained=trained,
        total=total,
        card=place.card.name if len(place.cards) == 1 else str(config.estimate.gpu),
        memory=place.card.memory,
        likely=tuple(card.name for card in place.cards) if config.estimate.gpu and len(place.cards) > 1 else (),
        precision=str(place.autocast or torch.float32).removeprefix("torch."),
        frozen=str(place.frozen).removeprefix("torch."),
        rows=len(rows.lengths) if rows.rows is not None else None,
        longest=max(rows.lengths),
        average=sum(rows.lengths) / len(rows.lengths),
        sees=rows.sight is not None,
        blind=rows.sight is None and hasattr(base.config, "vision_config"),
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        epochs=None if arguments.max_steps > 0 else arguments.num_train_epochs,
        measured=place.card.measured,
        columns=tuple(columns),
    )


def column(way: Way, found: Measured, place: Place, rows: Rows, config: TrainConfig, arguments: Any) -> Column:
    """One column of the table: the batch as given where it fits, else the largest that does."""
    asked, most = arguments.per_device_train_batch_size, MOST_ROWS
    if rows.rows is not None:
        most = max(asked, min(most, len(rows.lengths)))
    largest = found.profile.largest(place.card.memory, most)
    batch = min(asked, largest) or asked
    length, seconds = duration_of(found.work, batch, place, rows, config, arguments, found.profile.fixed.trained)
    return Column(
        way.label,
        way.flags,
        found.profile.needs(asked),
        largest,
        most,
        batch,
        None if length is None else length.updates,
        seconds if largest else (),
        tuple(value / 3600 * config.estimate.usd_per_hour for value in seconds if largest)
        if config.estimate.usd_per_hour is not None
        else (),
    )


def duration_of(
    work: Work, batch: int, place: Place, rows: Rows, config: TrainConfig, arguments: Any, trained: float
) -> tuple[Length | None, tuple[float, ...]]:
    """Steps, and seconds on the fastest and the slowest card; none where how much there is to do is not known."""
    if rows.rows is None and arguments.max_steps <= 0:
        return None, ()
    count = len(rows.lengths) if rows.rows is not None else batch * arguments.gradient_accumulation_steps
    length = run_length(count, batch, arguments)
    epoch = widths(rows.lengths, batch, arguments, place.multiple_of) if rows.rows is not None else [rows.limit]
    speeds = [Speed.of(card, place.autocast, config.estimate.utilisation) for card in place.cards if card.bandwidth]
    times = sorted(
        run_seconds(work, speed, length, batch, epoch, count if rows.rows is not None else batch, round(trained / 4))
        for speed in speeds
    )
    return length, tuple(dict.fromkeys((times[0], times[-1]))) if times else ()


def described(ranks: Mapping[str, int], full: Iterable[str]) -> str:
    values = sorted(ranks.values())
    span = f"{values[0]}" if values and values[0] == values[-1] else f"{values[0]} to {values[-1]}" if values else ""
    lora = f"LoRA of rank {span} at {len(values)} sites" if values else "no adapter"
    whole = ", ".join(full)
    return lora + (f", {whole} in full" if whole else "")


def show(found: EstimatePage, section: EstimateSection) -> None:
    print(page(found))
    if section.estimate_out:
        write_json(Path(section.estimate_out), found.record())
