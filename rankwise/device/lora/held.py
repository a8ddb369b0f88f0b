"""An adapter in transformers, and its LoRA's file held to it: sites, factors and scales, whichever converter wrote it.

LoraFile ── compared ──▶ Rung `adapter file`
base, adapter folder ── adapted ──▶ the PEFT model that is the reference
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.device.parity.rungs import NOT_MEASURED, Rung, judged
from rankwise.device.sides import LoraFile
from rankwise.files.adapter import read_adapter
from rankwise.files.checkpoint import resolve
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.lora import held_factors
from rankwise.gguf.metadata import config_of
from rankwise.models.adapters import load_adapter

RUNG = "adapter file"
UNKNOWN = "the adapter that it was made from is not recorded; give the adapters of all files with --reference A,B"


def adapted(model: Any, adapter: Path) -> Any:
    """A base with its adapter, unmerged, in evaluation mode."""
    return load_adapter(model, adapter).eval()


def compared(one: LoraFile, base: str) -> Rung:
    """The file against its adapter. base: the model, whose config says what the sites are called."""
    if one.reference is None:
        return Rung(RUNG, NOT_MEASURED, why=UNKNOWN)
    file, adapter = GGUFFile(one.path), read_adapter(resolve(one.reference))
    held = held_factors(file, adapter, config_of(resolve(base)))
    measured: dict[str, Any] = {
        "sites": held.sites,
        "missing": len(held.missing),
        "other_factors": len(held.other),
        "other_scales": len(held.scales),
        "not_of_the_adapter": len(held.extra),
    }
    whole = f"{one.name} does not hold the adapter {one.adapter}: {held.why}; export it again, or name its adapter"
    limit = dict.fromkeys(("missing", "other_factors", "other_scales", "not_of_the_adapter"), 0)
    return judged(RUNG, measured, limit, whole if held.why else "")
