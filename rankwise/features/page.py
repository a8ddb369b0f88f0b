"""A comparison of factorizations on a page, and on the terminal: verdicts, tables, pictures, small print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.features.measures import GRAM, PCA, SVD
from rankwise.features.plots import PLOTS
from rankwise.features.words import (
    FILE,
    Comparison,
    cost_of,
    effective,
    label,
    optimum_words,
    source_title,
    span,
    storage_words,
    timing_words,
    verdict,
)
from rankwise.files.atomic import write_json, write_text
from rankwise.page.blocks import Block, Page, Picture, Section, Table, Words
from rankwise.page.template import render
from rankwise.page.text import align, amount, printable

CLOSE = ("method", "relative error", "excess error, %", "energy", "cosine", "angle")
COST = ("method", "time", "speed", "MFLOP", "parameters", "stored")


def comparison_blocks(comparison: Comparison, pictures: Sequence[Picture] = ()) -> list[Block]:
    """Everything about one comparison, in the order of its weight."""
    sources, names = comparison["sources"], comparison["networks"]
    return [
        *(Words(printable(verdict(comparison, sources[0], name))) for name in names),
        *(closeness_table(source) for source in sources),
        *(Words(printable(effective(row))) for row in sources[0]["rows"] if row.get("excess_at_effective_rank")),
        cost_table(comparison),
        *pictures,
        *(Words(text) for text in (optimum_words(comparison), storage_words(comparison))),
    ]


def closeness_table(source: Mapping[str, Any]) -> Table:
    rows = [[printable(cell, 60) for cell in closeness_cells(row)] for row in source["rows"]]
    note = f"{source_title(source)}. 95 % intervals over images; angle: mean principal angle to the SVD's row space."
    return Table(CLOSE, rows, note=note)


def closeness_cells(row: Mapping[str, Any]) -> list[str]:
    """A refined output has neither an excess nor an angle: its rank is open."""
    excess, angle = row.get("excess_error"), row.get("principal_angle")
    return [
        label(row),
        span(row["relative_error"]),
        span(excess, 2, 100) if excess else "",
        f"{row['explained_energy']['mean']:.4f}",
        f"{row['cosine']['mean']:.4f}",
        f"{math.degrees(angle['mean']):.1f}°" if angle else "",
    ]


def cost_table(comparison: Comparison) -> Table:
    exact = cost_of(comparison, GRAM)["seconds"]
    rows = [[printable(cell, 60) for cell in cost_cells(row, exact)] for row in comparison["cost"]]
    return Table(COST, rows, note=f"Per matrix; speed: against the exact Gram factors. {timing_words(comparison)}")


def cost_cells(row: Mapping[str, Any], exact: float) -> list[str]:
    return [
        row["method"],
        milliseconds(row["seconds"]),
        f"{exact / row['seconds']:.2f}×",
        f"{row['flops'] / 1e6:,.3g}" if row["flops"] < 1e9 else f"{row['flops'] / 1e6:,.0f}",
        amount(row["parameters"]) if row["parameters"] else "",
        f"{row['stored']:,}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


def terminal(comparison: Comparison) -> str:
    """Both tables and the verdicts, for a terminal."""
    parts = []
    for source in comparison["sources"]:
        parts += [f"{source_title(source)}, rank {comparison['rank']} (95 % intervals over images)"]
        parts += [aligned(closeness_table(source)), ""]
    parts += [
        "per matrix (speed: against the exact Gram factors)",
        aligned(cost_table(comparison)),
        timing_words(comparison),
        storage_words(comparison),
        "",
    ]
    parts += [verdict(comparison, comparison["sources"][0], name) for name in comparison["networks"]]
    parts += [effective(row) for row in comparison["sources"][0]["rows"] if row.get("excess_at_effective_rank")]
    return "\n".join(parts)


def aligned(table: Table) -> str:
    return "\n".join(align([table.header, *table.rows]))


PAGE, OF_ONE, PLOT_FOLDER = "comparison.md", "svd_nn_comparison.json", "plots"
__all__ = ["FILE", "OF_ONE", "PAGE", "PLOT_FOLDER", "of_one", "write_comparison"]


def write_comparison(folder: Path, comparison: Comparison, *, plots: bool = True) -> dict[str, Path | str]:
    """Write them into the results folder; what was written, by name."""
    pictures = [
        Picture(draw(comparison, folder / PLOT_FOLDER / f"{name}.png"), caption)
        for name, (draw, caption) in (PLOTS if plots else {}).items()
    ]
    page = Page(
        title=f"Factors of rank {comparison['rank']}: {', '.join(comparison['networks'])}",
        subtitle=f"{comparison['tokens']} tokens × {comparison['channels']} channels of {comparison['features']}",
        headline=[],
        lead=[],
        sections=[Section("Networks against the optimum", comparison_blocks(comparison, pictures))],
        appendix=[],
    )
    written: dict[str, Path | str] = {
        name: write_json(folder / name / OF_ONE, of_one(comparison, name)) for name in comparison["networks"]
    }
    written |= {picture.path.stem: picture.path for picture in pictures}
    written["page"] = write_text(folder / PAGE, render(page, "report.md.j2", folder))
    return written | {"comparison": write_json(folder / FILE, comparison)}


def of_one(comparison: Comparison, name: str) -> dict[str, Any]:
    """One network beside the SVD and the shared PCA: means, paired differences, every matrix, cost."""
    shared = ("rank", "tokens", "channels", "features", "model", "timing", "storage")
    sweep = comparison["sweep"]
    return {
        "arch": name,
        **{key: comparison[key] for key in shared},
        "network_rank": comparison["network_ranks"][name],
        "sources": [one_source(source, name) for source in comparison["sources"]],
        "cost": [row for row in comparison["cost"] if row["method"] in (SVD, GRAM, PCA, name)],
        "sweep": {"ranks": sweep["ranks"], **{key: sweep["relative_error"][key] for key in (SVD, PCA, name)}},
    }


def one_source(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    own, optimum = source["values"][name], source["values"][SVD]
    rows = {row["method"]: row for row in source["rows"] if not row["refined"]}
    refined = [row for row in source["rows"] if row["method"] == name and row["refined"]]
    matrices = zip(source["ids"], optimum["relative_error"], *own.values(), strict=True)
    names = ("id", "svd_relative_error", *own)
    return {
        **{key: source[key] for key in ("name", "source", "features", "matrices", "images")},
        "svd": rows[SVD],
        "pca": rows[PCA],
        "network": rows[name],
        "refined": refined[0] if refined else None,
        "paired": [pair for pair in source["paired"] if pair["network"] == name],
        "per_matrix": [dict(zip(names, row, strict=True)) for row in matrices],
    }
