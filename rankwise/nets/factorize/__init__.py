"""Networks that predict the low-rank factors of visual features, in one pass and for each input anew.

    net = build(FactorizerSettings("ResMLP", tokens=256, channels=2048, rank=128))
    net(normalised(features)).factors.product()          # (B, T, D), of rank 128
    save_factorizer(net, "results/ResMLP")

A new network is a subclass of `Factorizer` and a line in `ARCHITECTURES`.
"""

from __future__ import annotations

from rankwise.nets.factorize.adaptive import AdaptiveLowRankProjAdaLoRA
from rankwise.nets.factorize.architectures import ARCHITECTURES, build, canonical
from rankwise.nets.factorize.factorizer import Factorization, Factorizer, FactorizerSettings
from rankwise.nets.factorize.files import load_factorizer, save_factorizer
from rankwise.nets.factorize.plain import LowRankProjMLP
from rankwise.nets.factorize.subspace import Subspace
from rankwise.nets.factorize.svd_linear import SVDLinear
from rankwise.nets.factorize.symmetric import LowRankProjSymmetric

__all__ = [
    "ARCHITECTURES",
    "AdaptiveLowRankProjAdaLoRA",
    "Factorization",
    "Factorizer",
    "FactorizerSettings",
    "LowRankProjMLP",
    "LowRankProjSymmetric",
    "SVDLinear",
    "Subspace",
    "build",
    "canonical",
    "load_factorizer",
    "save_factorizer",
]
