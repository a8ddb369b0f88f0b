"""The files of a comparison: comparison.json and .md, plots, and svd_nn_comparison.json of each network.

<results_dir>/comparison.json  comparison.md  plots/error_time.png …  <arch>/svd_nn_comparison.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_json, write_text
from rankwise.page.blocks import Page, Picture, Section
from rankwise.page.template import render
from rankwise.score.factorization import GRAM, PCA, SVD
from rankwise.show.factor_blocks import comparison_blocks
from rankwise.show.factor_plots import PLOTS
from rankwise.show.factor_words import FILE, Comparison

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
