"""Tables of gradient norms as curves over the steps, and their summary in numbers and words.

training ──▶ gradient_analysis.*.csv ──▶ Series ──▶ write_summary (numbers, words), gradient_plots.py (pictures)
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.files.atomic import write_json, write_text
from rankwise.page.blocks import Block, Table, Words, lines
from rankwise.page.text import number, percent, plural
from rankwise.train.expert_record import ExpertRecord, read_experts
from rankwise.train.gradient_table import (
    GROUP_OF,
    GROUPS,
    LAYERS,
    NORMS,
    PER_LAYER,
    PHASES_TABLE,
    SiteNorm,
    stored,
    summary,
    views,
)

LAYER = re.compile(r"(?:(?P<tower>\w+)_)?layer_(?P<number>\d+)_(?P<kind>attention|mlp)")
WINDOW = 5  # steps of the moving average that the documented plots have
NAN = float("nan")
BLANK = (None, "")

Change = tuple[int, str]  # first step of a phase, its name
Boundary = tuple[float, str]  # where it begins on the axis of steps, its name


@dataclass(frozen=True)
class Series:
    """Columns over steps. NaN: blank in the table, so a group that did not train. `phases`: one name per step."""

    steps: list[int]
    columns: dict[str, list[float]]
    phases: list[str]

    def changes(self) -> list[Change]:
        """(first step, name) of every phase; one alone is no phase."""
        named = list(zip(self.steps, self.phases, strict=True))
        found = [(step, name) for i, (step, name) in enumerate(named) if not i or name != named[i - 1][1]]
        return found if len(found) > 1 else []

    def boundaries(self) -> list[Boundary]:
        """Of the phases as far as the measured steps tell."""
        return boundaries(self.changes(), self.steps)

    def smoothed_at(self, values: Sequence[float], place: int) -> float:
        """One value of the moving average, from what lies around it."""
        first, end = max(0, place - 4 * WINDOW), place + 4 * WINDOW + 1
        part = Series(self.steps[first:end], {}, self.phases[first:end])
        return part.smoothed(values[first:end])[place - first]

    def smoothed(self, values: Sequence[float]) -> list[float]:
        """The moving average, phase by phase; of a short run the values themselves."""
        if len(self.steps) < 4 * WINDOW:
            return list(values)
        starts = [self.steps.index(step) for step, _ in self.changes()] or [0]
        parts = [smooth(values[first:end]) for first, end in pairwise([*starts, len(values)])]
        return [value for part in parts for value in part]

    def filled(self) -> dict[str, list[float]]:
        """The columns that have a value at some step."""
        return {name: values for name, values in self.columns.items() if any(map(math.isfinite, values))}


def boundaries(starts: Sequence[Change], measured: Sequence[int] = ()) -> list[Boundary]:
    """Where a phase begins in every picture: between its first step and the step before it.

    measured: steps at which the phase was asked for, where those are not all of them; then it is halfway between.
    """
    before = dict(zip(measured[1:], measured, strict=False))
    return [((step + before.get(step, step - 1)) / 2, name) for step, name in starts]


def read_phases(path: Path) -> list[Change]:
    """(first step, name) of every phase in a `phases.csv`; one alone is no phase."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            found = [(int(row["step"]), row["phase"]) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: expected the columns step and phase: {error!r}") from error
    return found if len(found) > 1 else []


@dataclass(frozen=True)
class Layers:
    """Norms of one kind by layer: names of the layers from the first on, and one curve each."""

    names: list[str]
    curves: list[list[float]]


def series(rows: Iterable[Mapping[str, Any]] | Series) -> Series:
    """The curves of a table's rows; curves as they are. DataError: a step or norm that is not a number."""
    if isinstance(rows, Series):
        return rows
    kept = list(rows)
    names = dict.fromkeys(name for row in kept for name in row if name not in ("step", "phase"))
    try:
        steps = [int(row["step"]) for row in kept]
        columns = {name: [NAN if (v := row.get(name)) in BLANK else float(v) for row in kept] for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"gradient norms: expected a step and numbers or blanks in every row: {error!r}") from error
    return Series(steps, columns, [str(row.get("phase") or "") for row in kept])


def by_kind(table: Series) -> dict[str, Layers]:
    """attention, mlp → its layers, those of the language model first; kinds that never train are left out."""
    found: dict[str, list[tuple[tuple[bool, str, int], str]]] = {kind: [] for kind in PER_LAYER}
    for column in table.columns:
        match = LAYER.fullmatch(column)
        if match:
            tower, number = match["tower"] or "", int(match["number"])
            found[match["kind"]].append(((bool(tower), tower, number), column))
    kinds = {}
    for kind, rows in found.items():
        curves = [table.columns[column] for _, column in sorted(rows)]
        if any(math.isfinite(value) for curve in curves for value in curve):
            names = [f"{tower} {number}".strip() for (_, tower, number), _ in sorted(rows)]
            kinds[kind] = Layers(names, curves)
    return kinds


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Centred moving average within each stretch of values; it never bridges a gap, and is shorter at its ends."""
    half = window // 2
    found = [NAN] * len(values)
    for first, last in stretches(values):
        for i in range(first, last):
            near = values[max(first, i - half) : min(last, i + half + 1)]
            found[i] = math.fsum(near) / len(near)
    return found


def stretches(values: Sequence[float]) -> list[tuple[int, int]]:
    """(first, end) of every run of finite values."""
    runs = [(there, list(run)) for there, run in groupby(range(len(values)), lambda i: math.isfinite(values[i]))]
    return [(run[0], run[-1] + 1) for there, run in runs if there]


def mean(values: Iterable[float]) -> float:
    """Of those that are there; NaN where none is."""
    there = [value for value in values if math.isfinite(value)]
    return math.fsum(there) / len(there) if there else NAN


def positive(values: Sequence[float]) -> list[float]:
    """A norm of exactly 0 has no place on a logarithmic scale."""
    return [value if value > 0 else NAN for value in values]


@dataclass(frozen=True)
class GradientTables:
    """What a run folder says of gradient norms: rows of the table by group, curves of the one by layer and of the LoRA
    factors.

    phases: of `phases.csv`, which knows each step; without it they are read off the steps that were measured.
    sites: path → mean norm of the recorded steps at which the site trained.
    """

    groups: Sequence[Mapping[str, Any]]
    layers: Series
    factors: Series
    phases: Sequence[Change] = ()
    experts: ExpertRecord = field(default_factory=ExpertRecord)
    sites: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def group_curves(self) -> Series:
        return series(self.groups)

    def boundaries(self) -> list[Boundary]:
        return boundaries(self.phases) if self.phases else self.group_curves.boundaries()


def read_tables(folder: Path) -> GradientTables | None:
    """The tables of a run folder; None where it has none. Views that are missing are computed from the long table."""
    long = folder / NORMS
    factors, sites = by_factor_and_site(stored(long) if long.is_file() else ())
    phases = read_phases(folder / PHASES_TABLE) if (folder / PHASES_TABLE).is_file() else []
    if (folder / GROUPS).is_file() and (folder / LAYERS).is_file():
        groups, layers = read_rows(folder / GROUPS), read_rows(folder / LAYERS)
        curves_of(folder / GROUPS, groups)
        return GradientTables(groups, curves_of(folder / LAYERS, layers), factors, phases, read_experts(folder), sites)
    if not long.is_file():
        return None
    found = views(stored(long))
    return GradientTables(found.groups, series(found.layers), factors, phases, read_experts(folder), sites)


def read_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if rows and "step" not in rows[0]:
        raise DataError(f"{path}: no column `step`; a table of gradient norms has one row per step")
    return rows


def curves_of(path: Path, rows: Iterable[Mapping[str, Any]]) -> Series:
    """Of the rows of this file, which an error names."""
    try:
        return series(rows)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def by_factor_and_site(rows: Iterable[SiteNorm]) -> tuple[Series, dict[str, float]]:
    """√Σx² over the sites of a kind, by step: attention_norm_a, attention_norm_b, attention_delta_norm, mlp_…; and the
    mean norm of each site. In one pass, since the table may be larger than one wants to hold."""
    steps: dict[tuple[int, str], dict[str, float]] = {}
    norms: dict[str, list[float]] = {}
    for row in rows:
        if row.norm is not None:
            norms.setdefault(row.site, []).append(row.norm)
        squares = steps.setdefault((row.step, row.phase), {})
        for name in ("norm_a", "norm_b", "delta_norm") if row.kind in PER_LAYER else ():
            value = getattr(row, name)
            if value is not None:
                squares[f"{row.kind}_{name}"] = squares.get(f"{row.kind}_{name}", 0.0) + value * value
    factors = series(
        {"step": step, "phase": phase, **{name: math.sqrt(square) for name, square in found.items()}}
        for (step, phase), found in steps.items()
    )
    return factors, {site: mean(values) for site, values in norms.items()}


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
    text = "\n".join(lines([*summary_blocks(found), *expert_blocks(tables.experts)]))
    found |= {"experts": tables.experts.as_dict()} if tables.experts.steps else {}
    return [write_text(folder / TEXT, f"{text}\n"), write_json(folder / JSON, found)]


def gradient_summary(
    groups: Iterable[Mapping[str, Any]], layers: Iterable[Mapping[str, Any]] | Series
) -> dict[str, Any]:
    """The numbers, from rows of the two documented tables (of layers their curves will do).

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
    both = finite_pairs(table, "attention_norm", "mlp_norm")
    below = math.fsum(mlp for _, mlp in both)
    return math.fsum(attention for attention, _ in both) / below if below else None


def finite_pairs(table: Series, *names: str) -> list[tuple[float, ...]]:
    """The values of two columns at the steps at which both have one."""
    pairs = zip(*(table.columns.get(name, ()) for name in names), strict=False)
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def clipped_share(table: Series) -> float | None:
    known = finite_pairs(table, "total_norm", "clipped_total_norm")
    return sum(clipped < total for total, clipped in known) / len(known) if known else None


def phase_means(table: Series) -> list[dict[str, Any]]:
    """One entry per stretch of steps in the same phase; none where there are no phases."""
    changes = table.changes()
    ends = [table.steps.index(step) for step, _ in changes] + [len(table.steps)]
    found = []
    for (step, name), first, end in zip(changes, ends, ends[1:], strict=False):
        names = (*GROUP_OF.values(), "total_norm")
        means = {name.removesuffix("_norm"): mean(table.columns.get(name, [])[first:end]) for name in names}
        there = {name: value for name, value in means.items() if math.isfinite(value)}
        found.append({"phase": name, "first_step": step, "last_step": table.steps[end - 1], "means": there})
    return found


def layer_means(table: Series) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for kind, one in by_kind(table).items():
        means = zip(one.names, map(mean, one.curves), strict=True)
        found[kind] = {name: value for name, value in means if math.isfinite(value)}
    return found


def summary_blocks(found: Mapping[str, Any]) -> list[Block]:
    """The same as a table and in words; nothing where no group trained."""
    rows = [
        (NAMES[name], *(number(row[key]) for key in ("mean", "std", "min", "max")), f"{row['peak_step']:,}")
        for name, row in found["groups"].items()
    ]
    header = ("gradient norm", "mean", "std", "min", "max", "peak at step")
    note = f"Before clipping, over the steps at which the group trained; measured at {plural(found['steps'], 'step')}."
    if found["skipped_steps"]:
        note += f" {found['skipped_steps']:,} of them were skipped by the loss scaler."
    table, said = Table(header, rows, note=note), Words(" ".join(sentences(found)))
    return [table, said, *phase_blocks(found["phases"])] if rows else []


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


def expert_blocks(found: ExpertRecord) -> list[Block]:
    """Experts without a gradient, and change without effect, in words."""
    return [Words(" ".join(found.sentences()))] if found.steps else []


def phase_blocks(phases: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Mean norms of each phase."""
    rows = [
        (
            f"steps {row['first_step']:,} to {row['last_step']:,}, {row['phase']}",
            ", ".join(f"{NAMES[name]} {number(value)}" for name, value in row["means"].items()),
        )
        for row in phases[:MOST_PHASES]
    ]
    more = len(phases) - MOST_PHASES
    note = f"And {plural(more, 'more phase')} in {JSON}." if more > 0 else ""
    return [Table(("phase", "mean norms"), rows, first_number=2, note=note)] if rows else []
