"""Answer quality with approximated features, as a table and a plot, from downstream.json.

content ── markdown ──▶ downstream.md, and the terminal's table · plot_downstream ──▶ downstream.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.features.answers import NOTHING, ORIGINAL, WHOLE
from rankwise.page import canvas
from rankwise.page.canvas import GREY, INK, name_axes, new_figure, save
from rankwise.page.text import align, clip, plural

FORMAT = "rankwise-downstream/1"
JSON, MARKDOWN, PICTURE = "downstream.json", "downstream.md", "downstream.png"
HEADER = ("method", "rank", "feature error", "loss", "loss change", "KL", "same token", "answer right")
RIGHT_ALIGNED = 1  # the first column that holds numbers
INVISIBLE = 1e-6  # KL below it is rounding; on a logarithmic axis it would take most of the room
Row = Mapping[str, Any]


def markdown(content: Mapping[str, Any]) -> str:
    """The whole page: on what, the table, how to read it, notes."""
    lines = [f"# Answers of {content['model']['name']} with approximated features", "", on_what(content), ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|{' --- |' * RIGHT_ALIGNED}{' ---: |' * (len(HEADER) - RIGHT_ALIGNED)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells(row))} |" for row in content["rows"]]
    lines += ["", *(f"- {line}" for line in differences(content))] if content["paired"] else []
    lines += ["", *reading(content)]
    lines += ["", *(f"- {note}" for note in content["notes"])] if content["notes"] else []
    return "\n".join(lines) + "\n"


def terminal(content: Mapping[str, Any]) -> list[str]:
    """The same for a terminal: aligned columns."""
    table = align([HEADER, *(cells(row) for row in content["rows"])], left=range(RIGHT_ALIGNED), gap=3)
    lines = [on_what(content), "", *(f"  {line}" for line in table)]
    return [*lines, "", *differences(content), *([""] if content["paired"] else []), *reading(content)]


def differences(content: Mapping[str, Any]) -> list[str]:
    """MLP, rank 4: KL 0.11 below that of the shared PCA [-0.15, -0.07]"""
    lines = []
    for row in content["paired"]:
        value, interval = row["kl_difference"], row["interval"]
        span = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
        compared = f"{abs(value):.4f} {'above' if value > 0 else 'below'} that of {row['against']} on the same rows"
        lines.append(f"{row['method']}, rank {row['rank']}: KL {compared}{span}")
    return lines


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
    figure, axes = new_figure(9.6, 4.0, columns=2)
    divergence, loss = axes[0]
    draw(divergence, rows, "kl")
    draw(loss, rows, "loss")
    divergence.set_yscale("log")
    visible = [row["kl"] for row in rows if row["kl"] > INVISIBLE]
    if visible:
        divergence.set_ylim(min(visible) / 2, max(visible) * 2)
    name_axes(divergence, "rank", "nats per answer token", "KL from the model as it is")
    name_axes(loss, "rank", "nats per answer token", "Loss of the right answer")
    found, labels = loss.get_legend_handles_labels()
    figure.legend(found, labels, loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, path)


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
            axis.axhline(row[metric], color=GREY, linestyle="--", linewidth=1, label=NOTHING)
        if row["method"] == ORIGINAL and metric != "kl":
            axis.axhline(row[metric], color=INK, linewidth=1, label=ORIGINAL)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()


def draw_method(axis: Any, curve: Sequence[Row], metric: str, shift: float, look: Mapping[str, Any]) -> None:
    y = [max(row[metric], INVISIBLE / 100) for row in curve]
    reach = [row["intervals"].get(metric, (value, value)) for row, value in zip(curve, y, strict=True)]
    error = [
        [max(0.0, value - low) for value, (low, _) in zip(y, reach, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(y, reach, strict=True)],
    ]
    x = [row["rank"] * shift for row in curve]
    name = clip(curve[0]["method"], 40) + (f", rank {curve[0]['rank']}" if curve[0]["network"] else "")
    axis.errorbar(x, y, yerr=error, label=name, capsize=2, linewidth=1.2, **look)


def style(index: int, network: bool) -> dict[str, Any]:
    """A network is a single open marker, a baseline a line."""
    line = canvas.LINES[index % len(canvas.LINES)]
    baseline = {"markersize": 4, "fillstyle": "full", "linestyle": line}
    return canvas.style(index) | ({"markersize": 7, "fillstyle": "none", "linestyle": ""} if network else baseline)
