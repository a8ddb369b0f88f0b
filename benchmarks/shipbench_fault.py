"""What a fault of ShipBench is: one thing made wrong in a sound shipment, and where that must show, said beforehand.

sound(ship, "f16") ──▶ Delivery(files, cases, request) ── delivered(fault, …) ──▶ the same with one thing wrong
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shipbench_gguf import Draft, altered
from shipbench_ships import Ship

from rankwise.device.parity.cases import Case
from rankwise.gguf.plan import plan_export
from rankwise.gguf.view import model_view
from rankwise.options.commands import ExportConfig

FILE, TEXT, MMPROJ = "file", "text", "mmproj"
Request = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Delivery:
    """What a device gets: files, what the app sends, and what it does to each request for an answer."""

    form: str
    text: Path
    mmproj: Path | None
    cases: Sequence[Case]
    request: Request | None = None


Change = Callable[[Delivery, Ship], Delivery]


@dataclass(frozen=True)
class Fault:
    """Exactly one of change, edit, cut and model makes it.

    rung: the first rung that must break; `file` where llama.cpp must refuse to load it; None where the ladder can't
    see it. proof: whether export's own verification must find it, had the converter made the file so; None where no
    file is wrong. edit: of the content of the file `kind`; damage: done to that file alone, after the float32 one that
    it is compared with was made. cut: share of the file that is kept. model: `base` or `alpha`, another model shipped
    under this one's name.
    """

    name: str
    what: str
    rung: str | None
    proof: bool | None = None
    change: Change | None = None
    edit: Callable[[Draft], None] | None = None
    kind: str = TEXT
    form: str = "f16"
    damage: bool = False
    cut: float = 0.0
    model: str = ""


def sound(ship: Ship, form: str) -> Delivery:
    return Delivery(form, ship.exported.text(form), ship.exported.mmproj(form), ship.cases)


def delivered(fault: Fault, ship: Ship, folder: Path) -> Delivery:
    """The delivery with the fault in it; changed files go to `folder`."""
    whole = sound(ship, fault.form)
    if fault.change:
        return fault.change(whole, ship)
    source = whole.text if fault.kind == TEXT else whole.mmproj
    assert source
    made = make_file(fault, ship, source, folder / source.name)
    return replace(whole, text=made) if fault.kind == TEXT else replace(whole, mmproj=made)


def make_file(fault: Fault, ship: Ship, source: Path, out: Path) -> Path:
    """`source` with the fault in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if fault.model:
        convert(ship, fault, out)
    elif fault.cut:
        content = source.read_bytes()
        out.write_bytes(content[: int(len(content) * fault.cut)])
    else:
        assert fault.edit
        with altered(source, out) as draft:
            fault.edit(draft)
    return out


def convert(ship: Ship, fault: Fault, out: Path) -> None:
    """The other model's file, made as `rankwise export` makes it."""
    plan = plan_export(
        ExportConfig(model=str(ship.other_model(fault.model)), outtype=[fault.form]), ship.plan.converter
    )
    with model_view(plan.model, plan.changes, plan.name) as view:
        plan.converter.convert(view, out, fault.form, fault.kind == MMPROJ)
