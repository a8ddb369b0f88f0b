"""The part of a report that is about scores: one table a task, what was taken for what, the first items."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.evaluate.classify import confusion_table
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.page.blocks import Block, Examples, Folded, Gallery, Picture, Table
from rankwise.page.text import metric_name, number, printable, score
from rankwise.show.contents import Scored
from rankwise.show.gallery import MARKED

MOST_EXAMPLES = 3
INTERVALS = (
    "In brackets: 95 % intervals, Wilson's of shares, a bootstrap's of the rest; none where all items score alike."
)


def score_blocks(results: Sequence[Scored], pictures: Sequence[Picture], seen: Gallery | None = None) -> list[Block]:
    """One table of all results of a task, the bars, and the first items side by side: with their pictures, if any."""
    metrics = dict.fromkeys(name for one in results for name in (*one.result.metrics, *one.result.unavailable))
    rows = [[printable(metric_name(name), 40), *(score_cell(one.result, name) for one in results)] for name in metrics]
    rows.append(["items", *(number(one.result.n) for one in results)])
    notes = [INTERVALS] if any(one.result.intervals for one in results) else []
    notes += [f"Labels by {method}." for method in dict.fromkeys(one.result.method for one in results) if method]
    reasons = dict.fromkeys(
        f"{metric_name(name)}: {why.rstrip('.')}." for one in results for name, why in one.result.unavailable.items()
    )
    header = ("", *(printable(one.label, 40) for one in results))
    table = Table(header, rows, note=printable(" ".join([*notes, *reasons])))
    shown = [seen] if seen else examples(results)
    return [*pictures, table, *confusions(results), *types(results), *shown]


def types(results: Sequence[Scored]) -> list[Block]:
    """Exact match by type of item, where the rows have types: one column a result."""
    found = [one.result.settings.get("scoring", {}).get("by_type") for one in results]
    if not all(isinstance(one, dict) for one in found):
        return []
    names = dict.fromkeys(name for one in found for name in one)
    rows = [
        [printable(name, 40), *(score(one[name][MARKED]) if name in one else "" for one in found)] for name in names
    ]
    return [Table(("exact match of", *(printable(one.label, 40) for one in results)), rows)]


def confusions(results: Sequence[Scored]) -> list[Block]:
    """What each classification took for what."""
    found: list[Block] = []
    for one in results:
        details = one.result.settings.get("scoring")
        if isinstance(details, dict) and "confusion" in details:
            head, *rows = confusion_table(details)
            table = Table(
                tuple(printable(name, 40) for name in head), [[printable(cell, 40) for cell in row] for row in rows]
            )
            found.append(Folded(f"What was taken for what · {printable(one.label, 40)}", [table]))
    return found


def score_cell(result: EvaluationResult, metric: str) -> str:
    value = result.metrics.get(metric)
    if value is None:
        return "not measured"
    interval = result.intervals.get(metric)
    return score(value) + (f" [{score(interval[0])}, {score(interval[1])}]" if interval else "")


def examples(results: Sequence[Scored]) -> list[Block]:
    """The first items that every result has answered: not the best ones."""
    answered = [one for one in results if one.predictions]
    if not answered:
        return []
    ids = [key for key in answered[0].predictions if all(key in one.predictions for one in answered)]
    items = [example(key, answered) for key in ids[:MOST_EXAMPLES]]
    return [Examples(items, "The first items of the file, not chosen.")] if items else []


def example(key: str, results: Sequence[Scored]) -> list[tuple[str, str]]:
    row = results[0].predictions[key]
    references = row.get("references")
    parts = [("input", row.get("prompt")), ("reference", references[0] if isinstance(references, list) else references)]
    parts += [(one.label, one.predictions[key].get("prediction")) for one in results]
    return [(printable(title, 40), printable(text)) for title, text in parts if text is not None]
