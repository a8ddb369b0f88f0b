"""What an examination of a data set found, in words, bars and as a report's numbers."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from rankwise.data.check import KINDS, Findings, Problem, histogram
from rankwise.page.text import plural

FORMAT = "rankwise-check/1"
BAR = 40  # characters of the longest bar
SHOWN = 10


def report(findings: Findings, limit: int | None) -> dict[str, Any]:
    """Content of check.json. limit: most tokens of a sample; None where no tokens were made."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "samples": findings.samples,
        "usable": findings.usable,
        "changes": dict(findings.changes),
        "control_tokens_as_text": dict(findings.control),
        "special_tokens": dict(findings.special),
        "images": findings.images,
        "pictures": findings.pictures,
        "bad": {kind: findings.bad(kind) for kind in KINDS},
        "compared_with_chat_template": {"samples": findings.compared, "pixels": findings.seen},
        "samples_of_single_answers": findings.apart,
        "model_run": {"samples": findings.tried, "notes": findings.notes},
    }
    if limit is not None:
        content["tokens"] = {
            "limit": limit,
            "all": findings.tokens,
            "of_images": findings.image_tokens,
            "of_labels": findings.label_tokens,
            "truncated_samples": findings.truncated,
            **spread(findings),
            "histogram": [vars(each) for each in histogram(findings.lengths)],
        }
    return content


def spread(findings: Findings) -> dict[str, float | None]:
    """Shortest, median, mean and longest sample, in tokens; None where there is none."""
    lengths = findings.lengths
    if not lengths:
        return dict.fromkeys(("shortest", "median", "mean", "longest"))
    return {"shortest": min(lengths), "median": median(lengths), "mean": mean(lengths), "longest": max(lengths)}


def in_words(findings: Findings, limit: int | None) -> list[str]:
    """The same for the screen, the first bad samples with their reasons."""
    lines = [f"{plural(findings.samples, 'sample')}, {findings.usable:,} usable"]
    if findings.images:
        looked = "not looked at" if findings.pictures is None else f"{findings.pictures:,} different ones decoded"
        lines.append(f"{plural(findings.images, 'image')} in them, {looked}")
    if limit is not None and findings.lengths:
        lines += _tokens(findings, limit)
    if findings.apart:
        lines.append(
            f"conversations make {findings.apart:,} samples of one answer each: the chat template renders earlier "
            "answers otherwise than they were given"
        )
    for tokens, how in (
        (findings.control, "control tokens, read as text"),
        (findings.special, "special tokens, read as such"),
    ):
        named = ", ".join(f"{token} in {plural(count, 'sample')}" for token, count in tokens.most_common(SHOWN))
        lines += [f"their texts hold {how}: {named}"] if tokens else []
    if findings.compared:
        pixels = f", {findings.seen} of them with pixels" if findings.seen else ""
        lines.append(
            f"{plural(findings.compared, 'sample')} compared with apply_chat_template{pixels}: "
            f"{findings.bad('differs') or 'none'} different"
        )
    if findings.tried:
        lines.append(
            f"{plural(findings.tried, 'sample')} run through the model, alone and in a batch: "
            f"{findings.bad('model') or 'none'} bad"
        )
    lines += findings.notes
    if findings.problems:
        counts = ", ".join(f"{findings.bad(kind)} {kind}" for kind in KINDS if findings.bad(kind))
        lines.append(f"bad: {counts}")
        lines += [f"  {one}" for one in map(_clipped, findings.problems[:SHOWN])]
        if len(findings.problems) > SHOWN:
            lines.append(f"  … and {len(findings.problems) - SHOWN:,} more")
    return lines


def _tokens(findings: Findings, limit: int) -> list[str]:
    sizes = spread(findings)
    lines = [
        f"{findings.tokens:,} tokens in usable samples: {findings.image_tokens:,} of images, {findings.label_tokens:,} "
        "learnt",
        f"a sample has {sizes['shortest']:,} to {sizes['longest']:,} tokens, median {sizes['median']:,.0f}; "
        f"the limit is {limit:,}",
    ]
    if findings.truncated:
        lines.append(f"the source of {plural(findings.truncated, 'sample')} was cut to the limit")
    return lines + bars(findings)


def bars(findings: Findings) -> list[str]:
    """One line per bin: its bounds in tokens, a bar, how many samples."""
    bins = histogram(findings.lengths)
    most, wide = max(each.count for each in bins), len(f"{bins[-1].high:,}")
    return [
        f"  {each.low:>{wide},} – {each.high:>{wide},} {'█' * -(-BAR * each.count // most):<{BAR}} {each.count:,}"
        for each in bins
    ]


def _clipped(problem: Problem) -> str:
    text = str(problem)
    return text if len(text) <= 300 else f"{text[:299]}…"
