"""A labelled data set: a folder of pictures, each with its class, as `rankwise label` writes it (or you do).

    task.json                  the classes and what the student is asked
    train.jsonl, val.jsonl     {"image_id", "image_path", "element": "fire", "reason": …} a line; `element` is the
    images/*.png               task's own field

Pictures of one content are one group, the class is the stratum. The reason never stands in the prompt: it names the
answer, and a device has none. With `aux_reason` it is the answer to a second question, so that the label stays a bare
word with its end token behind it and is compared with other labels exactly as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.label_answer import label_called
from rankwise.data.label_task import LabelTask, read_task
from rankwise.data.sources.rows import BadRow, RowFile, json_rows, samples, text_of
from rankwise.files.adapter import TASK

WHY = "Why?"


def read(source: RowFile) -> Iterator[Example]:
    """One sample per row, named by its image_id. The task is read from the folder of the rows."""
    task = task_of(source)
    return samples(source, json_rows(source), partial(_example, task, source.how.aux_reason), id_key="image_id")


def task_of(source: RowFile) -> LabelTask:
    """The task of the rows' folder; it is part of what was read."""
    task = read_task(source.path.parent)
    source.companions.append(source.path.parent / TASK)
    return task


def _example(task: LabelTask, aux_reason: bool, identity: str, row: dict[str, Any]) -> Example:
    given = row.get(task.field)
    label = label_called(given, task.labels) if isinstance(given, str) else None
    if label is None:
        raise BadRow(f"{task.field} must be {', '.join(task.labels)} ({TASK}), found {given!r:.60}")
    image = text_of(row, "image_path")
    turns = [Turn("user", f"{IMAGE_SLOT}\n{task.student_prompt}"), Turn("assistant", label)]
    if aux_reason:
        turns += [Turn("user", WHY), Turn("assistant", text_of(row, "reason"))]
    return Example(
        id=identity,
        group=str(row.get("image_sha256") or image),
        turns=tuple(turns),
        references=(label,),
        stratum=label,
        images=(image,),
        facts={"label": label, "labels": task.labels, **sources_of(row)},
    )


def sources_of(row: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The original of the picture, where the data set keeps it."""
    return {} if row.get("source_path") is None else {"sources": (text_of(row, "source_path"),)}
