"""Networks that predict the low-rank factors of visual features, in one pass and for each input anew.

    net = build(FactorizerSettings("ResMLP", tokens=256, channels=2048, rank=128))
    net(normalised(features)).factors.product()          # (B, T, D), of rank 128

A new network is a subclass of `Factorizer` (`base.py`) and a name in `ARCHITECTURES`, which `--arch` takes.
"""

from __future__ import annotations

from dataclasses import replace

from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.nets.row_column import AdaptiveLowRankProjAdaLoRA, LowRankProjMLP, LowRankProjSymmetric
from rankwise.features.nets.subspace import Subspace
from rankwise.options.features import canonical

ARCHITECTURES: dict[str, type[Factorizer]] = {
    network.name: network for network in (LowRankProjSymmetric, LowRankProjMLP, AdaptiveLowRankProjAdaLoRA, Subspace)
}


def build(settings: FactorizerSettings) -> Factorizer:
    """The network that the settings name, with random start values of torch's global generator."""
    name = canonical(settings.arch)
    return ARCHITECTURES[name](replace(settings, arch=name))
