"""A rank plan on a page: the map of its ranks, the plan in a sentence, and every site in a table.

rank_map(plan, {"model.layers.0.mlp.down_proj": 0.013})      # with gradient norms that training has measured
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.page.blocks import Block, Folded, Table, Words
from rankwise.page.grid import LEAST_SPAN, Cell, CellMap, Measure
from rankwise.page.text import clip, number, percent, plural
from rankwise.ranks.plots import by_cell, by_layer, median, short_share

MAP = "ranks_heatmap"  # the name of the picture that `rankwise ranks` draws of it
MOST_SITES = 1000  # rows of the table; a model of many experts has tens of thousands, and a page shall be sent
Norms = Mapping[str, float]


@dataclass(frozen=True)
class Quantity:
    """What is known of a site, None where it is not; `short` fits a cell of the map."""

    name: str
    of: Callable[[PlannedSite], float | None]
    write: Callable[[float], str]
    short: Callable[[float], str]
    share: bool = False


def quantities(plan: RankPlan, norms: Norms) -> list[Quantity]:
    """Those that any site of the plan has."""
    found = [
        Quantity("rank", lambda row: float(row.rank), number, lambda rank: f"{rank:.0f}"),
        Quantity("energy kept", lambda row: row.energy_retained, percent, short_share, share=True),
        Quantity("stable rank", lambda row: row.stable_rank, number, lambda rank: f"{rank:.3g}"),
        Quantity("gradient norm", lambda row: norms.get(row.site.path), number, lambda norm: f"{norm:.1g}"),
    ]
    return [one for one in found if any(one.of(row) is not None for row in plan.sites)]


def rank_map(plan: RankPlan, norms: Norms) -> CellMap:
    """Projection types × layers, coloured by rank, or by what else is known. Sites that share a cell, as experts do,
    give their median.

    norms: path of a site → its gradient norm, the mean of the steps at which it was recorded.
    """
    cells, shown = by_cell(plan.sites), quantities(plan, norms)
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=by_layer)
    values = {place: [known(map(one.of, rows)) for one in shown] for place, rows in cells.items()}
    return CellMap(
        name=MAP,
        caption="Rank of every site: projection types × layers",
        rows=[clip(name, 30) for name in names],
        columns=["none" if layer is None else str(layer) for layer in layers],
        cells={
            (names.index(name), layers.index(layer)): Cell(values[name, layer], facts(rows, shown))
            for (name, layer), rows in cells.items()
        },
        measures=[measure(one, [row[place] for row in values.values()]) for place, one in enumerate(shown)],
        corner="layer",
    )


def known(values: Iterable[float | None]) -> float | None:
    found = median(values)
    return found if found == found else None


def measure(one: Quantity, values: Sequence[float | None]) -> Measure:
    """A share from 0 to 1; everything else from its least to its greatest, by ratios."""
    positive = [value for value in values if value]
    low = min(positive, default=1.0)
    high = max([LEAST_SPAN * low, *positive])
    return Measure(one.name, one.short, *((0.0, 1.0, False) if one.share else (low, high, True)))


def facts(rows: Sequence[PlannedSite], shown: Sequence[Quantity]) -> list[tuple[str, str]]:
    """Of one site; of several the median and the range."""
    first, parameters = rows[0], sum(row.parameters for row in rows)
    site = first.site.path + (f" and {len(rows) - 1:,} more" if len(rows) > 1 else "")
    found = [("site", site), ("shape", shape(first))]
    for one in shown:
        values = [value for row in rows if (value := one.of(row)) is not None]
        if values:
            span = f", {one.write(min(values))} to {one.write(max(values))}" if len(values) > 1 else ""
            found.append((one.name, one.write(median(values)) + span))
    if len(rows) == 1 and first.r_raw is not None and first.r_raw != first.rank:
        found.append(("rank before bounds", f"{first.r_raw:,}"))
    return [*found, ("parameters", f"{parameters:,}")]


def shape(row: PlannedSite) -> str:
    experts = f"{row.site.experts} × " if row.site.experts else ""
    return f"{experts}{row.site.shape[0]} × {row.site.shape[1]}"


def plan_blocks(plan: RankPlan, norms: Norms) -> list[Block]:
    """The plan in a sentence, and every site in a table."""
    ranks = [row.rank for row in plan.sites]
    saturated = sum(row.saturated for row in plan.sites)
    said = f"{plural(len(plan.ranks), 'site')} with ranks from {min(ranks)} to {max(ranks)}: {plan.parameters:,} "
    said += f"trainable parameters, {percent(plan.kept_fraction)} of the analysed matrices."
    if saturated:
        said += f" {plural(saturated, 'site')} did not reach the energy threshold within the largest rank."
    budget = plan.metadata.get("budget")
    said += f" Chosen within a budget of {budget}." if budget else ""
    choice = plan.metadata.get("choice")
    said += f" Metric by gain kept: {choice['metric']}, {choice['purpose']}." if choice else ""
    return [Words(said), Folded("Every site", [sites_table(plan, norms)])]


def sites_table(plan: RankPlan, norms: Norms) -> Table:
    """A row per site: shape, rank, what the map shows, parameters."""
    shown = quantities(plan, norms)
    rows = [
        [row.site.path, shape(row), *(cell(one, row) for one in shown), f"{row.parameters:,}"]
        for row in plan.sites[:MOST_SITES]
    ]
    more = len(plan.sites) - len(rows)
    note = f"And {plural(more, 'more site')} in the file." if more > 0 else ""
    if any(one.name == "gradient norm" for one in shown):
        note = f"{note} Gradient norm: before clipping, the mean of the steps at which it was recorded.".strip()
    header = ["site", "shape", *(one.name for one in shown), "parameters"]
    return Table(header, rows, first_number=2, note=note)


def cell(one: Quantity, row: PlannedSite) -> str:
    value = one.of(row)
    return "" if value is None else one.write(value)
