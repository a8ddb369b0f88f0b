"""`ranks --metric auto`: the metric whose plan keeps most of the gain on half of the held-out rows, taken only where
that plan keeps more than uniform rank on the other half.

    choice = choose(model, deltas, plans, choosing, confirming, seed)     # plans: metric → ranks, and UNIFORM → ranks
    choice.metric                                                         # UNIFORM unless the other half confirms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.site import Site
from rankwise.ranks.gain import Gain, Losses, Ranks, arms_of, gain_kept

UNIFORM = "uniform"
METRICS = ("weight", "activation", "loss")
PURPOSE = "chosen for truncation; for training from scratch use `rankwise advise`"


@dataclass(frozen=True)
class MetricChoice:
    """`best`: the metric that keeps most on the rows that choose. choosing: all metrics and uniform rank there.
    confirming: the plan of `best` on the other rows, with its baselines."""

    best: str
    choosing: Gain
    confirming: Gain

    @property
    def leads(self) -> bool:
        return self.choosing.arm(self.best).loss < self.choosing.arm(UNIFORM).loss

    @property
    def confirmed(self) -> bool:
        """Whether the 95 % interval of best − uniform, on rows that did not choose, is above 0."""
        margin = self.confirming.margin
        return self.leads and self.confirming.defined and margin is not None and margin[0] > 0

    @property
    def metric(self) -> str:
        return self.best if self.confirmed else UNIFORM

    @property
    def shares(self) -> str:
        """What chose, in a line."""
        where = f"on {self.choosing.items} items that choose"
        if not self.choosing.defined:
            return f"{where} the probe's own gain touches 0"
        return ", ".join(f"{arm.name} {100 * arm.kept:.1f} %" for arm in self.choosing.arms) + f" {where}"

    @property
    def reason(self) -> str:
        """Why uniform rank is the result."""
        if not self.leads:
            return "no metric keeps more on the items that choose"
        if not self.confirming.defined or self.confirming.margin is None:
            return "the probe's own gain touches 0 on the items that confirm"
        low, high = (100 * bound for bound in self.confirming.margin)
        return (
            f"`--metric {self.best}` is not confirmed, its gain over uniform is [{low:+.1f}, {high:+.1f}] points on "
            "the items that confirm"
        )

    def facts(self) -> dict[str, Any]:
        """For the plan file and `gain.json`."""
        return {
            "metric": self.metric,
            "best": self.best,
            "choosing": self.choosing.as_dict(),
            "confirming_items": self.confirming.items,
            "margin": self.confirming.margin if self.confirming.defined else None,
            "purpose": PURPOSE,
        }


def choose(
    model: nn.Module,
    deltas: Mapping[Site, Tensor],
    plans: Mapping[str, Ranks],
    choosing: Losses,
    confirming: Losses,
    seed: int,
) -> MetricChoice:
    """Compare all plans by `choosing`, then the best one with uniform rank by `confirming`.

    plans: the ranks of each of METRICS, in order of preference where they keep the same, and of UNIFORM.
    """
    first = gain_kept(model, deltas, plans, choosing, seed)
    best = min((name for name in plans if name != UNIFORM), key=lambda name: first.arm(name).loss)
    arms = arms_of(plans[best], torch.Generator().manual_seed(seed)) | {UNIFORM: plans[UNIFORM]}
    return MetricChoice(best, first, gain_kept(model, deltas, arms, confirming, seed))


def per_group(losses: Losses, groups: Sequence[str]) -> Losses:
    """Sums over the items of each group, which are no independent draws: what a bootstrap resamples."""
    order = {name: position for position, name in enumerate(dict.fromkeys(groups))}
    places = torch.tensor([order[name] for name in groups])

    def summed(model: nn.Module) -> tuple[Tensor, Tensor]:
        values, tokens = (part.new_zeros(len(order)).index_add(0, places, part) for part in losses(model))
        return values, tokens

    return summed
