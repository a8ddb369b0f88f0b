"""A study in sentences: what its verdicts say, in the terminal and on the page alike.

All of it takes the content of study.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.page.text import number, plural

FORMAT = "rankwise-study/1"
PARTS = ("verdicts", "assay", "arms", "differences", "tuning", "seeds", "data", "notes", "registration")
Study = Mapping[str, Any]


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def shown_interval(row: Mapping[str, Any]) -> str:
    return f"{signed(row['estimate'])} [{signed(row['low'])}, {signed(row['high'])}]"


def place(row: Mapping[str, Any], study: Study) -> str:
    """Budget and way of training, as far as the study has several of them."""
    schedulers = {each["scheduler"] for each in study["arms"]}
    parts = [row["budget"]] if row["budget"] else []
    return ", ".join(parts + ([row["scheduler"]] if len(schedulers) > 1 else [])) or "all weights"


def verdict_sentence(row: Mapping[str, Any], study: Study) -> str:
    """One contrast in words, with the difference in nats per token and its 95 % interval."""
    first, second, where = row["first"], row["second"], place(row, study)
    if row["verdict"] == "diverged":
        return f"{where}: {first} and {second} cannot be compared: fewer than two seeds of both stayed finite."
    difference = f"{shown_interval(row)} {study['metric'].replace('answer ', '')}"
    chance = f"p {row['p_difference']:.2g} after Holm"
    if row["verdict"] == "equivalent":
        return f"{where}: {first} and {second} are equivalent within {study['smallest_effect']:g}: {difference}."
    if row["verdict"] in ("better", "worse"):
        return f"{where}: {first} is {row['verdict']} than {second}: {difference}, {chance}."
    more = row["more_seeds"]
    needed = f"about {plural(more, 'more seed')}" if more else "more test items; more seeds alone would not decide it"
    return f"{where}: {first} vs {second} is undecided: {difference}, {chance}. It takes {needed}."


def assay_sentence(row: Mapping[str, Any], study: Study) -> str:
    """Whether the bad plan did harm; where not, no verdict about plans means anything on this task."""
    against = ", ".join(f"{shown_interval(effect)} against {name}" for name, effect in row["against"].items())
    where = place(row, study)
    if row["works"]:
        return f"{where}: the task tells plans apart: {row['arm']} is worse ({against})."
    return f"{where}: this task cannot tell plans apart: {row['arm']} is not worse ({against})."


def deviation_sentence(row: Mapping[str, Any]) -> str:
    changed = "; ".join(f"{name} {before!r} → {after!r}" for name, (before, after) in row.get("changed", {}).items())
    what = f"test read again (first on {row['test_read_again']})" if "test_read_again" in row else changed
    known = f"{plural(row['runs_finished'], 'run')} finished, test {'was' if row['test_was_read'] else 'not'} read"
    return f"Deviation of {row['time']}: {what}. Why: {row['why']} ({known})."


def study_lines(study: Study) -> list[str]:
    """The terminal's last lines: verdicts first, then what they stand on."""
    registration = study["registration"]
    return [
        *(f"  {verdict_sentence(row, study)}" for row in study["verdicts"]),
        *(f"  {assay_sentence(row, study)}" for row in study["assay"]),
        *(f"  {deviation_sentence(row)}" for row in registration["deviations"]),
        f"  registered {registration['time']} as {registration['sha256']}; {stopped(study)}",
        *(f"  note: {note}" for note in study["notes"]),
    ]


def stopped(study: Study) -> str:
    seeds = study["seeds"]
    return f"{plural(seeds['reported'], 'seed')} reported, stopped by {seeds['stopped']}"


def runs_rate(seconds: Sequence[float]) -> int:
    """Runs per hour of one process."""
    return round(3600 * len(seconds) / max(1e-9, sum(seconds)))


def rate_words(value: float | None) -> str:
    return "–" if value is None else number(value)
