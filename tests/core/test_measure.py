"""Laws of measuring: exact energies, the fast plan is the exact plan, rounding is seen for what it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator, planted, truth
from torch import Tensor

from rankwise.core.measure import (
    Delta,
    energy_of,
    exact_spectrum,
    from_difference,
    marchenko_pastur_edge,
    measure,
    null_edge,
    sketch,
    subtract,
)
from rankwise.core.site import describe
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SpectrumSection
from rankwise.ranks.measured import Measured, noise_share, refuse_noise, unchanged_share
from rankwise.ranks.spectra import measure_site

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def asks(threshold: float, most: int) -> Callable[[Spectrum], int]:
    return lambda spectrum: spectrum.rank_for(threshold, 1, most)


@given(
    shape=st.sampled_from([(1, 1), (3, 70), (70, 3), (40, 40)]),
    base=st.sampled_from(DTYPES),
    tuned=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_a_delta_is_the_float32_difference_with_its_exact_energy(
    shape: tuple[int, int], base: torch.dtype, tuned: torch.dtype, seed: int
) -> None:
    draw = generator(seed)
    before, after = (torch.randn(shape, generator=draw).to(dtype) for dtype in (base, tuned))
    delta = subtract(before, after)
    assert torch.equal(delta.matrix, after.float() - before.float())
    assert delta.energy == pytest.approx(float(delta.matrix.double().square().sum()), rel=1e-12)
    assert delta.base_energy == pytest.approx(float(before.double().square().sum()), rel=1e-6)
    assert delta.relative_change == pytest.approx(math.sqrt(delta.energy / delta.base_energy))
    assert delta.unchanged == pytest.approx(float((delta.matrix == 0).float().mean()))


def test_energy_does_not_drift_where_float32_sums_would() -> None:
    """4 Mi equal entries in blocks: a float32 accumulator is off in the third digit."""
    matrix = torch.full((2048, 2048), 0.1)
    assert energy_of(matrix) == pytest.approx(2048**2 * float(matrix[0, 0]) ** 2, rel=1e-10)


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(90, 90), (64, 200), (200, 64)]),
    rank=st.integers(1, 12),
    noise=st.sampled_from([0.0, 1e-4, 0.05, 0.111, 0.5]),
    decay=st.sampled_from([1.0, 0.9, 0.4]),
    threshold=st.sampled_from([0.5, 0.9, 0.99]),
    seed=st.integers(0, 9999),
)
def test_the_fast_rank_is_the_exact_rank(
    shape: tuple[int, int], rank: int, noise: float, decay: float, threshold: float, seed: int
) -> None:
    delta = from_difference(planted(*shape, rank, noise, seed, decay))
    question = asks(threshold, 4)
    fast = measure(delta, 4, question, generator=generator(seed))
    slow = measure(delta, 4, question, exact=True)
    assert question(fast) == question(slow)
    assert fast.method in ("sketch", "sketch, refined bound", "exact, undecided by the sketch")
    assert slow.method == "exact"


def test_a_threshold_within_the_bound_is_decided_exactly_and_the_method_says_so() -> None:
    """The true energy at rank 3 is the threshold itself: no interval around it can decide."""
    delta = from_difference(planted(100, 120, 8, 0.02, 0, decay=0.7))
    values = truth(delta.matrix)
    threshold = float(values[:3].square().sum() / values.square().sum())
    found = measure(delta, 5, asks(threshold + 1e-9, 5), generator=generator(0))
    assert found.method == "exact, undecided by the sketch"
    assert found.rank_for(threshold + 1e-9) == 4
    assert measure(delta, 5, asks(threshold - 0.02, 5), generator=generator(0)).method.startswith("sketch")


def test_the_sketch_is_its_seed_s_doing_and_orientation_does_not_matter() -> None:
    matrix = planted(80, 150, 5, 0.1, 3)
    first, second = (sketch(matrix, energy_of(matrix), 6, generator(1)).spectrum().values for _ in range(2))
    assert torch.equal(first, second)
    turned = sketch(matrix.T, energy_of(matrix), 6, generator(1)).spectrum()
    assert turned.shape == (150, 80)
    assert torch.allclose(turned.values, first)


def test_small_matrices_are_done_exactly() -> None:
    assert measure(from_difference(torch.eye(5)), 128, asks(0.9, 5)).rank_for(0.9) == 5


def test_a_zero_delta_is_zero_and_not_an_error() -> None:
    weight = torch.randn(6, 9, generator=generator(0))
    delta = subtract(weight, weight.clone())
    assert (delta.energy, delta.unchanged, delta.noise_share, delta.relative_change) == (0.0, 1.0, 0.0, 0.0)
    assert measure(delta, 4, asks(0.9, 4)).is_zero


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_that_names_the_tensor(value: float) -> None:
    weight = torch.zeros(6, 9)
    weight[2, 3] = value
    delta = subtract(torch.zeros(6, 9), weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(delta, 4, asks(0.9, 4))
    with pytest.raises(DataError, match=r"layers\.0\.q_proj\.weight"):
        measured(delta)


def measured(delta: Delta, noise_floor: str = "none", threshold: float = 0.9) -> Measured:
    m, n = delta.matrix.shape
    config = RanksConfig(spectrum=SpectrumSection(max_rank=300, noise_floor=noise_floor))
    return measure_site(describe("layers.0.q_proj", (m, n)), delta, config, lambda site, s: s.rank_for(threshold))


def fine_tune(m: int, n: int, rms: float, dtype: torch.dtype, base: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weights of scale 0.02 before and after a change of rank 6, stored as `dtype`."""
    draw = generator(m + n)
    weight = (0.02 * torch.randn(m, n, generator=draw)).to(base or dtype)
    change = torch.randn(m, 6, generator=draw) @ torch.randn(6, n, generator=draw)
    return weight, (weight.float() + change * rms / change.square().mean().sqrt()).to(dtype)


@pytest.mark.parametrize(("m", "n", "seen"), [(256, 256, 53), (512, 512, 106), (512, 1024, 146), (1024, 1024, 207)])
def test_the_documented_rounding_example_is_refused(m: int, n: int, seen: int) -> None:
    """True rank 6; saved in bf16 with rms Δ 5e-5 on weights of 0.02 the energy rule reads dozens."""
    before, after = fine_tune(m, n, 5e-5, torch.bfloat16)
    delta = subtract(before, after)
    assert exact_spectrum(delta.matrix, delta.energy).rank_for(0.9) == pytest.approx(seen, rel=0.05)
    row = measured(delta)
    with pytest.raises(DataError, match=r"bfloat16 weights: \d+% of the delta's energy is rounding \(\d+% if the base"):
        refuse_noise({describe("a", (m, n)): row}, False, [])
    warnings: list[str] = []
    refuse_noise({describe("a", (m, n)): row}, True, warnings)
    assert "NOISE" in warnings[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moderate_rounding_is_corrected_with_a_warning(dtype: torch.dtype) -> None:
    rms = 2e-4 if dtype is torch.bfloat16 else 2.5e-5
    delta = subtract(*fine_tune(256, 512, rms, dtype))
    assert exact_spectrum(delta.matrix, delta.energy).rank_for(0.98) > 4 * 6
    row = measured(delta, threshold=0.98)
    assert row.corrected
    assert row.spectrum.rank_for(0.98) == 6
    warnings: list[str] = []
    refuse_noise({describe("a", (256, 512)): row}, False, warnings)
    assert "corrected" in warnings[0]


@settings(max_examples=10)
@given(rms=st.floats(1e-4, 1e-3), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_rounding_estimate_is_the_rounding(rms: float, dtype: torch.dtype) -> None:
    before, after = fine_tune(128, 256, rms, dtype)
    unrounded = fine_tune(128, 256, rms, torch.float32, base=dtype)[1]
    true_noise = energy_of(after.float() - unrounded)
    assert subtract(before, after).rounding_energy == pytest.approx(true_noise, rel=0.15)


def test_float32_files_that_hold_bf16_values_are_recognised() -> None:
    before, after = (weight.float() for weight in fine_tune(256, 256, 5e-5, torch.bfloat16))
    delta = subtract(before, after)
    assert delta.stored_as == "bfloat16"
    assert delta.noise_share > 0.3


def test_float32_training_from_a_bf16_base_is_not_called_noise() -> None:
    """The base's values are where the run started, exactly; only a rounded result has noise."""
    delta = subtract(*fine_tune(256, 256, 5e-5, torch.float32, base=torch.bfloat16))
    assert (delta.stored_as, delta.noise_share) == ("float32", 0.0)
    assert measured(delta).spectrum.rank_for(0.9) <= 6


def test_one_drowned_site_among_sound_ones_is_named() -> None:
    sound, drowned = describe("sound", (512, 512)), describe("drowned", (64, 64))
    rows = {
        sound: measured(subtract(*fine_tune(512, 512, 2e-4, torch.bfloat16))),
        drowned: measured(subtract(*fine_tune(64, 64, 2e-5, torch.bfloat16))),
    }
    warnings: list[str] = []
    refuse_noise(rows, False, warnings)
    assert "1 sites are mostly rounding" in warnings[-1]
    assert "drowned" in warnings[-1]
    assert noise_share(rows) < 0.1
    assert 0 < unchanged_share(rows) < 0.5


def test_the_null_edge_is_what_unstructured_entries_reach() -> None:
    """Structure stands above the largest value of its own permuted entries, noise does not."""
    structured = from_difference(planted(100, 150, 2, 0.5, 1))
    noise = from_difference(torch.randn(100, 150, generator=generator(2)))
    assert float(truth(structured.matrix)[0]) > 1.5 * null_edge(structured, generator(0))
    assert float(truth(noise.matrix)[0]) == pytest.approx(null_edge(noise, generator(0)), rel=0.1)
    assert null_edge(noise, generator(0)) == pytest.approx(marchenko_pastur_edge(noise.energy, (100, 150)), rel=0.05)


@pytest.mark.parametrize("noise_floor", ["gavish-donoho", "marchenko-pastur"])
def test_a_noise_floor_changes_the_rank_as_it_should(noise_floor: str) -> None:
    delta = from_difference(planted(150, 250, 3, 0.5, 4, decay=1.0))
    assert measured(delta).spectrum.rank_for(0.9) > 20
    assert measured(delta, noise_floor).spectrum.rank_for(0.9) == 3
