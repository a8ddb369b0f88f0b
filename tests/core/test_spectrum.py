"""Laws of spectra: certified bounds hold, what is not known is refused, noise is cut where it is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator, planted, truth
from torch import Tensor

from rankwise.core.measure import energy_of, exact_spectrum, marchenko_pastur_edge, sketch
from rankwise.core.spectrum import Spectrum, Undecided


def spectrum_of(values: list[float], shape: tuple[int, int] = (8, 8)) -> Spectrum:
    exact = torch.tensor(values, dtype=torch.float64)
    return Spectrum(exact, float(exact.square().sum()), shape, complete=True)


matrices = st.builds(
    planted,
    m=st.integers(40, 90),
    n=st.integers(40, 300),
    rank=st.integers(1, 30),
    noise=st.sampled_from([0.0, 1e-8, 1e-4, 0.01, 0.3, 3.0]),
    seed=st.integers(0, 10**6),
    decay=st.sampled_from([1.0, 0.97, 0.8, 0.3]),
)


@settings(max_examples=40)
@given(matrix=matrices, up_to=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_certificate_holds(matrix: Tensor, up_to: int, seed: int) -> None:
    """True energies lie between the bounds, the refined bounds are closer, and no true rank is excluded."""
    found = sketch(matrix, energy_of(matrix), up_to, generator(seed))
    values = truth(matrix)
    energies = values.square().cumsum(0) / values.square().sum()
    wide, basis = found.wide.double(), found.basis.double()
    left_out = float(torch.linalg.matrix_norm(wide - basis @ (basis.T @ wide), 2))
    assert found.residual >= left_out - 1e-6 * float(values[0]), "below float32's own rounding of QQᵀΔ"
    for spectrum in (found.spectrum(), found.refined()):
        for k in range(1, up_to + 1):
            low, high = spectrum.energy(k)
            assert low <= energies[k - 1] <= high
        for threshold in (0.3, 0.9, 0.99):
            true_rank = int((energies < threshold).sum()) + 1
            low_rank, high_rank = spectrum.rank_bounds(threshold)
            assert low_rank <= true_rank
            assert true_rank <= high_rank or high_rank == up_to + 1
    assert bool((found.refined().upper() <= found.spectrum().upper() + 1e-12).all())


@settings(max_examples=40)
@given(matrix=matrices)
def test_exact_values_are_those_of_the_svd(matrix: Tensor) -> None:
    spectrum, values = exact_spectrum(matrix, energy_of(matrix)), truth(matrix)
    assert spectrum.complete
    assert torch.allclose(spectrum.values, values, rtol=1e-9, atol=1e-7 * float(values[0]))
    assert spectrum.energy(len(values)).low == pytest.approx(1.0, abs=1e-12)
    assert math.isclose(spectrum.energy_total, float(values.square().sum()), rel_tol=1e-12)


@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), threshold=st.floats(0.01, 1.0))
def test_the_rank_is_the_least_that_keeps_the_energy(values: list[float], threshold: float) -> None:
    spectrum = spectrum_of(sorted(values, reverse=True))
    rank = spectrum.rank_for(threshold)
    assert spectrum.energy(rank).low >= threshold - 1e-9
    assert rank == 1 or spectrum.energy(rank - 1).high < threshold


def test_energy_is_of_squares_and_of_the_whole() -> None:
    """3² of 3² + 4²·1: a truncated spectrum is not its own denominator, and σ is not σ²."""
    truncated = Spectrum(torch.tensor([4.0], dtype=torch.float64), 25.0, (8, 8))
    assert truncated.energy(1) == (16 / 25, 16 / 25)
    assert truncated.rank_for(0.64, most=1) == 1
    assert truncated.stable_rank == 25 / 16


def test_a_spectrum_refuses_what_it_cannot_answer() -> None:
    truncated = Spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 10.0, (8, 8), residual=1.0)
    with pytest.raises(Undecided, match="only 2 of 8"):
        truncated.energy(3)
    with pytest.raises(Undecided, match="not reached within the 2"):
        truncated.rank_for(0.9)
    with pytest.raises(Undecided, match="between 1 and 2"):
        truncated.rank_for(0.45, most=2)
    with pytest.raises(Undecided, match="--exact"):
        truncated.cut("gavish-donoho")
    assert truncated.entropy_rank is None
    assert truncated.rank_for(0.45, least=2, most=2) == 2, "bounds may decide what the values do not"
    with pytest.raises(AssertionError):
        Spectrum(torch.tensor([1.0]), 1.0, (8, 8))


def test_saturated_is_what_is_certain() -> None:
    values = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert Spectrum(values, 10.0, (8, 8), residual=0.5).saturated(0.9, 2)
    assert not Spectrum(values, 10.0, (8, 8), residual=2.0).saturated(0.9, 2), "the bound leaves it open"
    assert not spectrum_of([1.0, 1.0]).saturated(0.9, 2)


def test_a_zero_delta_has_no_rank_and_all_its_energy() -> None:
    zero = Spectrum(torch.zeros(4, dtype=torch.float64), 0.0, (4, 4), complete=True)
    assert zero.rank_bounds(0.9) == (0, 0)
    assert zero.energy(0) == zero.energy(2) == (1.0, 1.0)
    assert (zero.stable_rank, zero.decay_rate, zero.entropy_rank) == (0.0, 0.0, 0.0)
    assert not zero.saturated(0.9, 1)


@given(rank=st.integers(1, 8), scale=st.floats(1e-6, 1e6))
def test_numbers_of_a_flat_spectrum(rank: int, scale: float) -> None:
    """Rank many equal values: every notion of rank says so, at any scale."""
    flat = spectrum_of([scale] * rank)
    assert flat.stable_rank == pytest.approx(rank)
    assert flat.entropy_rank == pytest.approx(rank)
    assert flat.decay_rate == 0.0
    assert flat.rank_for(1.0) == rank


def test_decay_rate_counts_from_zero_to_ten() -> None:
    assert spectrum_of([math.exp(-i) for i in range(20)], (20, 20)).decay_rate == pytest.approx(10.0)
    assert spectrum_of([1.0, math.exp(-3)]).decay_rate == pytest.approx(3.0)
    assert spectrum_of([1.0, 0.0]).decay_rate == math.inf


@pytest.mark.parametrize("rule", ["gavish-donoho", "marchenko-pastur"])
@pytest.mark.parametrize(("m", "n"), [(200, 200), (120, 400), (400, 120)])
@pytest.mark.parametrize("rank", [1, 5])
def test_noise_cuts_find_the_planted_rank(rule: str, m: int, n: int, rank: int) -> None:
    """Signals 3× above the noise's edge are kept, the bulk is not."""
    draw = generator(m + rank)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=draw)).Q for side in (m, n))
    edge = math.sqrt(m) + math.sqrt(n)
    matrix = torch.randn(m, n, generator=draw) + 3 * edge * left @ right.T
    cut = exact_spectrum(matrix, energy_of(matrix)).cut(rule)
    assert len(cut) == rank
    assert cut.energy_total == float(cut.values.square().sum())


@pytest.mark.parametrize(("m", "n"), [(300, 300), (100, 400)])
def test_the_edge_of_noise_is_where_theory_has_it(m: int, n: int) -> None:
    noise = 0.01 * torch.randn(m, n, generator=generator(0))
    assert marchenko_pastur_edge(energy_of(noise), (m, n)) == pytest.approx(float(truth(noise)[0]), rel=0.03)


@settings(max_examples=20)
@given(rank=st.integers(1, 6), level=st.floats(0.05, 0.3), seed=st.integers(0, 999))
def test_removing_known_noise_finds_the_signal_s_energy(rank: int, level: float, seed: int) -> None:
    clean = planted(150, 250, rank, 0.0, seed, decay=0.9)
    noise = torch.randn(150, 250, generator=generator(seed + 1))
    noise *= level * math.sqrt(energy_of(clean) / energy_of(noise))
    noisy = exact_spectrum(clean + noise, energy_of(clean + noise))
    denoised = noisy.without_noise(energy_of(noise))
    assert denoised.rank_for(0.95) == exact_spectrum(clean, energy_of(clean)).rank_for(0.95)
    assert denoised.energy_total == pytest.approx(energy_of(clean), rel=0.05)
    assert torch.allclose(denoised.values[:rank], truth(clean)[:rank], rtol=0.05)


def test_noise_removal_from_an_even_spectrum_admits_that_it_does_not_know() -> None:
    """An orthogonal delta (Muon's) has no direction above noise of half its energy."""
    delta = torch.linalg.qr(torch.randn(64, 64, generator=generator(0)))[0]
    denoised = exact_spectrum(delta, energy_of(delta)).without_noise(32.0)
    assert float(denoised.values[0]) == 0.0
    assert denoised.stable_rank is None
    assert denoised.entropy_rank is None
    assert denoised.rank_for(0.9) == 64
