"""Table of `advise.py`: regret of the advice and of the prior, what did not pass, and per pair sweep and plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rankwise.files.atomic import read_if_there, write_json, write_text

SHARE = 0.2  # of the sweep's tokens that an advice may take
TITLE, JSON, MARKDOWN = "# Is the advice good?", "advise.json", "advise.md"
Result = Mapping[str, Any]
ABOUT = (
    "Regret: loss on the test part less that of the sweep's best cell (chosen on *choose*), in nats per answer token; "
    "both are retrained with fresh seeds and read once, paired by item and seed. Passed: estimate ≤ m, upper one-sided "
    "95 % bound ≤ 2m, m the larger of 0.02 nats and 1 % of the best cell's gain, no seed diverged, and at most "
    f"{SHARE:.0%} of the tokens that the sweep trained on. The prior is its rate at the largest rank, without any run. "
    "Distance on the grid is printed and not judged: steps of the sweep's rates, doublings of the rank."
)


def write_table(out: Path, found: Mapping[str, Result]) -> None:
    """Pairs that have no result here stay as they are in `out`."""
    pairs = read_if_there(out / JSON) | {name: result for name, result in found.items() if result}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JSON, pairs)
    text = "\n".join(page(pairs)) + "\n"
    write_text(out / MARKDOWN, text)
    print(text)


def page(pairs: Mapping[str, Result]) -> Iterator[str]:
    yield from (TITLE, "", ABOUT, "")
    yield "| pair | cell | rate | rank | regret [upper bound] | m | tokens | on the grid | verdict |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    for result in pairs.values():
        yield from verdict_rows(result)
    yield from ("", "## What did not pass", "")
    lines = [line for result in pairs.values() for line in failures(result)]
    yield from lines or ["Nothing that was judged."]
    for result in pairs.values():
        yield from ("", f"## {result['title']}", "", about(result))
        yield from sweep_lines(result)
        yield from plan_lines(result)


def verdict_rows(result: Result) -> Iterator[str]:
    title, judged = result["title"], result.get("judge")
    if "sweep" in result:
        best = result["sweep"]["best"]
        yield f"| {title} | sweep's best | {best['learning_rate']:g} | {best['rank']} | 0 | | 100% | | reference |"
    if judged is None:
        yield f"| {title} | advised | | | | | | | not judged: {' and '.join(missing(result))} to be run |"
        return
    margin = f"{judged['margin']:.3f}"
    for name in ("advised", "prior"):
        cell = judged["cells"].get(name)
        if cell is None:
            yield f"| {title} | {name} | | | | {margin} | | | **failed: no advice** |"
            continue
        share = result["advise"]["share"] if name == "advised" else 0.0
        where = f"{cell['rate_steps']:+.1f}, {cell['rank_doublings']:+.0f}"
        word = "passed" if passed(result, name) else "**failed**"
        yield (
            f"| {title} | {name} | {cell['learning_rate']:g} | {cell['rank']} | {regret(cell)} | {margin} | "
            f"{share:.1%} | {where} | {word} |"
        )


def regret(cell: Result) -> str:
    lost = f", {cell['diverged']} seeds diverged" if cell["diverged"] else ""
    known = "–" if cell["estimate"] is None else f"{cell['estimate']:+.4f} [{cell['bound']:+.4f}]"
    return known + lost


def passed(result: Result, name: str) -> bool:
    return bool(result["judge"]["cells"][name]["passed"]) and (name == "prior" or result["advise"]["share"] <= SHARE)


def missing(result: Result) -> list[str]:
    return [stage for stage in ("sweep", "advise", "judge") if stage not in result]


def failures(result: Result) -> Iterator[str]:
    """Plain sentences, one for each thing that a reader must not overlook."""
    title, judged = result["title"], result.get("judge")
    if missing(result):
        yield f"- {title}: not finished; {' and '.join(missing(result))} to be run."
    if result.get("sweep", {}).get("at_edge"):
        yield f"- {title}: the sweep's best rate is at the edge of its grid, so a better one may lie outside."
    if judged is None:
        return
    if judged["best_diverged"]:
        seeds = f"{judged['best_diverged']} of {judged['seeds']} fresh seeds"
        yield f"- {title}: the sweep's best cell diverged for {seeds}."
    if "advised" not in judged["cells"]:
        yield f"- {title}: `advise` came to no advice."
    for name, cell in judged["cells"].items():
        if not passed(result, name):
            share = f", at {result['advise']['share']:.1%} of the sweep's tokens" if name == "advised" else ""
            yield f"- {title}: {name}, rate {cell['learning_rate']:g} at rank {cell['rank']}: {regret(cell)}{share}."
    beaten = judged["advised_to_prior"]
    if beaten and beaten["low"] is not None and beaten["high"] >= 0:
        word = "worse than" if beaten["low"] > 0 else "not shown to be better than"
        yield f"- {title}: the advice is {word} the prior: {interval(beaten)} nats."


def about(result: Result) -> str:
    extent = result["extent"]
    text = (
        f"{result['date']} · {result['machine']} · `{result['command']}` · {extent['steps']} steps of "
        f"{extent['batch_size']} rows, {result['train_rows']} rows to train on, "
        f"{result['choose_items']} items that decide; "
        f"{result['dropped']:.1%} of the rows are longer than the model reads and left out."
    )
    if "sweep" in result:
        sweep = result["sweep"]
        text += f" Sweep: {sweep['runs']} runs, {sweep['tokens']:,} tokens, {sweep['seconds'] / 60:.0f} minutes."
    if "advise" in result:
        made = result["advise"]
        text += (
            f" Advice: {made['runs']} runs of {made['steps']} steps up to rung {made['rung'] or 'none'}, "
            f"{made['tokens']:,} tokens, {made['seconds'] / 60:.0f} minutes."
        )
    if "judge" in result:
        judged = result["judge"]
        text += f" Judged on {judged['items']} items with {judged['seeds']} seeds; gain {judged['gain']:.3f} nats."
    return text


def sweep_lines(result: Result) -> Iterator[str]:
    if "sweep" not in result:
        return
    losses = result["sweep"]["losses"]
    rates = list(next(iter(losses.values())))
    yield from ("", "Loss on *choose*, mean of two seeds (– : one of them diverged):", "")
    yield f"| rank | {' | '.join(rates)} |"
    yield f"|---:|{'---:|' * len(rates)}"
    for rank, row in losses.items():
        yield f"| {rank} | {' | '.join('–' if row[rate] is None else f'{row[rate]:.4f}' for rate in rates)} |"


def plan_lines(result: Result) -> Iterator[str]:
    if not result.get("plans"):
        return
    plans = result["plans"]
    shown = "; ".join(f"{name}: {interval(found)}" for name, found in plans["differences"].items())
    known = "–" if plans["rank_correlation"] is None else f"{plans['rank_correlation']:.2f}"
    yield ""
    yield (
        f"Plans at the parameters of uniform rank {plans['uniform_rank']}, from the best arm's change and from a full "
        f"probe's: rank correlation {known}. Trained at {plans['learning_rate']:g}, difference in nats: {shown}."
    )


def interval(found: Result) -> str:
    if found["estimate"] is None:
        return "no seed that both trained"
    return f"{found['estimate']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
