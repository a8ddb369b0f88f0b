"""What the gradient norms of a run say, in numbers and in words: gradient_summary.json and gradient_summary.txt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.files.atomic import write_json, write_text
from rankwise.page.text import number, percent, plural
from rankwise.show.gradient_series import GradientTables, Series, by_kind, mean, read_tables, series
from rankwise.train.gradient_table import GROUP_OF, GROUPS, summary

TEXT, JSON = "gradient_summary.txt", "gradient_summary.json"
MOST_PHASES = 12
NAMES = {"embed": "embeddings", "attention": "attention", "mlp": "MLP", "lm_head": "output head", "total": "all"}


def generate_summary_report(run: Path) -> list[Path]:
    """Write both files into a run folder and return their paths. DataError: the folder has no gradient norms."""
    tables = read_tables(run)
    if tables is None:
        raise DataError(f"{run}: no {GROUPS}; train with --log_frequency 1 or more to have it")
    return write_summary(tables, run)


def write_summary(tables: GradientTables, folder: Path) -> list[Path]:
    found = gradient_summary(tables.groups, tables.layers)
    return [write_text(folder / TEXT, in_words(found)), write_json(folder / JSON, found)]


def gradient_summary(groups: Iterable[Mapping[str, Any]], layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers, from rows of the two documented tables.

    groups: mean, std, max, min, peak_step of each. attention_to_mlp_ratio: of the mean norms over the steps at which
    both train (None where they never do). clipped_steps: share of steps whose norm was above the limit. phases: name,
    first and last step, means. layers: mean of each, by kind.
    """
    rows = list(groups)
    table = series(rows)
    return {
        "steps": len(rows),
        "skipped_steps": sum(row.get("total_norm") in (None, "") for row in rows),
        "groups": summary(rows),
        "attention_to_mlp_ratio": ratio(table),
        "clipped_steps": clipped_share(table),
        "phases": phase_means(table),
        "layers": layer_means(series(layers)),
    }


def ratio(table: Series) -> float | None:
    pairs = zip(*(table.columns.get(f"{name}_norm", ()) for name in ("attention", "mlp")), strict=False)
    both = [pair for pair in pairs if all(map(math.isfinite, pair))]
    below = math.fsum(mlp for _, mlp in both)
    return math.fsum(attention for attention, _ in both) / below if below else None


def clipped_share(table: Series) -> float | None:
    pairs = zip(table.columns.get("total_norm", ()), table.columns.get("clipped_total_norm", ()), strict=False)
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return sum(clipped < total for total, clipped in known) / len(known) if known else None


def phase_means(table: Series) -> list[dict[str, Any]]:
    """One entry per stretch of steps in the same phase; none where there are no phases."""
    changes = table.changes()
    ends = [table.steps.index(step) for step, _ in changes] + [len(table.steps)]
    found = []
    for (step, name), first, end in zip(changes, ends, ends[1:], strict=False):
        means = {
            column: mean(table.columns.get(column, [])[first:end]) for column in (*GROUP_OF.values(), "total_norm")
        }
        there = {column.removesuffix("_norm"): value for column, value in means.items() if math.isfinite(value)}
        found.append({"phase": name, "first_step": step, "last_step": table.steps[end - 1], "means": there})
    return found


def layer_means(table: Series) -> dict[str, dict[str, float]]:
    return {
        kind: {
            name: value
            for name, curve in zip(one.names, one.curves, strict=True)
            if math.isfinite(value := mean(curve))
        }
        for kind, one in by_kind(table).items()
    }


def in_words(found: Mapping[str, Any]) -> str:
    """The same as a page of text."""
    lines = [f"Gradient norms before clipping, measured at {plural(found['steps'], 'step')}.", ""]
    if found["skipped_steps"]:
        lines[0] += f" {found['skipped_steps']:,} of them were skipped by the loss scaler."
    lines += [f"{'group':<12} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}  at step"]
    for name, row in found["groups"].items():
        cells = " ".join(f"{number(row[key]):>10}" for key in ("mean", "std", "min", "max"))
        lines.append(f"{NAMES[name]:<12} {cells}  {row['peak_step']:,}")
    return "\n".join([*lines, "", *sentences(found), *phase_lines(found["phases"])]) + "\n"


def sentences(found: Mapping[str, Any]) -> list[str]:
    said = []
    if found["attention_to_mlp_ratio"] is not None:
        said.append(f"Attention to MLP: {found['attention_to_mlp_ratio']:.3g} (means over steps at which both train).")
    if found["clipped_steps"] is not None:
        said.append(f"Clipped: {percent(found['clipped_steps'])} of the steps.")
    for kind, means in found["layers"].items():
        most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        largest, smallest = f"{most} ({number(means[most])})", f"{least} ({number(means[least])})"
        said.append(f"Largest {NAMES[kind]} norm on average: layer {largest}; smallest: layer {smallest}.")
    return said


def phase_lines(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    if not phases:
        return []
    rows = [
        f"  steps {row['first_step']:,} to {row['last_step']:,}, {row['phase']}: "
        + ", ".join(f"{NAMES[name]} {number(value)}" for name, value in row["means"].items())
        for row in phases
    ]
    more = [f"  … and {len(rows) - MOST_PHASES} more in {JSON}"] if len(rows) > MOST_PHASES else []
    return ["", "Mean norms by phase:", *rows[:MOST_PHASES], *more]
