"""Presentation of advice.json: one screen, the report's section, three plots, and advice.yaml for `rankwise train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
from rankwise.options.field import anywhere, flatten, options_of
from rankwise.page.blocks import Block, Finding, Folded, Page, Plot, Section, Table, drawn, into, pictures
from rankwise.page.canvas import BLUE, FAINT, GREY, drawable, legend, log_ticks, name_axes, new_figure, save, style
from rankwise.page.template import markdown
from rankwise.page.text import duration, memory, number, plural
from rankwise.study.advice import UNIFORM
from rankwise.study.page import ceiling, draw_differences, format_interval, signed

DOCUMENT = Document(
    "advice.json",
    "rankwise-advice/1",
    "an advice",
    made_by="rankwise advise",
    parts=tuple("rung learnt gain delta prior rates real_run placements trials data open cost too_few in_turn".split()),
)
CONFIG, PLAN = "advice.yaml", "advice_plan.json"
RANKS_SHOWN = 3  # beside the largest, on the screen
PLACES = {
    UNIFORM: "one rank everywhere",
    "attention": "attention only",
    "mlp": "MLP only",
    "experts": "experts only",
    "energy": "ranks by energy",
    "eva": "ranks by EVA",
}
Advice = Mapping[str, Any]


nats, interval = partial(signed, digits=3), partial(format_interval, digits=3)


def advised_rates(advice: Advice) -> Mapping[str, Any]:
    found: Mapping[str, Any] = advice["rates"][str(advice["advised"]["rank"])]
    return found


def rate_words(advice: Advice) -> list[str]:
    """The rate of the real run and of the short ones, the set that it is the middle of, the parabola, and what was
    known before."""
    rates, prior, real = advised_rates(advice), advice["prior"], advice["real_run"]
    low, high = rates["within"][0], rates["within"][-1]
    rate, delta = number(advice["advised"]["learning_rate"]), f"{advice['delta']:.3f}"
    if advice["advised"]["learning_rate"] not in rates["within"]:
        short = f"{rate}: {number(rates['best'])} was better, but is the last rate before training fails"
    elif low != high:
        short = f"{rate}: from {number(low)} to {number(high)} no rate that was tried loses more than {delta} nats"
    else:
        short = f"{rate}: every other rate that was tried loses more than {delta} nats against it"
    told = [short]
    if real["steps"] > advice["steps"]:
        span = f"{number(real['low'])} to {number(real['high'])}"
        told = [
            f"{number(real['learning_rate'])} for {real['steps']:,} steps, the middle of {span}; the longer, the lower",
            f"for {advice['steps']} steps {short}",
        ]
    told.append(
        f"lowest point of a parabola through the losses: {number(rates['vertex'])}"
        if rates["vertex"]
        else f"no parabola was fitted: {rates['why']}"
    )
    advised = advice["advised"]
    highest = max(rates["best"], advised["learning_rate"])
    tried = diverged(advice, advised["placement"], advised["rank"])
    if lost := [trial for trial in tried if trial["learning_rate"] <= highest]:
        told.append(
            f"{plural(len(lost), 'run')} with another seed diverged at this rate or below it: give lower --rates"
        )
    elif rates["cliff"]:
        told.append(f"too high: from {number(rates['cliff'])} on training diverges or loses half of the gain")
    if rates["at_edge"]:
        told.append("the best rate is the last that was tried on its side; a better one may lie beyond (--rates)")
    calibrated = "" if prior["calibrated"] else "; the formula is not calibrated for this family"
    return [*told, f"the model's size alone would have said {number(prior['learning_rate'])}{calibrated}"]


def diverged(advice: Advice, placement: str, rank: int | None = None) -> list[Mapping[str, Any]]:
    """The runs of a placement, and of a rank where one is given, that diverged, whatever their seed."""
    tried = [trial for trial in advice["trials"] if trial["placement"] == placement and rank in (None, trial["rank"])]
    return [trial for trial in tried if trial["loss"] is None]


def rank_words(advice: Advice) -> list[str]:
    """The rank with its bound, and where estimate and bound differ both; of many ranks those next to the decision."""
    rank, advised = advice["rank"], f"{advice['advised']['rank']} ({advice['advised']['parameters']:,} parameters)"
    if rank is None:
        return [f"{advised}; smaller ranks were not tried"]
    told = [advised]
    if rank["by_estimate"] != rank["by_bound"]:
        more = next((step["more_seeds"] for step in rank["steps"] if step["rank"] == rank["by_estimate"]), None)
        needs = f"about {plural(more, 'more seed')}" if more else "more seeds or more items"
        told = [f"{advised}; {rank['by_estimate']} may be enough, which {needs} would decide"]
    steps = rank["steps"]
    last = sum(step["rank"] >= rank["by_estimate"] for step in steps)
    first = max(0, min(last - 2, len(steps) - RANKS_SHOWN))
    shown = steps[first : first + RANKS_SHOWN]
    left = len(steps) - len(shown)
    rest = [f"{plural(left, 'more rank')} in advice.json"] if left else []
    out = sorted({trial["rank"] for trial in advice["trials"]} - set(map(int, advice["rates"])), reverse=True)
    rest += [f"rank {', '.join(map(str, out))}: every rate diverged, not compared"] if out else []
    return told + [excess_words(step, advice) for step in shown] + ["; ".join(rest)] * bool(rest)


def excess_words(step: Mapping[str, Any], advice: Advice) -> str:
    if step["excess"] is None:
        return f"rank {step['rank']}: diverged for one of its seeds"
    largest = max(map(int, advice["rates"]))
    bound = f", at most {nats(step['bound'])} (95 %)" if step["bound"] is not None else ", one seed: no bound"
    verdict = {"enough": "enough", "worse": "too small", "undecided": "undecided"}[step["verdict"]]
    return f"rank {step['rank']} loses {nats(step['excess']['estimate'])} against rank {largest}{bound}: {verdict}"


def placement_words(advice: Advice) -> list[str]:
    """The verdict on the best other placement, or what was only tried."""
    small = [f"{PLACES[name]}: cannot hold as many parameters, not compared" for name in advice["too_small"]]
    if advice["placement"] is None:
        tried = [f"{PLACES[name]}: {interval(row)} against it" for name, row in advice["placements"].items()]
        return [
            f"one rank everywhere; others were {'tried, not confirmed' if tried else 'not compared'}",
            *tried,
            *small,
        ]
    found, name = advice["placement"], PLACES[advice["challenger"]]
    if found["verdict"] == "better":
        return [f"{name}: better than one rank everywhere by {interval(found)}", *small]
    words = {
        "equivalent": f"{name} is no better",
        "worse": f"{name} is worse",
        "undecided": f"whether {name} is better is undecided",
    }
    return [f"one rank everywhere; {words[found['verdict']]}: {interval(found)}", *small]


def cost_words(advice: Advice) -> list[str]:
    """Time and memory of a short run, and what follows for the real one."""
    found, epochs = advice["cost"], advice["cost"]["epochs"]
    peak = f"{memory(found['peak_bytes'])} of {'GPU memory' if found['device'] == 'cuda' else 'memory'}"
    towers = ", of the language tower only" if advice.get("frozen") else ""
    turn = [f"the short runs trained one after the other: {advice['in_turn']}"] if advice["in_turn"] else []
    return [
        f"a short run: {duration(advice['seconds_per_run'])}; one alone takes at most {peak}",
        *turn,
        f"the real run{towers}: {found['steps']:,} steps ({epochs:g} × {found['rows']:,} rows), about "
        f"{duration(found['seconds'])} ({1000 * found['seconds_per_token']:.2g} ms per token)",
    ]


def few_words(advice: Advice) -> list[str]:
    """Whether rows and items can carry the decision; nothing where they can."""
    found, told = advice["too_few"], []
    if "items" in found:
        told.append(
            f"{advice['data']['choose']} items tell no {advice['delta']:.3f} apart (±{found['half_width']:.3f}); about "
            f"{found['items']:,} would do (--choose_size)"
        )
    if "overfit" in found:
        over = found["overfit"]
        told.append(
            f"{over['rows']:,} rows were seen {over['seen']:.1f} times; held-out loss is {over['above']:.3f} above the "
            f"training loss (margin {over['margin']:.3f}): more rows would help"
        )
    return told


def open_words(advice: Advice) -> list[str]:
    """What was not decided, and what it takes: rungs are climbed in order, so each includes those before."""
    what = {"B": "smaller ranks", "C": "whether a smaller rank is enough", "D": "placement", "E": "its confirmation"}
    total, told = 0.0, []
    for row in advice["open"]:
        total += row["seconds"]
        told.append(f"{what[row['rung']]} (rung {row['rung']}): {duration(total)} more")
    return told


def screen(advice: Advice) -> list[tuple[str, list[str]]]:
    """Subjects of the screen with their lines, 25 at most. Losses are in nats per answer token, with 95 %
    intervals."""
    gain, data = advice["gain"], advice["data"]
    learnt = f"{interval(gain)} nats per answer token in {advice['steps']} steps of {advice['batch_size']} rows"
    if not advice["learnt"]:
        told = ["take longer runs (--steps) or look at the rows (`rankwise check`); there is no advice.yaml"]
        return [("gain", [f"nothing was learnt: {learnt}", *told])]
    loss, few = advice["loss"], few_words(advice)
    spread = advice["seed_deviation"]
    seeds = f"; another seed moves a loss by ±{spread:.3f}" if spread is not None else ""
    compared = f"compared on {data['choose']} items; a difference below {advice['delta']:.3f} (δ) counts as none{seeds}"
    expected = (
        f"{loss['estimate']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}] on {data['confirm']} items kept back, after "
        f"{advice['steps']} steps"
        if loss
        else "not known yet; rung C measures it on items kept back"
    )
    return [
        ("learning rate", rate_words(advice)),
        ("rank", rank_words(advice)),
        ("placement", placement_words(advice)),
        (
            "gain",
            [
                f"{learnt}; without adapter the loss is {advice['base_loss']:.3f}",
                compared,
            ],
        ),
        ("loss expected", [expected]),
        *([("too small a set", few)] if few else []),
        ("time", cost_words(advice)),
        *([("not decided", open_words(advice))] if advice["open"] else []),
    ]


def screen_table(advice: Advice) -> Table:
    rows = [
        (subject if not index else "", line) for subject, lines in screen(advice) for index, line in enumerate(lines)
    ]
    return Table((), rows, first_number=2)


def advice_blocks(advice: Advice) -> list[Block]:
    """All blocks of one advice: what to do and how sure it is, the plots, every short run."""
    plots = [Plot(name, caption, partial(draw, advice)) for name, (draw, caption) in PLOTS.items()]
    return [screen_table(advice), *plots, Folded("Short runs", [trials_table(advice)])]


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
    """Options of `rankwise train` for the real run, by name: those given, those advised, and the shape of the runs.
    Local files by their absolute paths: it may be started anywhere."""
    defaults = flatten(AdviseConfig())
    shared = [option for section in (config.model, config.data) for option in options_of(section)]
    given = {item.name: anywhere(item, item.default) for item in shared if item.default != defaults[item.name]}
    given |= {"target": config.target} if config.target else {}
    lora = {"lora_config": os.path.abspath(plan)} if plan else {"lora_r": advice["advised"]["rank"]}
    return {**given, **lora, **run_options(config, advice), "seed": config.seed}


def run_options(config: AdviseConfig, advice: Advice) -> dict[str, Any]:
    """What is advised, and the shape of the runs, by `rankwise train`'s names."""
    return {
        "lora_dropout": 0.0,
        "learning_rate": advice["real_run"]["learning_rate"],
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_ratio": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "batch_size": config.batch_size,
        "num_epochs": config.num_epochs,
    }


def advised_plan(config: AdviseConfig, advice: Advice, ranks: Mapping[Site, int]) -> RankPlan:
    """The advised ranks as a plan."""
    placement = advice["advised"]["placement"]
    rows = tuple(PlannedSite(site, rank, method=placement) for site, rank in ranks.items())
    return RankPlan(rows, str(config.model.model_name), description=PLACES[placement])


def write_advice(folder: Path, config: AdviseConfig, advice: Advice, ranks: RankPlan) -> dict[str, Path | str]:
    """Write them into the run folder; what was written, by name. Nothing learnt: no advice.yaml, nor an earlier one."""
    written: dict[str, Path | str] = {"advice": DOCUMENT.write(folder, advice)}
    for earlier in (CONFIG, PLAN):
        (folder / earlier).unlink(missing_ok=True)
    if advice["learnt"]:
        plan = write_plan(folder / PLAN, ranks) if advice["advised"]["placement"] != UNIFORM else None
        written |= {"plan": plan} if plan else {}
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
    """Loss against learning rate, a line per rank; the best of the short runs ringed, the rates of the real run shaded
    with their middle."""
    figure, axis = new_figure(6.4, 4.0)
    real = advice["real_run"]
    axis.axvspan(real["low"], real["high"], color=FAINT, zorder=0)
    told = f"{number(real['learning_rate'])} for {real['steps']:,} steps"
    axis.axvline(real["learning_rate"], color=BLUE, linewidth=1.2, linestyle="--", label=told)
    first = min(trial["seed"] for trial in advice["trials"])
    tried = [t for t in advice["trials"] if t["placement"] == UNIFORM and t["seed"] == first]
    kept = [t for t in tried if t["loss"] is not None]
    for index, rank in enumerate(sorted({trial["rank"] for trial in kept}, reverse=True)):
        points = sorted((t["learning_rate"], t["loss"]) for t in kept if t["rank"] == rank)
        axis.plot(*zip(*points, strict=True), label=f"rank {rank}", linewidth=1, markersize=4, **style(index))
    lost = sorted({t["learning_rate"] for t in diverged(advice, UNIFORM)})
    if lost:
        axis.plot(lost, [0.97] * len(lost), "x", color="black", transform=axis.get_xaxis_transform(), label="diverged")
    axis.axvline(advice["prior"]["learning_rate"], color=GREY, linewidth=0.8, linestyle=":", label="by size alone")
    advised = advice["advised"]
    ring = [t["loss"] for t in kept if (t["rank"], t["learning_rate"]) == (advised["rank"], advised["learning_rate"])]
    for loss in ring:
        axis.plot(
            [advised["learning_rate"]],
            [loss],
            "o",
            markersize=11,
            fillstyle="none",
            color=BLUE,
            label=f"for {advice['steps']} steps",
        )
    axis.set_xscale("log")
    axis.set_ylim(*ceiling([(t["learning_rate"], t["loss"]) for t in kept]))
    log_ticks(axis.xaxis)
    legend(axis)
    name_axes(axis, "learning rate", advice["metric"], "grey: rates for the real run")
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
    names, found, filled = zip(*rows, strict=True) if rows else ((), (), ())
    draw_differences(axis, names, found, filled, advice["delta"])
    name_axes(
        axis, "← better     nats per token (95 %)", "", f"minus one rank everywhere · grey: ±{advice['delta']:.3f}"
    )
    return save(figure, path)


PLOTS = {
    "advice_rates": (
        plot_advice_rates,
        "Loss against learning rate for each rank; grey: rates for the real run, dashed: their middle",
    ),
    "advice_ranks": (plot_advice_ranks, "Excess loss of smaller ranks with its upper bound; dashed: δ"),
    "advice_placements": (plot_advice_placements, "Placements minus one rank everywhere; grey: below δ"),
}


def read_advice(path: Path) -> Advice:
    return DOCUMENT.read(path)


ADVICE = Finding(DOCUMENT.name, ("advise",), read_advice, advice_blocks)
