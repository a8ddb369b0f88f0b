"""The first images of `label`: what the teacher says of them and what that costs, before it is asked about the rest."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.data.teacher.answers import Verdict
from rankwise.data.teacher.ledger import AnswerLedger, Entry
from rankwise.errors import Interrupted
from rankwise.page.text import plural


@dataclass(frozen=True)
class Trial:
    """Verdicts on a few images with the answers behind them; rest: how many images are left to ask about, about."""

    verdicts: Sequence[Verdict]
    entries: dict[str, list[Entry]]
    rest: int
    budget: float | None

    def lines(self) -> list[str]:
        """The trial for people: image, answer, tokens, price; then what the rest will cost at that price."""
        lines = [f"trial: {plural(len(self.verdicts), 'image')}"]
        width = max(len(verdict.image_id) for verdict in self.verdicts)
        for verdict in self.verdicts:
            entries = self.entries[verdict.image_id]
            lines.append(f"  {verdict.image_id:<{width}}  {said(verdict)}  ({cost(entries)})")
        everything = [entry for entries in self.entries.values() for entry in entries]
        usd = [entry.usd for entry in everything if entry.usd is not None]
        left = f"the rest: about {plural(self.rest, 'image')}"
        if usd and len(usd) == len(everything):
            left += f", ${sum(usd) / len(self.verdicts) * self.rest:.2f} at this price"
        limit = "no budget: no prices are known" if self.budget is None else f"--budget_usd {self.budget:.2f}"
        return [*lines, f"{left} ({limit})"]


def said(verdict: Verdict) -> str:
    if verdict.content is None:
        return f"no label: {verdict.problem}"
    return f"{max(set(verdict.votes), key=verdict.votes.count)} {verdict.confidence:.2f}"


def cost(entries: Sequence[Entry]) -> str:
    """Tokens and dollars of the answers to one image."""
    if not entries:
        return "no answer"
    counts = [(entry.reply.input_tokens, entry.reply.output_tokens) for entry in entries]
    if any(None in pair for pair in counts):
        tokens = "tokens not told"
    else:
        tokens = f"{sum(pair[0] or 0 for pair in counts)} + {sum(pair[1] or 0 for pair in counts)} tokens"
    usd = [entry.usd for entry in entries]
    return tokens if None in usd else f"{tokens}, ${sum(each or 0 for each in usd):.4f}"


def remaining(verdicts: Sequence[Verdict], kept: int, wanted: int, there: int) -> int:
    """How many more images will be asked about, if as large a share of them is kept."""
    share = kept / len(verdicts) if kept else 1 / len(verdicts)
    return min(there - len(verdicts), math.ceil((wanted - kept) / share))


def is_due(size: int, wanted: int, there: int, ledger: AnswerLedger, asker_key: tuple[str, str]) -> bool:
    """Whether a trial of this size comes first: not where no more is wanted, and not where a run went past it."""
    asked = {entry.key.image for entry in ledger.entries if (entry.key.task, entry.key.model) == asker_key}
    return 0 < size < min(wanted, there) and len(asked) <= size


def ask_to_go_on(yes: bool) -> None:
    """A question at a terminal; scripts and runs in the background go on. Interrupted where the answer is no."""
    if yes or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        answer = input("ask about the rest? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().casefold() not in ("y", "yes"):
        raise Interrupted("stopped after the trial", signal.SIGINT)
