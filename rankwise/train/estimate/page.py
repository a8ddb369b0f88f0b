"""The estimate of a run on one screen: what it needs, whether that fits, and what would make it fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.page.text import amount, memory, plural
from rankwise.train.estimate.cost import Needs

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
    """What is estimated, for which machine, and a column for each way to run it."""

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
        """All of it, for a file. Memory in bytes."""
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
    lines += [rule(len(columns))]
    lines += [line(f"peak at batch {found.batch}", [memory(c.needs.total) for c in columns])]
    lines += [line("fits", [fits(c, found) for c in columns])]
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


def rule(columns: int) -> str:
    return "  " + "─" * (LABEL + WIDTH * columns)


def fits(column: Column, found: EstimatePage) -> str:
    return "yes" if column.largest >= found.batch else "no"


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
    """One sentence: it fits, or what does."""
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
