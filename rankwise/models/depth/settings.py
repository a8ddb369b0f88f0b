"""How a model was trained to take depth: what must be the same wherever its adapter is used. `depth.json` beside it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankwise.core.geometry import CONTROLS
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import beside
from rankwise.files.atomic import read_document, write_json

FILE, FORMAT = "depth.json", "rankwise-depth/1"
GATES, LAYOUTS = ("learned", "none"), ("split", "interleaved")


@dataclass(frozen=True)
class DepthSettings:
    """Depth of a model.

    alpha: depth in [0, 1] is multiplied by it before the encoding. input_size: the shorter side of an image as the
    estimator sees it. gate: `learned`, one number that starts at 0, or `none`, always 1: the encoding's length
    √(width/2) can then swamp the features. layout: sines before cosines, or by turns. estimator: file, folder or hub
    id; estimator_hash: its fingerprint. control: where the numbers come from (core.depth.CONTROLS). gate_value: the
    trained gate of a merged model; an adapter holds its gate itself.
    """

    alpha: float = 100.0
    input_size: int = 518
    gate: str = "learned"
    layout: str = "split"
    estimator: str | None = None
    estimator_hash: str | None = None
    control: str = "estimated"
    gate_value: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"--depth_alpha must be above 0, got {self.alpha}")
        if self.input_size < 14:
            raise UsageError(f"--depth_input_size must be at least 14 (one patch), got {self.input_size}")
        for name, value, known in (
            ("gate", self.gate, GATES),
            ("layout", self.layout, LAYOUTS),
            ("control", self.control, CONTROLS),
        ):
            if value not in known:
                raise UsageError(f"--depth_{name} takes {', '.join(known)}; got {value!r}")


def write_depth(folder: Path | str, settings: DepthSettings) -> Path:
    """`depth.json` in the folder of an adapter, a run or a merged model."""
    return write_json(Path(folder) / FILE, {"format": FORMAT, **asdict(settings)})


def read_depth(folder: Path | str) -> DepthSettings | None:
    """The settings of an adapter's folder (a checkpoint's: of its run folder), None for a model without depth.

    Raises DataError, naming the file, for one that says something else.
    """
    file = beside(folder, FILE)
    return None if file is None else parsed(read_document(file, FORMAT, "depth settings"), file)


def parsed(content: dict[str, Any], file: Path) -> DepthSettings:
    known = {field.name for field in fields(DepthSettings)}
    given = {name: value for name, value in content.items() if name != "format"}
    if set(given) != known:
        wrong = ", ".join(sorted(set(given) ^ known))
        raise DataError(f"{file}: not the depth settings that this version writes ({wrong})")
    try:
        return DepthSettings(**given)
    except (UsageError, TypeError) as error:
        raise DataError(f"{file}: {error}") from error
