"""The report's examples: images with their question, reference and every result's answer.

predictions.jsonl (question, images) + the image folder of evaluation_results.json ──▶ thumbnails ──▶ Gallery
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from rankwise.data.images import BadImage, ImageReader
from rankwise.evaluate.answers import is_right
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import atomic_write
from rankwise.page.blocks import Answer, Block, Folded, Gallery, Picture, Plot, Shot, SideBySide, Table
from rankwise.page.text import metric_name, number, plural, printable, score, with_interval
from rankwise.pipeline.table import imported
from rankwise.report.contents import Scored
from rankwise.train.loss_plots import plot_scores, shared_metrics

MOST_SHOTS = 12
THUMBNAIL = 192  # pixels of the longer side: sharp at 128 CSS pixels, and twelve of them stay below a megabyte
MOST_WORDS = 100  # characters of a question or an answer
NOTHING = "(nothing)"
MARKED = "exact_match"  # a task with this metric has right and wrong answers


def gallery(results: Sequence[Scored], run: Path, folder: Path) -> Gallery | None:
    """Pictures that every result of a task has answered, their thumbnails written into `folder`.

    They are spread evenly over the file: its order is that of the work, which puts like questions together.

    None where the items have no pictures. A picture that cannot be read is left out, and the note says how many.
    """
    answered = [one for one in results if one.predictions]
    source = next((one for one in answered if "image_folder" in one.result.settings), None)
    if source is None:
        return None
    reader = ImageReader(run / source.folder / str(source.result.settings["image_folder"]))
    seen = {key: row for key, row in source.predictions.items() if pictures_of(row)}
    ids = spread([key for key in seen if all(key in one.predictions for one in answered)])
    shots, lost = [], []
    for index, key in enumerate(ids):
        path = folder / f"seen_{source.result.task}_{index:02d}.png"
        try:
            picture = thumbnail(reader, seen[key], path)
        except BadImage as reason:
            lost.append(str(reason))
        else:
            shots.append(shot(picture, key, seen[key], answered))
    return Gallery(shots, note(len(ids), len(seen), lost)) if ids else None


def spread(ids: Sequence[str]) -> list[str]:
    """Up to `MOST_SHOTS` of them, the first one and others at equal distances."""
    step = max(1.0, len(ids) / MOST_SHOTS)
    return [ids[int(number * step)] for number in range(min(len(ids), MOST_SHOTS))]


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    images = row.get("images")
    return [image for image in images if isinstance(image, str)] if isinstance(images, list) else []


def thumbnail(reader: ImageReader, row: Mapping[str, Any], path: Path) -> Picture:
    """The row's first picture, made smaller where it is large."""
    references = pictures_of(row)
    image = reader.open(references[0])
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())
    more = f" (the first of {len(references)})" if len(references) > 1 else ""
    return Picture(path, printable(references[0], 80) + more)


def shot(picture: Picture, key: str, row: Mapping[str, Any], results: Sequence[Scored]) -> Shot:
    references = [str(text) for text in row.get("references") or [""]]
    asked = printable(row.get("question", row.get("prompt", key)), MOST_WORDS)
    given = [answer(one, str(one.predictions[key].get("prediction", "")), references) for one in results]
    return Shot(picture, asked, [Answer("reference", printable(references[0], MOST_WORDS)), *given])


def answer(one: Scored, text: str, references: Sequence[str]) -> Answer:
    right = None
    if MARKED in one.result.metrics:
        right = is_right(one.result.task, text, references)
    return Answer(printable(one.label, 40), printable(text, MOST_WORDS).strip() or NOTHING, right)


def note(shown: int, count: int, lost: Sequence[str]) -> str:
    said = f"{shown} pictures of {count}, spread evenly over the file and not chosen." if shown < count else ""
    if lost:
        said += f"{' ' if said else ''}{plural(len(lost), 'picture')} could not be read: {printable(lost[0], 200)}."
    return said


MOST_EXAMPLES = 3
INTERVALS = (
    "In brackets: 95 % intervals, Wilson's of shares, a bootstrap's of the rest; none where all items score alike."
)


def score_blocks(results: Sequence[Scored], seen: Gallery | None = None) -> list[Block]:
    """The bars, one table of all results of a task, and the first items side by side: with their pictures, if any."""
    metrics = dict.fromkeys(name for one in results for name in (*one.result.metrics, *one.result.unavailable))
    rows = [[metric_name(name), *(score_cell(one.result, name) for one in results)] for name in metrics]
    rows.append(["items", *(number(one.result.n) for one in results)])
    notes = [INTERVALS] if any(one.result.intervals for one in results) else []
    notes += [f"Labels by {method}." for method in dict.fromkeys(one.result.method for one in results) if method]
    reasons = dict.fromkeys(
        f"{metric_name(name)}: {why.rstrip('.')}." for one in results for name, why in one.result.unavailable.items()
    )
    table = Table(("", *(one.label for one in results)), rows, note=" ".join([*notes, *reasons]))
    shown = [seen] if seen else examples(results)
    return [*bars(results), table, *confusions(results), *types(results), *shown]


def bars(results: Sequence[Scored]) -> list[Block]:
    if not shared_metrics(one.result for one in results):
        return []
    caption = "Scores with 95 % intervals, each metric on its own scale"
    return [Plot("scores", caption, partial(plot_scores, {one.label: one.result for one in results}))]


def types(results: Sequence[Scored]) -> list[Block]:
    """Exact match by type of item, where the rows have types: one column a result."""
    found = [one.result.settings.get("scoring", {}).get("by_type") for one in results]
    if not all(isinstance(one, dict) for one in found):
        return []
    names = dict.fromkeys(name for one in found for name in one)
    rows = [[name, *(score(one[name][MARKED]) if name in one else "" for one in found)] for name in names]
    return [Table(("exact match of", *(one.label for one in results)), rows)]


def confusions(results: Sequence[Scored]) -> list[Block]:
    """What each classification took for what."""
    found: list[Block] = []
    for one in results:
        details = one.result.settings.get("scoring")
        if isinstance(details, dict) and "confusion" in details:
            head, *rows = imported("rankwise.evaluate.classify").confusion_table(details)
            found.append(Folded(f"What was taken for what · {one.label}", [Table(head, rows)]))
    return found


def score_cell(result: EvaluationResult, metric: str) -> str:
    value = result.metrics.get(metric)
    if value is None:
        return "not measured"
    return with_interval(value, result.intervals.get(metric))


def examples(results: Sequence[Scored]) -> list[Block]:
    """The first items that every result has answered: not the best ones."""
    answered = [one for one in results if one.predictions]
    if not answered:
        return []
    ids = [key for key in answered[0].predictions if all(key in one.predictions for one in answered)]
    items = [example(key, answered) for key in ids[:MOST_EXAMPLES]]
    return [SideBySide(items, "The first items of the file, not chosen.")] if items else []


def example(key: str, results: Sequence[Scored]) -> list[tuple[str, str]]:
    row = results[0].predictions[key]
    references = row.get("references")
    parts = [("input", row.get("prompt")), ("reference", references[0] if isinstance(references, list) else references)]
    parts += [(one.label, one.predictions[key].get("prediction")) for one in results]
    return [(printable(title, 40), printable(text)) for title, text in parts if text is not None]
