"""Answer quality with approximated features, as a table and a plot, from downstream.json.

content ── answer_blocks ──▶ downstream.md with downstream.png, the terminal, the report's section
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.features.answers import NOTHING, ORIGINAL, WHOLE
from rankwise.files.document import Document
from rankwise.page import canvas
from rankwise.page.blocks import Block, Finding, Page, Plot, Table, Target, Words, drawn
from rankwise.page.text import clip, plural

DOWNSTREAM = Document(
    "downstream.json",
    "rankwise-downstream/1",
    "answers with approximated features",
    "rankwise features downstream",
    ("rows", "notes", "settings", "shapes"),
)
MARKDOWN, PICTURE = "downstream.md", "downstream.png"
HEADER = ("method", "rank", "feature error", "loss", "loss change", "KL", "same token", "answer right")
INVISIBLE = 1e-6  # KL below it is rounding; on a logarithmic axis it would take most of the room
Row = Mapping[str, Any]


def answer_page(content: Mapping[str, Any], target: Target | None) -> Page:
    """The page with its plot drawn into the target; without one it has none."""
    title = f"Answers of {content['model']['name']} with approximated features"
    return Page(title, on_what(content), lead=drawn(answer_blocks(content)[1:], target))


def answer_blocks(content: Mapping[str, Any]) -> list[Block]:
    """On what, the table, how to read it, notes."""
    caption = "How far the model's answers move when factors stand in for its features"
    return [
        Words(on_what(content)),
        Table(HEADER, [cells(row) for row in content["rows"]]),
        *(Words(line) for line in [*differences(content), *reading(content)]),
        *(Words(f"Note: {note}.") for note in content["notes"]),
        Plot("downstream", caption, partial(plot_downstream, content)),
    ]


def differences(content: Mapping[str, Any]) -> list[str]:
    """MLP, rank 4: KL 0.11 below that of the shared PCA [-0.15, -0.07]"""
    said = []
    for row in content.get("paired", ()):
        value, interval = row["kl_difference"], row["interval"]
        span = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
        compared = f"{abs(value):.4f} {'above' if value > 0 else 'below'} that of {row['against']} on the same rows"
        said.append(f"{row['method']}, rank {row['rank']}: KL {compared}{span}")
    return said


def on_what(content: Mapping[str, Any]) -> str:
    settings, shapes = content["settings"], content["shapes"]
    sizes = ", ".join(f"{tokens} × {channels}" for tokens, channels in shapes)
    return (
        f"{plural(settings['samples'], 'question')} about {plural(settings['pictures'], 'picture')}, "
        f"{plural(settings['answer_tokens'], 'answer token')}; features {sizes} (tokens × channels)"
    )


def reading(content: Mapping[str, Any]) -> list[str]:
    """What the columns are; each a sentence that stands alone."""
    return [
        "loss: of the right answer, nats per answer token; KL(original ‖ replaced): nats per answer token; "
        "same token: share of answer tokens at which the likeliest one is the original's; answer right: share of "
        "answers of which every token is the likeliest, each behind the right ones.",
        f"{WHOLE}: what rounding alone costs. {NOTHING}: each token's channels all at their mean. "
        "[…]: 95 % intervals over pictures.",
        f"shared PCA: {content['settings']['pca_basis']}.",
    ]


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text; what does not apply is blank."""
    error = "" if row["relative_error"] is None else f"{row['relative_error']:.4f}"
    plain = row["method"] == ORIGINAL
    change = "" if plain else spanned(row, "loss_change", "+.4f")
    kl = "" if plain else spanned(row, "kl", ".4f")
    agreement = "" if plain else f"{row['agreement']:.3f}"
    rank = "" if row["rank"] is None else str(row["rank"])
    right = spanned(row, "accuracy", ".3f")
    return row["method"], rank, error, f"{row['loss']:.4f}", change, kl, agreement, right


def spanned(row: Row, metric: str, form: str) -> str:
    """0.1234 [0.1000, 0.1500]; what these digits do not show is 0."""
    interval = row["intervals"].get(metric)
    span = f" [{shown(interval[0], form)}, {shown(interval[1], form)}]" if interval else ""
    return f"{shown(row[metric], form)}{span}"


def shown(value: float, form: str) -> str:
    text = f"{value:{form}}"
    return text if float(text) else "0"


# --- picture ---------------------------------------------------------------------------------------------------------


def plot_downstream(content: Mapping[str, Any], path: Path | str) -> Path:
    """KL and loss against rank, a line per method, a marker per network, both controls as horizontal lines."""
    rows = content["rows"]
    figure, (divergence, loss) = canvas.panels(9.6, 4.0, columns=2)
    draw(divergence, rows, "kl")
    draw(loss, rows, "loss")
    divergence.set_yscale("log")
    visible = [row["kl"] for row in rows if row["kl"] > INVISIBLE]
    if visible:
        divergence.set_ylim(min(visible) / 2, max(visible) * 2)
    canvas.name_axes(divergence, "rank", "nats per answer token", "KL from the model as it is")
    canvas.name_axes(loss, "rank", "nats per answer token", "Loss of the right answer")
    canvas.legend_outside(figure, "right upper", [loss])
    return canvas.save(figure, path)


def draw(axis: Any, rows: Sequence[Row], metric: str) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in (ORIGINAL, WHOLE, NOTHING)))
    ranks = sorted({row["rank"] for row in rows if row["method"] in methods})
    axis.set_xscale("log", base=2)
    learned = 0
    for index, method in enumerate(methods):
        curve = sorted((row for row in rows if row["method"] == method), key=lambda row: row["rank"])
        is_network = curve[0]["network"]
        learned += is_network
        # side by side, or intervals hide each other: baselines about the rank, networks to the right of it
        shift = 2 ** (0.1 + 0.12 * learned if is_network else 0.06 * (index - 1))
        draw_method(axis, curve, metric, shift, style(index, is_network))
    for row in rows:
        if row["method"] == NOTHING:
            axis.axhline(row[metric], color=canvas.GREY, linestyle="--", linewidth=1, label=NOTHING)
        if row["method"] == ORIGINAL and metric != "kl":
            axis.axhline(row[metric], color=canvas.INK, linewidth=1, label=ORIGINAL)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()


def draw_method(axis: Any, curve: Sequence[Row], metric: str, shift: float, look: Mapping[str, Any]) -> None:
    y = [max(row[metric], INVISIBLE / 100) for row in curve]
    error = canvas.error_bars(y, [row["intervals"].get(metric) for row in curve])
    x = [row["rank"] * shift for row in curve]
    name = clip(curve[0]["method"], 40) + (f", rank {curve[0]['rank']}" if curve[0]["network"] else "")
    axis.errorbar(x, y, yerr=error, label=name, capsize=2, linewidth=1.2, **look)


def style(index: int, network: bool) -> dict[str, Any]:
    """A network is a single open marker, a baseline a line."""
    line = canvas.LINES[index % len(canvas.LINES)]
    baseline = {"markersize": 4, "fillstyle": "full", "linestyle": line}
    return canvas.style(index) | ({"markersize": 7, "fillstyle": "none", "linestyle": ""} if network else baseline)


def read_answers(path: Path) -> Mapping[str, Any] | None:
    return DOWNSTREAM.read_own(path)


ANSWERS = Finding(DOWNSTREAM.name, ("features downstream",), read_answers, answer_blocks)
