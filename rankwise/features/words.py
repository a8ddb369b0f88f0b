"""comparison.json of factorizations, in words: what was compared, how close each network comes, what it costs.

{"format": "rankwise-factors/1", "rank", "tokens", "channels", "networks", "timing", "storage",
 "sources": [{"name", "matrices", "images", "rows": [{"method", "relative_error": {"mean", "low", "high"}, …}],
              "paired": […], "ids": […], "values": {label: {"relative_error": […], "cosine": […]}}}],
 "cost": [{"method", "flops", "seconds", "parameters", "stored"}],
 "sweep": {"ranks": […], "relative_error": {method: […]}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.features.measures import GRAM, PCA, SVD
from rankwise.page.text import clip, percent, plural, printable

FORMAT, FILE = "rankwise-factors/1", "comparison.json"
PARTS = ("rank", "tokens", "channels", "networks", "timing", "storage", "sources", "cost", "sweep")
Comparison = Mapping[str, Any]


def label(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, refined" if row["refined"] else str(row["method"])


def source_title(source: Mapping[str, Any]) -> str:
    where = f" of {clip(printable(source['source'], 100), 60)}" if source.get("source") else ""
    tiles = f" ({plural(source['matrices'], 'tile')})" if source["matrices"] != source["images"] else ""
    return f"{source['name']}: {plural(source['images'], 'image')}{tiles}{where}"


def row_of(source: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """The row of a method's rank-r product."""
    return next(row for row in source["rows"] if row["method"] == method and not row["refined"])


def cost_of(comparison: Comparison, method: str) -> Mapping[str, Any]:
    return next(row for row in comparison["cost"] if row["method"] == method)


def span(estimate: Mapping[str, Any], digits: int = 4, scale: float = 1.0, signed: bool = False) -> str:
    """0.1234 [0.1200, 0.1270]"""

    def shown(key: str) -> str:
        rounded = round(scale * estimate[key], digits) + 0.0  # no −0.00
        return f"{rounded:{'+' if signed else ''}.{digits}f}"

    return shown("mean") if estimate["low"] is None else f"{shown('mean')} [{shown('low')}, {shown('high')}]"


def verdict(comparison: Comparison, source: Mapping[str, Any], name: str) -> str:
    """How far from the optimum, against the shared PCA, and against the time of the exact factors."""
    row = row_of(source, name)
    excess = row["excess_error"]
    said = f"{name}: relative error {row['relative_error']['mean']:.4f}, "
    said += f"{percent(excess['mean'])} above the optimum" if excess else "where the SVD of this rank is exact"
    if excess and excess["low"] is not None:
        said += f" (95 %: {percent(excess['low'])} to {percent(excess['high'])})"
    for pair in source["paired"]:
        if pair["network"] == name and pair["against"] == PCA:
            said += f"; {against_pca(pair)}"
    return f"{said}. {speed(comparison, name)}"


def against_pca(pair: Mapping[str, Any]) -> str:
    low, high = pair["low"], pair["high"]
    if low is None or low <= 0 <= high:
        word = "not told apart from"
    else:
        word = "closer than" if high < 0 else "farther than"
    return f"{word} the shared PCA basis ({span(pair, signed=True)}, paired)"


def speed(comparison: Comparison, name: str) -> str:
    """0.4× the time of the exact Gram factors: faster than exact."""
    own, exact = cost_of(comparison, name)["seconds"], cost_of(comparison, GRAM)["seconds"]
    ratio = own / exact
    word = "faster" if ratio < 1 else "slower"
    shown = f"{1 / ratio:.2g}× faster than" if ratio < 1 else f"{ratio:.2g}× the time of"
    return f"{shown} the exact Gram factors: {word} than exact."


def effective(row: Mapping[str, Any]) -> str:
    """AdaLoRA: 32 of its 128 ranks act; …"""
    extra = row["excess_at_effective_rank"]
    return (
        f"{row['method']}: {row['effective_rank']} of its {row['rank']} ranks act; against the optimum of rank "
        f"{row['effective_rank']} its excess error is {percent(extra['mean'])}."
    )


def timing_words(comparison: Comparison) -> str:
    timing = comparison["timing"]
    cpu = f", {plural(timing['threads'], 'thread')}" if timing["threads"] else ""
    return (
        f"Times: {timing['device']}{cpu}, batches of {timing['batch_size']}, all methods in turn after a warm-up, the "
        f"fastest of {plural(timing['repeats'], 'pass').replace('passs', 'passes')}. Operations: matrix products as "
        "counted by torch; eigendecomposition, SVD and QR by their textbook counts."
    )


def storage_words(comparison: Comparison) -> str:
    storage, rank = comparison["storage"], comparison["rank"]
    ratio = storage["matrix"] / storage["factors"]
    said = f"Storage at rank {rank}: {storage['factors']:,} numbers for factors, {storage['matrix']:,} for a matrix"
    fewer = f"{ratio:.2g}× fewer" if ratio > 1 else f"{1 / ratio:.2g}× more"
    return f"{said} ({fewer}); factors take no more up to rank {storage['break_even_rank']}."


def optimum_words(comparison: Comparison) -> str:
    return (
        f"No product of rank {comparison['rank']} is closer to a matrix than its {SVD}, so its error is the floor; "
        "excess error is the distance above it on the same matrix."
    )
