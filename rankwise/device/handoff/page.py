"""A hand-off in words and pictures: the verdict, what each API told, and how far the answers are from each hypothesis.

handoff.json ── handoff_blocks ──▶ terminal (its first line is the verdict), plot, the report's section
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.device.handoff.verdict import nats
from rankwise.files.document import Document
from rankwise.page.blocks import Block, Finding, Plot, Table, Words
from rankwise.page.canvas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARKERS,
    legend_outside,
    name_axes,
    name_rows,
    new_figure,
    save,
)
from rankwise.page.text import percent

HANDOFF = Document(
    "handoff.json",
    "rankwise-handoff/1",
    "a verdict on a hand-off",
    "rankwise validate --server URL/v1",
    ("verdict", "kind", "hypotheses", "apis"),
)
NEARER = (
    "In the last column by how much nearer than the tuned model, row by row, between -1 and 1: the interval of the "
    "mean, all compared at once. Above 0: better; below 0: worse; across: not told apart."
)
LEAST = 1e-9  # KL where the plot's axis begins


def handoff_blocks(content: Mapping[str, Any]) -> list[Block]:
    """The verdict first."""
    found: list[Block] = [Words(content["verdict"]), *map(Words, content["more"])]
    found += [Words(f"Not asked: {name}: {why}") for name, why in content.get("left_out", {}).items()]
    found += [api_table(content), distance_table(content)]
    return [*found, Plot("handoff_kl", "KL from the answers to each hypothesis, in nats", partial(draw, content))]


def api_table(content: Mapping[str, Any]) -> Table:
    rows = [
        (
            one["route"],
            one["kind"],
            str(one["items"]),
            str(one["places"]),
            str(one["offered"]),
            percent(one["mass"]),
            nats(one["limit"]),
            "" if one["longer"] is None else f"{one['longer']:+d}",
        )
        for one in content["apis"]
    ]
    header = ("API", "answers are", "rows", "places", "tokens told", "their share", "rounding, KL", "prompt tokens")
    note = (
        "Places are next tokens along the rows' own answers. KL within that of rounding, k noise floors, is no "
        "difference; prompt tokens: counted by the server beyond training's."
    )
    return Table(header, rows, first_number=2, note=note)


def nearest_first(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The API that decides, and the hypotheses from the nearest to its answers to the farthest."""
    deciding = next(one for one in content["apis"] if one["route"] == content["api"])
    return deciding, sorted(content["hypotheses"], key=lambda one: deciding["kl"][one["name"]])


def distance_table(content: Mapping[str, Any]) -> Table:
    apis, (deciding, ordered) = content["apis"], nearest_first(content)
    rows = [
        (one["words"], *(nats(api["kl"][one["name"]]) for api in apis), better(deciding["gains"].get(one["name"])))
        for one in ordered
    ]
    header = ("hypothesis", *(f"KL, {one['route']}" for one in apis), f"nearer than tuned, {content['api']}")
    return Table(header, rows, note=NEARER)


def better(gain: list[float | None] | None) -> str:
    if gain is None:
        return ""
    low, high = ("∞" if bound is None else f"{bound:+.1g}" for bound in gain[1:])
    return f"{low} to {high}"


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """A row for each hypothesis, a mark for each API, on a logarithmic axis; a line where rounding ends."""
    apis, (deciding, ordered) = content["apis"], nearest_first(content)
    figure, axis = new_figure(7.2, 1.2 + 0.3 * len(ordered))
    for number, one in enumerate(apis):
        values = [max(one["kl"][each["name"]], LEAST) for each in ordered]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number], "linestyle": ""}
        beside = 0.25 * (number - (len(apis) - 1) / 2)  # equal values of two APIs are both seen
        axis.plot(values, [row + beside for row in range(len(ordered))], label=one["route"], markersize=4, **style)
    axis.axvline(deciding["limit"], color=GREY, linestyle="--", linewidth=1, label="rounding")
    axis.set_xscale("log")
    name_rows(axis, [one["name"] for one in ordered])
    for tick, one in zip(axis.get_yticklabels(), ordered, strict=True):
        tick.set_color(BLUE if one["kind"] == "tuned" else INK)
    name_axes(axis, "KL from the answers, nats", "", "What explains the answers: the nearest on top")
    legend_outside(figure, "right upper", [axis])
    return save(figure, path)


FINDING = Finding(HANDOFF.name, ("validate",), HANDOFF.read, handoff_blocks)
