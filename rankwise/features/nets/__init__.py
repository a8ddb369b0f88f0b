"""The networks by the names that `--arch` takes: the one table of them."""

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
