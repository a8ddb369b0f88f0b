"""The one-screen summary of `rankwise ranks`: from numbers to at most 24 lines of text, the verdict in words.

print(render(summarise(plan, measured, rule, budget, evidence, seconds, memory)))    # "no evidence" where there is none
"""

from __future__ import annotations

import shlex
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.core.allocate import Rule
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.page.text import clip, duration, memory, percent, plural
from rankwise.ranks.choice import PURPOSE, MetricChoice
from rankwise.ranks.decide import Evidence
from rankwise.ranks.expert_map import expert_facts, movement
from rankwise.ranks.measured import Measured, dtypes, noise_share

MOST_RANGES = 6


def rank_table(rows: Sequence[PlannedSite], room: int, width: int) -> list[str]:
    """Median rank by layer range × projection type, in at most `room` lines of `width` columns."""
    columns = list(dict.fromkeys(row.site.projection for row in rows))
    ranges = layer_ranges(rows, max(1, min(MOST_RANGES, room - 1)))
    first = max(len("median rank"), *(len(name) for name, _ in ranges)) if ranges else 0
    shown, used = [], first
    for column in columns:
        used += 2 + max(len(column), 4)
        if used > width - len("  +99 more types"):
            break
        shown.append(column)
    more = f"  +{len(columns) - len(shown)} more types" if len(shown) < len(columns) else ""
    table = ["median rank".ljust(first) + "".join(f"  {column:>4}" for column in shown) + more]
    for name, members in ranges:
        cells = (cell(members, column).rjust(max(len(column), 4)) for column in shown)
        table.append(name.ljust(first) + "".join(f"  {text}" for text in cells))
    return table


def cell(members: Iterable[PlannedSite], projection: str) -> str:
    ranks = [row.rank for row in members if row.site.projection == projection]
    return f"{statistics.median_low(ranks)}" if ranks else ""


def layer_ranges(rows: Sequence[PlannedSite], most: int) -> list[tuple[str, list[PlannedSite]]]:
    """Sites grouped into at most about `most` ranges of layers, tower by tower."""
    towers: dict[str, dict[int | None, list[PlannedSite]]] = {}
    for row in rows:
        towers.setdefault(row.site.tower, {}).setdefault(row.site.layer, []).append(row)
    found = []
    for tower, layers in list(towers.items())[:most]:
        order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
        size = -(-len(order) // max(1, most // len(towers)))
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            name = range_name(chunk) if len(towers) == 1 else f"{tower} {range_name(chunk)}"
            found.append((name, [row for layer in chunk for row in layers[layer]]))
    return found


def range_name(layers: Sequence[int | None]) -> str:
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return "no layer"
    name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}–{numbers[-1]}"
    return name if len(numbers) == len(layers) else f"{name} + rest"


WIDTH, HEIGHT, LABEL = 100, 24, 11
DISGUISE = 0.05  # share of the parameters that would have to move to make the plan uniform
NEARLY_ALL = 0.9
REPEATABLE = 0.7  # Spearman ρ; the pilot's disjoint probes gave 0.97, unrelated ones are near 0
NOISY = 0.5


@dataclass(frozen=True)
class RanksSummary:
    """Content of the summary, as plain values. None and () mean "not measured".

    `caps` are the smallest and the largest of the sites' greatest ranks (--max_rank, or ⌊mn/(m+n)⌋ where that is less);
    `energy_rank_share` is the median over sites of r_raw ÷ min(m, n); `clipped_sites` counts ranks that a bound
    decided; `gain_*` are shares of the probe's loss improvement (1 = all of it), `gain_margin` the 95 % interval
    of plan − uniform; `rho_within` the mean Spearman ρ within one projection type.
    """

    model: str
    plan: RankPlan
    stored_as: tuple[str, ...]
    seconds: float
    peak_memory: int
    noise_share: float | None = None
    rounding: str = ""
    exact_sites: int = 0
    threshold: float = 0.9
    caps: tuple[int, int] = (128, 128)
    saturated_sites: int = 0
    clipped_sites: int = 0
    energy_rank_share: float | None = None
    budget: int | None = None
    above_null: int | None = None
    rho_all: float | None = None
    rho_within: float | None = None
    probes: int = 1
    gain_plan: float | None = None
    gain_uniform: float | None = None
    gain_shuffles: tuple[float, ...] = ()
    gain_margin: tuple[float, float] | None = None
    gain_note: str = ""
    choice: MetricChoice | None = None
    experts: str = ""
    intruders: str = ""
    next_commands: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def sites(self) -> int:
        return len(self.plan.sites)


def render(summary: RanksSummary) -> str:
    """The whole summary: plain text, at most HEIGHT lines of at most WIDTH columns."""
    head = [*title_lines(summary), *finding_lines(summary)]
    tail = [*labelled("Verdict", verdict(summary), most=3), *command_lines(summary.next_commands)]
    tail += file_lines(summary.files)
    room = HEIGHT - len(head) - len(tail) - 2
    lines = [*head, "", *rank_table(summary.plan.sites, room, WIDTH), "", *tail]
    return "\n".join(clip(line, WIDTH) for line in lines)


def title_lines(summary: RanksSummary) -> list[str]:
    about = f" · {plural(summary.sites, 'site')} · stored as {' + '.join(summary.stored_as) or 'nothing that changed'}"
    facts = [f"{duration(summary.seconds)}, peak memory {memory(summary.peak_memory)} without mapped files"]
    if summary.noise_share is not None:
        facts.insert(0, f"rounding noise {percent(summary.noise_share)} of the energy")
    if summary.exact_sites:
        facts.append(f"{plural(summary.exact_sites, 'site')} by the exact path")
    name = clip(summary.model or "(no model name)", WIDTH - len(about))
    return [name + about, " · ".join(facts)]


def finding_lines(summary: RanksSummary) -> list[str]:
    lines = [
        *(labelled("Rounding", summary.rounding, most=2) if summary.rounding else []),
        *(labelled("Metric", summary.choice.shares, most=1) if summary.choice else []),
        *labelled("Energy", energy_finding(summary), most=2 if summary.choice else 3),
        *labelled("Parameters", spending(summary), most=1),
        *(labelled("Experts", summary.experts, most=1) if summary.experts else []),
        *(labelled("Intruders", summary.intruders, most=2) if summary.intruders else []),
        *labelled("Repeatable", repeatability(summary), most=1),
        *labelled("Gain kept", gain_kept(summary), most=2),
    ]
    if summary.above_null is not None:
        null = f"{summary.above_null} of {plural(summary.sites, 'site')} have a top singular value above "
        lines += labelled("Null", null + "that of their own entries permuted", most=1)
    if summary.warnings:
        lines += labelled("Warning", " ".join(summary.warnings), most=2)
    return lines


def energy_finding(summary: RanksSummary) -> str:
    """The median energy rank, how many sites the bounds decided, and what that means."""
    saturated, sites = summary.saturated_sites, max(1, summary.sites)
    said = f"{saturated} of {sites} sites ({percent(saturated / sites)}) saturate: "
    low, high = summary.caps
    within = f"within rank {low}" if low == high else f"within their largest ranks, {low} to {high}"
    said += f"{percent(summary.threshold)} of the energy is not reached {within}."
    if not saturated:
        said = f"{percent(summary.threshold)} of the energy is reached {within} at every site."
    if summary.energy_rank_share is not None:
        least = "at least " if 2 * saturated >= sites else ""  # beyond the computed values nothing is known
        said += f" It needs {least}{percent(summary.energy_rank_share)} of full rank (median site)."
    if clips(summary) and summary.budget is None:
        said += " Nearly all ranks are the bounds: this is uniform rank. --budget N lets sites compete for parameters."
    return said


def clips(summary: RanksSummary) -> bool:
    """Whether bounds, not spectra, decided nearly all ranks."""
    return max(summary.clipped_sites, summary.saturated_sites) >= NEARLY_ALL * max(1, summary.sites)


def spending(summary: RanksSummary) -> str:
    spent = f"{summary.plan.parameters:,}"
    kept = f"{percent(summary.plan.kept_fraction)} of the analysed matrices"
    if summary.budget is None:
        return f"{spent} trainable ({kept}); no budget was given"
    return f"{spent} of the budget of {summary.budget:,}, {summary.budget - summary.plan.parameters:,} unspent ({kept})"


def repeatability(summary: RanksSummary) -> str:
    if summary.rho_all is None:
        return "one probe: not known, add --probe2"
    within = "" if summary.rho_within is None else f", {summary.rho_within:.2f} within projection type"
    return f"Spearman ρ {summary.rho_all:.2f} over all sites{within} ({summary.probes} probes)"


def gain_kept(summary: RanksSummary) -> str:
    if summary.gain_plan is None or summary.gain_uniform is None:
        return summary.gain_note or "not measured, add --gain DATA"
    who = f"--metric {summary.choice.best}" if summary.choice else "plan"
    said = f"{who} {100 * summary.gain_plan:.1f} %, uniform {100 * summary.gain_uniform:.1f} %"
    if summary.gain_shuffles:
        low, high = min(summary.gain_shuffles), max(summary.gain_shuffles)
        said += f", {len(summary.gain_shuffles)} shuffles {100 * low:.1f} to {100 * high:.1f} %"
    if summary.gain_margin is not None:
        low, high = summary.gain_margin
        said += f"; {who} − uniform {100 * (summary.gain_plan - summary.gain_uniform):+.1f} "
        said += f"[{100 * low:+.1f}, {100 * high:+.1f}] points"
    return f"{said}. {summary.gain_note}" if summary.gain_note else said


def verdict(summary: RanksSummary) -> str:
    """The conclusion in words. Evidence against the plan comes before evidence for it."""
    if summary.noise_share is not None and summary.noise_share >= NOISY:
        return "mostly rounding noise: these ranks say more about the file format than about the training"
    if summary.choice:
        return choice_verdict(summary, summary.choice)
    moved = distance_from_uniform(summary.plan)
    if moved < DISGUISE:
        return (
            f"uniform in disguise: only {percent(moved)} of the parameters lie elsewhere than in a uniform plan; "
            + ("uniform:R is simpler" if summary.budget is not None else "--budget N lets sites compete")
        )
    if summary.gain_plan is not None and summary.gain_uniform is not None:
        return gain_verdict(summary, summary.gain_plan)
    return unproven(summary)


def choice_verdict(summary: RanksSummary, choice: MetricChoice) -> str:
    """The metric that rows of its own confirmed, or why it is uniform rank; and what it was chosen for."""
    if choice.confirmed and summary.gain_plan is not None:
        return f"`--metric {choice.best}` {gain_verdict(summary, summary.gain_plan)}; {PURPOSE}"
    return f"one rank everywhere: {choice.reason}; {PURPOSE}"


def gain_verdict(summary: RanksSummary, plan: float) -> str:
    """The plan against uniform rank and against shuffles of its own ranks."""
    low, high = summary.gain_margin or (-1.0, 1.0)
    beaten = sum(plan > shuffle for shuffle in summary.gain_shuffles)
    shuffles = len(summary.gain_shuffles)
    if high < 0:
        return "keeps less than uniform rank at the same parameters: use --budget with uniform:R, or --metric loss"
    if low <= 0:
        why = "the interval of the difference contains 0" if summary.gain_margin else "the difference has no interval"
        return f"no evidence that this plan beats uniform: {why}"
    if not shuffles:
        return "keeps more than uniform; no shuffles were run, so where the ranks lie is unproven"
    if beaten < shuffles:
        return (
            f"keeps more than uniform, but no more than {shuffles - beaten} of {shuffles} shuffles of its own ranks: "
            "unequal ranks help here, their places are unproven"
        )
    return f"keeps more than uniform and than all {shuffles} shuffles, on this data{trust(summary)}"


def trust(summary: RanksSummary) -> str:
    rho = lowest_rho(summary)
    if rho is None:
        return "; from one probe"
    return "; repeatable" if rho >= REPEATABLE else "; but another probe gives another plan"


def unproven(summary: RanksSummary) -> str:
    """The verdict without a measured gain: only whether the plan is repeatable."""
    flat = "; layers of one projection type hardly differ" if distance_from_types(summary.plan) < DISGUISE else ""
    rho = lowest_rho(summary)
    if rho is None:
        return f"unproven: one probe, and no gain was measured{flat}"
    if rho < REPEATABLE:
        return f"not repeatable (ρ {rho:.2f}): another probe gives another plan{flat}"
    return f"repeatable but unproven: whether it beats uniform is what --gain DATA measures{flat}"


def lowest_rho(summary: RanksSummary) -> float | None:
    return least((summary.rho_all, summary.rho_within))


def distance_from_uniform(plan: RankPlan) -> float:
    """Share of the plan's parameters that would have to move to another site to make all ranks equal."""
    cost = sum(row.site.parameters(1) for row in plan.sites)
    return moved_share(plan.sites, [plan.parameters / max(1, cost)] * len(plan.sites))


def distance_from_types(plan: RankPlan) -> float:
    """The same against one rank per projection type of a tower (its mean)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in plan.sites:
        groups.setdefault((row.site.tower, row.site.projection), []).append(row.rank)
    means = [statistics.fmean(groups[row.site.tower, row.site.projection]) for row in plan.sites]
    return moved_share(plan.sites, means)


def moved_share(rows: Sequence[PlannedSite], ranks: Sequence[float]) -> float:
    """Half the parameters that lie in one plan and not in the other; a site's own limit caps the other plan."""
    moved = sum(
        abs(row.rank - min(rank, row.site.largest_rank)) * row.site.parameters(1)
        for row, rank in zip(rows, ranks, strict=True)
    )
    return moved / 2 / max(1, sum(row.parameters for row in rows))


def labelled(label: str, text: str, most: int) -> list[str]:
    """The label and the text beside it, wrapped; what goes beyond `most` lines is cut with an ellipsis."""
    lines = textwrap.wrap(text, WIDTH - LABEL, max_lines=most, placeholder=" …") or [""]
    return [f"{label if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(lines)]


def command_lines(commands: Sequence[str], most: int = 3) -> list[str]:
    """The next commands, whole or not at all, so that what is shown can be pasted."""
    lines: list[str] = []
    for command in commands:
        parts = wrapped(shlex.split(command), WIDTH - LABEL - 2)
        if len(lines) + len(parts) <= most:
            lines += [f"{part} \\" for part in parts[:-1]] + parts[-1:]
    return [f"{'Next' if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(lines)]


def wrapped(words: Sequence[str], width: int) -> list[str]:
    """A command in lines of this width, broken between its words, however these are quoted."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def file_lines(files: Sequence[str]) -> list[str]:
    """Where the outputs are: as many as fit two lines, and how many more."""
    if not files:
        return []
    for shown in range(len(files), 0, -1):
        more = f" · +{len(files) - shown} more" if shown < len(files) else ""
        lines = textwrap.wrap(" · ".join(files[:shown]) + more, WIDTH - LABEL, break_on_hyphens=False)
        if len(lines) <= 2:
            break
    return [f"{'Files' if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(lines[:2])]


def summarise(
    plan: RankPlan,
    measured: Mapping[Site, Measured],
    rule: Rule,
    budget: int | None,
    evidence: Evidence,
    seconds: float,
    peak_memory: int,
) -> RanksSummary:
    """Everything that can be said without knowing the command line: next commands and files are the caller's."""
    gain = evidence.gain if evidence.gain and evidence.gain.defined else None
    compared = list((evidence.repeats or {}).get("compared", []))
    found = {site: row.spectrum.rank_bounds(rule.threshold)[0] for site, row in measured.items()}
    caps = {site: rule.most(site) for site in measured}
    bounds = [min(rank, site.full_rank) / site.full_rank for site, rank in found.items()]
    return RanksSummary(
        model=plan.model_name,
        plan=plan,
        stored_as=dtypes(measured),
        seconds=seconds,
        peak_memory=peak_memory,
        noise_share=noise_share(measured) or None,
        rounding=evidence.rounding.sentence() if evidence.rounding else "",
        exact_sites=sum("undecided" in row.spectrum.method for row in measured.values()),
        threshold=rule.threshold,
        caps=(min(caps.values()), max(caps.values())),
        saturated_sites=sum(row.spectrum.saturated(rule.threshold, caps[site]) for site, row in measured.items()),
        clipped_sites=sum(row.clipped is not None for row in plan.sites) if budget is None else 0,
        energy_rank_share=statistics.median(bounds) if bounds else None,
        budget=budget,
        above_null=sum(row.above_null for row in measured.values()),
        rho_all=least(row["rho_all"] for row in compared),
        rho_within=least(row["rho_within"] for row in compared),
        probes=1 + len(compared),
        gain_plan=gain.arm("plan").kept if gain else None,
        gain_uniform=gain.arm("uniform").kept if gain else None,
        gain_shuffles=tuple(arm.kept for arm in gain.shuffles) if gain else (),
        gain_margin=gain.margin if gain else None,
        gain_note=undefined_note(evidence),
        choice=evidence.choice,
        experts=movement(expert_facts(measured, rule.threshold)),
        intruders=evidence.intruders.sentence() if evidence.intruders else "",
    )


def undefined_note(evidence: Evidence) -> str:
    gain = evidence.gain
    if gain is None or gain.defined:
        return ""
    return (
        f"undefined: the probe's own gain on this data is {gain.base_loss - gain.tuned_loss:+.3f} nats per token "
        f"[{gain.gain_low:+.3f}, {gain.gain_high:+.3f}], which touches 0"
    )


def least(values: Iterable[float | None]) -> float | None:
    """The smallest of the numbers that are there: repeatability is as good as its worst comparison."""
    return min((value for value in values if value is not None), default=None)
