"""Where fine-tuning moved a mixture's experts: energy by expert and layer, as a map, a table, a sentence and a warning.

content = expert_facts(measured, threshold)         # what expert_changes.json holds; None without experts
plot_expert_map(content, plots / "expert_map.png")
few_hold_all(content)                               # the warning, where a tenth of the experts holds nearly all
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.core.site import Site, from_row, layer_of
from rankwise.errors import DataError, need
from rankwise.files.document import Document
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Plot, Table, Words
from rankwise.page.text import percent, plural
from rankwise.ranks.measured import Measured

CHANGES = Document(
    "expert_changes.json", "rankwise-expert-changes/1", "the changes of experts", "rankwise ranks", ("parameters",)
)
PER_EXPERT = ("energy", "relative_change", "unchanged", "noise_share", "rank_at_threshold")
NEARLY_ALL, FEW = 0.9, 0.1  # of the energy; of the experts
SHOWN = 10
LEAST = 0.01  # × the mean energy: what is below is drawn as that
ROW, COLUMN, MOST = 0.22, 0.4, 9.0  # inches


def expert_facts(measured: Mapping[Site, Measured], threshold: float) -> dict[str, Any] | None:
    """Per parameter, lists over its experts; the rank at the threshold is a lower bound where a sketch decided."""
    rows = [
        site.as_dict()
        | {
            "energy": [one.energy for one in found.experts],
            "relative_change": [finite(one.relative_change) for one in found.experts],
            "unchanged": [one.unchanged for one in found.experts],
            "noise_share": [one.noise_share for one in found.experts],
            "rank_at_threshold": [one.spectrum.rank_bounds(threshold)[0] for one in found.experts],
        }
        for site, found in measured.items()
        if found.experts
    ]
    return {"svd_threshold": threshold, "parameters": rows} if rows else None


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else None


@dataclass(frozen=True)
class MovedExpert:
    """One expert of a layer with all its matrices: the energy of its change, and ‖Δ‖/‖W‖ of each by projection."""

    owner: str
    layer: int | None
    expert: int
    energy: float
    changes: Mapping[str, float | None]


def moved_experts(content: Mapping[str, Any]) -> list[MovedExpert]:
    """Every expert, in the order of layers; `owner` is the module that holds it."""
    found: dict[tuple[str, int], list[tuple[Site, Mapping[str, Any]]]] = {}
    for row in content["parameters"]:
        site = from_row(row)
        for expert in range(site.experts):
            found.setdefault((owner_of(site), expert), []).append((site, row))
    return [
        MovedExpert(
            owner=owner,
            layer=rows[0][0].layer,
            expert=expert,
            energy=sum(row["energy"][expert] for _, row in rows),
            changes={site.projection: row["relative_change"][expert] for site, row in rows},
        )
        for (owner, expert), rows in found.items()
    ]


def shares(experts: Sequence[MovedExpert]) -> dict[str, float]:
    """Expert, named → its share of the change of all, the most moved first; empty where nothing moved."""
    total = sum(one.energy for one in experts)
    return {name_of(one): one.energy / total for one in by_change(experts)} if total else {}


def trained_experts(changes: Mapping[str, Sequence[float]]) -> list[MovedExpert]:
    """Every expert that an adapter changes. changes: parameter → ‖s·B·A‖² of each of its experts."""
    found: dict[tuple[str, int], float] = {}
    for name, energies in changes.items():
        owner = name.rpartition(".")[0]
        for expert, energy in enumerate(energies):
            found[owner, expert] = found.get((owner, expert), 0.0) + energy
    return [MovedExpert(owner, layer_of(owner), expert, energy, {}) for (owner, expert), energy in found.items()]


def owner_of(site: Site) -> str:
    return site.path.removesuffix(".weight").rpartition(".")[0]


def by_change(experts: Sequence[MovedExpert]) -> list[MovedExpert]:
    """The most moved first."""
    return sorted(experts, key=lambda one: -one.energy)


def holders(experts: Sequence[MovedExpert], share: float) -> int:
    """How few experts hold this share of the change of all; 0 where nothing moved."""
    left, count = share * sum(one.energy for one in experts), 0
    for one in by_change(experts):
        if left <= 0:
            break
        left, count = left - one.energy, count + 1
    return count


def name_of(one: MovedExpert) -> str:
    return f"expert {one.expert} of {one.owner}" if one.layer is None else f"layer {one.layer}, expert {one.expert}"


def movement(content: Mapping[str, Any] | None) -> str:
    """The most moved expert, and how evenly the change is spread, in a line; empty without experts."""
    experts = moved_experts(content) if content else []
    if not experts:
        return ""
    total = sum(one.energy for one in experts)
    if not total:
        return f"none of {len(experts)} experts has changed"
    top = by_change(experts)[0]
    share = percent(top.energy / total)
    return f"half of the change is in {holders(experts, 0.5)} of {len(experts)}; most moved: {name_of(top)} ({share})"


def few_hold_all(content: Mapping[str, Any]) -> str | None:
    """A warning where at most a tenth of the experts, rounded up, holds nearly all of the change."""
    experts = moved_experts(content)
    count = holders(experts, NEARLY_ALL)
    if not 0 < count <= math.ceil(FEW * len(experts)):
        return None
    first = by_change(experts)[0]
    return (
        f"{count} of {len(experts)} experts ({percent(count / len(experts))}) hold {percent(NEARLY_ALL)} of the "
        f"experts' change (most: {name_of(first)}): a rank is the same for all experts of a parameter, and most of "
        "them need none; plots/expert_map.png shows which moved"
    )


# --- in plots and in the report --------------------------------------------------------------------------------------


def plot_expert_map(content: Mapping[str, Any], path: Path | str) -> Path:
    """Energy of each expert's change as a multiple of the mean, experts × layers, on a logarithmic colour scale."""
    experts = moved_experts(content)
    owners = list(dict.fromkeys(one.owner for one in experts))
    layers = [next(one.layer for one in experts if one.owner == owner) for owner in owners]
    count = max(one.expert for one in experts) + 1
    mean = sum(one.energy for one in experts) / len(experts) or 1.0
    grid = [[float("nan")] * len(owners) for _ in range(count)]
    for one in experts:
        grid[one.expert][owners.index(one.owner)] = max(LEAST, one.energy / mean)
    size = min(MOST, 3.2 + COLUMN * max(4, len(owners))), min(MOST, 1.3 + ROW * max(4, count))
    figure, axis = canvas.new_figure(*size)
    known = [value for row in grid for value in row if value == value]
    norm = need("matplotlib.colors", extra="plots").LogNorm(min(0.5, *known), max(2.0, *known))
    masked = np.ma.masked_invalid(grid)
    image = axis.imshow(masked, cmap=canvas.colormap(), norm=norm, aspect="auto", interpolation="nearest")
    shown = range(0, len(owners), -(-len(owners) // 24))
    axis.set_xticks(list(shown), [column_name(owners, layers, place) for place in shown])
    axis.set_yticks(list(range(0, count, -(-count // 32))))
    canvas.bare(axis)
    bar = canvas.colour_bar(figure, image, axis, "energy ÷ mean", pad=0.015, aspect=20)
    bar.ax.yaxis.set_major_formatter(need("matplotlib.ticker", extra="plots").FormatStrFormatter("%.2g"))
    bar.ax.minorticks_off()
    bar.set_ticks([norm.vmin, 1.0, norm.vmax])
    canvas.name_axes(axis, "layer", "expert", "Where the experts moved")
    return canvas.save(figure, path)


def column_name(owners: Sequence[str], layers: Sequence[int | None], place: int) -> str:
    """The layer's number; with the module's own name where a layer has two sets of experts."""
    layer = "none" if layers[place] is None else str(layers[place])
    if layers.count(layers[place]) == 1:
        return layer
    other = next(owner for k, owner in enumerate(owners) if layers[k] == layers[place] and k != place)
    own = [part for part in owners[place].split(".") if part not in other.split(".")]
    return "\n".join([layer, *own[:1]])


def movers_table(content: Mapping[str, Any]) -> Table:
    """The most moved experts, with their relative change by projection."""
    experts = moved_experts(content)
    total = sum(one.energy for one in experts) or 1.0
    columns = list(dict.fromkeys(name for one in experts for name in one.changes))
    rows = []
    for one in by_change(experts)[:SHOWN]:
        changes = [one.changes.get(name) for name in columns]
        shares = ["" if change is None else percent(change) for change in changes]
        rows.append((name_of(one), percent(one.energy / total), *shares))
    note = "Share of all experts' squared change; per projection ‖Δ‖/‖W‖."
    return Table(("most moved", "share", *columns), rows, note=note)


def expert_blocks(content: Mapping[str, Any]) -> list[Block]:
    experts = moved_experts(content)
    said = f"{plural(len(experts), 'expert')}: {movement(content)}."
    warning = few_hold_all(content)
    caption = "Energy of each expert's change, experts × layers, as a multiple of the mean"
    return [
        Words(f"{said} Warning: {warning}." if warning else said),
        Plot("expert_map", caption, partial(plot_expert_map, content)),
        movers_table(content),
    ]


def read_experts(path: Path) -> Mapping[str, Any]:
    content = CHANGES.read(path)
    rows = content["parameters"]
    if not isinstance(rows, list) or not rows or not all(map(is_row, rows)):
        raise DataError(
            f"{path}: expected `parameters`, a list of objects with path, shape, experts and a number of each"
        )
    return content


def is_row(row: Any) -> bool:
    try:
        site = from_row(row)
        return site.experts > 0 and all(len(row[name]) == site.experts for name in PER_EXPERT)
    except (KeyError, TypeError, ValueError):
        return False


EXPERT_MAP = Finding(CHANGES.name, ("ranks",), read_experts, expert_blocks)
