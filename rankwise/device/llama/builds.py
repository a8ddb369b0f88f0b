"""Builds of llama.cpp: what they are called, and whether what ran is what was validated.

/props' build_info, xllamacpp's version ── named ──▶ "b10257-22dc605c4, xllamacpp 2026.10.11549"
validated, ran ── other_build ──▶ a sentence where they differ; it is no error: the ladder judges the answers
"""

from __future__ import annotations

import re

COMMIT = re.compile(r"\bb([1-9]\d*)(?:-[0-9a-f]{7,40}\b)?")  # llama.cpp's own form; b0 is a build that does not know
UNKNOWN = ("", "unknown")


def named(stated: str, package: str | None = None) -> str:
    """stated: what the runtime says of itself; package: what brought it."""
    known = stated if stated not in UNKNOWN and not stated.startswith("b0-") else ""
    return ", ".join(part for part in (known, package) if part) or UNKNOWN[1]


def number_of(build: str) -> str:
    """llama.cpp's build number where the name has it: packages of one build are one; else the whole name."""
    found = COMMIT.search(build)
    return found[1] if found else build


def other_build(validated: str | None, ran: str | None) -> str:
    """What to know where the answers are not from the validated build; "" where they are."""
    if not ran or ran in UNKNOWN:
        return "the llama.cpp build that answered is unknown; have the app write it (`build`), or ask a newer server"
    if not validated:
        return f"answered by {ran}; no validated build is recorded to compare it with"
    if number_of(validated) == number_of(ran):
        return ""
    return (
        f"answered by {ran}, validated on {validated}: builds differ in rounding and in how they cut and scale "
        "pictures. Where the ladder holds they agree on its cases; ship one build, and validate on that one (rankwise "
        "validate --server)"
    )
