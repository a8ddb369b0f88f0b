"""Ranks from one number per matrix, measured on the base: what published rules rank by, without the rest of them.

    values = gradient_variance(model, sites, items, start, SCALE)    # Fisher: FIM-LoRA
    values = mean_products(model, gradients)                         # GoRA
    values = allocated_sizes(ranks)                                  # AdaLoRA's ranks
    gains = {site: diminishing(value, 128) for site, value in values.items()}

The k-th rank of a matrix is worth value/k. Greedily by gain per parameter (`ranks_within`), ranks become proportional
to value/(m + n), what the rules that share out a budget of parameters in proportion to the value come to as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.core.site import Site
from rankwise.ranks.gain import Batch, logical_gradient, only_trainable
from rankwise.train.together.starts import Pairs, Ranks

ITEMS = 64  # whose gradients are looked at
FISHER_RANK = 16  # rows of A at every site: the number cancels between sites, more of them vary less
GORA_STEP = 0.05  # the paper's γ


def diminishing(value: float, up_to: int) -> Tensor:
    """Gains value/k of the k-th rank, k = 1 … up_to."""
    return max(0.0, value) / torch.arange(1, up_to + 1, dtype=torch.float64)


def items_of(batches: Sequence[Batch], count: int = ITEMS) -> Sequence[Batch]:
    """The first rows of some batches, one by one."""
    rows = [
        {name: value[i : i + 1] for name, value in batch.items()} for batch in batches for i in range(rows_in(batch))
    ]
    return rows[:count]


def rows_in(batch: Batch) -> int:
    return len(batch["labels"])


def gradient_variance(
    model: nn.Module, sites: Sequence[Site], items: Sequence[Batch], start: Pairs, scale: float
) -> dict[Site, float]:
    """Site → F = mean over items of ‖∂ℓᵢ/∂B‖² − ‖mean over items of ∂ℓᵢ/∂B‖², with W + scale·B·A, B = 0.

    The trace of the gradients' covariance: FIM-LoRA's score of a layer (Sathyavageeswaran 2026, arXiv 2605.16800: the
    diagonal of the empirical Fisher matrix of B at the start, as variance of its gradient). Departures: 64 items one by
    one instead of 8 batches; A drawn as the arms draw it, 16 rows at every site; no smallest rank, and instead of
    its two-phase filling of the budget in ranks the k-th rank is worth F/k, and parameters are what is shared out.

    Args:
        items: batches of one row each; ℓᵢ is its mean loss per answer token.
        start: path → A (r, n) and B, which is not looked at.
    """
    squares = dict.fromkeys(sites, 0.0)
    sums: dict[Site, Tensor] = {}
    with only_trainable(model, sites):
        for item in items:
            model.zero_grad()
            model(**{name: item[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
            for site in sites:
                gradient = logical_gradient(model, site).double()
                of_b = scale * gradient @ start[site.path][0].to(gradient).T
                squares[site] += float(of_b.square().sum())
                sums[site] = sums[site] + of_b if site in sums else of_b
    count = len(items)
    return {site: squares[site] / count - float((sums[site] / count).square().sum()) for site in sites}


def mean_products(model: nn.Module, gradients: Mapping[Site, Tensor]) -> dict[Site, float]:
    """Site → mean over the entries of |W ∘ G|, G the gradient of the mean loss: GoRA's importance of a matrix (He et
    al. 2025, arXiv 2502.12171: I(W) = avg|W ∘ G|).

    Departures: G is that of 64 items, a token counting as much as another; ranks stay between 0 and the common maximum
    instead of the paper's bounds around the mean rank; a rank costs its m + n parameters, where the paper's budget
    counts the square root.
    """
    found = {}
    for site, gradient in gradients.items():
        weight = model.get_parameter(site.weight).detach()
        weight = weight.mT if site.transposed else weight
        found[site] = float((weight.double() * gradient.double()).abs().mean())
    return found


def allocated_sizes(ranks: Mapping[Site, int]) -> dict[Site, float]:
    """Site → parameters at these ranks: as values, they give ranks in proportion to these, at any budget."""
    return {site: float(site.parameters(rank)) for site, rank in ranks.items()}


def gradient_start(
    start: Pairs, ranks: Ranks, gradients: Mapping[Site, Tensor], scales: Mapping[str, float], step: float = GORA_STEP
) -> Pairs:
    """A as it is, B = −(step/scale)·√(n/r)·G·Aᵀ(A·Aᵀ)⁻¹: the update that the adapter starts with is the gradient seen
    through A, about as long as `step` times the gradient (GoRA's initialization, scaled as in its authors' code).
    """
    pairs: Pairs = {}
    for site, rank in ranks.items():
        if rank:
            a = start[site.path][0]
            length = step / scales[site.path] * math.sqrt(site.shape[1] / rank)
            b = -length * gradients[site].cpu().double() @ torch.linalg.pinv(a.double())
            pairs[site.path] = (a, b.float())
    return pairs
