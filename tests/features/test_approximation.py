"""The law of the feature part: nothing of rank r is closer than the truncated SVD; and how near each method comes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.core.factors import Factors
from rankwise.features.approximation import (
    best_errors,
    by_basis,
    by_gram,
    by_randomized,
    by_svd,
    normalised,
    restored,
    shared_basis,
    singular_values,
)
from rankwise.features.measures import (
    break_even_rank,
    cosine,
    excess_error,
    explained_energy,
    mse,
    principal_angles,
    relative_error,
    stored_numbers,
)

FLOAT32 = torch.finfo(torch.float32).eps
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 24), st.integers(2, 40), st.integers(1, 24))
POWERS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(tokens: int, channels: int, values: Tensor, seed: int) -> Tensor:
    """A matrix (T, D), float64, with these singular values."""
    sides = [torch.randn(n, len(values), generator=seeded(seed + n), dtype=torch.float64) for n in (tokens, channels)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return (left * values) @ right.mT


def batch_of(shape: tuple[int, int, int, int], power: float, seed: int) -> Tensor:
    count, tokens, channels, _ = shape
    values = torch.arange(1, min(tokens, channels) + 1, dtype=torch.float64) ** -power
    return torch.stack([planted(tokens, channels, values, 100 * seed + i) for i in range(count)]).float()


def best_at(features: Tensor, rank: int) -> Tensor:
    errors = best_errors(singular_values(features))
    return errors[..., min(rank, errors.shape[-1]) - 1]


@settings(max_examples=40)
@given(SHAPES, POWERS, st.integers(0, 5))
def test_nothing_of_rank_r_beats_the_svd(shape: tuple[int, int, int, int], power: float, seed: int) -> None:
    features, rank = batch_of(shape, power, seed), shape[3]
    generator = seeded(seed)
    basis = shared_basis([features], rank)
    random = torch.randn(features.shape[0], features.shape[1], rank, generator=generator)
    fitted = torch.linalg.lstsq(random.double(), features.double()).solution.float()
    rivals = {
        "gram": by_gram(features, rank),
        "randomized": by_randomized(features, rank, generator=generator),
        "basis": by_basis(features, basis),
        "random columns, best rows": Factors(random, fitted),
        "random": Factors(random, torch.randn(features.shape[0], rank, features.shape[2], generator=generator)),
    }
    best, exact = best_at(features, rank), relative_error(features, by_svd(features, rank).product())
    for name, factors in rivals.items():
        error = relative_error(features, factors.product())
        assert (error >= exact - 1e-5).all(), name
        assert (excess_error(error, best) >= -1e-5).all(), name
    assert (excess_error(exact, best).abs() < 2e-3).all()  # rounding, where the error itself is near none


@settings(max_examples=30)
@given(SHAPES, POWERS, st.integers(0, 5))
def test_the_gram_path_gives_the_same_product_as_the_svd(
    shape: tuple[int, int, int, int], power: float, seed: int
) -> None:
    """Wide and tall. Equal errors always; equal products where the rank falls on a gap."""
    features, rank = batch_of(shape, power, seed), shape[3]
    by_eigen, by_lapack = by_gram(features, rank), by_svd(features, rank)
    assert by_eigen.left.shape == by_lapack.left.shape and by_eigen.right.shape == by_lapack.right.shape
    first, second = (relative_error(features, one.product()) for one in (by_eigen, by_lapack))
    assert torch.allclose(first.square(), second.square(), atol=2 * FLOAT32)


@pytest.mark.parametrize(("tokens", "channels"), [(12, 40), (40, 12), (16, 16)])
def test_gram_svd_and_randomized_agree_where_there_is_a_gap(tokens: int, channels: int) -> None:
    values = torch.tensor([9.0, 7.0, 5.0, 4.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    features = planted(tokens, channels, values, 3).float()
    expected = by_svd(features, 4).product()
    assert torch.allclose(by_gram(features, 4).product(), expected, atol=1e-5)
    near = by_randomized(features, 4, oversample=3, power_iterations=3, generator=seeded(0)).product()
    assert torch.allclose(near, expected, atol=1e-5)


@pytest.mark.parametrize(("tokens", "channels"), [(10, 30), (30, 10)])
def test_best_errors_are_those_of_the_svd_at_every_rank(tokens: int, channels: int) -> None:
    features = torch.randn(3, tokens, channels, generator=seeded(1), dtype=torch.float64)
    errors = best_errors(singular_values(features))
    assert errors.shape == (3, 10) and errors.dtype == torch.float64
    for rank in range(1, 10):
        expected = relative_error(features, by_svd(features, rank).product())
        assert torch.allclose(errors[:, rank - 1], expected, rtol=1e-9)
    assert (errors[:, -1] == 0).all()
    assert torch.allclose(singular_values(features), torch.linalg.svdvals(features), rtol=1e-9)


def test_best_errors_of_a_zero_matrix_are_zero() -> None:
    assert (best_errors(singular_values(torch.zeros(2, 4, 6))) == 0).all()


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5, 2.0, 2.5, 3.0])
def test_how_far_float32_takes_the_gram_path(power: float) -> None:
    """The Gram matrix squares the spectrum, so what lies below √ε·σ₁ is lost: the squared error grows by ≤ ε."""
    values = torch.arange(1, 97, dtype=torch.float64) ** -power
    features = planted(96, 200, values, 5).float()
    best = float(best_at(features, 24))
    error = float(relative_error(features, by_gram(features, 24).product()))
    assert error**2 - best**2 < 2 * FLOAT32
    assert error / best - 1 < FLOAT32 / best**2 + 2e-6
    assert float(relative_error(features, by_svd(features, 24).product())) == pytest.approx(best, rel=1e-3)


def test_the_gram_path_is_off_on_a_steep_spectrum_and_says_what_to_do() -> None:
    """Best error 1e-5: the SVD reaches it in float32, the Gram path only in float64."""
    values = torch.cat([torch.logspace(0, -2.5, 16, dtype=torch.float64), torch.full((40,), 1.6e-6)])
    features = planted(56, 90, values, 2)
    best = float(best_at(features, 16))
    assert best < 1.2e-5
    assert float(relative_error(features, by_gram(features.float(), 16).product().double())) > 3 * best
    assert float(relative_error(features, by_svd(features.float(), 16).product().double())) < 1.05 * best
    assert float(relative_error(features, by_gram(features, 16).product())) == pytest.approx(best, rel=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(3, 20), st.integers(4, 24), st.integers(1, 8), st.integers(0, 5))
def test_no_shared_basis_is_better_for_the_pooled_tokens(
    count: int, tokens: int, channels: int, rank: int, seed: int
) -> None:
    features = torch.randn(count, tokens, channels, generator=seeded(seed)) @ torch.diag(
        torch.arange(1, channels + 1).float().pow(-0.8)
    )
    rank = min(rank, channels)
    basis = shared_basis([features[:1], features[1:]] if count > 1 else [features], rank)
    assert torch.allclose(basis @ basis.mT, torch.eye(rank), atol=1e-5)
    pooled = features.flatten(0, 1)
    own = relative_error(pooled, by_basis(pooled, basis).product())
    assert float(own) == pytest.approx(float(best_at(pooled, rank)), rel=1e-3, abs=1e-3)
    for trial in range(4):
        other = torch.linalg.qr(torch.randn(channels, rank, generator=seeded(trial))).Q.mT
        nearby = torch.linalg.qr((basis + 0.1 * other).mT).Q.mT
        for rival in (other, nearby):
            assert relative_error(pooled, by_basis(pooled, rival).product()) >= own - 1e-6


def test_a_shared_basis_does_not_depend_on_the_batches_and_is_nested() -> None:
    features = torch.randn(6, 9, 12, generator=seeded(4))
    whole, parts = shared_basis([features], 5), shared_basis(features.split(2), 5)
    assert float(principal_angles(whole, parts).max()) < 1e-5
    assert torch.allclose(shared_basis([features], 3).abs(), whole[:3].abs(), atol=1e-5)


def test_a_basis_row_is_one_for_all_matrices() -> None:
    features = torch.randn(2, 3, 9, 12, generator=seeded(4))
    factors = by_basis(features, shared_basis([features], 4))
    assert factors.left.shape == (2, 3, 9, 4) and factors.right.shape == (2, 3, 4, 12)
    assert factors.right.stride()[:2] == (0, 0)  # stored once


def test_the_randomized_svd_is_reproducible_and_gets_better_with_iterations() -> None:
    features = batch_of((2, 40, 60, 8), 0.5, 0)
    one, same = (by_randomized(features, 8, generator=seeded(3)) for _ in range(2))
    assert torch.equal(one.left, same.left) and torch.equal(one.right, same.right)
    errors = [
        float(relative_error(features, by_randomized(features, 8, 4, steps, seeded(3)).product()).mean())
        for steps in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2] >= float(best_at(features, 8).mean()) - 1e-6


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(2, 40), st.floats(0.1, 50.0), st.floats(-20.0, 20.0))
def test_normalised_and_back(tokens: int, channels: int, scale: float, shift: float) -> None:
    features = scale * torch.randn(tokens, channels, generator=seeded(tokens)) + shift
    found = normalised(features)
    assert found.mean(-1).abs().max() < 1e-3
    assert torch.allclose(restored(found, features), features, atol=1e-3 * (scale + abs(shift)))


def test_normalised_is_float32_and_takes_a_constant_token() -> None:
    features = torch.tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 6.0]], dtype=torch.bfloat16)
    found = normalised(features)
    assert found.dtype == torch.float32 and (found[0] == 0).all()
    assert restored(found, features).dtype == torch.bfloat16
    assert torch.equal(restored(found, features), features)


def test_the_measures_of_a_matrix_by_hand() -> None:
    features = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    approximation = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert float(mse(features, approximation)) == pytest.approx(9 / 4)
    assert float(relative_error(features, approximation)) == pytest.approx(3 / 5)
    assert float(explained_energy(relative_error(features, approximation))) == pytest.approx(16 / 25)
    assert float(cosine(features, approximation)) == pytest.approx(1 / 2)
    assert float(excess_error(torch.tensor(0.66), torch.tensor(0.6))) == pytest.approx(0.1)
    assert stored_numbers(256, 2048, 128) == (128 * 2304, 256 * 2048)
    assert break_even_rank(256, 2048) == 227
    kept, whole = stored_numbers(256, 2048, break_even_rank(256, 2048))
    assert kept <= whole < stored_numbers(256, 2048, 228)[0]


@settings(max_examples=25)
@given(SHAPES, st.integers(0, 5))
def test_explained_energy_is_the_share_of_the_squares(shape: tuple[int, int, int, int], seed: int) -> None:
    features = batch_of(shape, 0.5, seed).double()
    product = by_svd(features, shape[3]).product()
    expected = product.square().sum((-2, -1)) / features.square().sum((-2, -1))  # the SVD's residual is orthogonal
    assert torch.allclose(explained_energy(relative_error(features, product)), expected, atol=1e-9)
    entries = features.shape[-1] * features.shape[-2]
    squared = mse(features, product) * entries / features.square().sum((-2, -1))
    assert torch.allclose(squared, relative_error(features, product).square(), atol=1e-12)


def test_a_matrix_that_the_svd_reproduces_has_no_excess_of_rounding() -> None:
    """Rank 3 at rank 5: both errors are rounding, and their ratio must not be read."""
    features = planted(12, 20, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 1).float()
    best = best_at(features, 5)
    for factors in (by_svd(features, 5), by_randomized(features, 5, generator=seeded(0))):
        assert float(excess_error(relative_error(features, factors.product()), best)) == pytest.approx(0, abs=1e-6)
    assert float(excess_error(torch.tensor(0.5), best)) > 1e4
    assert float(excess_error(torch.tensor(0.0), torch.tensor(0.0))) == 0


def test_an_approximation_of_a_zero_matrix() -> None:
    zero = torch.zeros(4, 5)
    assert float(relative_error(zero, zero)) == 0 and float(mse(zero, zero)) == 0
    assert math.isfinite(float(cosine(zero, zero)))


def test_principal_angles_of_equal_orthogonal_and_turned_spaces() -> None:
    basis = torch.linalg.qr(torch.randn(10, 6, generator=seeded(0), dtype=torch.float64)).Q.mT
    mixed = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64) @ basis[:3]
    assert float(principal_angles(basis[:3], mixed).max()) < 1e-6
    assert torch.allclose(principal_angles(basis[:3], basis[3:]), torch.full((3,), math.pi / 2, dtype=torch.float64))
    turned = basis[:2].clone()
    turned[1] = math.cos(0.4) * basis[1] + math.sin(0.4) * basis[5]
    angles = principal_angles(basis[:2], turned)
    assert angles.tolist() == pytest.approx([0, 0.4], abs=1e-7)
    assert (angles.diff() >= 0).all()
    assert torch.allclose(angles, principal_angles(turned, basis[:2]), atol=1e-7)
    assert principal_angles(basis[:2].expand(5, 2, 10), turned).shape == (5, 2)
