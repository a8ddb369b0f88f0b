"""Which model families that see are tested, and what came of it: `families.json`, written by the test matrix.

    standing("gemma3")     # Standing("exact", "…"): prompts, pixels and logits as the family's own code makes them

A family that is refused stops before weights load; one that is not in the table is used with a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.files.atomic import read_object

TABLE = Path(__file__).with_name("families.json")
PAGE = "docs/vision.md lists the tested families"


@dataclass(frozen=True)
class Standing:
    """state: `exact`, `refused` or `untested`; why: in words."""

    state: str
    why: str = ""


def standing(model_type: str) -> Standing:
    """What the table says of a family, by the `model_type` of its config."""
    found = table(TABLE)["families"].get(model_type)
    return Standing(found["state"], found.get("why", "")) if found else Standing("untested")


@cache
def table(path: Path) -> dict[str, Any]:
    """{"versions": {package: version}, "families": {model_type: {"state", "why"}}}."""
    return read_object(path)


def blind_warning_for(model_type: str) -> str | None:
    """The warning for a family whose image input is not supported (no vision config: Emu3, Chameleon, Fuyu)."""
    if model_type not in table(TABLE)["families"]:
        return None
    return f"warning: images are not supported for the family {model_type}: training uses the text of rows only; {PAGE}"


def warning_for(model_type: str) -> str | None:
    """What to tell the user of a family that is about to be used; None for a tested one.

    UsageError, with the reason, for a family that is refused.
    """
    found = standing(model_type)
    if found.state == "refused":
        raise UsageError(f"models of the family {model_type} cannot be used with images: {found.why}; {PAGE}")
    if found.state == "exact":
        return None
    why = f" ({found.why})" if found.why else ""
    return (
        f"warning: the family {model_type} is not among the tested ones{why}: run `rankwise check` on your rows first, "
        f"which compares prompts, pixels and batches with the family's own code; {PAGE}"
    )
