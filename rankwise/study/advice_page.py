"""Presentation of advice.json: one screen, the report's section, three plots, and advice.yaml for `rankwise train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.files.atomic import write_text
from rankwise.files.document import Document
from rankwise.files.plan import write_plan
from rankwise.options.advise import AdviseConfig
from rankwise.options.field import flatten
from rankwise.page.blocks import Block, Finding, Folded, Page, Plot, Section, Table, drawn, into, pictures
from rankwise.page.canvas import BLUE, FAINT, GREY, drawable, legend, log_ticks, name_axes, new_figure, save, style
from rankwise.page.template import markdown
from rankwise.page.text import duration, number, plural
from rankwise.study.advice import UNIFORM
from rankwise.study.page import ceiling

DOCUMENT = Document(
    "advice.json",
    "rankwise-advice/1",
    "an advice",
    made_by="rankwise advise",
    parts=("rung", "learnt", "gain", "delta", "prior", "rates", "placements", "trials", "data", "open"),
)
CONFIG, PLAN = "advice.yaml", "advice_plan.json"
DECIDES = {"B": "rank", "C": "rank", "D": "placement", "E": "placement"}
PLACES = {
    UNIFORM: "one rank everywhere",
    "attention": "attention only",
    "mlp": "MLP only",
    "energy": "ranks by energy",
    "eva": "ranks by EVA",
}
Advice = Mapping[str, Any]


def nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def interval(row: Mapping[str, Any]) -> str:
    return f"{nats(row['estimate'])} [{nats(row['low'])}, {nats(row['high'])}]"


def advised_rates(advice: Advice) -> Mapping[str, Any]:
    found: Mapping[str, Any] = advice["rates"][str(advice["advised"]["rank"])]
    return found


def rate_words(advice: Advice) -> list[str]:
    """The rate, the set that it is the middle of, the parabola, and what was known before."""
    rates, prior = advised_rates(advice), advice["prior"]
    low, high = rates["within"][0], rates["within"][-1]
    rate, delta = number(advice["advised"]["learning_rate"]), advice["delta"]
    told = [
        f"{rate}: the middle of {number(low)} to {number(high)}, which lose at most {delta:.3f} nats on the best"
        if low != high
        else f"{rate}: no other rate that was tried comes within {delta:.3f} nats of the best"
    ]
    if rates["vertex"]:
        told.append(f"minimum of the parabola in log rate: {number(rates['vertex'])}")
    else:
        told.append(f"no parabola: {rates['why']}")
    if rates["cliff"]:
        told.append(f"a cliff: from {number(rates['cliff'])} on training diverges or loses half the gain")
    if rates["at_edge"]:
        told.append("the best rate is still at the edge of those tried")
    calibrated = "" if prior["calibrated"] else ", uncalibrated for this family"
    return [*told, f"by the model's size alone: {number(prior['learning_rate'])} at rank 16{calibrated}"]


def rank_words(advice: Advice) -> list[str]:
    """The rank with its bound, and where estimate and bound differ both."""
    rank, advised = advice["rank"], advice["advised"]["rank"]
    if rank is None:
        return [f"{advised}: the only one that was tried"]
    told = [f"{advised}"]
    if rank["by_estimate"] != rank["by_bound"]:
        more = next((step["more_seeds"] for step in rank["steps"] if step["rank"] == rank["by_estimate"]), None)
        needs = f"about {plural(more, 'more seed')}" if more else "more seeds or more items"
        told = [f"{rank['by_estimate']} by the estimate, {rank['by_bound']} by the bound; {needs} would decide"]
    return told + [excess_words(step, advice) for step in rank["steps"]]


def excess_words(step: Mapping[str, Any], advice: Advice) -> str:
    if step["excess"] is None:
        return f"rank {step['rank']}: diverged for one of its seeds"
    bound = f", at most {nats(step['bound'])} by the bound" if step["bound"] is not None else ", one seed: no bound"
    return f"rank {step['rank']} loses {nats(step['excess']['estimate'])} nats{bound}: {step['verdict']}"


def placement_words(advice: Advice) -> list[str]:
    """The verdict on the best other placement, or what was only tried."""
    small = [f"{PLACES[name]} cannot hold as many parameters: not compared" for name in advice["too_small"]]
    if advice["placement"] is None:
        tried = [f"{PLACES[name]} {interval(row)}" for name, row in advice["placements"].items()]
        return [f"one rank everywhere; not {'confirmed' if tried else 'compared'}", *tried, *small]
    found, name = advice["placement"], PLACES[advice["challenger"]]
    if found["verdict"] == "better":
        return [f"{name} is better than one rank everywhere: {interval(found)} nats", *small]
    words = {
        "equivalent": "is as good as",
        "worse": "is better than",
        "undecided": "is advised; it is undecided against",
    }
    return [f"one rank everywhere {words[found['verdict']]} {name} ({interval(found)} nats)", *small]


def open_words(advice: Advice) -> list[str]:
    """What was not decided, and what it takes: rungs are climbed in order, so each includes those before."""
    total, told = 0.0, []
    for row in advice["open"]:
        total += row["seconds"]
        what = {
            "B": "smaller ranks",
            "C": "whether a smaller rank is enough",
            "D": "placement",
            "E": "its confirmation",
        }
        told.append(f"{what[row['rung']]} (rung {row['rung']}): {duration(total)} more")
    return told


def screen(advice: Advice) -> list[tuple[str, list[str]]]:
    """Subjects of the screen with their lines."""
    gain, data = advice["gain"], advice["data"]
    learnt = f"{interval(gain)} nats per token in {advice['steps']} steps of {advice['batch_size']} rows"
    if not advice["learnt"]:
        return [("gain", [f"nothing was learnt: {learnt}", "longer runs (--steps) or other rows; no advice.yaml"])]
    loss = advice["loss"]
    expected = (
        f"{loss['estimate']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}] on {data['confirm']} items kept back"
        if loss
        else "not measured on items kept back before rung C"
    )
    return [
        ("learning rate", rate_words(advice)),
        ("rank", rank_words(advice)),
        ("placement", placement_words(advice)),
        (
            "gain",
            [learnt, f"base {advice['base_loss']:.3f}; decided on {data['choose']} items, δ {advice['delta']:.3f}"],
        ),
        ("loss expected", [f"{expected}, after {advice['steps']} steps"]),
        ("adapter", [f"{advice['advised']['parameters']:,} parameters"]),
        *([("not decided", open_words(advice))] if advice["open"] else []),
    ]


def advice_blocks(advice: Advice) -> list[Block]:
    """All blocks of one advice: what to do and how sure it is, the plots, every short run."""
    rows = [
        (subject if not index else "", line) for subject, lines in screen(advice) for index, line in enumerate(lines)
    ]
    plots = [Plot(name, caption, partial(draw, advice)) for name, (draw, caption) in PLOTS.items()]
    return [Table((), rows, first_number=2), *plots, Folded("Short runs", [trials_table(advice)])]


def trials_table(advice: Advice) -> Table:
    rows = [
        (
            trial["rung"],
            PLACES[trial["placement"]],
            str(trial["rank"]),
            number(trial["learning_rate"]),
            str(trial["seed"]),
            "diverged" if trial["loss"] is None else f"{trial['loss']:.4f}",
        )
        for trial in advice["trials"]
    ]
    header = ("rung", "placement", "rank", "learning rate", "seed", "loss")
    return Table(header, rows, first_number=2, note="Nats per answer token on the items that decide.")


def train_options(config: AdviseConfig, advice: Advice, plan: Path | None) -> dict[str, Any]:
    """Options of `rankwise train` for the real run, by name: those given, those advised, and the shape of the runs."""
    defaults = flatten(AdviseConfig())
    shared = [item.name for section in (config.model, config.data) for item in fields(section)]
    values = flatten(config)
    given = {name: values[name] for name in (*shared, "target") if values[name] != defaults[name]}
    lora = {"lora_config": str(plan)} if plan else {"lora_r": advice["advised"]["rank"]}
    return {
        **given,
        **lora,
        "lora_dropout": 0.0,
        "learning_rate": advice["advised"]["learning_rate"],
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_ratio": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "batch_size": config.batch_size,
        "num_epochs": config.num_epochs,
        "seed": config.seed,
    }


def write_advice(
    folder: Path, config: AdviseConfig, advice: Advice, ranks: Mapping[Site, int]
) -> dict[str, Path | str]:
    """Write them into the run folder; what was written, by name. Nothing learnt: no advice.yaml."""
    written: dict[str, Path | str] = {"advice": DOCUMENT.write(folder, advice)}
    if advice["learnt"]:
        plan = None
        if advice["advised"]["placement"] != UNIFORM:
            rows = tuple(PlannedSite(site, rank, method=advice["advised"]["placement"]) for site, rank in ranks.items())
            named = PLACES[advice["advised"]["placement"]]
            plan = write_plan(folder / PLAN, RankPlan(rows, str(config.model.model_name), description=named))
            written["plan"] = plan
        options = train_options(config, advice, plan)
        head = "# What `rankwise advise` recommends; run it with: rankwise train advice.yaml\n"
        text = head + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        written["config"] = write_text(folder / CONFIG, text)
    target = into(folder / "plots") if not config.no_plots and drawable("pictures of the advice are") else None
    blocks = drawn(advice_blocks(advice), target)
    page = Page("Advice", str(config.model.model_name), sections=[Section("What to train", blocks)])
    written["page"] = write_text(folder / "advice.md", markdown(page, folder))
    return written | pictures(blocks)


def plot_advice_rates(advice: Advice, path: Path | str) -> Path:
    """Loss against learning rate, a line per rank; the set within δ shaded, the advised rate ringed."""
    figure, axis = new_figure(6.4, 4.0)
    rates = advised_rates(advice)
    axis.axvspan(rates["within"][0], rates["within"][-1], color=FAINT, zorder=0)
    first = min(trial["seed"] for trial in advice["trials"])
    kept = [t for t in advice["trials"] if t["placement"] == UNIFORM and t["seed"] == first and t["loss"] is not None]
    for index, rank in enumerate(sorted({trial["rank"] for trial in kept}, reverse=True)):
        points = sorted((t["learning_rate"], t["loss"]) for t in kept if t["rank"] == rank)
        axis.plot(*zip(*points, strict=True), label=f"rank {rank}", linewidth=1, markersize=4, **style(index))
    axis.axvline(advice["prior"]["learning_rate"], color=GREY, linewidth=0.8, linestyle=":", label="by size alone")
    advised = advice["advised"]
    ring = [t["loss"] for t in kept if (t["rank"], t["learning_rate"]) == (advised["rank"], advised["learning_rate"])]
    for loss in ring:
        axis.plot([advised["learning_rate"]], [loss], "o", markersize=11, fillstyle="none", color=BLUE, label="advised")
    axis.set_xscale("log")
    axis.set_ylim(*ceiling([(t["learning_rate"], t["loss"]) for t in kept]))
    log_ticks(axis.xaxis)
    legend(axis)
    name_axes(axis, "learning rate", advice["metric"], f"grey: within {advice['delta']:.3f} of the best")
    return save(figure, path)


def plot_advice_ranks(advice: Advice, path: Path | str) -> Path:
    """Excess loss of smaller ranks over the largest with the upper bound; below δ a rank is enough."""
    figure, axis = new_figure(6.4, 3.6)
    steps = [step for step in (advice["rank"] or {"steps": []})["steps"] if step["excess"] is not None]
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axhline(advice["delta"], color=GREY, linewidth=0.8, linestyle="--", label="δ")
    for step in steps:
        estimate = step["excess"]["estimate"]
        up = [[0], [step["bound"] - estimate]] if step["bound"] is not None else None
        axis.errorbar([step["rank"]], [estimate], yerr=up, color=BLUE, marker="o", markersize=5, capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks([step["rank"] for step in steps], [str(step["rank"]) for step in steps])
    axis.minorticks_off()
    legend(axis)
    name_axes(axis, "rank", "excess loss (95 % upper bound)", f"against rank {max(map(int, advice['rates']))}")
    return save(figure, path)


def plot_advice_placements(advice: Advice, path: Path | str) -> Path:
    """Placements minus one rank everywhere at equal parameters; the confirmed one filled."""
    rows = [(PLACES[name], row, False) for name, row in advice["placements"].items()]
    if advice["placement"] is not None:
        rows.append((f"{PLACES[advice['challenger']]}, confirmed", advice["placement"], True))
    figure, axis = new_figure(6.4, 1.2 + 0.35 * max(1, len(rows)))
    axis.axvspan(-advice["delta"], advice["delta"], color=FAINT, zorder=0)
    axis.axvline(0, color=GREY, linewidth=0.8)
    for y, (_, row, filled) in enumerate(rows):
        error = [[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]
        look = {"color": BLUE if filled else GREY, "fillstyle": "full" if filled else "none"}
        axis.errorbar(row["estimate"], y, xerr=error, marker="o", markersize=5, capsize=3, **look)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    name_axes(
        axis, "← better     nats per token (95 %)", "", f"minus one rank everywhere · grey: ±{advice['delta']:.3f}"
    )
    return save(figure, path)


PLOTS = {
    "advice_rates": (plot_advice_rates, "Loss against learning rate for each rank; grey: within δ of the best"),
    "advice_ranks": (plot_advice_ranks, "Excess loss of smaller ranks with its upper bound; dashed: δ"),
    "advice_placements": (plot_advice_placements, "Placements minus one rank everywhere; grey: below δ"),
}


def read_advice(path: Path) -> Advice:
    return DOCUMENT.read(path)


ADVICE = Finding(DOCUMENT.name, ("advise",), read_advice, advice_blocks)
