"""Importance of rank channels: AdaLoRA's scores and its budget (Zhang et al. 2023, arXiv 2303.10512).

    gradients ── Importance.updated ──▶ scores per weight ── triplet_scores ──▶ one per rank channel ──┐
    step ── RankBudget.at ──▶ how many stay ──────────────────────────────────────────────────────── kept ──▶ mask

Sections named below are the paper's. Pure values: whoever trains calls `updated` once per optimizer step, with the
gradients that the step uses, and masks where `RankBudget.masks_at` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rankwise.errors import UsageError


@dataclass(frozen=True)
class Importance:
    """Smoothed sensitivity and its uncertainty of each weight of named parameters (section 3.2).

    The sensitivity of a weight is |w·∂L/∂w|: how much the loss would change, to first order, were the weight zero.
    Measured on a batch it is noisy, so its average over steps counts together with how far it strays from that average.
    """

    beta1: float = 0.85
    beta2: float = 0.85
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    uncertainty: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise UsageError(f"{name} of the rank allocator is a smoothing factor, 0 ≤ {name} < 1; got {beta}")

    @torch.no_grad()
    def updated(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Importance:
        """A copy updated by one step's weights and gradients, of the same names and shapes; averages start at zero."""
        assert values.keys() == gradients.keys(), "a gradient for each parameter"
        sensitivity, uncertainty = {}, {}
        for name, value in values.items():
            now = (value * gradients[name]).abs().float()
            nothing = torch.zeros_like(now)
            mean = self.beta1 * self.sensitivity.get(name, nothing) + (1 - self.beta1) * now
            stray = (now - mean).abs()
            sensitivity[name] = mean
            uncertainty[name] = self.beta2 * self.uncertainty.get(name, nothing) + (1 - self.beta2) * stray
        return replace(self, sensitivity=sensitivity, uncertainty=uncertainty)

    def to(self, device: torch.device) -> Importance:
        """A copy on this device."""
        sides = [{name: one.to(device) for name, one in side.items()} for side in (self.sensitivity, self.uncertainty)]
        return replace(self, sensitivity=sides[0], uncertainty=sides[1])

    def score(self, name: str) -> Tensor:
        """Sensitivity × uncertainty, in the parameter's shape."""
        return self.sensitivity[name] * self.uncertainty[name]


def triplet_scores(scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One score per rank channel (r,): the scale's own plus the means over what it joins.

    All three have the rank first: scale (r,) or (r, 1), left and right (r, …), scores of the weights that make that
    channel on either side. Means, so that a wide side does not outvote the scale.
    """
    rank = scale.shape[0]
    sides = (left.reshape(rank, -1).mean(1), right.reshape(rank, -1).mean(1))
    return scale.reshape(rank) + sides[0] + sides[1]


@dataclass(frozen=True)
class RankBudget:
    """How many rank channels may stay after `step` optimizer steps (section 3.3).

    All `rank` of them until init_warmup; then a cubic decay, fast first; the final number, `keep_ratio` of the rank and
    at least one, from total_steps − final_warmup on. Masks are due every `mask_interval` steps on the way down, and
    where it ends. Raises UsageError where the warm-ups leave no step between them.
    """

    rank: int
    keep_ratio: float
    init_warmup: int
    final_warmup: int
    mask_interval: int
    total_steps: int

    def __post_init__(self) -> None:
        if self.init_warmup + self.final_warmup >= self.total_steps:
            raise UsageError(self._too_short())
        assert self.rank >= 1, "a rank to spend"

    def _too_short(self) -> str:
        each = self.total_steps // 5
        return (
            f"the run has {self.total_steps} optimizer steps, and --allocator_init_warmup {self.init_warmup} + "
            f"--allocator_final_warmup {self.final_warmup} leave none between them to lower the rank. Give for example "
            f"{each} and {each}, or train for more than {self.init_warmup + self.final_warmup} steps"
        )

    @property
    def final(self) -> int:
        """Final number of rank channels."""
        return max(1, round(self.keep_ratio * self.rank))

    @property
    def end(self) -> int:
        """The step from which on the budget is final."""
        return self.total_steps - self.final_warmup

    def at(self, step: int) -> int:
        """The budget after `step` optimizer steps; fractions are cut off, as the paper's authors and PEFT do."""
        if step <= self.init_warmup:
            return self.rank
        if step >= self.end:
            return self.final
        left = 1 - (step - self.init_warmup) / (self.end - self.init_warmup)
        return int((self.rank - self.final) * left**3 + self.final)

    def masks_at(self, step: int) -> bool:
        """Whether the mask is set anew after `step` optimizer steps."""
        return self.init_warmup < step <= self.end and (step % self.mask_interval == 0 or step == self.end)


def kept(scores: Tensor, budget: int, among: Tensor | None = None) -> Tensor:
    """Mask (r,), true for the top `budget` channels by score; ties go to the first.

    among: mask (r,) of those that still act. What is masked stays masked, whatever its score: with fewer than
    `budget` of them left, those stay.
    """
    assert 0 <= budget <= scores.numel(), "a budget within the rank"
    acting = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    order = scores.masked_fill(~acting, -torch.inf).argsort(descending=True, stable=True)
    mask = torch.zeros_like(acting)
    mask[order[:budget]] = True
    return mask & acting
