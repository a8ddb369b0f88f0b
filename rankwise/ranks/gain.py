"""Measurements that run the model: signals other than σ² of the delta, and the share of the loss gain a plan keeps.

weight      σ² of Δ                                     (core.measure; nothing runs)
activation  σ² of Δ in the metric of the site's inputs  → output_change_spectra
loss        share of the loss drop of each direction    → loss_gains (loss change allocation along the straight path)
EVA         variance of the site's inputs               → input_spectra
LoRA-GA     σ² of the first gradient                    → gradient_spectra

Gain kept: (L(base) − L(base + Δ truncated to the plan)) / (L(base) − L(base + Δ)) on held-out text, against uniform
rank and shuffled plans with as many parameters. The one number that a reader of a plan wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.allocate import invert, shuffle, uniform
from rankwise.core.factors import leading_svd
from rankwise.core.measure import Delta, exact_spectrum, from_difference
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum, together

Batch = Mapping[str, Tensor]
OF_THE_LOSS = ("labels", "sample_index")  # what is no input of the model (`evaluate.likelihood.BESIDE`)
# Gauss–Legendre on [0, 1] with eight points: on a tiny model that 25 steps of AdamW moved far, the shares' sum was
# 3e-5 off the real loss drop (four points: 1.4 %).
HALF = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
HALF_WEIGHTS = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)
NODES = tuple((1 + sign * node) / 2 for sign in (-1, 1) for node in HALF)
WEIGHTS = tuple(weight / 2 for weight in HALF_WEIGHTS * 2)


@dataclass(frozen=True)
class InputMoments:
    """Mean of x·xᵀ (n, n) and of x (n,) over the tokens that attention sees, float64."""

    second: Tensor
    mean: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


def input_moments(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> dict[Site, InputMoments]:
    sums = {site: torch.zeros(site.shape[1], site.shape[1], dtype=torch.float64) for site in sites}
    totals = {site: torch.zeros(site.shape[1], dtype=torch.float64) for site in sites}
    seen: dict[str, Tensor] = {}

    def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach()[seen["mask"]].double()
            sums[site] += (rows.T @ rows).cpu()
            totals[site] += rows.sum(0).cpu()

        return add

    handles = [model.get_submodule(site.path).register_forward_pre_hook(hook(site)) for site in sites]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in batches:
                seen["mask"] = batch["attention_mask"].bool()
                tokens += int(seen["mask"].sum())
                model(**{name: value for name, value in batch.items() if name not in OF_THE_LOSS})
    finally:
        for handle in handles:
            handle.remove()
    return {site: InputMoments(sums[site] / max(1, tokens), totals[site] / max(1, tokens)) for site in sites}


@contextmanager
def only_trainable(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Gradients for the sites' weights and nothing else; the previous state comes back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for site in sites:
            model.get_parameter(site.weight).requires_grad_(True)
        yield
    finally:
        for parameter, state in before.items():
            parameter.requires_grad_(state)
            parameter.grad = None


def mean_gradients(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> dict[Site, Tensor]:
    """Site → gradient (m, n) of the mean loss per scored token."""
    with only_trainable(model, sites):
        tokens = 0
        for batch in batches:
            scored = int((batch["labels"][:, 1:] != -100).sum())
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
            (output.loss * scored).backward()
            tokens += scored
        return {site: logical_gradient(model, site) / max(1, tokens) for site in sites}


def logical_gradient(model: nn.Module, site: Site) -> Tensor:
    gradient = model.get_parameter(site.weight).grad
    assert gradient is not None, "a trainable weight has a gradient after backward"
    return (gradient.mT if site.transposed else gradient).detach().clone()


def path_gradients(model: nn.Module, deltas: Mapping[Site, Tensor], batches: Sequence[Batch]) -> dict[Site, Tensor]:
    """Gradient averaged along W₀ + tΔ, t from 0 to 1, all sites moving together."""
    sites = list(deltas)
    total = {site: torch.zeros_like(delta) for site, delta in deltas.items()}
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        with moved(model, {site: node * delta for site, delta in deltas.items()}):
            for site, gradient in mean_gradients(model, sites, batches).items():
                total[site] += weight * gradient.to(total[site])
    return total


def loss_shares(
    triplets: Mapping[Site, tuple[Tensor, Tensor, Tensor]], gradients: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """Site → −σᵢ·uᵢᵀ Ḡ vᵢ in nats per token: what each singular direction took off the loss.

    Over all directions of all sites they sum to the loss drop of moving these sites (loss change allocation,
    Lan et al. 2019). The i-th of a layer's experts are one share, which rank i for each adds.
    """
    found = {
        site: -(values * torch.einsum("...mk,...mn,...kn->...k", u, gradients[site], vt)).double()
        for site, (u, values, vt) in triplets.items()
    }
    return {site: share.sum(0) if site.experts else share for site, share in found.items()}


def in_input_metric(delta: Delta, second: Tensor) -> Delta:
    """Δ·L with the inputs' second moments = L·Lᵀ: its energy is the expected squared change of the site's output."""
    n = second.shape[0]
    jitter = 1e-8 * float(second.diagonal().mean()) * torch.eye(n, dtype=second.dtype)
    root = torch.linalg.cholesky(second + jitter)
    product = from_difference((delta.matrix.double() @ root).float())
    return replace(product, unchanged=delta.unchanged, stored_as=delta.stored_as)


Read = Callable[[Site], Delta]


def input_spectra(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[Site, Spectrum]:
    """Spectrum of each site's inputs: σ² are the eigenvalues of their covariance, shares are EVA's explained-variance
    ratios (Paischer et al. 2024), as PEFT computes them."""
    spectra = {}
    for site, moments in input_moments(model, sites, batches).items():
        eigenvalues = torch.linalg.eigvalsh(moments.covariance).flip(0).clamp(min=0)
        values = eigenvalues.sqrt()[: site.full_rank]
        spectra[site] = Spectrum(values, float(eigenvalues.sum()), site.shape, method="inputs", complete=True)
    return spectra


def gradient_spectra(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[Site, Spectrum]:
    """Spectrum of each site's mean gradient at the base."""
    gradients = mean_gradients(model, sites, batches)
    return {
        site: together([whole_spectrum(matrix, "gradient") for matrix in (gradient if site.experts else [gradient])])
        for site, gradient in gradients.items()
    }


def output_change_spectra(
    model: nn.Module, sites: Sequence[Site], read: Read, batches: Sequence[Batch]
) -> dict[Site, Spectrum]:
    """Spectrum of each delta in the metric of its inputs: energy is the expected squared change of the output."""
    found = input_moments(model, sites, batches)
    return {
        site: whole_spectrum(in_input_metric(read(site), found[site].second).matrix, "delta × inputs") for site in sites
    }


def whole_spectrum(matrix: Tensor, method: str) -> Spectrum:
    return exact_spectrum(matrix, from_difference(matrix).energy, method)


def loss_gains(
    model: nn.Module, deltas: Mapping[Site, Tensor], batches: Sequence[Batch], up_to: int
) -> tuple[dict[Site, Tensor], float]:
    """Gains per further rank in nats per token, and the loss drop that they add up to (all directions).

    Taken in the order of σ, because truncation keeps leading directions; the allocator pools what is not concave.
    """
    gradients = path_gradients(model, deltas, batches)
    triplets = {site: leading(delta, site.full_rank) for site, delta in deltas.items()}
    shares = loss_shares(triplets, gradients)
    return {site: share[:up_to] for site, share in shares.items()}, sum(float(s.sum()) for s in shares.values())


@contextmanager
def moved(model: nn.Module, moves: Mapping[Site, Tensor]) -> Iterator[nn.Module]:
    """The model with (out, in) matrices, of experts (E, out, in), added to its sites' weights; put back bit for bit
    afterwards."""
    kept = {site: model.get_parameter(site.weight).detach().clone() for site in moves}
    try:
        with torch.no_grad():
            for site, move in moves.items():
                weight = model.get_parameter(site.weight)
                weight.add_((move.mT if site.transposed else move).to(weight))
        yield model
    finally:
        with torch.no_grad():
            for site, before in kept.items():
                model.get_parameter(site.weight).copy_(before)


Ranks = Mapping[Site, int]
Losses = Callable[[nn.Module], tuple[Tensor, Tensor]]
Triplets = tuple[Tensor, Tensor, Tensor]
SHUFFLES = 8
RESAMPLES = 1000


@dataclass(frozen=True)
class KeptGain:
    """Share of the gain that one assignment of ranks keeps, with its 95 % interval over held-out items."""

    name: str
    parameters: int
    loss: float
    kept: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """Losses in nats per token. `margin`: 95 % interval of kept(plan) − kept(uniform), paired over items.

    `defined` is False where the fine-tune's own gain is not clearly above 0: no share of it means anything then.
    """

    base_loss: float
    tuned_loss: float
    items: int
    tokens: int
    gain_low: float
    gain_high: float
    margin: tuple[float, float] | None = None
    arms: tuple[KeptGain, ...] = field(default_factory=tuple)

    @property
    def defined(self) -> bool:
        return self.gain_low > 0

    def arm(self, name: str) -> KeptGain:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def shuffles(self) -> tuple[KeptGain, ...]:
        return tuple(arm for arm in self.arms if arm.name.startswith("shuffled"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Where the gain is not defined there are no shares of it, only the losses."""
        shares: dict[str, Any] = {} if self.defined else {"arms": [], "margin": None}
        losses = {arm.name: arm.loss for arm in self.arms}
        return asdict(self) | shares | {"defined": self.defined, "losses": losses}


def arms_of(plan: Ranks, generator: torch.Generator, shuffles: int = SHUFFLES) -> dict[str, Ranks]:
    """The plan, and its baselines at equal parameters."""
    parameters = sum(site.parameters(rank) for site, rank in plan.items())
    arms: dict[str, Ranks] = {"plan": plan, "uniform": uniform(list(plan), parameters), "inverted": invert(plan)}
    return arms | {f"shuffled {i + 1}": shuffle(plan, generator) for i in range(shuffles)}


def truncations(deltas: Mapping[Site, Tensor], arms: Mapping[str, Ranks]) -> dict[Site, Triplets]:
    """Of every delta, as many singular triplets as the most generous arm takes."""
    most = {site: max(ranks[site] for ranks in arms.values()) for site in deltas}
    return {site: leading(delta, most[site]) for site, delta in deltas.items()}


def leading(delta: Tensor, rank: int) -> Triplets:
    """Leading singular triplets of a matrix, or of each of a layer's experts (E, m, n)."""
    if delta.dim() == 2:
        return leading_svd(delta, rank)
    u, values, vt = zip(*(leading_svd(matrix, rank) for matrix in delta), strict=True)
    return torch.stack(u), torch.stack(values), torch.stack(vt)


def at_ranks(triplets: Mapping[Site, Triplets], ranks: Ranks) -> dict[Site, Tensor]:
    """The deltas cut to these ranks."""
    moves = {}
    for site, (u, values, vt) in triplets.items():
        rank = ranks[site]
        moves[site] = (u[..., :rank] * values[..., None, :rank]) @ vt[..., :rank, :]
    return moves


def gain_kept(
    model: nn.Module, deltas: Mapping[Site, Tensor], arms: Mapping[str, Ranks], losses: Losses, seed: int
) -> Gain:
    """Measure every arm on the same items.

    Args:
        model: the base model, in evaluation mode.
        deltas: site → dense delta (m, n), of a layer's experts (E, m, n).
        arms: name → ranks over the same sites.
        losses: model → (summed negative log-likelihood per item, scored tokens per item).
        seed: of the bootstrap over items.
    """
    triplets = truncations(deltas, arms)
    base, tokens = losses(model)
    with moved(model, deltas):
        tuned, _ = losses(model)
    results = {}
    for name, ranks in arms.items():
        with moved(model, at_ranks(triplets, ranks)):
            results[name] = losses(model)[0]
    return summarise(base, tuned, tokens, results, arms, seed)


def summarise(
    base: Tensor, tuned: Tensor, tokens: Tensor, results: Mapping[str, Tensor], arms: Mapping[str, Ranks], seed: int
) -> Gain:
    """Ratios of sums, and percentile bootstrap intervals over items: the same resamples for every arm."""
    total = float(tokens.sum())
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(base), (RESAMPLES, len(base)), generator=generator)
    whole = (base - tuned)[picks].sum(1)
    per_token = whole / tokens[picks].sum(1)
    rows = []
    for name, nll in results.items():
        low, high = interval((base - nll)[picks].sum(1) / whole)
        kept = float((base - nll).sum() / (base - tuned).sum())
        spent = sum(site.parameters(rank) for site, rank in arms[name].items())
        rows.append(KeptGain(name, spent, float(nll.sum()) / total, kept, low, high))
    margin = None
    if {"plan", "uniform"} <= set(results):
        margin = interval((results["uniform"] - results["plan"])[picks].sum(1) / whole)
    losses = float(base.sum()) / total, float(tuned.sum()) / total
    return Gain(*losses, len(base), int(total), *interval(per_token), margin, tuple(rows))


def interval(samples: Tensor) -> tuple[float, float]:
    """95 % percentile interval."""
    bounds = torch.quantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(bounds[0]), float(bounds[1])
