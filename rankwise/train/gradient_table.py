"""The tables that training writes row by row, cut back on resume: its log, and gradient norms by step and site.

    gradient_norms.csv            step, site, tower, kind, layer, norm, norm_a, norm_b, …        site by site
    gradient_analysis.*.csv       by group of modules, and by layer                              views(rows)
    training_log.csv              step, epoch, loss, eval_loss, grad_norm, …                     what the Trainer logs

The two views have every step that is measured; the long table, which grows by a row per site, has those of `kept`,
so that whatever is said of groups, layers and phases is said of all steps.

Blank means not trained at that step (or, in a row of which all norms are blank, a step that the loss scaler skipped);
it is never written as 0.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.files.atomic import atomic_write

NORMS = "gradient_norms.csv"
GROUPS = "gradient_analysis.group_norms.csv"
LAYERS = "gradient_analysis.layer_norms.csv"
GRADIENT_SUMMARY = "gradient_analysis.summary.json"
TRAINING_LOG = "training_log.csv"
PHASES_TABLE = "phases.csv"
LOG_COLUMNS = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "seconds")
GROUP_OF = {"embed": "embed_norm", "attention": "attention_norm", "mlp": "mlp_norm", "head": "lm_head_norm"}
GROUP_COLUMNS = ("step", *GROUP_OF.values(), "total_norm", "clipped_total_norm", "phase")
PER_LAYER = ("attention", "mlp")
MAIN_TOWERS = ("language", "unknown")
DENSE = 100  # steps of which the long table has all; beyond them they are 1/DENSE apart

Row = dict[str, Any]


@dataclass(frozen=True)
class StepTable:
    """A CSV file whose first column is the optimizer step. Blank means not measured at that step."""

    path: Path
    columns: Sequence[str]

    def read(self) -> Iterator[dict[str, str]]:
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)

    def cut(self, step: int) -> None:
        """Drop what lies after a step, so that a resumed run continues the table it had at its checkpoint."""
        whole = (row for row in self.read() if None not in row.values())  # a power cut may leave half a row
        kept = (row for row in whole if row["step"].isdigit() and int(row["step"]) <= step)
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="", extrasaction="ignore").writerow(row)

    def extend(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows of cells that are in the order of the columns, in one piece; None is blank."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


@dataclass(frozen=True, slots=True)
class SiteNorm:
    """One site at one step.

    norm: ‖∇‖₂ over everything that trains at the site, unscaled, before clipping; norm_a, norm_b: of the LoRA factors
    apart; norm_per_sqrt_parameter: norm/√(number of parameters), comparable between sites of different size;
    delta_norm: ‖scale·B·A‖_F before the step is taken.
    """

    step: int
    site: str
    tower: str
    kind: str
    layer: int | None
    norm: float | None
    norm_a: float | None = None
    norm_b: float | None = None
    norm_per_sqrt_parameter: float | None = None
    delta_norm: float | None = None
    phase: str = ""


COLUMNS = tuple(field.name for field in fields(SiteNorm))
NUMBERS = COLUMNS[5:10]
cells = attrgetter(*COLUMNS)  # of a row; the csv module writes None as blank and a float with all its digits


def kept(step: int) -> bool:
    """Whether the long table includes this optimizer step (from 1): the first 100, then steps 1 % apart.

    1,000 steps leave 330, 100,000 leave 790. They follow from the step alone, so a resumed run keeps the same ones, and
    keep no time with a schedule of phases that change every few steps.
    """
    if step <= DENSE:
        return True
    grown, before = (math.floor(DENSE * math.log(count / DENSE)) for count in (step, step - 1))
    return grown > before


def rounded(value: float) -> float:
    """Eight significant digits, what float32 holds: the views are computed from what is written, so they agree."""
    return float(f"{value:.8g}")


def root_sum(norms: Iterable[float]) -> float:
    """√Σx²: the norm of several gradients taken together."""
    return math.sqrt(math.fsum(norm * norm for norm in norms))


@dataclass(frozen=True)
class Views:
    """Rows of the two documented tables. A group or layer that does not train at a step has no cell there."""

    groups: list[Row]
    layers: list[Row]


def views(rows: Iterable[SiteNorm], max_grad_norm: float | None = None) -> Views:
    """The documented tables, from the long one.

    Args:
        rows: in order of the step.
        max_grad_norm: what the total is clipped to; None or 0: not clipped.
    """
    steps = [list(group) for _, group in groupby(rows, key=lambda row: row.step)]
    return Views([group_row(step, max_grad_norm) for step in steps], [layer_row(step) for step in steps])


def group_row(rows: Sequence[SiteNorm], max_grad_norm: float | None) -> Row:
    """√Σ‖∇‖² by group at one step; the total is over everything that trains, of whatever kind."""
    found = summed(rows, lambda row: GROUP_OF.get(row.kind))
    total = summed(rows, lambda _: "total_norm")
    if total:
        total["clipped_total_norm"] = min(total["total_norm"], max_grad_norm or math.inf)
    return {"step": rows[0].step, **found, **total, "phase": rows[0].phase}


def layer_row(rows: Sequence[SiteNorm]) -> Row:
    """The same by layer, for attention and MLP."""
    found = summed(rows, lambda row: None if row.layer is None else layer_column(row.tower, row.layer, row.kind))
    return {"step": rows[0].step, **found}


def summed(rows: Sequence[SiteNorm], name: Any) -> Row:
    norms: dict[str, list[float]] = {}
    for row in rows:
        column = name(row)
        if column is not None and row.norm is not None:
            norms.setdefault(column, []).append(row.norm)
    return {column: rounded(root_sum(values)) for column, values in norms.items()}


def layer_column(tower: str, layer: int, kind: str) -> str | None:
    """layer_3_mlp; vision_layer_3_mlp for a tower beside the language model, whose layers have numbers of their own."""
    if kind not in PER_LAYER:
        return None
    name = f"layer_{layer}_{kind}"
    return name if tower in MAIN_TOWERS else f"{tower}_{name}"


def layer_columns(places: Iterable[Any]) -> list[str]:
    """Both columns of every layer from 0 to the last that trains, tower by tower."""
    last: dict[str, int] = {}
    for one in places:
        if one.layer is not None and one.kind in PER_LAYER:
            tower = MAIN_TOWERS[0] if one.tower in MAIN_TOWERS else one.tower
            last[tower] = max(one.layer, last.get(tower, 0))
    towers = sorted(last, key=lambda tower: (tower not in MAIN_TOWERS, tower))
    names = [layer_column(tower, n, kind) for tower in towers for n in range(last[tower] + 1) for kind in PER_LAYER]
    return ["step", *(name for name in names if name)]


def summary(groups: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Group → mean, std (over the steps at which it trained; population), max, min, peak_step.

    Takes rows of the group table, as written or as computed; a group that never trains is left out.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for row in groups:
        for column in (*GROUP_OF.values(), "total_norm"):
            if row.get(column) not in (None, ""):
                found.setdefault(column.removesuffix("_norm"), []).append((float(row[column]), int(row["step"])))
    return {name: statistics_of(points) for name, points in found.items()}


def statistics_of(points: Sequence[tuple[float, int]]) -> dict[str, float | int]:
    norms = [norm for norm, _ in points]
    peak, step = max(points, key=lambda point: point[0])
    mean = statistics.fmean(norms)
    return {"mean": mean, "std": statistics.pstdev(norms, mean), "max": peak, "min": min(norms), "peak_step": step}


def stored(path: Path) -> Iterator[SiteNorm]:
    """The rows of a `gradient_norms.csv` in order, one by one: the table may be larger than one wants to hold.

    DataError: no such file, columns are missing, or a cell is not a number (file and line are named).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; `rankwise train` writes {NORMS} into the run folder")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        lacks = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if lacks:
            raise DataError(f"{path}: no column {', '.join(lacks)}; a table of gradient norms has {', '.join(COLUMNS)}")
        for row in reader:
            yield parsed(row, path, reader.line_num)


def parsed(row: Mapping[str, str], path: Path, line: int) -> SiteNorm:
    try:
        norm, a, b, share, delta = (float(row[name]) if row[name] else None for name in NUMBERS)
        layer = int(row["layer"]) if row["layer"] else None
        where = (int(row["step"]), row["site"], row["tower"], row["kind"], layer)
        return SiteNorm(*where, norm, a, b, share, delta, row["phase"])
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error
