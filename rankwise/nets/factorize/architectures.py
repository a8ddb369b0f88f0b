"""The networks by the names that `--arch` takes: the one table of them."""

from __future__ import annotations

from dataclasses import replace

from rankwise.errors import UsageError
from rankwise.nets.factorize.adaptive import AdaptiveLowRankProjAdaLoRA
from rankwise.nets.factorize.factorizer import Factorizer, FactorizerSettings
from rankwise.nets.factorize.plain import LowRankProjMLP
from rankwise.nets.factorize.subspace import Subspace
from rankwise.nets.factorize.symmetric import LowRankProjSymmetric
from rankwise.options import unknown

ARCHITECTURES: dict[str, type[Factorizer]] = {
    network.name: network for network in (LowRankProjSymmetric, LowRankProjMLP, AdaptiveLowRankProjAdaLoRA, Subspace)
}
ALIASES = {"adaptive_adalora": "AdaLoRA", "adaptive": "AdaLoRA"}


def canonical(name: str) -> str:
    """The name in ARCHITECTURES of what `--arch` was given, in any case, or by its class's name.

    Raises UsageError, with near names, for anything else.
    """
    answers = {key.lower(): key for key in ARCHITECTURES}
    answers |= {network.__name__.lower(): key for key, network in ARCHITECTURES.items()}
    answers |= ALIASES
    if name.lower() not in answers:
        near = str(unknown(name.lower(), answers, "--arch", "network"))
        raise UsageError(f"{near}{'' if near.endswith('?') else '.'} There are {', '.join(ARCHITECTURES)}")
    return answers[name.lower()]


def build(settings: FactorizerSettings) -> Factorizer:
    """The network that the settings name, with random start values of torch's global generator."""
    name = canonical(settings.arch)
    return ARCHITECTURES[name](replace(settings, arch=name))
