"""rankwise train --estimate: peak memory, time, cost and the largest batch that fits, before anything is loaded.

    skeleton + plan ─ adapt ─▶ model of shapes ─ trace a few steps ─▶ Profile, Work ─▶ one table

Four ways are compared: as given, with checkpointed activations, on a 4-bit base, and both. Not counted: validation,
loading and saving; phases and frozen prefixes (everything that is adapted is taken to train all the time).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from rankwise.errors import UsageError
from rankwise.files.atomic import write_json
from rankwise.models.load import load_structure
from rankwise.options.commands import TrainConfig
from rankwise.options.sections import EstimateSection
from rankwise.page.text import amount, memory, plural
from rankwise.train.adalora import starting_lora
from rankwise.train.adapter import choose_plan, sites_for
from rankwise.train.arguments import quantization
from rankwise.train.estimate.cost import Length, Needs, Speed, Work, run_length, run_seconds, widths
from rankwise.train.estimate.gpus import cards
from rankwise.train.estimate.shapes import (
    CHECKPOINTING,
    Hardware,
    Rows,
    Shapes,
    Traced,
    Way,
    measure_way,
    place_of,
    rows_of,
    ways_of,
)
from rankwise.train.experts import settle_dropout
from rankwise.train.towers import full_of, train_use

MOST_ROWS = 4096  # the largest batch that is looked for
ALLOWED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", None)


def run_estimate(config: TrainConfig, name: str, arguments: TrainingArguments) -> Path:
    """Print memory, time and cost of the run instead of running it; returns the run folder it would have."""
    skeleton, towers = load_structure(config.model, name), train_use(config.towers)
    full = full_of(skeleton, towers)
    sites = sites_for(config.lora, skeleton, towers.routers)
    plan, _ = choose_plan(starting_lora(config), sites, name, towers.lora)
    config = settle_dropout(config, plan)
    rows = rows_of(config, name, skeleton)
    shapes = Shapes(skeleton, plan, config.lora, full, config.model.attn_implementation)
    found = estimate(config, name, arguments, shapes, rows)
    print(page(found))
    if config.estimate.estimate_out:
        write_json(Path(config.estimate.estimate_out), found.record())
    return Path(config.output_dir)


def check_estimate(section: EstimateSection, config: TrainConfig) -> None:
    """UsageError for runs that --estimate does not support."""
    if not section.estimate:
        return
    if section.gpu is not None:
        cards(section.gpu)
    if config.training.get("deepspeed") or config.training.get("fsdp"):
        raise UsageError("--estimate is for one GPU that holds the whole model: leave --deepspeed and --fsdp out")
    if config.depth.use_depth:
        raise UsageError("--estimate does not support --use_depth: leave it out; the depth gate adds next to nothing")
    if config.model.attn_implementation not in ALLOWED:
        raise UsageError(f"--estimate supports sdpa, flash and eager attention, not {config.model.attn_implementation}")


def estimate(config: TrainConfig, name: str, arguments: TrainingArguments, shapes: Shapes, rows: Rows) -> EstimatePage:
    """Compute the estimate to print."""
    place = place_of(config.estimate, config, arguments)
    ways = ways_of(quantization(config.lora), bool(getattr(arguments, CHECKPOINTING)))
    first = measure_way(shapes, ways[0], place, rows, arguments)
    others = [measure_way(shapes, way, place, rows, arguments, first) for way in ways[1:]]
    pairs = zip(ways, [first, *others], strict=True)
    columns = [column(way, found, place, rows, config, arguments) for way, found in pairs]
    trained, total = shapes.counts
    return EstimatePage(
        model=name,
        what=describe_adapted(shapes.plan.ranks, shapes.full),
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
        blind=rows.sight is None and hasattr(shapes.base.config, "vision_config"),
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        epochs=None if arguments.max_steps > 0 else arguments.num_train_epochs,
        measured=place.card.measured,
        columns=tuple(columns),
    )


def column(way: Way, found: Traced, place: Hardware, rows: Rows, config: TrainConfig, arguments: Any) -> Column:
    """One column of the table: the given batch size if it fits, else the largest that does."""
    asked, most = arguments.per_device_train_batch_size, MOST_ROWS
    if rows.rows is not None:
        most = max(asked, min(most, len(rows.lengths)))
    largest = found.profile.largest(place.card.memory, most)
    batch = min(asked, largest) or asked
    length, seconds = duration_of(found.work, batch, place, rows, config, arguments, found.profile.fixed.trained)
    seconds, updates = seconds if largest else (), None if length is None else length.updates
    price = config.estimate.usd_per_hour
    dollars = () if price is None else tuple(value / 3600 * price for value in seconds)
    needs = found.profile.needs(asked)
    return Column(way.label, way.flags, needs, largest, most, batch, updates, seconds, dollars)


def duration_of(
    work: Work, batch: int, place: Hardware, rows: Rows, config: TrainConfig, arguments: Any, trained: float
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


def describe_adapted(ranks: Mapping[str, int], full: Iterable[str]) -> str:
    values = sorted(ranks.values())
    span = f"{values[0]}" if values and values[0] == values[-1] else f"{values[0]} to {values[-1]}" if values else ""
    lora = f"LoRA of rank {span} at {len(values)} sites" if values else "no adapter"
    whole = ", ".join(full)
    return lora + (f", {whole} in full" if whole else "")


LABEL, WIDTH = 22, 17


@dataclass(frozen=True)
class Column:
    """One way to run. needs: at the batch that was asked for. batch: the one that steps, time and cost are for.

    seconds, dollars: on the fastest and the slowest card that is meant; one where they agree, none where the length of
    the run or the speed of the card is not known.
    """

    label: str
    flags: str
    needs: Needs
    largest: int
    most: int
    batch: int
    updates: int | None
    seconds: tuple[float, ...]
    dollars: tuple[float, ...]


@dataclass(frozen=True)
class EstimatePage:
    """The estimated run, the machine, and a column for each configuration."""

    model: str
    what: str
    trained: int
    total: int
    card: str
    memory: float
    likely: tuple[str, ...]
    precision: str
    frozen: str
    rows: int | None
    longest: int
    average: float
    sees: bool
    blind: bool
    batch: int
    accumulation: int
    epochs: float | None
    measured: bool
    columns: tuple[Column, ...]

    def record(self) -> dict[str, Any]:
        """All values, as written to a file. Memory in bytes."""
        return asdict(self) | {"totals": {column.label: column.needs.total for column in self.columns}}


def page(found: EstimatePage) -> str:
    asked = found.columns[0]
    return "\n".join([*heading(found), "", *table(found), "", verdict(found, asked), *notes(found)])


def heading(found: EstimatePage) -> list[str]:
    name = Path(found.model).name
    lengths = f"up to {found.longest:,} tokens"
    if found.rows is not None:
        lengths = f"{plural(found.rows, 'row')} of {found.average:,.0f} tokens on average, {found.longest:,} at most"
    steps = f" × {found.accumulation} accumulated" if found.accumulation > 1 else ""
    free = " free" if found.measured else ""
    return [
        f"{name} · {found.what} · {amount(found.trained)} of {amount(found.total)} parameters train",
        f"{found.card} · {memory(found.memory)}{free} · computes in {found.precision}, frozen weights {found.frozen}",
        f"{lengths} · batch {found.batch}{steps}"
        + (f" · {found.epochs:g} epochs" if found.epochs and found.rows is not None else ""),
    ]


def table(found: EstimatePage) -> list[str]:
    columns = found.columns
    lines = [line("", [column.label for column in columns])]
    parts = {
        "frozen weights": [c.needs.fixed.weights for c in columns],
        "trained weights": [c.needs.fixed.trained for c in columns],
        "gradients": [c.needs.fixed.gradients for c in columns],
        "optimizer state": [c.needs.fixed.optimizer for c in columns],
        "activations": [c.needs.activations for c in columns],
        "logits and loss": [c.needs.logits for c in columns],
        "allowance": [c.needs.fixed.allowance for c in columns],
    }
    lines += [line(name, [memory(value) for value in values]) for name, values in parts.items()]
    lines += ["  " + "─" * (LABEL + WIDTH * len(columns))]
    lines += [line(f"peak at batch {found.batch}", [memory(c.needs.total) for c in columns])]
    lines += [line("fits", ["yes" if c.largest >= found.batch else "no" for c in columns])]
    lines += [line("largest batch", [largest(c) for c in columns])]
    if any(c.updates for c in columns):
        lines += ["", line("at batch", [str(c.batch) if c.largest else "–" for c in columns])]
        lines += [line("optimizer steps", [f"{c.updates:,}" if c.updates and c.largest else "–" for c in columns])]
        lines += [line("time", [time(c.seconds) for c in columns])]
    if any(c.dollars for c in columns):
        lines += [line("cost", [span([f"${value:,.2f}" for value in c.dollars]) for c in columns])]
    return lines


def line(name: str, cells: list[str]) -> str:
    return (f"  {name:<{LABEL}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)).rstrip()


def largest(column: Column) -> str:
    if column.largest == 0:
        return "none"
    return f"{column.largest:,}" + ("+" if column.largest == column.most else "")


def span(values: list[str]) -> str:
    return "–" if not values else values[0] if values[0] == values[-1] else f"{values[0]}–{values[-1]}"


def time(seconds: tuple[float, ...]) -> str:
    """12 s · 48 min · 3.4 h, or a span of these in one unit: an estimate has no more digits."""
    if not seconds:
        return "–"
    divisor, unit = next((row for row in ((3600, "h"), (60, "min")) if seconds[-1] >= 1.5 * row[0]), (1, "s"))
    digits = 1 if seconds[0] < 20 * divisor else 0
    return f"{span([f'{value / divisor:.{digits}f}' for value in seconds])} {unit}"


def verdict(found: EstimatePage, asked: Column) -> str:
    """One sentence: the run fits, or which configuration does."""
    if asked.largest >= found.batch:
        return f"Fits as given, with {memory(found.memory - asked.needs.total)} to spare."
    if asked.largest:
        return f"Batch {found.batch} does not fit; batch {asked.largest} does{other_ways(found)}."
    ways = other_ways(found)
    if ways:
        return f"Not even batch 1 fits as given{ways}."
    return (
        "Nothing fits, not even batch 1 on a 4-bit base with checkpointing. Ways out: shorter rows (--max_seq_length, "
        "--overlong), a card with more memory, a smaller model."
    )


def other_ways(found: EstimatePage) -> str:
    good = [column for column in found.columns[1:] if column.largest >= found.batch]
    good = good or [column for column in found.columns[1:] if column.largest]
    shown = [f"{column.flags} (batch up to {largest(column)})" for column in good]
    return "; with " + ", or ".join(shown) if shown else ""


def notes(found: EstimatePage) -> list[str]:
    lines = ["Counted: forward, backward and update. Not counted: validation, loading, saving, phases."]
    if found.likely and any(column.seconds for column in found.columns):
        lines.append(f"Time is that of cards of this size, fastest to slowest: {', '.join(found.likely)}.")
    elif not any(column.seconds for column in found.columns) and found.rows is None:
        lines.append("No time: give --data_path and --task, or --max_steps.")
    elif not any(column.seconds for column in found.columns) and any(column.largest for column in found.columns):
        lines.append("No time: no card of this size is known; name the card.")
    if found.blind:
        lines.append("No images in the estimate: rows of --task conversations or cota (with --data_path) bring them.")
    return lines
