"""What ranks can be decided from besides σ² of the delta, each as a spectrum or as gains per further rank.

weight      σ² of Δ                                     (core.measure; nothing runs)
activation  σ² of Δ in the metric of the site's inputs  → output_change_spectra
loss        share of the loss drop of each direction    → loss_gains
EVA         variance of the site's inputs               → input_spectra
LoRA-GA     σ² of the first gradient                    → gradient_spectra
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.core.factors import leading_svd
from rankwise.core.measure import Delta, exact_spectrum, from_difference
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.score.signals import Batch, covariances, in_input_metric, loss_shares, mean_gradients, path_gradients

Read = Callable[[Site], Delta]


def input_spectra(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[Site, Spectrum]:
    """Spectrum of each site's inputs: σ² are the eigenvalues of their second moments, shares are EVA's
    explained-variance ratios."""
    spectra = {}
    for site, covariance in covariances(model, sites, batches).items():
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
        values = eigenvalues.sqrt()[: site.full_rank]
        spectra[site] = Spectrum(values, float(eigenvalues.sum()), site.shape, method="inputs", complete=True)
    return spectra


def gradient_spectra(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[Site, Spectrum]:
    """Spectrum of each site's mean gradient at the base."""
    gradients = mean_gradients(model, sites, batches)
    return {site: whole_spectrum(gradient, "gradient") for site, gradient in gradients.items()}


def output_change_spectra(
    model: nn.Module, sites: Sequence[Site], read: Read, batches: Sequence[Batch]
) -> dict[Site, Spectrum]:
    """Spectrum of each delta in the metric of its inputs: energy is the expected squared change of the output."""
    found = covariances(model, sites, batches)
    return {site: whole_spectrum(in_input_metric(read(site), found[site]).matrix, "delta × inputs") for site in sites}


def whole_spectrum(matrix: Tensor, method: str) -> Spectrum:
    return exact_spectrum(matrix, from_difference(matrix).energy, method)


def loss_gains(
    model: nn.Module, deltas: Mapping[Site, Tensor], batches: Sequence[Batch], up_to: int
) -> tuple[dict[Site, Tensor], float]:
    """Gains per further rank in nats per token, and the loss drop that they add up to (all directions).

    Taken in the order of σ, because truncation keeps leading directions; the allocator pools what is not concave.
    """
    gradients = path_gradients(model, deltas, batches)
    triplets = {site: leading_svd(delta, site.full_rank) for site, delta in deltas.items()}
    shares = loss_shares(triplets, gradients)
    return {site: share[:up_to] for site, share in shares.items()}, sum(float(s.sum()) for s in shares.values())
