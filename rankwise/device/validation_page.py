"""A validation in words and pictures: the verdict, the ladder of each form, scores and what was taken for what.

validation.json ── validation_blocks ──▶ terminal (summary), plots (draw), the report's section
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.device.parity.rungs import BROKEN, said, unmeasured
from rankwise.device.scores import DOCUMENT
from rankwise.evaluate.classify import class_table, plot_confusion
from rankwise.page.blocks import Block, Finding, Folded, Plot, Table, Words, drawn, into, lines, pictures
from rankwise.page.canvas import drawable
from rankwise.page.text import is_number, memory, number, percent, printable, with_interval
from rankwise.pipeline.table import imported

CONFUSION = "confusion_matrix"
LORAS = "rankwise.device.lora.page"  # imported only where a validation has some


def draw(content: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The plots of a validation in folder/plots, by name; none where matplotlib is missing or there are no classes."""
    if CONFUSION not in content or not drawable("the confusion matrix is"):
        return {}
    return pictures(drawn(validation_blocks(content), into(folder / "plots")))


def summary(content: Mapping[str, Any]) -> list[str]:
    """The lines of the terminal."""
    return lines(validation_blocks(content))


def validation_blocks(content: Mapping[str, Any]) -> list[Block]:
    """The verdict, the ladder, the scores, the confusion matrix, the classes."""
    parity = content["parity"]
    found: list[Block] = [Words(line) for line in content["verdict"]]
    more = failures_beside(content)
    found += [Words("Failed: " + "; ".join(more))] if more else []
    found += ladder_blocks(parity) if parity else []
    if content.get("adapters"):
        found += imported(LORAS).lora_blocks(content["adapters"], parity)
    found += [score_table(content), *(Words(line) for line in gain_sentences(content))]
    if CONFUSION in content:
        name = printable(content["outtype"], 20)
        draw = partial(plot_confusion, content["labels"], content[CONFUSION], title=name)
        found.append(Plot(CONFUSION, "What was taken for what: rows are true classes, columns answers", draw))
    if "per_class" in content:
        rows = {label: in_percent(row) for label, row in content["per_class"].items()}
        details = {"by_class": rows, "unparsed": content["unparsed"]}
        found.append(class_table(details, f"{content['outtype']}, by class"))
    if content.get("sweep"):
        found.append(sweep_table(content["sweep"]))
    return found


def failures_beside(content: Mapping[str, Any]) -> list[str]:
    """Those whose reason the verdict does not tell."""
    verdict = "\n".join(content["verdict"])
    rungs = [rung for ladder in content["parity"].values() for rung in ladder["rungs"] if rung["status"] == BROKEN]
    told = [rung["why"] for rung in rungs if rung["why"] in verdict]
    return [line for line in content["failures"] if line not in verdict and not any(why in line for why in told)]


def ladder_blocks(parity: Mapping[str, Any]) -> list[Block]:
    """Rungs of every quantization type, those that were not measured, and what each measured."""
    names = [rung["name"] for rung in next(iter(parity.values()))["rungs"]]
    status = {form: {rung["name"]: said(rung) for rung in ladder["rungs"]} for form, ladder in parity.items()}
    rows = [(name, *(status[form][name] for form in parity)) for name in names]
    note = (
        "Each rung compares transformers with llama.cpp on the same items; the first broken one is the cause. "
        "Limits are k measured floors; above 10 they are weak: only large faults show."
    )
    missing = dict.fromkeys(line for ladder in parity.values() for line in unmeasured(ladder["rungs"]))
    return [
        Table(("rung", *parity), rows, first_number=len(rows[0]), note=note),
        *(Words(line) for line in missing),
        Folded("What each rung measured", measured_tables(parity)),
    ]


def gain_sentences(content: Mapping[str, Any]) -> list[str]:
    """Each quantization type against the trained model, and how much of training's gain it keeps."""
    found = []
    for form, row in (content.get("against_reference") or {}).items():
        low, high = row["interval"]
        found.append(
            f"{form} against the trained model: {100 * row['difference']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}], {row['lost']} lost, {row['won']} won, McNemar p = {row['p']:.2g}"
        )
    for form, row in (content.get("gain") or {}).items():
        undefined = f"gain kept by {form} is undefined: {row['why']}"
        found.append(undefined if row["kept"] is None else f"{form} keeps {percent(row['kept'])} of training's gain")
    return found


def sweep_table(swept: Mapping[str, Any]) -> Table:
    """Quantization types from the largest to the smallest, and which one to ship. swept: content of `sweep.json`."""
    rows = []
    for form in swept["forms"]:
        rows.append(
            (
                form["form"],
                f"{form['bytes'] / 1e6:,.1f} MB",
                with_interval(form["accuracy"], form["interval"], in_points),
                f"{form['seconds_median']:.3f} s",
                f"{form['seconds_p95']:.3f} s",
                f"{form['peak_memory'] / 1e6:,.0f} MB" if form["peak_memory"] else "",
                beside_largest(form["against_reference"]),
            )
        )
    header = ("form", "size", "accuracy, %", "median latency", "p95", "peak memory with weights", "against the largest")
    return Table(header, rows, note=". ".join([swept["why"], *matrix_sentences(swept.get("imatrix"))]))


def matrix_sentences(imatrix: Mapping[str, Any] | None) -> list[str]:
    """What the quantization types were weighed with."""
    return [f"Made with an importance matrix ({'; '.join(imatrix['datasets'])})"] if imatrix else []


def beside_largest(against: Mapping[str, Any] | None) -> str:
    if not against:
        return "the largest"
    span = f"{100 * against['low']:+.1f} to {100 * against['high']:+.1f} points"
    return f"{against['verdict']} ({span}; {against['lost']} lost, {against['won']} won)"


def in_points(share: float) -> str:
    return f"{100 * share:.1f}"


def in_percent(row: Mapping[str, Any]) -> dict[str, float]:
    """A class of validation.json, in shares, as `evaluate` has it."""
    keys = {"precision": "precision", "recall": "recall", "f1": "f1_score"}
    return {**{name: 100 * row[key] for name, key in keys.items()}, "n": row["support"]}


def measured_tables(parity: Mapping[str, Any]) -> list[Block]:
    """Numbers of every rung of every form, with what they are held to, and the reasons."""
    tables: list[Block] = []
    for form, ladder in parity.items():
        rows = []
        for rung in ladder["rungs"]:
            limits = {name: value for name, value in rung["threshold"].items() if value is not None}
            plain = {name: value for name, value in rung["measured"].items() if not isinstance(value, dict)}
            for name, value in plain.items():
                rows.append((rung["name"], name.replace("_", " "), cell(value), cell(limits.get(name))))
            if rung["why"]:
                rows.append((rung["name"], "why", rung["why"], ""))
        tables.append(Table((form, "", "measured", "at most"), rows, first_number=2))
    return tables


def cell(value: Any) -> str:
    if value is None:
        return ""
    if is_number(value):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else number(value)
    return ", ".join(map(cell, value)) if isinstance(value, list) else str(value)


def score_table(content: Mapping[str, Any]) -> Table:
    columns = {**content["by_outtype"], "trained": content["reference"]}
    columns |= {"before training": content["base"]} if content.get("base") else {}
    names = [name for name in ("accuracy", "macro_f1", "unparsed") if any(name in one for one in columns.values())]
    names += list(dict.fromkeys(name for one in columns.values() for name in one.get("metrics", {})))
    rows = [(name.replace("_", " "), *(score_cell(one, name) for one in columns.values())) for name in names]
    rows += [
        ("items", *(f"{one['n']} by {one.get('method', 'generation')}" for one in columns.values())),
        ("latency, median and p95", *(latency(one) for one in columns.values())),
        ("peak memory with weights", *(memory(one["memory"]) if one.get("memory") else "" for one in columns.values())),
    ]
    baseline = content.get("majority_baseline")
    note = "Greedy generation; in brackets Wilson's 95 % intervals."
    note += f" Always {baseline['label']}: accuracy {baseline['accuracy']:.3f}." if baseline else ""
    return Table(("", *columns), rows, note=note)


def score_cell(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name, facts.get("metrics", {}).get(name))
    if not is_number(value):
        return ""
    if name == "accuracy":
        return with_interval(value, facts["interval"], in_points).replace(" ", " % ", 1)
    return f"{value:.3f}" if isinstance(value, float) else number(value)


def latency(facts: Mapping[str, Any]) -> str:
    return "{median:.3f} s, {p95:.3f} s".format(**facts["latency"]) if facts.get("latency") else ""


VALIDATION = Finding(DOCUMENT.name, ("validate",), DOCUMENT.read, validation_blocks)
