"""Rules that rank by one number per matrix: the numbers against autograd by hand, the ranks against brute force and
PEFT, and whole arms at equal parameters."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from test_study import small
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from rankwise.core.allocate import TOLERANCE, spent
from rankwise.core.site import Site, describe
from rankwise.files.ledger import Ledger
from rankwise.models.sites import model_sites
from rankwise.ranks.gain import mean_gradients
from rankwise.study import command as stage
from rankwise.study.arms import ranks_within
from rankwise.study.design import Run, design_study
from rankwise.study.importance import (
    allocated_sizes,
    diminishing,
    gradient_start,
    gradient_variance,
    items_of,
    mean_products,
)
from rankwise.train.together.alone import allocated_ranks
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import random_start

CHOSEN = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path_factory.mktemp("model"))).double().eval()


@pytest.fixture(scope="module")
def sites(model: LlamaForCausalLM) -> list[Site]:
    found = model_sites(model)
    return [found[path] for path in CHOSEN]


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """Three batches of two rows with padding and unscored prompts."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (9, 7, 11):
        ids = torch.randint(3, 300, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length - 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def loss_with(model: nn.Module, changes: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The model's loss per scored token, written out, with matrices added to some weights."""
    weights = {
        f"{path}.weight": model.get_parameter(f"{path}.weight").detach() + more for path, more in changes.items()
    }
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = torch.func.functional_call(model, weights, kwargs=given).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(chosen * (labels != -100)).sum() / (labels != -100).sum()


def test_the_variance_is_that_of_the_gradients_of_b(
    model: LlamaForCausalLM, sites: list[Site], batches: list[dict[str, Tensor]]
) -> None:
    start = random_start(dict.fromkeys(sites, 3), 5, 8)
    items = items_of(batches, 5)
    assert [len(item["labels"]) for item in items] == [1] * 5
    found = gradient_variance(model, sites, items, start, 2.0)
    gradients: dict[str, list[Tensor]] = {path: [] for path in CHOSEN}
    for item in items:
        factors = {path: torch.zeros(start[path][1].shape, dtype=torch.float64, requires_grad=True) for path in CHOSEN}
        changes = {path: 2.0 * b @ start[path][0].double() for path, b in factors.items()}
        for path, gradient in zip(
            CHOSEN, torch.autograd.grad(loss_with(model, changes, item), list(factors.values())), strict=True
        ):
            gradients[path].append(gradient)
    for site in sites:
        each = torch.stack(gradients[site.path])
        expected = (each - each.mean(0)).square().sum((1, 2)).mean()  # the same variance, from deviations
        assert found[site] == pytest.approx(float(expected), rel=1e-6)
        assert found[site] > 0


def test_the_importance_is_the_mean_of_weight_times_gradient(
    model: LlamaForCausalLM, sites: list[Site], batches: list[dict[str, Tensor]]
) -> None:
    found = mean_products(model, mean_gradients(model, sites, batches))
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    for site in sites:
        change = torch.zeros(site.shape, dtype=torch.float64, requires_grad=True)
        loss = sum(
            loss_with(model, {site.path: change}, batch) * count for batch, count in zip(batches, tokens, strict=True)
        ) / sum(tokens)
        (gradient,) = torch.autograd.grad(loss, change)
        weight = model.get_parameter(site.weight).detach()
        expected = sum(abs(float(w) * float(g)) for w, g in zip(weight.flatten(), gradient.flatten(), strict=True))
        assert found[site] == pytest.approx(expected / site.size, rel=1e-6)


def test_a_gradient_start_is_a_step_along_the_gradient_seen_through_a(
    model: LlamaForCausalLM, sites: list[Site], batches: list[dict[str, Tensor]]
) -> None:
    ranks, scales = dict.fromkeys(sites, 4), dict.fromkeys(CHOSEN, 2.0)
    gradients, drawn = mean_gradients(model, sites, batches), random_start(ranks, 1, 8)
    started = gradient_start(drawn, ranks, gradients, scales, step=0.05)
    for site in sites:
        a, b = started[site.path]
        assert torch.equal(a, drawn[site.path][0])
        rows = torch.linalg.svd(a.double(), full_matrices=False)[2]
        seen = gradients[site] @ rows.T @ rows
        expected = -0.05 * (site.shape[1] / 4) ** 0.5 * seen
        torch.testing.assert_close(2.0 * b.double() @ a.double(), expected, rtol=1e-4, atol=1e-7)


SHAPES = ((8, 8), (8, 4), (4, 12))


def small_sites() -> list[Site]:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    return [describe(f"model.layers.0.{name}", shape) for name, shape in zip(names, SHAPES, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_by_value_over_k_are_the_best_that_brute_force_finds(seed: int) -> None:
    """At a budget that the five most valuable ranks per parameter take up exactly."""
    sites, generator = small_sites(), torch.Generator().manual_seed(seed)
    values = dict(zip(sites, torch.rand(3, generator=generator, dtype=torch.float64).tolist(), strict=True))
    gains = {site: diminishing(value, 8) for site, value in values.items()}
    order = sorted(
        ((float(gains[site][k]) / site.parameters(1), site) for site in sites for k in range(site.largest_rank)),
        key=lambda each: -each[0],
    )
    taken = [site for _, site in order[:5]]
    budget = sum(site.parameters(1) for site in taken)
    found = ranks_within(gains, budget, 8)
    best = max(
        (
            sum(float(gains[site][:rank].sum()) for site, rank in zip(sites, ranks, strict=True))
            for ranks in itertools.product(*(range(site.largest_rank + 1) for site in sites))
            if sum(site.parameters(rank) for site, rank in zip(sites, ranks, strict=True)) <= budget
        ),
    )
    assert sum(float(gains[site][:rank].sum()) for site, rank in found.items()) == pytest.approx(best, abs=1e-12)


def test_values_share_out_parameters_and_known_ranks_come_back() -> None:
    sites = small_sites()
    ranks = dict(zip(sites, (2, 0, 3), strict=True))
    gains = {site: diminishing(value, 8) for site, value in allocated_sizes(ranks).items()}
    assert ranks_within(gains, spent(ranks), 8) == ranks


def rows_of(batches: list[dict[str, Tensor]]) -> list[dict[str, list[int]]]:
    return [
        {name: value[row][batch["attention_mask"][row].bool()].tolist() for name, value in batch.items()}
        for batch in batches
        for row in range(2)
    ]


def collate(rows: Any) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([list(row[name]) + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in padding.items()
    }


def test_ranks_that_adalora_leaves_are_those_of_peft(batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """A loop of PEFT, torch and nothing else, from the same random start on the same rows."""
    folder = tiny_llama(tmp_path)
    rows, steps, rate = rows_of(batches), 10, 0.02
    order = [position % len(rows) for position in range(2 * steps)]
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    sites = [site for site in model_sites(plain).values() if site.kind in ("attention", "mlp")]
    settings = ArmSettings(steps, 2)
    found = allocated_ranks(plain, sites, 2, rate, rows, order, collate, settings, 7)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not any("lora" in name for name in plain.state_dict())

    torch.manual_seed(7)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=3, deltaT=1, total_step=steps, lora_alpha=8, lora_dropout=0.0,
        target_modules=[site.path for site in sites], orth_reg_weight=0.5, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
        adapted = get_peft_model(plain, config).eval()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    for step in range(1, steps + 1):
        batch = collate([rows[place] for place in order[2 * step - 2 : 2 * step]])
        adapted(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pattern = adapted.peft_config["default"].rank_pattern
    expected = {name.removesuffix(".lora_E.default"): sum(mask) for name, mask in pattern.items()}
    assert found == expected
    assert sum(found.values()) == 2 * len(sites) and len(set(found.values())) > 1


NEW = ["uniform", "fisher", "gora", "adalora", "eva", "eva+start", "gora+start", "attention", "mlp", "shuffled:fisher"]


@pytest.fixture(scope="module")
def compared(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compared")
    primary, budgets = ["fisher vs uniform", "mlp vs attention"], ["uniform:5"]
    stage.run(small(base, data, out, arms=NEW, primary=primary, budgets=budgets, most_seeds=2))
    return out, json.loads((out / "study.json").read_text())


def test_the_arms_have_equal_parameters_and_ranks_of_their_own(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, study = compared
    rows = {row["arm"]: row["parameters"] for row in study["arms"]}
    assert list(rows) == NEW
    assert all(abs(count - rows["uniform"]) <= TOLERANCE * rows["uniform"] for count in rows.values())
    maps = {row["key"]["arm"]: row["ranks"] for row in Ledger(folder).rows.values() if row["key"]["seed"] == 42000}
    kept = {arm: json.loads((folder / "ranks" / f"{name[:16]}.json").read_text()) for arm, name in maps.items()}
    assert kept["eva"] == kept["eva-ranks"] and kept["gora"] == kept["gora+start"]
    assert len({tuple(ranks.values()) for ranks in kept.values()}) >= 6
    assert {path for path, rank in kept["mlp"].items() if not rank} == {p for p in kept["mlp"] if "self_attn" in p}
    assert {path for path, rank in kept["attention"].items() if rank} == {p for p in kept["mlp"] if "self_attn" in p}


def test_rules_give_ranks_only_and_the_started_arms_more(base: Path, data: Path, tmp_path: Path) -> None:
    """All of them draw A by site and seed, at scale 2, with B = 0."""
    config = small(base, data, tmp_path, arms=NEW, primary=["fisher vs uniform"], budgets=["uniform:5"])
    design = design_study(config)
    material = stage.load_material(config.model, config.data, config.target, config.device, stage.parts_of(config))
    registration = stage.register_study(stage.RunFolder(tmp_path), design, material)
    plans = stage.workbench(stage.RunFolder(tmp_path), design, material, registration).plans
    for contender in design.contenders:
        run = Run(contender, "constant", 1e-3, 42000, "report", "")
        arm = plans.arm(run, 2, [])
        whole = random_start(dict.fromkeys(plans.sites, 128), 42000, 128)
        assert set(arm.scales.values()) == {2.0}
        drawn = all(torch.equal(a, whole[path][0][: len(a)]) for path, (a, _) in arm.start.items())
        empty = not any(bool(b.any()) for _, b in arm.start.values())
        assert (drawn, empty) == (contender.arm != "eva+start", contender.arm != "gora+start"), contender.arm


def test_rules_of_the_base_train_no_probe(base: Path, data: Path, tmp_path: Path) -> None:
    arms = ["uniform", "fisher", "gora", "inverted:gora", "attention"]
    assert not stage.needs_probe(design_study(small(base, data, tmp_path, arms=arms)))
    for more in ("eva+start", "inverted", "plan-warm:gora", "warm", "energy"):
        assert stage.needs_probe(design_study(small(base, data, tmp_path, arms=[*arms, more])))
