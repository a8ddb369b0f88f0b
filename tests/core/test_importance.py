"""AdaLoRA's scores and budget: formulas against a loop over single numbers and against PEFT's own allocator."""

from __future__ import annotations

from types import SimpleNamespace

import peft.tuners.adalora.layer as peft_adalora
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankwise.core.rank_budget import Importance, RankBudget, kept, triplet_scores
from rankwise.errors import UsageError
from rankwise.options.features import AllocatorSection


def steps_of(shape: tuple[int, ...], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(count)]


def test_averages_are_those_of_a_loop_over_numbers() -> None:
    beta1, beta2 = 0.7, 0.4
    steps = steps_of((2, 3), 5)
    importance = Importance(beta1, beta2)
    for value, gradient in steps:
        importance = importance.updated({"w": value}, {"w": gradient})
    for row in range(2):
        for column in range(3):
            mean = stray = 0.0
            for value, gradient in steps:
                now = abs(float(value[row, column]) * float(gradient[row, column]))
                mean = beta1 * mean + (1 - beta1) * now
                stray = beta2 * stray + (1 - beta2) * abs(now - mean)
            assert float(importance.sensitivity["w"][row, column]) == pytest.approx(mean, rel=1e-5)
            assert float(importance.uncertainty["w"][row, column]) == pytest.approx(stray, rel=1e-5)
            assert float(importance.score("w")[row, column]) == pytest.approx(mean * stray, rel=1e-5)


def test_updating_leaves_the_old_value_as_it_was() -> None:
    (value, gradient), (second, other) = steps_of((4,), 2)
    first = Importance().updated({"w": value}, {"w": gradient})
    before = first.score("w").clone()
    first.updated({"w": second}, {"w": other})
    assert torch.equal(first.score("w"), before)


def test_scores_need_no_graph() -> None:
    weight = nn.Parameter(torch.ones(3))
    found = Importance().updated({"w": weight}, {"w": torch.ones(3)})
    assert not found.score("w").requires_grad


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_smoothing_factors_have_bounds(beta: float) -> None:
    with pytest.raises(UsageError, match="beta2"):
        Importance(beta2=beta)


def test_a_triplet_is_its_scale_and_the_means_of_its_sides() -> None:
    scale, left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.ones(2, 2, 5)
    assert triplet_scores(scale, left, right).tolist() == [1 + 2 + 1, 2 + 0 + 1]
    assert triplet_scores(scale[:, 0], left, right).tolist() == [4, 3]


class Triplet(nn.Module):
    """One SVD-form weight with the parameter names by which PEFT's allocator finds it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"lora_A": (rank, 5), "lora_E": (rank, 1), "lora_B": (7, rank)}
        for name, shape in shapes.items():
            holder = nn.ParameterDict({"default": nn.Parameter(torch.randn(shape, generator=generator))})
            self.add_module(name, holder)


def test_agrees_with_pefts_allocator_step_by_step() -> None:
    rank, total = 6, 24
    settings = SimpleNamespace(beta1=0.85, beta2=0.85, target_r=2, tinit=4, tfinal=5, total_step=total, deltaT=3)
    model = Triplet(rank)
    peers = peft_adalora.RankAllocator(model, settings, "default")
    budget = RankBudget(rank, 2 / rank, 4, 5, 3, total)
    ours, acting = Importance(), torch.ones(rank, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, budget.end):
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        ours = ours.updated(parameters, gradients)
        wanted, pattern = peers.update_and_allocate(model, step)
        for name in parameters:
            assert torch.allclose(ours.score(name), peers._element_score(name), rtol=1e-5)
        assert budget.at(step) == wanted
        assert budget.masks_at(step) == (pattern is not None)
        if pattern is not None:
            a, e, b = (ours.score(f"lora_{letter}.default") for letter in "AEB")
            mask = kept(triplet_scores(e, a, b.mT), wanted)
            assert mask.tolist() == pattern["lora_E.default"]
            acting = kept(triplet_scores(e, a, b.mT), wanted, among=acting)
    assert int(acting.sum()) == budget.at(budget.end - 1) < rank


def test_budget_is_the_cubic_of_the_paper() -> None:
    budget = RankBudget(
        rank=128, keep_ratio=0.25, init_warmup=1000, final_warmup=1000, mask_interval=20, total_steps=4000
    )
    assert [budget.at(step) for step in (0, 1000, 3000, 4000)] == [128, 128, 32, 32]
    assert budget.at(2000) == 32 + (128 - 32) // 8
    assert budget.at(1500) == int(32 + 96 * 0.75**3)


@given(st.data())
def test_budget_falls_from_all_to_the_share(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 300))
    init = data.draw(st.integers(0, total - 1))
    final = data.draw(st.integers(0, total - 1 - init))
    rank, share = data.draw(st.integers(1, 200)), data.draw(st.floats(0.001, 1))
    budget = RankBudget(rank, share, init, final, data.draw(st.integers(1, 50)), total)
    line = [budget.at(step) for step in range(total + 1)]
    assert all(line[step] == rank for step in range(init + 1))
    assert line == sorted(line, reverse=True)
    assert set(line[budget.end :]) == {max(1, round(share * rank))} == {budget.final}
    masks = [step for step in range(total + 1) if budget.masks_at(step)]
    assert masks[-1] == budget.end, "the final budget is reached whatever the interval"
    assert all(init < step <= budget.end for step in masks)
    assert all(step % budget.mask_interval == 0 for step in masks[:-1])


def test_too_short_a_run_names_values_that_fit() -> None:
    with pytest.raises(UsageError, match=r"640 optimizer steps.*example 128 and 128.*more than 2000") as caught:
        RankBudget(128, 0.25, 1000, 1000, 20, total_steps=640)
    assert caught.value.exit_code == 2
    assert RankBudget(128, 0.25, 128, 128, 20, total_steps=640).at(640) == 32
    assert RankBudget(128, 0.25, 1000, 1000, 20, total_steps=2001).at(2001) == 32


@pytest.mark.parametrize("total", [1, 2, 3, 4, 9])
def test_the_values_it_names_fit_however_short_the_run(total: int) -> None:
    with pytest.raises(UsageError, match=f"example {total // 5} and {total // 5}"):
        RankBudget(8, 0.5, total, 0, 1, total)
    assert RankBudget(8, 0.5, total // 5, total // 5, 1, total).at(total) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"mask_interval": 0}, "mask_interval is 0"),
        ({"init_warmup": -1}, "init_warmup is -1"),
        ({"final_warmup": -1}, "final_warmup is -1"),
    ],
)
def test_values_out_of_bounds_are_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=f"--allocator_{named}; give a number"):
        AllocatorSection(**{f"allocator_{name}": value for name, value in change.items()})


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_exactly_the_budget_stays_and_it_is_the_best(scores: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, len(scores)))
    mask = kept(torch.tensor(scores, dtype=torch.float32), budget).tolist()
    assert sum(mask) == budget
    inside = [score for score, stays in zip(scores, mask, strict=True) if stays]
    outside = [score for score, stays in zip(scores, mask, strict=True) if not stays]
    assert not inside or not outside or min(inside) >= max(outside)
    if inside and outside and min(inside) == max(outside):
        tied = [stays for score, stays in zip(scores, mask, strict=True) if score == min(inside)]
        assert tied == sorted(tied, reverse=True), "of equal scores the first stay"


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_what_is_out_stays_out(acting: list[bool], data: st.DataObject) -> None:
    among = torch.tensor(acting)
    budget = data.draw(st.integers(0, len(acting)))
    scores = torch.where(among, 0.0, 1.0)
    mask = kept(scores, budget, among)
    assert not bool((mask & ~among).any())
    assert int(mask.sum()) == min(budget, sum(acting))
