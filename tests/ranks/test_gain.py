"""Laws of running a model on its deltas: weights come back, shares are of the real loss, signals are what they say."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import torch
from planted import generator, planted
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise.core.factors import leading_svd
from rankwise.core.measure import energy_of, from_difference
from rankwise.core.site import Site, describe
from rankwise.evaluate.likelihood import answer_losses
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.ranks.gain import (
    arms_of,
    gain_kept,
    gradient_spectra,
    input_moments,
    input_spectra,
    loss_gains,
    loss_shares,
    mean_gradients,
    moved,
    only_trainable,
    output_change_spectra,
    path_gradients,
    summarise,
)

Batch = dict[str, Tensor]


def batches(vocabulary: int = 64, seed: int = 0) -> list[Batch]:
    """Two batches of three rows of unequal length, padded right; labels on the second half of each row."""
    draw, found = generator(seed), []
    for _ in range(2):
        ids = torch.randint(3, vocabulary, (3, 10), generator=draw)
        mask = (torch.arange(10)[None] < torch.tensor([[10], [7], [8]])).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(10)[None] < 4), -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(str(tiny_llama(tmp_path_factory.mktemp("llama"))), torch.float32).eval()


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    """Conv1D weights are stored (in, out); attn.c_proj is square, so that its shape does not give it away."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def deltas_of(model: nn.Module, size: float = 0.02) -> dict[Site, Tensor]:
    return {site: size * planted(*site.shape, 4, 0.1, i) for i, site in enumerate(model_sites(model).values())}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_moved_model_computes_with_the_delta_and_comes_back_bit_for_bit(
    request: pytest.FixtureRequest, name: str
) -> None:
    model = request.getfixturevalue(name)
    deltas = deltas_of(model, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    site = next(s for s in deltas if s.path.endswith(("attn.c_proj", "o_proj")))
    inputs = torch.randn(5, site.shape[1], generator=generator(0))
    plain = model.get_submodule(site.path)(inputs)
    with contextlib.suppress(KeyboardInterrupt), moved(model, deltas):
        assert torch.allclose(model.get_submodule(site.path)(inputs) - plain, inputs @ deltas[site].T, atol=1e-5)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_full_rank_keeps_everything_and_rank_zero_nothing(request: pytest.FixtureRequest, name: str) -> None:
    model = request.getfixturevalue(name)
    data, sites = batches(), model_sites(model).values()
    deltas = {s: -0.5 * g for s, g in mean_gradients(model, list(sites), data).items()}
    arms = {
        "plan": {s: s.full_rank for s in deltas},
        "uniform": {s: s.full_rank for s in deltas},
        "nothing": dict.fromkeys(deltas, 0),
        "half": {s: s.full_rank // 4 for s in deltas},
    }
    gain = gain_kept(model, deltas, arms, functools.partial(answer_losses, batches=data), seed=0)
    assert gain.defined
    assert gain.base_loss > gain.tuned_loss
    assert gain.arm("plan").kept == pytest.approx(1.0, abs=1e-4)
    assert (gain.arm("nothing").kept, gain.arm("nothing").parameters) == (pytest.approx(0.0, abs=1e-6), 0)
    assert 0 < gain.arm("half").kept < 1
    assert gain.margin == (0.0, 0.0), "paired: two equal arms differ in no resample"
    assert gain.items == 6
    assert gain.tokens == sum(int((batch["labels"] != -100).sum()) for batch in data)


def site(index: int) -> Site:
    return describe(f"layers.{index}.q_proj", (8, 8))


def test_arms_cost_what_the_plan_costs() -> None:
    plan = {site(0): 1, site(1): 3, site(2): 5}
    arms = arms_of(plan, generator(0))
    assert set(arms) == {"plan", "uniform", "inverted"} | {f"shuffled {i}" for i in range(1, 9)}
    assert {sum(ranks.values()) for ranks in arms.values()} == {9}
    assert set(arms["uniform"].values()) == {3}
    assert list(arms["inverted"].values()) == [5, 3, 1]
    assert len({tuple(ranks.values()) for name, ranks in arms.items() if "shuffled" in name}) > 1


def test_a_gain_that_touches_zero_has_no_shares() -> None:
    noise = torch.randn(40, generator=generator(0), dtype=torch.float64)
    base, tokens = torch.full((40,), 10.0, dtype=torch.float64), torch.full((40,), 5)
    arms = {"plan": {site(0): 1}, "uniform": {site(0): 1}}
    for tuned in (base.clone(), base + noise - noise.mean()):
        gain = summarise(base, tuned, tokens, {"plan": base, "uniform": tuned}, arms, 0)
        assert not gain.defined
        content = gain.as_dict()
        assert (content["arms"], content["margin"], content["defined"]) == ([], None, False)
        assert content["losses"]["plan"] == pytest.approx(2.0)


def test_intervals_are_of_ratios_of_sums_over_items() -> None:
    """A plan that keeps half of every item's gain keeps half in every resample, however unequal the items."""
    draw = generator(1)
    base = 10 + torch.rand(30, generator=draw, dtype=torch.float64)
    drop = 0.1 + torch.rand(30, generator=draw, dtype=torch.float64)
    arms = {"plan": {site(0): 1}, "uniform": {site(0): 1}}
    results = {"plan": base - drop / 2, "uniform": base - drop * torch.rand(30, generator=draw, dtype=torch.float64)}
    gain = summarise(base, base - drop, torch.ones(30), results, arms, 0)
    plan, uniform = gain.arm("plan"), gain.arm("uniform")
    assert (plan.kept, plan.low, plan.high) == pytest.approx((0.5, 0.5, 0.5))
    assert uniform.low < uniform.kept < uniform.high
    assert gain.margin is not None
    assert gain.margin[0] < plan.kept - uniform.kept < gain.margin[1]


def test_gradients_foretell_the_loss_and_leave_no_trace(llama: nn.Module) -> None:
    """d loss along a direction, against the difference of losses per token."""
    data, sites = batches(), list(model_sites(llama).values())
    state = [parameter.requires_grad for parameter in llama.parameters()]
    gradients = mean_gradients(llama, sites, data)
    assert [parameter.requires_grad for parameter in llama.parameters()] == state
    assert all(parameter.grad is None for parameter in llama.parameters())
    step = {s: 1e-4 * torch.sign(g) for s, g in gradients.items()}
    ends = []
    for direction in (1, -1):
        with moved(llama, {s: direction * d for s, d in step.items()}):
            losses, tokens = answer_losses(llama, data)
            ends.append(float(losses.sum() / tokens.sum()))
    foretold = 2 * sum(float((g * step[s]).sum()) for s, g in gradients.items())
    assert ends[0] - ends[1] == pytest.approx(foretold, rel=0.02)


def test_a_failure_in_between_gives_gradients_back_to_their_state(llama: nn.Module) -> None:
    sites = list(model_sites(llama).values())[:1]
    with contextlib.suppress(KeyboardInterrupt), only_trainable(llama, sites):
        assert sum(parameter.requires_grad for parameter in llama.parameters()) == 1
        raise KeyboardInterrupt
    assert all(parameter.requires_grad for parameter in llama.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_shares_sum_to_the_drop_over_sites_and_directions(request: pytest.FixtureRequest, name: str) -> None:
    model = request.getfixturevalue(name)
    data, deltas = batches(), deltas_of(model, 0.3)
    before, tokens = answer_losses(model, data)
    with moved(model, deltas):
        after, _ = answer_losses(model, data)
    drop = float((before.sum() - after.sum()) / tokens.sum())
    gradients = path_gradients(model, deltas, data)
    triplets = {s: leading_svd(delta, s.full_rank) for s, delta in deltas.items()}
    shares = loss_shares(triplets, gradients)
    assert sum(float(share.sum()) for share in shares.values()) == pytest.approx(drop, abs=2e-4)
    for s, delta in deltas.items():
        assert float(shares[s].sum()) == pytest.approx(-float((gradients[s] * delta).sum()), abs=1e-5)
    gains, explained = loss_gains(model, deltas, data, up_to=3)
    assert explained == pytest.approx(drop, abs=2e-4)
    assert all(len(gain) == 3 for gain in gains.values())


def test_input_moments_ignore_padding(llama: nn.Module) -> None:
    """The same rows one by one without padding give the same moments."""
    sites = [s for s in model_sites(llama).values() if s.projection in ("q_proj", "down_proj")]
    found = input_moments(llama, sites, batches())
    rows = [
        {"input_ids": ids[m.bool()][None], "attention_mask": m[m.bool()][None]}
        for batch in batches()
        for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    alone = input_moments(llama, sites, rows)
    for s in sites:
        assert torch.allclose(found[s].second, alone[s].second, atol=1e-6)
        assert torch.allclose(found[s].mean, alone[s].mean, atol=1e-6)


def test_the_activation_metric_is_the_change_of_outputs(llama: nn.Module) -> None:
    """Energy of the weighted delta = mean over tokens of ‖Δx‖²."""
    s = model_sites(llama)["model.layers.1.mlp.down_proj"]
    delta = from_difference(planted(*s.shape, 3, 0.1, 0))
    seen: list[Tensor] = []
    handle = llama.get_submodule(s.path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches():
            llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    inputs = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches(), strict=True)])
    expected = energy_of(inputs @ delta.matrix.T) / len(inputs)
    (spectrum,) = output_change_spectra(llama, [s], lambda _: delta, batches()).values()
    assert spectrum.energy_total == pytest.approx(expected, rel=1e-4)
    (inputs_spectrum,) = input_spectra(llama, [s], batches()).values()
    shares = torch.linalg.svdvals(inputs.double() - inputs.double().mean(0)).square()
    assert torch.allclose(
        inputs_spectrum.cumulative(), (shares.cumsum(0) / shares.sum())[: len(inputs_spectrum)], atol=1e-6
    )


def test_gradient_spectra_are_those_of_the_gradients(llama: nn.Module) -> None:
    sites = list(model_sites(llama).values())[:3]
    gradients = mean_gradients(llama, sites, batches())
    for s, spectrum in gradient_spectra(llama, sites, batches()).items():
        assert torch.allclose(spectrum.values, torch.linalg.svdvals(gradients[s].double()), atol=1e-6)
        assert spectrum.shape == s.shape


def test_the_loaded_model_is_float32_whatever_the_file(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(str(folder), torch.float32).parameters()} == {torch.float32}
