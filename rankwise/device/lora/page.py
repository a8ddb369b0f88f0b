"""LoRAs of a validation in words and tables: the verdict, and every setting with its ladder.

`adapters` of validation.json ── lora_verdict, lora_failures ──▶ sentences; lora_blocks ──▶ terminal, report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.device.parity.rungs import BROKEN, NOT_MEASURED, said
from rankwise.page.blocks import Block, Table, Words

Content = Mapping[str, Any]
SERVED = "scale 1"  # the first file as it is loaded


def lora_verdict(adapters: Content, parity: Mapping[str, Content]) -> list[str]:
    """Sentences, the most important first. parity: form → the ladder of the first file at scale 1."""
    name, effect = adapters["files"][0]["name"], adapters["effect"]
    lines = wrong_files(adapters)
    for form, rows in tried(adapters, parity).items():
        broken = [one for one in rows if one["first_broken"]]
        told = broken[:1] if parity[form]["first_broken"] else broken
        lines += [f"{form}, {one['setting']}, breaks at the rung {broken_rung(one, '')}" for one in told]
        lines += broken_too(form, broken[len(told) :])
    lines += [line for line in (untold(adapters),) if line]
    if lines:
        return lines
    switched = all(not one["why"] for rows in adapters["settings"].values() for one in rows)
    also = (
        "the base at scale 0, itself again after that, and chosen by request" if switched else "not measured otherwise"
    )
    forms = f"{', '.join(parity)}; mean KL to the base {effect['kl_mean']:.2g}"
    return [f"{name} in llama.cpp is the adapter at scale 1 ({forms}), {also}: no rung is broken."]


def untold(adapters: Content) -> str:
    """That the rows do not tell the first adapter from its base, if so."""
    name, effect = adapters["files"][0]["name"], adapters["effect"]
    blind = [form for form, told in effect["told_apart"].items() if not told]
    if not blind:
        return ""
    return (
        f"Cannot tell {name} from its base ({', '.join(blind)}): on these rows they differ by a mean KL of "
        f"{effect['kl_mean']:.2g}, within the limits; use rows that the adapter was trained for, or more of them"
    )


def lora_failures(adapters: Content, parity: Mapping[str, Content]) -> list[str]:
    """Reasons for exit code 6 beside the ladder at scale 1; where that is broken, the other settings by name only."""
    lines = wrong_files(adapters)
    for form, rows in adapters["settings"].items():
        broken = [one for one in rows if one["first_broken"]]
        if parity[form]["first_broken"]:
            lines += broken_too(form, broken)
        else:
            lines += [f"{form}: {one['setting']}: the rung {broken_rung(one, ' is broken')}" for one in broken]
    return lines


def broken_too(form: str, rows: Sequence[Content]) -> list[str]:
    """Settings by name, beside one whose reason is told."""
    return [f"{form}: broken too: {', '.join(one['setting'] for one in rows)}"] if rows else []


def wrong_files(adapters: Content) -> list[str]:
    return [one["file"]["why"] for one in adapters["files"] if one["file"]["status"] == BROKEN]


def tried(adapters: Content, parity: Mapping[str, Content]) -> dict[str, list[Content]]:
    """Form → its settings, the first file at scale 1 before the others."""
    words = f"the adapter {adapters['files'][0]['reference']}"
    return {
        form: [{"setting": SERVED, "expects": words, "why": "", **ladder}, *adapters["settings"][form]]
        for form, ladder in parity.items()
    }


def broken_rung(one: Content, verb: str) -> str:
    broken = next(rung for rung in one["rungs"] if rung["name"] == one["first_broken"])
    return f"`{broken['name']}`{verb}: {broken['why']}"


def lora_blocks(adapters: Content, parity: Mapping[str, Content]) -> list[Block]:
    """Every setting of every form, with what has to answer, and each file against its adapter."""
    columns = tried(adapters, parity)
    short = {f"the adapter {one['reference']}": f"the adapter {named(one)}" for one in adapters["files"]}
    files = adapters["files"]
    rows = [(one["name"], f"the adapter {named(one)}", *[said(one["file"])] * len(columns)) for one in files]
    for row in zip(*columns.values(), strict=True):
        rows.append((row[0]["setting"], short.get(row[0]["expects"], row[0]["expects"]), *map(cell, row)))
    note = (
        "The base's GGUF with its LoRAs on one running server: at scale 1 as loaded, then switched for all requests, "
        "then by `lora` of a request. Each row is a ladder of its own against transformers; a file is compared factor "
        "by factor."
    )
    why = dict.fromkeys(
        f"{one['setting']} not measured: {one['why']}" for each in columns.values() for one in each if one["why"]
    )
    table = Table(("LoRA", "has to be", *columns), rows, first_number=2 + len(columns), note=note)
    return [table, *map(Words, why)]


def named(file: Content) -> str:
    """The adapter of a file by its folder's name."""
    return Path(str(file["reference"])).name


def cell(one: Content) -> str:
    """The first rung that breaks, else how much the log-probabilities prove."""
    if one["first_broken"]:
        return f"broken: {one['first_broken']}"
    rung = next((rung for rung in one["rungs"] if rung["name"] == "logprobs"), None)
    return said(rung) if rung else NOT_MEASURED
