"""What is lost when a merged weight is written in fewer digits than it was merged in.

A LoRA changes a weight by a few percent, and bfloat16 keeps three digits of it: much of a small change falls below
the last one. Measured on the weights themselves while they are written, for float16 as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MUCH = 0.05  # of the adapter's change: above it the other precision is worth a word
BESIDE = torch.float16


@dataclass
class Rounding:
    """Sums over the weights that the adapter changes, as they are written one after the other.

    `change`: Σ‖Δ‖²_F; `lost`: Σ‖round(W + Δ) − (W + Δ)‖²_F for each precision looked at. `worst`: the weight that loses
    the largest share of its own change, with that share.
    """

    dtype: torch.dtype = torch.float32
    change: float = 0.0
    lost: dict[torch.dtype, float] = field(default_factory=dict)
    worst: tuple[str, float] | None = None

    def add(self, key: str, stored: Tensor, merged: Tensor, dtype: torch.dtype) -> None:
        """Count one weight: as the base stores it, merged in float32, and the precision it is written in."""
        if dtype == torch.float32:
            return
        self.dtype = dtype
        change = squared(merged - stored)
        self.change += change
        for kind in dict.fromkeys((dtype, BESIDE)):
            lost = squared(merged - merged.to(kind))
            self.lost[kind] = self.lost.get(kind, 0.0) + lost
            if kind == dtype and change and (self.worst is None or (lost / change) ** 0.5 > self.worst[1]):
                self.worst = key, (lost / change) ** 0.5

    def share(self, dtype: torch.dtype) -> float:
        """‖round(W + Δ) − (W + Δ)‖_F / ‖Δ‖_F over all of them; 0 where they are written as they were merged."""
        return (self.lost[dtype] / self.change) ** 0.5 if self.change and dtype in self.lost else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the manifest; empty where nothing was rounded."""
        if not self.change:
            return {}
        shares = {name_of(dtype): self.share(dtype) for dtype in self.lost if self.share(dtype) != float("inf")}
        worst = {"worst": {"weight": self.worst[0], "share": self.worst[1]}} if self.worst else {}
        return {"share_of_change_lost": shares, **worst}

    def sentence(self) -> str | None:
        """What rounding took, and which precision takes less; None where nothing was rounded."""
        if not self.change:
            return None
        share, other = self.share(self.dtype), self.share(BESIDE)
        text = f"rounding to {name_of(self.dtype)} changes the weights by {share:.1%} of what the adapter changes"
        if self.dtype == BESIDE or share <= MUCH:
            return text
        if other < share:
            return f"{text}; float16 would by {other:.1%}: --dtype float16 is the better one for export"
        return f"{text}; --dtype float32 keeps all of it"


def squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
