"""From what was measured to a plan: which spectra decide, by threshold or by budget.

decision = decide(settings, probe.spectra, probe.source.read, running)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankwise.core.allocate import (
    Rule,
    by_budget,
    by_threshold,
    decreasing,
    explained_by,
    next_rank,
    parse_budget,
    plan_of,
    spectral_gains,
    uniform,
)
from rankwise.core.factors import leading_svd
from rankwise.core.measure import Delta, exact_spectrum, from_difference
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum
from rankwise.ranks.gain import moved

TOLERANCE = 1e-3  # of the energy kept: the law of --budget


def upper_gains(spectra: Mapping[Site, Spectrum], normalise: str = "none") -> dict[Site, Tensor]:
    """Certified bounds of `spectral_gains`: summed up to any rank, they are not below the true ones."""
    found = {}
    for site, spectrum in spectra.items():
        sums = spectrum.values.square().cumsum(0) + spectrum.missed()
        if normalise == "site":
            sums = sums / (spectrum.energy_total or 1.0) * (1 + spectrum.rounding)
        found[site] = sums.diff(prepend=sums.new_zeros(1))
    return found


def most_gain(gains: Mapping[Site, Tensor], budget: int, rule: Rule) -> float:
    """What no plan within the budget and the rule's bounds exceeds: the best one if ranks were divisible."""
    total, left = 0.0, float(budget)
    steps: list[tuple[float, int]] = []
    for site, gain in gains.items():
        rank = rule.least(site)
        total, left = total + float(gain[:rank].sum()), left - site.parameters(rank)
        curve = decreasing(gain[rank:]).clamp(min=0)
        start = rank
        while (target := next_rank(rank, 8 if rule.round == "multiple-of-8" else 1, rule)) <= rule.most(site):
            cost = site.parameters(target - rank)
            steps.append((float(curve[rank - start : target - start].sum()) / cost, cost))
            rank = target
    for density, cost in sorted(steps, reverse=True):
        if left <= 0:
            break
        total, left = total + density * min(cost, left), left - cost
    return total


def unsettled(spectra: Mapping[Site, Spectrum], budget: int, rule: Rule, normalise: str = "none") -> list[Site]:
    """Sites to measure exactly, so that the plan keeps what exact spectra would make it keep, within TOLERANCE.

    None are left where the bounds prove that (up to one step of the allocator); else those whose bounds are widest
    where the budget would go under the upper bounds.
    """
    low, high = spectral_gains(spectra, normalise), upper_gains(spectra, normalise)
    kept = most_gain(low, budget, rule)
    if most_gain(high, budget, rule) - kept <= TOLERANCE * kept:
        return []
    ranks = by_budget(high, budget, rule)
    gaps = {site: float((high[site] - low[site])[: max(1, ranks[site])].sum()) for site in spectra}
    chosen: list[Site] = []
    left = sum(gaps.values())
    for site in sorted(gaps, key=lambda site: -gaps[site]):
        if gaps[site] <= 0 or (chosen and left <= TOLERANCE / 2 * kept):
            break
        chosen.append(site)
        left -= gaps[site]
    return chosen


Batch = Mapping[str, Tensor]

# Gauss–Legendre on [0, 1] with eight points: on a tiny model that 25 steps of AdamW moved far, the shares' sum was
# 3e-5 off the real loss drop (four points: 1.4 %).
HALF = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
HALF_WEIGHTS = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)
NODES = tuple((1 + sign * node) / 2 for sign in (-1, 1) for node in HALF)
WEIGHTS = tuple(weight / 2 for weight in HALF_WEIGHTS * 2)


def covariances(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> dict[Site, Tensor]:
    """Site → mean of x·xᵀ (n, n) over the tokens that attention sees, float64."""
    sums = {site: torch.zeros(site.shape[1], site.shape[1], dtype=torch.float64) for site in sites}
    seen: dict[str, Tensor] = {}

    def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach()[seen["mask"]].double()
            sums[site] += (rows.T @ rows).cpu()

        return add

    handles = [model.get_submodule(site.path).register_forward_pre_hook(hook(site)) for site in sites]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in batches:
                seen["mask"] = batch["attention_mask"].bool()
                tokens += int(seen["mask"].sum())
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
    return {site: total / max(1, tokens) for site, total in sums.items()}


@contextmanager
def only_trainable(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Gradients for the sites' weights and nothing else; the previous state comes back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for site in sites:
            model.get_parameter(f"{site.path}.weight").requires_grad_(True)
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
    gradient = model.get_parameter(f"{site.path}.weight").grad
    assert gradient is not None, "a trainable weight has a gradient after backward"
    return (gradient.T if site.transposed else gradient).detach().clone()


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
    Lan et al. 2019).
    """
    return {
        site: -(values * torch.einsum("mk,mn,kn->k", u, gradients[site], vt)).double()
        for site, (u, values, vt) in triplets.items()
    }


def in_input_metric(delta: Delta, covariance: Tensor) -> Delta:
    """Δ·L with covariance = L·Lᵀ: its energy is the expected squared change of the site's output."""
    n = covariance.shape[0]
    jitter = 1e-8 * float(covariance.diagonal().mean()) * torch.eye(n, dtype=covariance.dtype)
    root = torch.linalg.cholesky(covariance + jitter)
    product = from_difference((delta.matrix.double() @ root).float())
    return replace(product, unchanged=delta.unchanged, stored_as=delta.stored_as)


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


@dataclass(frozen=True)
class DecisionSettings:
    """signal: delta, activation, gradient, uniform or random; metric: weight, activation or loss."""

    rule: Rule
    budget: str | None = None
    normalise: str = "none"
    signal: str = "delta"
    metric: str = "weight"
    seed: int = 42

    @property
    def runs_the_model(self) -> bool:
        return self.metric != "weight" or self.signal in ("activation", "gradient")


@dataclass(frozen=True)
class Running:
    """A model in evaluation mode with rendered batches to run it on."""

    model: nn.Module
    batches: Sequence[Batch]


@dataclass(frozen=True)
class Decision:
    """The plan; the budget in parameters, where there was one; the loss drop that loss shares add up to."""

    plan: RankPlan
    budget: int | None = None
    explained_loss: float | None = None


def decide(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Decision:
    """Ranks of all sites. Whatever decides, the plan's rows are explained by the deltas' own spectra."""
    if settings.budget is None:
        deciding = deciding_spectra(settings, spectra, read, running)
        return Decision(RankPlan(explained_by(by_threshold(deciding, settings.rule), spectra)))
    budget = parse_budget(settings.budget, spectra)
    if settings.signal == "uniform":
        return Decision(plan_of(uniform(list(spectra), budget), spectra), budget)
    gains, explained = deciding_gains(settings, spectra, read, running)
    return Decision(plan_of(by_budget(gains, budget, settings.rule), spectra), budget, explained)


def unsettled_sites(settings: DecisionSettings, spectra: Mapping[Site, Spectrum]) -> list[Site]:
    """Sites whose sketches leave open how a budget is best divided by the deltas' own energy."""
    if settings.budget is None or settings.signal != "delta" or settings.metric != "weight":
        return []
    return unsettled(spectra, parse_budget(settings.budget, spectra), settings.rule, settings.normalise)


def deciding_spectra(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> Mapping[Site, Spectrum]:
    if not settings.runs_the_model:
        return spectra
    assert running is not None, "the stage loads a model where one is needed"
    sites = list(spectra)
    if settings.signal == "activation":
        return input_spectra(running.model, sites, running.batches)
    if settings.signal == "gradient":
        return gradient_spectra(running.model, sites, running.batches)
    return output_change_spectra(running.model, sites, read, running.batches)


def deciding_gains(
    settings: DecisionSettings, spectra: Mapping[Site, Spectrum], read: Callable[[Site], Delta], running: Running | None
) -> tuple[dict[Site, Tensor], float | None]:
    """Gains per further rank of every site, and for loss shares what they add up to."""
    if settings.signal == "random":
        return random_gains(list(spectra), settings.rule, settings.seed), None
    if settings.metric == "loss":
        assert running is not None, "the stage loads a model where one is needed"
        deltas = {site: read(site).matrix for site in spectra}
        return loss_gains(running.model, deltas, running.batches, settings.rule.max_rank)
    # EVA compares explained-variance ratios, so its gains are shares of each site's own variance.
    normalise = "site" if settings.signal == "activation" else settings.normalise
    return spectral_gains(deciding_spectra(settings, spectra, read, running), normalise), None


def random_gains(sites: Sequence[Site], rule: Rule, seed: int) -> dict[Site, Tensor]:
    """A null: every site gets a random weight, so that ranks under the budget are random but as uneven as others'."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(sites), generator=generator, dtype=torch.float64) + 0.05
    steps = torch.arange(1, rule.max_rank + 1, dtype=torch.float64)
    return {
        site: weight * sum(site.shape) / steps[: site.full_rank] for site, weight in zip(sites, weights, strict=True)
    }


def fractional_ranks(values: Sequence[float]) -> Tensor:
    """Ranks from 1, ties at their mean."""
    data = torch.tensor(list(values), dtype=torch.float64)
    below = (data[:, None] > data[None, :]).sum(1)
    equal = (data[:, None] == data[None, :]).sum(1)
    return below + (equal + 1) / 2


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation with ties; None where either side is constant or shorter than 3."""
    if len(first) < 3:
        return None
    a, b = fractional_ranks(first), fractional_ranks(second)
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else None


def repeatability(first: Mapping[Site, float], second: Mapping[Site, float]) -> tuple[float | None, float | None]:
    """Spearman over all common sites, and the mean over projections of Spearman within each.

    Within type is the honest one: that MLP matrices need more rank than attention repeats trivially.
    """
    common = [site for site in first if site in second]
    overall = spearman([first[site] for site in common], [second[site] for site in common])
    types: dict[str, list[Site]] = {}
    for site in common:
        types.setdefault(site.type_path, []).append(site)
    within = [
        rho
        for members in types.values()
        if (rho := spearman([first[site] for site in members], [second[site] for site in members])) is not None
    ]
    return overall, sum(within) / len(within) if within else None
