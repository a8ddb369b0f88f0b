"""Our own network, and the orthonormal bases that it computes: what must hold whatever it has learnt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.features.approximation import best_errors, by_gram, normalised, singular_values
from rankwise.features.measures import excess_error, relative_error
from rankwise.features.nets.base import FactorizerSettings
from rankwise.features.nets.subspace import BLOCK, TOLERANCE, Subspace, inverse_cholesky, orthonormal
from rankwise.features.trained import load_factorizer, save_factorizer

TOKENS, CHANNELS, RANK = 64, 192, 32


def matrices(count: int, decay: float = 0.7, shape: tuple[int, int] = (TOKENS, CHANNELS), seed: int = 0) -> Tensor:
    """Random matrices whose singular values fall like i^-decay, normalised."""
    generator = torch.Generator().manual_seed(seed)
    left, values, right = torch.linalg.svd(torch.randn(count, *shape, generator=generator), full_matrices=False)
    values = torch.arange(1, values.shape[-1] + 1) ** -decay
    return normalised((left * values) @ right)


def excess(net: Subspace, features: Tensor) -> Tensor:
    best = best_errors(singular_values(features))[:, net.settings.rank - 1]
    with torch.no_grad():
        return excess_error(relative_error(features, net.eval()(features).factors.product()), best)


def subspace(steps: int = 1, tokens: int = TOKENS, channels: int = CHANNELS) -> Subspace:
    torch.manual_seed(0)
    return Subspace(FactorizerSettings("Subspace", tokens, channels, RANK), steps)


# --- orthonormal bases ---------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 3), rows=st.integers(1, 90), columns=st.integers(1, 90), seed=st.integers(0, 9))
def test_a_basis_is_orthonormal_and_spans_the_columns(batch: int, rows: int, columns: int, seed: int) -> None:
    rows = max(rows, columns)
    given_columns = torch.randn(batch, rows, columns, generator=torch.Generator().manual_seed(seed))
    basis = orthonormal(given_columns)
    assert torch.allclose(basis.mT @ basis, torch.eye(columns).expand(batch, -1, -1), atol=2 * TOLERANCE)
    assert torch.allclose(basis @ (basis.mT @ given_columns), given_columns, atol=1e-2 * given_columns.abs().max())


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_the_inverse_of_the_cholesky_factor_is_lapacks(size: int) -> None:
    square = torch.randn(2, size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    gram = square @ square.mT
    wanted = torch.linalg.inv(torch.linalg.cholesky(gram))
    assert torch.allclose(inverse_cholesky(gram), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", ["zero", "repeated", "almost repeated", "steep"])
def test_one_hard_matrix_in_a_batch_is_done_right_and_leaves_the_others_alone(broken: str) -> None:
    columns = torch.randn(3, 80, 40, generator=torch.Generator().manual_seed(1))
    alone = orthonormal(columns[::2])
    if broken == "zero":
        columns[1] = 0
    elif broken == "repeated":
        columns[1, :, 7] = columns[1, :, 3]
    elif broken == "almost repeated":
        columns[1, :, 39] = columns[1, :, 0] + 1e-5 * columns[1, :, 1]
    else:
        columns[1] = columns[1] @ (10.0 ** -torch.arange(40).float() * torch.randn(40, 40))
    basis = orthonormal(columns)
    assert torch.equal(basis[::2], alone)
    assert torch.allclose(basis[1].mT @ basis[1], torch.eye(40), atol=1e-5)


# --- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 1.2, 3.0])
def test_one_step_is_close_to_the_optimum_and_never_beyond(decay: float) -> None:
    features = matrices(4, decay)
    best = best_errors(singular_values(features))[:, RANK - 1]
    with torch.no_grad():
        error = relative_error(features, subspace().eval()(features).factors.product())
    assert (error > best * (1 - 1e-4)).all()
    assert (error < 1.12 * best + 5e-4).all(), "a Gram matrix in float32 resolves nothing below √ε of the norm"


def test_every_step_comes_closer() -> None:
    features = matrices(6)
    errors = [float(excess(subspace(steps), features).mean()) for steps in (0, 1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.3 * errors[0]
    assert errors[3] < 0.01


def test_the_shift_is_worth_its_place() -> None:
    features, net = matrices(6), subspace()
    shifted = float(excess(net, features).mean())
    with torch.no_grad():
        net.shifts.fill_(-1.0)  # sigmoid(−100) = 0
    assert float(excess(net, features).mean()) > 1.3 * shifted


def test_low_rank_matrices_are_met_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(3, TOKENS, 20, generator=generator) @ torch.randn(3, 20, CHANNELS, generator=generator)
    features = low / low.std()  # of rank 20 < 32; normalising would add the rank of the means
    with torch.no_grad():
        error = relative_error(features, subspace().eval()(features).factors.product())
    assert (error < 1e-3).all()


@pytest.mark.parametrize(("tokens", "channels"), [(TOKENS, CHANNELS), (CHANNELS, TOKENS), (RANK, CHANNELS)])
def test_wide_tall_and_full_rank(tokens: int, channels: int) -> None:
    features = matrices(3, shape=(tokens, channels))
    factors = subspace(tokens=tokens, channels=channels).eval()(features).factors
    assert factors.left.shape == (3, tokens, RANK) and factors.right.shape == (3, RANK, channels)
    best = relative_error(features, by_gram(features, RANK).product())
    assert (relative_error(features, factors.product()) <= 1.2 * best + 1e-3).all()


def test_training_and_evaluation_compute_the_same() -> None:
    features, net = matrices(3), subspace()
    with torch.no_grad():
        training, evaluated = net.train()(features).factors.product(), net.eval()(features).factors.product()
    assert torch.allclose(training, evaluated, atol=2e-3)


def test_the_products_precision_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    subspace().eval()(matrices(1))
    assert torch.get_float32_matmul_precision() == before


def test_the_error_has_a_gradient_in_start_and_shift_and_falls_along_it() -> None:
    features, net = matrices(8), subspace().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    losses = []
    for _ in range(25):
        loss = (net(features).factors.product() - features).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(one.grad.abs().sum() > 0) for one in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_save_and_load(tmp_path: object) -> None:
    net = subspace().eval()
    save_factorizer(net, str(tmp_path))
    features = matrices(2, seed=5)
    assert torch.equal(load_factorizer(str(tmp_path))(features).factors.left, net(features).factors.left)
