"""A validation in words and pictures: the verdict, the ladder of each form, scores and what was taken for what.

validation.json ── summary ──▶ lines for the terminal · draw ──▶ plots · blocks ──▶ the report's section
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.device.parity.rungs import said, unmeasured
from rankwise.device.scores import FORMAT
from rankwise.errors import UsageError
from rankwise.evaluate.classify import plot_confusion
from rankwise.files.atomic import read_document
from rankwise.page.blocks import Block, Folded, Picture, Table, Words
from rankwise.page.text import align, is_number, memory, number, percent, printable

PARTS = ("outtype", "by_outtype", "parity", "verdict", "reference", "failures")
CONFUSION = "confusion_matrix"


def read_validation(path: Path) -> Mapping[str, Any]:
    return read_document(path, FORMAT, "a validation", PARTS)


def draw(content: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The plots of a validation in folder/plots, by name; none where matplotlib is missing or there are no classes."""
    if "confusion_matrix" not in content:
        return {}
    path = folder / "plots" / f"{CONFUSION}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return {CONFUSION: plot_confusion(content["labels"], content["confusion_matrix"], path, content["outtype"])}
    except UsageError as error:
        print(f"note: no plots: {error}")
        return {}


# --- terminal --------------------------------------------------------------------------------------------------------


def summary(content: Mapping[str, Any]) -> list[str]:
    """The verdict first, then a line for each form and a table of rungs."""
    lines = list(content["verdict"])
    lines += ["", *(f"  {form}: {form_line(facts)}" for form, facts in content["by_outtype"].items())]
    lines.append(f"  trained, in transformers: {form_line(content['reference'])}")
    if content.get("base"):
        lines.append(f"  before training: {form_line(content['base'])}")
    lines += gain_lines(content)
    if content["parity"]:
        rows = ladder_rows(content["parity"])
        lines += ["", *(f"  {line}" for line in align(rows, left=range(len(rows[0])), gap=3))]
        lines += [f"  {line}" for line in not_measured(content["parity"])]
    return lines


def form_line(facts: Mapping[str, Any]) -> str:
    """accuracy 86.0 % [77.9, 91.5] · macro F1 0.85 · by generation, n = 100 · 0.21 s, p95 0.30 s · 612 MiB"""
    parts = []
    if "accuracy" in facts:
        low, high = facts["interval"]
        parts.append(f"accuracy {100 * facts['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    if "macro_f1" in facts:
        parts.append(f"macro F1 {facts['macro_f1']:.3f}")
    parts += [f"{name} {number(value)}" for name, value in facts.get("metrics", {}).items()][:4]
    parts.append(f"by {facts.get('method', 'generation')}, n = {facts['n']}")
    if facts.get("unparsed"):
        parts.append(f"{facts['unparsed']} unparsed")
    if facts.get("latency"):
        parts.append(f"{facts['latency']['median']:.3f} s an item, p95 {facts['latency']['p95']:.3f} s")
    if facts.get("memory"):
        parts.append(memory(facts["memory"]))
    return " · ".join(parts)


def gain_lines(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for form, row in (content.get("against_reference") or {}).items():
        low, high = row["interval"]
        lines.append(
            f"  {form} against the trained model: {100 * row['difference']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}], {row['lost']} lost, {row['won']} won, McNemar p = {row['p']:.2g}"
        )
    for form, row in (content.get("gain") or {}).items():
        kept = f"{percent(row['kept'])} of training's gain" if row["kept"] is not None else f"undefined: {row['why']}"
        lines.append(f"  {form} keeps {kept}" if row["kept"] is not None else f"  gain kept by {form} is {kept}")
    return lines


# --- report ----------------------------------------------------------------------------------------------------------


def validation_blocks(content: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> list[Block]:
    """The verdict, the ladder, the scores, the confusion matrix, the classes."""
    found: list[Block] = [Words(printable(" ".join(content["verdict"]), 1500))]
    found += [Words("Failed: " + printable("; ".join(content["failures"]), 1500))] if content["failures"] else []
    if content["parity"]:
        header, *rows = ladder_rows(content["parity"])
        note = (
            "Each rung compares transformers with llama.cpp on the same items; the first broken one is the cause. "
            "Limits are k measured floors; above 10 they are weak: only large faults show."
        )
        found += [
            Table(header, rows, first_number=99, note=note),
            Folded("What each rung measured", measured_tables(content)),
        ]
    found += [score_table(content), *pictures]
    if lines := gain_lines(content):
        found.append(Words(printable(" · ".join(line.strip() for line in lines), 1500)))
    if "per_class" in content:
        found.append(class_table(content))
    if content.get("sweep"):
        found.append(sweep_table(content["sweep"]))
    return found


def sweep_table(swept: Mapping[str, Any]) -> Table:
    """Quantization types from the largest to the smallest, and which one to ship."""
    rows = []
    for form in swept["forms"]:
        low, high = form["interval"]
        against = form["against_reference"]
        rows.append(
            (
                printable(form["form"], 20),
                memory(form["bytes"]),
                f"{form['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
                f"{form['seconds_median']:.3f} s",
                memory(form["peak_memory"]) if form["peak_memory"] else "",
                against["verdict"] if against else "the largest",
            )
        )
    header = ("form", "size", "accuracy", "median latency", "peak memory with weights", "against the largest")
    return Table(header, rows, note=printable(swept["why"], 400))


def ladder_rows(parity: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rung, then its status for each quantization type."""
    names = [rung["name"] for rung in next(iter(parity.values()))["rungs"]]
    status = {form: {rung["name"]: said(rung) for rung in ladder["rungs"]} for form, ladder in parity.items()}
    return [("rung", *parity), *((name, *(status[form][name] for form in parity)) for name in names)]


def not_measured(parity: Mapping[str, Any]) -> list[str]:
    """Reasons, once for all forms."""
    return list(dict.fromkeys(line for ladder in parity.values() for line in unmeasured(ladder["rungs"])))


def measured_tables(content: Mapping[str, Any]) -> list[Block]:
    """Numbers of every rung of every form, with what they are held to, and the reasons."""
    tables: list[Block] = []
    for form, ladder in content["parity"].items():
        rows = []
        for rung in ladder["rungs"]:
            limits = {name: value for name, value in rung["threshold"].items() if value is not None}
            plain = {name: value for name, value in rung["measured"].items() if not isinstance(value, dict)}
            for name, value in plain.items():
                rows.append((rung["name"], name.replace("_", " "), cell(value), cell(limits.get(name))))
            if rung["why"]:
                rows.append((rung["name"], "why", printable(rung["why"], 400), ""))
        tables.append(Table((printable(form, 20), "", "measured", "at most"), rows, first_number=2))
    return tables


def cell(value: Any) -> str:
    if value is None:
        return ""
    if is_number(value):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else number(value)
    return printable(", ".join(map(cell, value)) if isinstance(value, list) else value, 80)


def score_table(content: Mapping[str, Any]) -> Table:
    columns = {**content["by_outtype"], "trained": content["reference"]}
    columns |= {"before training": content["base"]} if content.get("base") else {}
    names = [name for name in ("accuracy", "macro_f1", "unparsed", "n") if any(name in one for one in columns.values())]
    names += list(dict.fromkeys(name for one in columns.values() for name in one.get("metrics", {})))
    rows = [(name.replace("_", " "), *(score_cell(one, name) for one in columns.values())) for name in names]
    rows.append(("median latency", *(seconds(one) for one in columns.values())))
    rows.append(
        ("peak memory with weights", *(memory(one["memory"]) if one.get("memory") else "" for one in columns.values()))
    )
    baseline = content.get("majority_baseline")
    note = "All by greedy generation; in brackets Wilson's 95 % intervals."
    note += f" Always {baseline['label']}: accuracy {baseline['accuracy']:.3f}." if baseline else ""
    return Table(("", *columns), rows, note=printable(note, 200))


def score_cell(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name, facts.get("metrics", {}).get(name))
    if not is_number(value):
        return ""
    shown = f"{value:.3f}" if isinstance(value, float) else number(value)
    if name != "accuracy":
        return shown
    low, high = facts["interval"]
    return f"{shown} [{low:.3f}, {high:.3f}]"


def seconds(facts: Mapping[str, Any]) -> str:
    return f"{facts['latency']['median']:.3f} s" if facts.get("latency") else ""


def class_table(content: Mapping[str, Any]) -> Table:
    rows = [
        (
            printable(label, 40),
            *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1_score")),
            str(row["support"]),
        )
        for label, row in content["per_class"].items()
    ]
    note = f"{content['unparsed']} answers name no class; they count as wrong." if content["unparsed"] else ""
    return Table((f"{content['outtype']}, by class", "precision", "recall", "F1", "n"), rows, note=note)
