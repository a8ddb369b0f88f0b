"""The lowest rung: what is sent to the runtime is, pixel for pixel, what the device's target makes of the picture.

A difference in the black margin alone is another padding; one in the picture itself another filter, or a lossy file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.ship.llama.runtime import Runtime
from rankwise.ship.parity.cases import decoded, strata
from rankwise.ship.parity.floor import Thresholds
from rankwise.ship.parity.observed import Observed
from rankwise.ship.parity.reference import Pixels
from rankwise.ship.parity.rung import NOT_MEASURED, Rung, judged, named

NAME = "pixels"


@dataclass(frozen=True)
class Apart:
    """Two pictures of one size: largest difference of a value, share of pixels that differ, and whether they do so in
    the picture itself, or in its black margin only."""

    most: int
    share: float
    inside: bool


def pixels(seen: Sequence[Observed], _: Runtime, __: Thresholds) -> Rung:
    """Exact: the threshold is 0."""
    pictured = [one for one in seen if one.expected.pixels or one.case.images]
    if not pictured:
        return Rung(NAME, NOT_MEASURED, why="no case has a picture")
    found = {one.case.id: compared(one) for one in pictured}
    wrong = [one for one in pictured if any(each is None or each.most for each in found[one.case.id])]
    known = [each for one in pictured for each in found[one.case.id] if each is not None]
    measured = {
        "pictures": sum(len(one.case.images) for one in pictured),
        "largest_difference": max((each.most for each in known), default=0),
        "share_of_pixels_that_differ": float(np.mean([each.share for each in known])) if known else 0.0,
        "tiles": sorted({"×".join(map(str, tile)) for one in pictured for tile in one.expected.tiles}),
        "kinds": {kind: len(ids) for kind, ids in strata([one.case for one in pictured]).items()},
    }
    why = f"{named(wrong)}: {reason([each for one in wrong for each in found[one.case.id]])}" if wrong else ""
    return judged(NAME, measured, {"largest_difference": 0}, why)


def compared(one: Observed) -> list[Apart | None]:
    """Every sent picture against the expected one; None where their sizes or their number differ."""
    sent = [np.asarray(decoded(image)) for image in one.case.images]
    if len(sent) != len(one.expected.pixels):
        return [None]
    return [apart(*pair) for pair in zip(sent, one.expected.pixels, strict=True)]


def apart(sent: Pixels, expected: Pixels) -> Apart | None:
    """(height, width, 3) each."""
    if sent.shape != expected.shape:
        return None
    difference = np.abs(sent.astype(int) - expected.astype(int)).max(-1)
    inside = bool((difference[expected.max(-1) > 0] > 0).any())
    return Apart(int(difference.max()), float((difference > 0).mean()), inside)


def reason(found: Sequence[Apart | None]) -> str:
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return "another number or size of pictures is sent than the target makes; use DeviceTarget.resize"
    most, share = max(each.most for each in known), float(np.mean([each.share for each in known]))
    said = f"pixels differ by up to {most} of 255 ({share:.1%} of them)"
    if not any(each.inside for each in known):
        return f"{said}, in the black margin only: the padding has another colour; the target pads with black"
    return (
        f"{said}, in the picture itself: another filter (antialiased, LANCZOS …), another place, or a lossy file; the "
        "target scales bilinearly without antialiasing, and pictures are sent as PNG"
    )
