"""What `label` records of its teacher, in label.json and quarantine.jsonl, and says of a ledger before it is used."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankwise.data.label_task import LabelTask
from rankwise.data.teacher.answers import Verdict
from rankwise.data.teacher.asking import Question
from rankwise.data.teacher.ledger import AnswerLedger
from rankwise.data.teacher.votes import agreement
from rankwise.files.atomic import write_text
from rankwise.options.label import TeacherSection

QUARANTINE = "quarantine.jsonl"
MENTIONED = 3


def teacher_facts(
    section: TeacherSection, model: str, question: Question, ledger: AnswerLedger, address: str
) -> dict[str, Any]:
    served_by = {entry.reply.served_by for entry in ledger.entries if entry.key.model == model}
    return {
        "model": model,
        "served_by": sorted(name for name in served_by if name),
        "service": "loopback: labels by colours alone" if section.loopback_teacher else address,
        "detail": section.detail,
        "response_format": section.response_format,
        "temperature": section.temperature,
        "votes": section.votes,
        "question_sha256": question.digest,
        "bad_ledger_lines": ledger.bad,
    }


def agreement_facts(verdicts: Iterable[Verdict], task: LabelTask, votes: int) -> dict[str, Any] | None:
    """Over the images whose votes are all there; None for one vote."""
    whole = [verdict.votes for verdict in verdicts if len(verdict.votes) == votes]
    found = agreement(whole, task.labels)
    return found.as_dict() if found else None


def save_quarantine(
    folder: Path, verdicts: Iterable[Verdict], digests: dict[str, str], ledger: AnswerLedger, question: Question
) -> Path:
    """The images without a label, with all that was answered to this question. digests: of the pixels, by image id."""
    said: dict[str, list[str]] = {}
    for entry in ledger.entries:
        if entry.key.task == question.digest:
            said.setdefault(entry.key.image, []).append(entry.reply.refusal or entry.reply.text)
    rows = [
        {"image_id": verdict.image_id, "problem": verdict.problem, "answers": said.get(digests[verdict.image_id], [])}
        for verdict in verdicts
        if verdict.content is None
    ]
    return write_text(folder / QUARANTINE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tell_of_ledger(ledger: AnswerLedger, question: Question, model: str, address: str, again: bool) -> None:
    """What stands in the ledger and is not what it seems, before anything is asked."""
    for line in ledger.bad[:MENTIONED]:
        _warn(f"{ledger.path}, {line}: not an answer of a teacher; it stays there, and is not used")
    if len(ledger.bad) > MENTIONED:
        _warn(f"{ledger.path}: {len(ledger.bad) - MENTIONED} more lines are no answers")
    if ledger.faults:
        _warn(f"{ledger.path}: {ledger.faults} error pages, stored as answers by an earlier version, are asked again")
    asked = [entry for entry in ledger.entries if (entry.key.task, entry.key.model) == (question.digest, model)]
    for other, count in Counter(entry.address for entry in asked).items():
        if other not in (None, address) and not again:
            advice = "--ask_again asks for them anew"
            _warn(f"{ledger.path}: {count} answers of {model} are of {other}, and count for {address}; {advice}")


def reason_for_nothing(verdicts: Sequence[Verdict], min_confidence: float) -> str:
    """Why no image of those asked about was kept."""
    unusable = [verdict for verdict in verdicts if not verdict.votes]
    tied = [verdict for verdict in verdicts if verdict.votes and verdict.content is None]
    unsure = [verdict.confidence for verdict in verdicts if verdict.content is not None]
    reasons = []
    if unusable:
        last = unusable[-1]
        reasons.append(f"{len(unusable)} got no usable answer (the last, {last.image_id}: {last.problem})")
    if tied:
        reasons.append(f"{len(tied)} got votes that tie")
    if unsure:
        reasons.append(
            f"{len(unsure)} got a confidence below --min_confidence {min_confidence} (the highest: {max(unsure):.2f})"
        )
    return "; ".join(reasons)


def _warn(text: str) -> None:
    print(f"rankwise: {text}", file=sys.stderr)
