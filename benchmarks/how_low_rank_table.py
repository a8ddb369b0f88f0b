"""Summary, tables and figure of how_low_rank.py, from its ledgers alone; what is not measured yet is said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workload import machine

from rankwise.core.site import Site
from rankwise.evaluate import bootstrap
from rankwise.files.atomic import write_json, write_text
from rankwise.files.ledger import Ledger, Row
from rankwise.page.canvas import BLUE, FAINT, GREY, INK, YELLOW, legend_outside, log_ticks, name_axes, panels, save
from rankwise.ranks.decide import repeatability

LENGTHS, RANKS, RATIO = (10, 30, 90), (4, 16, 64), 10**0.5
LEVELS = (0.5, 0.9, 0.99)
TOWERS = ("SmolLM2-135M", "DINOv2-S", "stories260K")  # their order in tables and figure
OPTIMIZERS = ("AdamW", "SGD")
COLOURS = {"AdamW": BLUE, "SGD": YELLOW}
NAME = "how_low_rank"


def best_rate(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate])


def curves(values: Tensor) -> Tensor:
    """(matrices, largest full rank): share of the energy in the leading k = 1, 2, … directions; 1 beyond the last."""
    squares = values.double().nan_to_num(0).square()
    return squares.cumsum(1) / squares.sum(1, keepdim=True)


def ranks_for(values: Tensor, level: float) -> Tensor:
    """(matrices,): least rank with that share of the energy."""
    return (curves(values) < level - 1e-6).sum(1) + 1


def shape_of(values: Tensor) -> dict[str, Any]:
    """Medians over matrices (rows of singular values, NaN beyond the last)."""
    full, energy = (~values.isnan()).sum(1), curves(values)
    shares = {str(round(100 * level)): ranks_for(values, level) / full for level in LEVELS}
    return {
        "share_of_full_rank": {name: rounded(share.median()) for name, share in shares.items()},
        "quartiles_90": [rounded(shares["90"].quantile(part)) for part in (0.25, 0.75)],
        "stable_rank": rounded((values.double().nan_to_num(0).square().sum(1) / values[:, 0].double() ** 2).median()),
        "energy": {str(rank): rounded(energy[:, min(rank, energy.shape[1]) - 1].median()) for rank in RANKS},
    }


def rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


class Finished:
    """What a tower's ledger has."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder)
        by_kind: dict[str, list[Row]] = {"base": [], "rate": [], "change": []}
        for row in self.ledger.rows.values():
            by_kind[row["key"]["what"]].append(row)
        self.base, self.rates = by_kind["base"][0], by_kind["rate"]
        self.sites = [Site(path, (m, n)) for path, m, n in self.base["sites"]]
        self.changes = {
            (key["optimizer"], key["probe"], key["step"]): row
            for row in by_kind["change"]
            if (key := row["key"])["rate"] == best_rate(self.grid(key["optimizer"]))
        }
        self.lengths = [step for step in self.base["lengths"] if any(key[2] == step for key in self.changes)]

    def numbers(self, row: Row, name: str) -> Tensor:
        return self.ledger.numbers(row["key"], name)

    def grid(self, optimizer: str) -> dict[float, float]:
        """Rate → loss on the rows that choose it; infinite where it diverged."""
        rows = [row for row in self.rates if row["key"]["optimizer"] == optimizer]
        found = {row["key"]["rate"]: math.inf if row["loss"] is None else row["loss"] for row in rows}
        return dict(sorted(found.items()))

    def of(self, optimizer: str, step: int) -> list[Row]:
        """The probes that are measured."""
        return [self.changes[key] for probe in (0, 1) if (key := (optimizer, probe, step)) in self.changes]

    def values(self, optimizer: str, step: int, name: str = "values") -> Tensor:
        """Singular values of all matrices of all probes."""
        return torch.cat([self.numbers(row, name) for row in self.of(optimizer, step)])

    def sums(self, rows: Sequence[Row], name: str) -> Tensor:
        """(items,) summed over the probes. The base's loss is the run's own only where a head was trained."""
        own = [row if name != "loss 0" or name in row["means"] else self.base for row in rows]
        return torch.stack([self.numbers(row, name) for row in own]).sum(0)

    def change(self, optimizer: str, step: int) -> dict[str, Any]:
        """One row of the tables: medians over sites and probes; losses averaged over the probes."""
        rows = self.of(optimizer, step)
        values, count = self.values(optimizer, step), self.sums(rows, "count tuned")
        losses = {name: self.sums(rows, f"loss {name}") for name in ("0", *map(str, RANKS), "tuned")}
        stack = torch.stack(list(losses.values())).numpy()

        def statistics(at: Any) -> Any:
            sums = torch.as_tensor(stack[:, at]).sum(-1)
            gain = sums[0] - sums[-1]
            return torch.stack([gain / count[torch.as_tensor(at)].sum(-1), *((sums[0] - sums[1:-1]) / gain)]).numpy()

        spread = bootstrap.intervals(statistics, len(count))
        assert spread is not None, "two held-out items or more"
        point = statistics(torch.arange(len(count))[None].numpy())[:, 0]
        gain, *kept = [
            [rounded(value), rounded(low), rounded(high)] for value, (low, high) in zip(point, spread, strict=True)
        ]
        right = self.sums(rows, "right tuned").sum() / count.sum() if "loss 0" in rows[0]["means"] else None
        base = torch.cat([self.numbers(self.base, "values")] * len(rows))
        return {
            "optimizer": optimizer,
            "step": step,
            "probes": len(rows),
            **shape_of(values),
            "null": shape_of(self.values(optimizer, step, "null")),
            "relative_change": rounded((norms(values) / norms(base)).median()),
            "loss": {name: rounded(value.sum() / count.sum()) for name, value in losses.items()},
            "gain": gain,
            "kept": dict(zip(map(str, RANKS), kept, strict=True)) if gain[1] > 0 else None,
            "accuracy": None if right is None else rounded(right),
        }

    def correlation(self, one: Any, other: Any) -> list[float | None]:
        """Spearman of the sites' ranks at 90 % of the energy: all sites, mean within projections."""
        first, second = (
            dict(zip(self.sites, ranks_for(self.numbers(self.changes[key], "values"), 0.9).tolist(), strict=True))
            for key in (one, other)
        )
        return [None if rho is None else round(rho, 3) for rho in repeatability(first, second)]

    def correlations(self) -> Iterator[dict[str, Any]]:
        """Per length, of what is measured: between the probes, between the optimizers, and with the first length."""
        first = min(self.lengths or [0])
        for step in self.lengths:
            pairs = {f"probes {name}": ((name, 0, step), (name, 1, step)) for name in OPTIMIZERS}
            pairs["optimizers"] = (("AdamW", 0, step), ("SGD", 0, step))
            if step > first:
                pairs |= {f"first length {name}": ((name, 0, first), (name, 0, step)) for name in OPTIMIZERS}
            there = {name: pair for name, pair in pairs.items() if all(key in self.changes for key in pair)}
            yield {"step": step, **{name: self.correlation(*pair) for name, pair in there.items()}}

    def summary(self) -> dict[str, Any]:
        grids = {optimizer: self.grid(optimizer) for optimizer in OPTIMIZERS}
        return {
            "about": self.base["about"],
            "sites": len(self.sites),
            "lengths": self.base["lengths"],
            "measured": len(self.changes),
            "of": 2 * len(OPTIMIZERS) * len(self.base["lengths"]),
            "rates": {
                name: {f"{rate:g}": None if loss == math.inf else rounded(loss) for rate, loss in grid.items()}
                for name, grid in grids.items()
            },
            "chosen": {
                name: best_rate(grid) for name, grid in grids.items() if self.of(name, min(self.lengths or [0]))
            },
            "weights": shape_of(self.numbers(self.base, "values")),
            "changes": [self.change(opt, n) for opt in OPTIMIZERS for n in self.lengths if self.of(opt, n)],
            "correlations": list(self.correlations()),
        }


def norms(values: Tensor) -> Tensor:
    return values.double().nan_to_num(0).square().sum(1).sqrt()


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def table_of_changes(summary: Mapping[str, Any]) -> Iterator[str]:
    yield "| tower | optimizer | steps | 50 % | 90 % | 99 % | noise, 90 % | stable rank | energy at r = 4 | 16 | 64 |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for title, tower in summary.items():
        own = tower["weights"]
        rows = [
            (row["optimizer"], str(row["step"]), row, row["null"]["share_of_full_rank"]["90"])
            for row in tower["changes"]
        ]
        for name, steps, row, null in [*rows, ("the weights themselves", "", own, None)]:
            shares = " | ".join(percent(share) for share in row["share_of_full_rank"].values())
            energies = " | ".join(percent(energy) for energy in row["energy"].values())
            noise = "" if null is None else percent(null)
            yield f"| {title} | {name} | {steps} | {shares} | {noise} | {row['stable_rank']:.1f} | {energies} |"


def table_of_gains(summary: Mapping[str, Any]) -> Iterator[str]:
    yield "| tower | optimizer | rate | steps | relative change | held-out loss | gain | kept at r = 4 | 16 | 64 |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for title, tower in summary.items():
        for row in tower["changes"]:
            kept = (
                [interval(one, 100, 0) for one in row["kept"].values()] if row["kept"] else ["not defined"] * len(RANKS)
            )
            right = f", {percent(row['accuracy'])} right" if row["accuracy"] is not None else ""
            yield (
                f"| {title} | {row['optimizer']} | {tower['chosen'][row['optimizer']]:g} | {row['step']} | "
                f"{100 * row['relative_change']:.2g} % | {row['loss']['tuned']:.3f}{right} | "
                f"{interval(row['gain'], 1, 3)} | {' | '.join(kept)} |"
            )


def table_of_correlations(summary: Mapping[str, Any]) -> Iterator[str]:
    names = ("probes AdamW", "probes SGD", "optimizers", "first length AdamW", "first length SGD")
    yield "| tower | steps | two probes, AdamW | two probes, SGD | AdamW and SGD | shortest, AdamW | shortest, SGD |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for title, tower in summary.items():
        for row in tower["correlations"]:
            pairs = [row.get(name) for name in names]
            cells = [f"{pair[1]:.2f} ({pair[0]:.2f})" if pair and None not in pair else "–" for pair in pairs]
            yield f"| {title} | {row['step']} | {' | '.join(cells)} |"


def answers(summary: Mapping[str, Any]) -> Iterator[str]:
    """One line per tower, of the longest run of each optimizer that is measured."""
    for title, tower in summary.items():
        told = []
        for name, row in {row["optimizer"]: row for row in tower["changes"]}.items():
            share, noise = (percent(of["share_of_full_rank"]["90"]) for of in (row, row["null"]))
            kept = (
                f"of the gain rank 16 keeps {interval(row['kept']['16'], 100, 0)}"
                if row["kept"]
                else "the gain is not clear of 0"
            )
            told.append(f"{name}, {row['step']} steps: {share} (noise: {noise}); {kept}")
        missing = (
            "" if tower["measured"] == tower["of"] else f" *{tower['measured']} of {tower['of']} measured so far.*"
        )
        weights = percent(tower["weights"]["share_of_full_rank"]["90"])
        yield f"- **{title}**. {'. '.join(told)}. The weights themselves: {weights}.{missing}"


def interval(found: Sequence[float], times: float, digits: int) -> str:
    point, low, high = (f"{times * value:.{digits}f}" for value in found)
    return f"{point} [{low}, {high}]" + (" %" if times == 100 else "")


def page(summary: Mapping[str, Any]) -> str:
    blocks = [
        ["# How low-rank are real changes?"],
        [f"{date.today()} · {machine()} · `python benchmarks/how_low_rank.py`"],
    ]
    blocks.append(["Share of full rank for 90 % of the energy, median over sites:\n", *answers(summary)])
    for title, tower in summary.items():
        blocks.append([f"{title}: {tower['sites']} sites; {tower['about']}.\n"])
        for name, grid in tower["rates"].items():
            told = ", ".join(f"{rate}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in grid.items())
            blocks[-1].append(f"- {name}, loss of every rate: {told}")
    tables = (table_of_changes, table_of_gains, table_of_correlations)
    return "\n\n".join("\n".join(block) for block in [*blocks, *(list(table(summary)) for table in tables)]) + "\n"


def draw(finished: Mapping[str, Finished], summary: Mapping[str, Any], path: Path) -> None:
    """Left: energy against rank, the longest run. Right: share of the gain that truncation keeps, every length."""
    figure, axes = panels(9, 2.9 * len(finished), 2, len(finished))
    for row, (title, tower) in enumerate(finished.items()):
        left, right = axes[2 * row : 2 * row + 2]
        longest = max(tower.lengths)
        lines = [
            (name, tower.values(name, longest), COLOURS[name], "-") for name in OPTIMIZERS if tower.of(name, longest)
        ]
        noise = torch.cat([tower.values(name, longest, "null") for name in OPTIMIZERS if tower.of(name, longest)])
        weights = tower.numbers(tower.base, "values")
        lines += [("the weights themselves", weights, INK, ":"), ("white noise", noise, GREY, "--")]
        for label, values, colour, style in lines:
            full = int((~values.isnan()).sum(1).max())
            whole = values[(~values.isnan()).sum(1) == full]
            middle = curves(whole).median(0).values
            ranks = torch.arange(1, full + 1)
            left.plot(ranks, middle, color=colour, linestyle=style, linewidth=1.8, label=label)
        left.axhline(0.9, color=FAINT, linewidth=1)
        left.set_xscale("log")
        left.set_ylim(0, 1.02)
        log_ticks(left.xaxis)
        name_axes(left, f"rank (full: {full})", "share of ‖Δ‖²", f"{title}, {longest} steps: energy at rank r")
        for name in OPTIMIZERS:
            rows = [one for one in summary[title]["changes"] if one["optimizer"] == name and one["kept"]]
            for one in rows:
                place = finished[title].lengths.index(one["step"])  # a length without a gain leaves its look unused
                points = [one["kept"][str(rank)] for rank in RANKS]
                at = [rank * (1 + 0.05 * (place - 1)) for rank in RANKS]
                reach = [[p - low for p, low, _ in points], [high - p for p, _, high in points]]
                look = {"color": COLOURS[name], "alpha": (0.55, 0.8, 1)[place], "linestyle": (":", "--", "-")[place]}
                look |= {"marker": "o", "markersize": 3, "linewidth": 1.5, "capsize": 2}
                right.errorbar(at, [p for p, _, _ in points], reach, label=f"{name}, {one['step']} steps", **look)
        right.axhline(1, color=FAINT, linewidth=1)
        right.set_xscale("log")
        right.set_xticks(RANKS, [str(rank) for rank in RANKS])
        right.minorticks_off()
        name_axes(right, "rank of every delta", "share of the gain", f"{title}: gain kept at rank r")
    legend_outside(figure, "lower center", axes, columns=4)
    save(figure, path)


def write_results(work: Path, out: Path, images: Path) -> None:
    """how_low_rank.json, .md and the figure, of all ledgers that hold a measured change."""
    found = {title: Finished(work / title) for title in TOWERS if (work / title / "runs.jsonl").is_file()}
    found = {title: tower for title, tower in found.items() if tower.changes}
    summary = {title: tower.summary() for title, tower in found.items()}
    write_json(out / f"{NAME}.json", summary)
    write_text(out / f"{NAME}.md", page(summary))
    draw(found, summary, images / "how_low_rank.png")
    print(page(summary))
