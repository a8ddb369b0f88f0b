"""Factorizing and its cost: measures per matrix, truncation, the sweep, operations, time, intervals over images."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from factor_folders import CHANNELS, RANK, TOKENS, matrices
from torch import Tensor

from rankwise.core.factors import Factors
from rankwise.features.approximation import by_svd, normalised, shared_basis
from rankwise.features.measures import (
    GRAM,
    OF_FACTORS,
    OF_REFINED,
    PCA,
    RANDOMIZED,
    SVD,
    Closeness,
    Method,
    baselines,
    cosine,
    counted,
    eigh_flops,
    estimated,
    leading_channels,
    measure,
    mse,
    network,
    optimum,
    paired,
    principal_angles,
    qr_flops,
    relative_error,
    summary,
    svd_flops,
    sweep,
    timings,
)
from rankwise.features.nets import build
from rankwise.features.nets.base import FactorizerSettings


@pytest.fixture(scope="module")
def whole() -> Tensor:
    return normalised(matrices(7))


@pytest.fixture(scope="module")
def basis(whole: Tensor) -> Tensor:
    return shared_basis([normalised(matrices(20, seed=5))], TOKENS)


def in_batches(whole: Tensor) -> Iterable[Tensor]:
    return whole.split(3)


def measured(whole: Tensor, methods: list[Method]) -> dict[tuple[str, bool], Closeness]:
    found = measure(methods, lambda: in_batches(whole), optimum(lambda: in_batches(whole)))
    return {(one.method, one.refined): one for one in found}


def test_the_exact_methods_have_no_excess_and_nothing_is_below_them(whole: Tensor, basis: Tensor) -> None:
    net = build(FactorizerSettings("MLP", TOKENS, CHANNELS, RANK))
    generator = torch.Generator().manual_seed(0)
    found = measured(whole, [*baselines(RANK, basis, generator), network(net)])
    assert [name for name, _ in found] == [SVD, GRAM, RANDOMIZED, PCA, net.settings.arch]
    for (name, _), row in found.items():
        assert set(row.values) == set(OF_FACTORS) and row.rank == RANK
        assert all(values.shape == (7,) and values.dtype == torch.float64 for values in row.values.values())
        assert (row.values["excess_error"] >= -1e-5).all(), name
    for name in (SVD, GRAM):
        assert found[name, False].values["excess_error"].abs().max() < 1e-5
        assert found[name, False].values["principal_angle"].max() < 1e-3
    assert (found[PCA, False].values["excess_error"] > 0.01).all()
    assert (found[PCA, False].values["principal_angle"] > 0.01).all()


def test_a_row_is_the_measures_of_each_matrix_in_order(whole: Tensor, basis: Tensor) -> None:
    row = measured(whole, [baselines(RANK, basis)[3]])[PCA, False]
    for place, matrix in enumerate(whole):
        product = matrix @ basis[:RANK].mT @ basis[:RANK]
        best = float(relative_error(matrix, by_svd(matrix, RANK).product()))
        error = float((matrix - product).norm() / matrix.norm())
        assert float(row.values["relative_error"][place]) == pytest.approx(error, rel=1e-5)
        assert float(row.values["explained_energy"][place]) == pytest.approx(1 - error**2, abs=1e-5)
        assert float(row.values["excess_error"][place]) == pytest.approx(error / best - 1, abs=1e-4)
        assert float(row.values["mse"][place]) == pytest.approx(float(mse(matrix, product)), rel=1e-5)
        assert float(row.values["cosine"][place]) == pytest.approx(float(cosine(matrix, product)), rel=1e-5)


def test_refined_output_is_a_row_of_its_own(whole: Tensor) -> None:
    net = build(FactorizerSettings("MLP", TOKENS, CHANNELS, RANK, refine=True)).eval()
    found = measured(whole, [network(net, "net")])
    assert set(found) == {("net", False), ("net", True)}
    assert set(found["net", True].values) == set(OF_REFINED)
    with torch.no_grad():
        given = net(whole)
    assert given.refined is not None
    assert torch.allclose(found["net", False].values["mse"].float(), mse(whole, given.factors.product()), rtol=1e-5)
    assert torch.allclose(found["net", True].values["mse"].float(), mse(whole, given.refined), rtol=1e-5)
    assert network(net, rank=2).refine is None  # refined from all its channels only


def test_leading_channels_are_those_with_most_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(2, 6, 5, generator=generator), torch.randn(2, 5, 9, generator=generator))
    found = leading_channels(factors, 2)
    for place in range(2):
        terms = [torch.outer(factors.left[place, :, k], factors.right[place, k]) for k in range(5)]
        best = sorted(range(5), key=lambda k: -float(terms[k].norm()))[:2]
        expected = sum(terms[k] for k in best)
        assert torch.allclose(found.product()[place], expected, atol=1e-6)
    assert torch.allclose(leading_channels(factors, 5).product(), factors.product(), atol=1e-5)


def test_leading_channels_of_the_svd_are_its_truncation(whole: Tensor) -> None:
    found = leading_channels(by_svd(whole, 9), 4).product()
    assert torch.allclose(found, by_svd(whole, 4).product(), atol=1e-4)


def test_a_network_runs_without_dropout_or_gradients(whole: Tensor) -> None:
    net = build(FactorizerSettings("MLP", TOKENS, CHANNELS, RANK, dropout=0.5)).train()
    method = network(net)
    first, second = method.factorize(whole), method.factorize(whole)
    assert torch.equal(first.left, second.left) and not first.left.requires_grad
    assert method.learned and method.parameters == sum(one.numel() for one in net.parameters())
    assert method.effective_rank is None and network(net, rank=2).factorize(whole).rank == 2


def test_masked_ranks_are_the_effective_rank_and_take_no_room(whole: Tensor) -> None:
    net = build(FactorizerSettings("AdaLoRA", TOKENS, CHANNELS, RANK))
    net.mask_ranks(torch.tensor([True, False, True, False]))
    method = network(net)
    assert method.effective_rank == 2
    assert method.stored(TOKENS, CHANNELS, RANK) == 2 * (TOKENS + CHANNELS)
    assert torch.linalg.matrix_rank(method.factorize(whole).product()[0]) <= 2


def test_the_row_space_of_a_masked_network_is_that_of_the_channels_left(whole: Tensor) -> None:
    net = build(FactorizerSettings("AdaLoRA", TOKENS, CHANNELS, RANK))
    net.mask_ranks(torch.tensor([False, True, False, True]))
    (row,) = measure([network(net)], lambda: [whole], optimum(lambda: [whole]))
    with torch.no_grad():
        rows = net(whole).factors.right[:, [1, 3]]
    wanted = principal_angles(rows, by_svd(whole.double(), RANK).right).mean(-1)
    assert torch.allclose(row.values["principal_angle"], wanted, atol=1e-4)


def test_the_sweep_is_the_table_at_each_rank(whole: Tensor, basis: Tensor) -> None:
    net = build(FactorizerSettings("MLP", TOKENS, CHANNELS, RANK))
    best = optimum(lambda: in_batches(whole))
    generator = torch.Generator().manual_seed(0)
    ranks = [2, RANK, 8]
    found = sweep(ranks, lambda: in_batches(whole), best, basis, {"net": net}, generator)
    assert list(found) == [SVD, GRAM, RANDOMIZED, PCA, "net"]
    assert found["net"][2] is None  # it has four channels
    for place, rank in enumerate(ranks):
        rows = measured(whole, baselines(rank, basis))
        for name in (SVD, GRAM, PCA):
            expected = float(rows[name, False].values["relative_error"].mean())
            assert found[name][place] == pytest.approx(expected, rel=1e-4)
    for name in (SVD, RANDOMIZED, PCA):
        assert found[name][0] > found[name][1] > found[name][2]
    own = measured(whole, [network(net, "net")])["net", False].values["relative_error"]
    assert found["net"][1] == pytest.approx(float(own.mean()), rel=1e-5)


def test_operations_are_the_textbook_counts() -> None:
    tokens, channels, rank = 16, 24, 4
    batch = normalised(matrices(3, tokens, channels))
    methods = {one.name: one.flops for one in counted(baselines(rank, torch.eye(rank, channels)), batch)}
    assert methods[PCA] == 2 * tokens * channels * rank
    assert methods[GRAM] == 2 * tokens**2 * channels + 9 * tokens**3 + 2 * rank * tokens * channels
    assert methods[SVD] == svd_flops(tokens, channels)
    width = rank + 10
    products = 3 * 2 * tokens * channels * width  # X·Ω, Xᵀ·Q, X·(Xᵀ·Q)
    projected = 2 * width * tokens * channels + 2 * width**2 * channels + 9 * width**3 + 2 * rank * width * channels
    assert methods[RANDOMIZED] == products + 2 * qr_flops(tokens, width) + projected + 2 * tokens * width * rank


def test_the_exact_factors_of_the_documented_size_take_about_half_a_gigaflop() -> None:
    exact = 2 * 256**2 * 2048 + eigh_flops(256) + 2 * 128 * 256 * 2048
    assert 0.5e9 < exact < 0.65e9
    assert (
        svd_flops(256, 2048)
        == svd_flops(2048, 256)
        == min(14 * 2048 * 256**2 + 8 * 256**3, 6 * 2048 * 256**2 + 20 * 256**3)
    )


def test_a_linear_network_costs_two_operations_per_weight_and_token() -> None:
    weight = torch.randn(24, 4)
    method = Method("linear", lambda batch: Factors(batch @ weight, batch[:, :4]))
    (found,) = counted([method], torch.randn(5, 16, 24))
    assert found.flops == 2 * 16 * 24 * 4


def test_timing_takes_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def recording(name: str) -> Method:
        def factorize(batch: Tensor) -> Factors:
            calls.append(name)
            return Factors(batch[..., :2], batch[:, :2])

        return Method(name, factorize)

    found = timings([recording("a"), recording("b")], torch.randn(5, 6, 8), repeats=3)
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
    assert all(0 < one.seconds <= one.slowest < 1 for one in found.values())


def closeness(name: str, errors: list[float]) -> Closeness:
    return Closeness(name, RANK, {"relative_error": torch.tensor(errors, dtype=torch.float64)})


def test_means_are_over_matrices_and_intervals_over_images() -> None:
    rng = np.random.default_rng(0)
    by_image = rng.normal(0.5, 0.1, 12)
    tiles = np.repeat(by_image, 5) + rng.normal(0, 0.001, 60)
    groups = [str(image) for image in range(12) for _ in range(5)]
    (by_groups,) = estimated(tiles[None], groups, seed=0)
    (as_if_apart,) = estimated(tiles[None], [str(i) for i in range(60)], seed=0)
    assert by_groups["mean"] == pytest.approx(tiles.mean())
    assert by_groups["low"] < by_groups["mean"] < by_groups["high"]
    wide, narrow = (one["high"] - one["low"] for one in (by_groups, as_if_apart))
    assert wide > 1.7 * narrow  # five tiles that agree are one observation: about √5 wider
    assert wide == pytest.approx(2 * 1.96 * by_image.std() / math.sqrt(12), rel=0.2)


def test_unequal_images_count_by_their_matrices() -> None:
    (found,) = estimated(np.array([[1.0, 1.0, 1.0, 5.0]]), ["a", "a", "a", "b"], seed=0)
    assert found["mean"] == 2.0 and found["low"] == 1.0 and found["high"] == 5.0


def test_one_image_has_no_interval() -> None:
    found = summary(closeness("net", [0.3, 0.5]), ["a", "a"])
    assert found == {"relative_error": {"mean": pytest.approx(0.4), "low": None, "high": None}}


def test_paired_differences_are_on_the_same_matrices() -> None:
    """Methods that vary a lot between images and differ by a constant: the difference is known exactly."""
    errors = [0.1, 0.9, 0.4, 0.6]
    first, second = closeness("net", [error + 0.01 for error in errors]), closeness(PCA, errors)
    found = paired(first, second, list("abcd"), "relative_error")
    assert (found["network"], found["against"]) == ("net", PCA)
    assert found["mean"] == pytest.approx(0.01) and found["high"] - found["low"] < 1e-9
