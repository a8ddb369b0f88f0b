"""rankwise compare: several runs in one table and one picture: what trained, how long, how well, with which gradients.

rankwise compare runs/batch/e2e_attention runs/batch/e2e_mlp -o runs/comparison

A number that a run does not have is blank, never 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rankwise.errors import DataError, UsageError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import read_if_there, write_json, write_text
from rankwise.options.commands import CompareConfig
from rankwise.page import canvas
from rankwise.page.blocks import Table, lines
from rankwise.page.template import markdown_table
from rankwise.page.text import amount, clip, duration, is_number, metric_name, number, percent, with_interval
from rankwise.ranks.expert_map import EXPERT_MAP, moved_experts, shares, trained_experts
from rankwise.report.contents import Contents, Scored, read_run
from rankwise.train.expert_record import ExpertRecord
from rankwise.train.gradient_summary import gradient_summary
from rankwise.train.loss_plots import points, shared_metrics

CSV, MARKDOWN, JSON, PICTURE = "comparison.csv", "comparison.md", "comparison.json", "comparison.png"
SUMMARY = "results_summary.json"  # of `rankwise train`: config, train_loss, gradient_stats
GRADIENTS = ("attention_mean", "mlp_mean", "attention_to_mlp_ratio")
MOST_SCORES = 2  # panels of the picture
MOVERS, MOVERS_SHOWN = 10, 3  # experts in the record, and in the table
EXPERT_PARTS = ("norms", "changes")


@dataclass(frozen=True)
class Row:
    """One run.

    trained: trainable_parameters, steps, seconds, train_loss, eval_loss (the least). gradients: attention_mean and
    mlp_mean over the steps at which each trained, attention_to_mlp_ratio over those at which both did. scores: the
    run's own by task, those from before training left out. experts: of a mixture, as `experts` gives it. What is
    not known is None.
    """

    name: str
    folder: str
    trained: dict[str, float | None] = field(default_factory=dict)
    gradients: dict[str, float | None] = field(default_factory=dict)
    scores: dict[str, EvaluationResult] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        scores = {
            task: {"n": result.n, "metrics": result.metrics, "intervals_95": result.intervals}
            for task, result in self.scores.items()
        }
        told = {"experts": self.experts} if self.experts else {}
        return {"run": self.name, "folder": self.folder, **self.trained, **self.gradients, "scores": scores, **told}


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """A row per run folder, in the order given. DataError: a folder that no run has written."""
    names = short_names(folders)
    return [row_of(name, read_run(folder)) for name, folder in zip(names, folders, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"one run folder is named twice: {', '.join(map(str, folders))}")


def row_of(name: str, contents: Contents) -> Row:
    told = trained(contents), gradients(contents), scores(contents.scores), experts(contents)
    return Row(name, str(contents.run), *told)


def trained(contents: Contents) -> dict[str, float | None]:
    """Of the last training stage, and of the log beside it."""
    stages = [stage for stage in contents.stages if stage.name == "train"]
    entry = stages[-1].entry if stages else {}
    folder = stages[-1].folder if stages else ""
    rows = next((rows for where, rows in contents.logs if where == folder), [])
    summary = contents.run / folder / SUMMARY
    validation = [value for _, value in points(rows, "eval_loss")]
    found = {
        "trainable_parameters": entry.get("trainable_parameters"),
        "steps": entry.get("steps"),
        "seconds": entry.get("training_seconds"),
        "train_loss": read_if_there(summary).get("train_loss") if stages else None,
        "eval_loss": min(validation, default=None),
    }
    return {key: value if is_number(value) else None for key, value in found.items()}


def gradients(contents: Contents) -> dict[str, float | None]:
    """Means over the steps, from the tables of the run that trained last."""
    if not contents.gradients:
        return dict.fromkeys(GRADIENTS)
    _, tables = contents.gradients[-1]
    found = gradient_summary(tables.groups, tables.layers)
    means = {f"{name}_mean": found["groups"].get(name, {}).get("mean") for name in ("attention", "mlp")}
    return {**means, "attention_to_mlp_ratio": found["attention_to_mlp_ratio"]}


def experts(contents: Contents) -> dict[str, Any]:
    """Of a mixture: norms (mean gradient norm by parameter, over its layers), changes (squared change by parameter, of
    all layers), movers (expert → its share of the change of all, the most moved first). By the run that trained last;
    without one by the two checkpoints that `ranks` compared. Empty without experts."""
    record = contents.gradients[-1][1].experts if contents.gradients else ExpertRecord()
    changes, moved = record.changes, trained_experts(record.changes)
    for finding, _, content in contents.findings if not changes else ():
        if finding is EXPERT_MAP:
            changes = {row["path"]: row["energy"] for row in content["parameters"]}
            moved = moved_experts(content)
    norms = {name: [record.norms[path] for path in paths] for name, paths in by_name(record.norms).items()}
    found = {
        "norms": {name: fmean(values) for name, values in norms.items()},
        "changes": {name: sum(sum(changes[path]) for path in paths) for name, paths in by_name(changes).items()},
        "movers": dict(list(shares(moved).items())[:MOVERS]),
    }
    return found if changes else {}


def by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """A parameter's own name → its paths, of all layers."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def scores(found: Sequence[Scored]) -> dict[str, EvaluationResult]:
    """The newest result of each task and method after training (of a run without training, the newest)."""
    after = [one for one in found if not one.is_before] or list(found)
    return {one.result.title: one.result for one in sorted(after, key=lambda one: one.written)}


# --- tables --------------------------------------------------------------------------------------------------------


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as cells by column; scores as task.metric, with .low and .high of the 95 % interval, and task.n."""
    metrics = {task: metrics_of(rows, task) for task in tasks_of(rows)}
    names = {
        part: list(dict.fromkeys(name for row in rows for name in row.experts.get(part, ()))) for part in EXPERT_PARTS
    }
    return [
        {"run": row.name, **row.trained, **row.gradients, **flat_experts(row, names), **flat_scores(row, metrics)}
        for row in rows
    ]


def flat_experts(row: Row, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        f"experts.{part}.{name}": row.experts.get(part, {}).get(name) for part, found in names.items() for name in found
    }


def flat_scores(row: Row, metrics: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, names in metrics.items():
        found[f"{task}.n"] = row.scores[task].n if task in row.scores else None
        for name in names:
            low, high = interval_of(row, task, name) or (None, None)
            cells = {"": value_of(row, task, name), ".low": low, ".high": high}
            found |= {f"{task}.{name}{end}": value for end, value in cells.items()}
    return found


def tasks_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row.scores))


def metrics_of(rows: Sequence[Row], task: str) -> list[str]:
    """Metrics that any run has for a task; those that all have come first, as people read them."""
    results = [row.scores[task] for row in rows if task in row.scores]
    return list(dict.fromkeys([*shared_metrics(results), *(name for one in results for name in one.metrics)]))


def value_of(row: Row, task: str, metric: str) -> float | None:
    return row.scores[task].metrics.get(metric) if task in row.scores else None


def interval_of(row: Row, task: str, metric: str) -> tuple[float, float] | None:
    return row.scores[task].intervals.get(metric) if task in row.scores else None


def table_text(rows: Sequence[Row]) -> str:
    """The table as CSV, every number with all its digits."""
    cells, text = flat(rows), io.StringIO()
    writer = csv.DictWriter(text, list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def comparison_table(rows: Sequence[Row]) -> Table:
    """The table for people: a line per number, a column per run, scores with their intervals."""
    found = []
    shown = {"trainable_parameters": amount, "seconds": duration}
    for part in ("trained", "gradients"):
        for name in getattr(rows[0], part):
            cells = [getattr(row, part)[name] for row in rows]
            if any(cell is not None for cell in cells):
                write = shown.get(name, number)
                found.append([name.replace("_", " "), *("" if cell is None else write(cell) for cell in cells)])
    found += expert_lines(rows)
    for task in tasks_of(rows):
        for metric in metrics_of(rows, task):
            found.append([f"{task}: {metric_name(metric)}", *(score_cell(row, task, metric) for row in rows)])
        found.append([f"{task}: items", *(number(row.scores[task].n) if task in row.scores else "" for row in rows)])
    note = "In brackets: 95 % intervals. Blank: not measured, or nothing trained there."
    return Table(("", *(row.name for row in rows)), found, note=note)


def expert_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of the table for mixtures: per parameter, and the most moved experts of each run."""
    found = []
    for part, says in {"norms": "mean gradient norm", "changes": "squared change"}.items():
        for name in dict.fromkeys(name for row in rows for name in row.experts.get(part, ())):
            values = [row.experts.get(part, {}).get(name) for row in rows]
            cells = ["" if value is None else number(value) for value in values]
            found.append([f"{name} of all experts, {says}", *cells])
    movers = [list(row.experts.get("movers", {}).items()) for row in rows]
    for place in range(min(MOVERS_SHOWN, max(map(len, movers), default=0))):
        cells = [f"{one[place][0]} ({percent(one[place][1])})" if place < len(one) else "" for one in movers]
        found.append([f"most moved expert, {place + 1}", *cells])
    return found


def score_cell(row: Row, task: str, metric: str) -> str:
    value = value_of(row, task, metric)
    return "" if value is None else with_interval(value, interval_of(row, task, metric))


# --- picture -------------------------------------------------------------------------------------------------------


def plot_comparison(rows: Sequence[Row], path: Path | str) -> Path:
    """A line per run, a panel per number: gradient norms of attention and MLP, losses, the scores read first.

    Raises:
        DataError: no run has any of these numbers.
    """
    parts = panels_of(rows)
    if not parts:
        raise DataError("these runs have neither losses, gradient norms nor scores to compare")
    figure, axes = canvas.panels(2.0 + 2.4 * len(parts), 1.3 + 0.34 * len(rows), columns=len(parts))
    for place, (axis, draw) in enumerate(zip(axes, parts, strict=True)):
        draw(axis)
        canvas.name_rows(axis, ["" if place else clip(row.name, 36) for row in rows])
    return canvas.save(figure, path)


def panels_of(rows: Sequence[Row]) -> list[Callable[[Any], None]]:
    """What draws each panel that there are numbers for."""
    norms = [(row.gradients.get("attention_mean"), row.gradients.get("mlp_mean")) for row in rows]
    losses = [(row.trained.get("train_loss"), row.trained.get("eval_loss")) for row in rows]
    pairs = (
        ("gradient norm, mean over steps", ("attention", "MLP"), norms),
        ("loss (nats per token)", ("training, mean", "validation, least"), losses),
    )
    found: list[Callable[[Any], None]] = [
        partial(draw_pair, title=title, labels=labels, values=values)
        for title, labels, values in pairs
        if any(value is not None for pair in values for value in pair)
    ]
    tasks = tasks_of(rows)
    for task in tasks:
        shown = metrics_of(rows, task)[: max(1, MOST_SCORES // len(tasks))]
        found += [partial(draw_score, rows=rows, task=task, metric=metric) for metric in shown]
    return found


def draw_pair(axis: Any, title: str, labels: Sequence[str], values: Sequence[Sequence[float | None]]) -> None:
    """Two numbers of every run, told apart by shape and lightness."""
    for i, (label, colour, marker) in enumerate(zip(labels, (canvas.BLUE, canvas.YELLOW), "os", strict=True)):
        there = [(pair[i], y) for y, pair in enumerate(values) if pair[i] is not None]
        if there:
            x, y = zip(*there, strict=True)
            axis.plot(x, y, color=colour, marker=marker, markersize=7, linestyle="", label=label)
    canvas.name_axes(axis, title, "")
    canvas.legend(axis, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def draw_score(axis: Any, rows: Sequence[Row], task: str, metric: str) -> None:
    """Values with their 95 % intervals."""
    for y, row in enumerate(rows):
        value = value_of(row, task, metric)
        if value is None:
            continue
        error = canvas.error_bars([value], [interval_of(row, task, metric)])
        axis.errorbar(value, y, xerr=error, color=canvas.INK, marker="o", markersize=6, capsize=4, linestyle="")
    canvas.name_axes(axis, f"{task}: {metric_name(metric)}", "")


def run(config: CompareConfig) -> Path:
    """Write the tables and, unless told not to, the picture; returns the folder."""
    rows = read_rows(check(config))
    folder = Path(config.output_dir)
    write_text(folder / CSV, table_text(rows))
    write_json(folder / JSON, {"runs": [row.record() for row in rows]})
    table = comparison_table(rows)
    write_text(folder / MARKDOWN, "\n".join(markdown_table(table)) + "\n")
    files = [CSV, MARKDOWN, JSON]
    if not config.no_plots:
        files.append(plot_comparison(rows, folder / PICTURE).name)
    print("\n".join([*lines([table]), ""]))
    print(f"{', '.join(files)} in {folder}")
    return folder


def check(config: CompareConfig) -> list[Path]:
    if len(config.runs) < 2:
        raise UsageError("compare needs at least two run folders: rankwise compare RUN RUN …")
    folders = [Path(run) for run in config.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("compare: one run folder is named twice")
    return folders
