"""`rankwise validate --sweep`: further forms made from the f16 file, and the smallest that is not worse.

sweep.json      every form's size, accuracy, latency, memory, and how it compares with the largest
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rankwise.errors import UsageError
from rankwise.files.processes import announce
from rankwise.options.commands import ValidateConfig
from rankwise.ship.llama.gguf_generator import GGUFGenerator
from rankwise.ship.llama.runtime import Runtime
from rankwise.ship.sweep import FILE as SWEPT
from rankwise.ship.sweep import Item, Sweep, prepared, sweep
from rankwise.ship.witness import Witness
from rankwise.stages.shipped import Shipment, Shipped
from rankwise.stages.validating import Trained, answered, context

__all__ = ["SWEPT", "sweep_forms"]
SOURCES = ("f16", "bf16", "f32")


def sweep_forms(config: ValidateConfig, trained: Trained, shipped: Shipment, out: Path) -> Sweep:
    """Make the forms, run them, write sweep.json. UsageError where there is nothing to make them from, or no answer of
    the task is right or wrong."""
    source = next((one for form in SOURCES for one in shipped.forms if one.form == form), None)
    if source is None or source.text is None:
        raise UsageError("--sweep needs the f16 form among those validated: rankwise export --outtype f16,q8_0")
    have = {one.form: one.text for one in shipped.forms if one.text and one.form in config.sweep}
    made = prepared(source.text, [form for form in config.sweep if form not in have], config.llama_cpp_dir)
    files = {source.form: source.text, **have, **made}
    found = sweep(
        files,
        partial(ask, trained, {form: Shipped(form, path, source.mmproj) for form, path in files.items()}, out),
        mmproj=source.mmproj,
        margin=config.sweep_margin,
        min_accuracy=config.min_accuracy,
        context=config.context or context(trained.renderer),
        threads=config.threads,
    )
    found.save(out)
    for line in found.lines():
        announce(line)
    announce("")
    return found


def ask(trained: Trained, forms: Mapping[str, Shipped], out: Path, runtime: Runtime, form: str) -> dict[str, Item]:
    """Every item answered by one form."""
    folder = out / "sweep" / form
    folder.mkdir(parents=True, exist_ok=True)
    witness = Witness(GGUFGenerator(runtime, trained.renderer, trained.decoding), folder / "answers.jsonl")
    answers = answered(trained, witness, folder, trained.made_from(*forms[form].files))
    right, records = answers.rights(trained.items), witness.answers()
    if right is None:
        raise UsageError(f"--sweep compares right and wrong answers, and {trained.task.name} has texts")
    pairs = zip(trained.items, right, strict=True)
    return {item.id: Item(correct, records[item.id].seconds) for item, correct in pairs}
