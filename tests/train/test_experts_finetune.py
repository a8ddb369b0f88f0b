"""`finetune --target experts` trains the experts alone and saves their deltas; a run can start from them."""

from __future__ import annotations

import json
from pathlib import Path

import experts
import pytest
import torch
from safetensors.torch import load_file
from test_finetune import restaurants
from tiny import tiny_llama

from rankwise import cli
from rankwise.core.measure import from_difference
from rankwise.models.adapt import ADAPTER, adapt, lora_layers
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.ranks.deltas import open_deltas
from rankwise.train.adapter import warm_start

FAMILIES = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3")
SHAPE = "--target experts --subset_ratio 1 --gradient_accumulation 1 --lr 1e-3 --max_samples 6 --use_cpu".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → a folder with base/ and run/."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        experts.saved(family, folder / "base")
        words = ["finetune", "--model_name", str(folder / "base"), "--task", "e2e_nlg", "--save", "both"]
        words += ["--data_path", str(restaurants(folder)), "-o", str(folder / "run"), *SHAPE]
        assert cli.main(words) == 0
        found[family] = folder
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_alone_move_and_their_deltas_are_saved(runs: dict[str, Path], family: str) -> None:
    folder = runs[family]
    before, after = (
        dict(load_model(str(place), torch.float32).named_parameters())
        for place in (folder / "base", folder / "run" / "finetuned")
    )
    sites = {site.weight: site for site in model_sites(load_model(str(folder / "base"), torch.float32)).values()}
    held = {name for name, site in sites.items() if site.experts}
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == held
    (file,) = (folder / "run" / "deltas").glob("*.safetensors")
    saved = load_file(file)
    assert saved.keys() == held
    for name, delta in saved.items():
        torch.testing.assert_close(delta, after[name].detach() - before[name].detach(), rtol=0, atol=1e-6)
        assert all(bool(one.any()) for one in delta), "every expert met a token"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_them_expert_by_expert(runs: dict[str, Path], family: str) -> None:
    """At full rank base + adapter is base + delta, in PEFT's own product; an expert without one keeps its start."""
    folder = runs[family]
    source = open_deltas(folder / "run")
    model = load_model(str(folder / "base"), torch.float32)
    sites = choose_sites(model_sites(model), "experts")
    plan = uniform_plan(sites, 1000, None, False, "x")
    adapted = adapt(model, plan, LoraSection())
    warm_start(adapted, plan, source, torch.Generator().manual_seed(0))
    (file,) = (folder / "run" / "deltas").glob("*.safetensors")
    saved = load_file(file)
    for path, layer in lora_layers(adapted).items():
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER).detach(), saved[path], rtol=1e-3, atol=1e-6)


def test_an_expert_that_did_not_move_can_still_learn(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["llama4_text"]
    source = open_deltas(folder / "run")
    still = Still(source)
    model = load_model(str(folder / "base"), torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model), "experts"), 2, None, False, "x")
    adapted = adapt(model, plan, LoraSection())
    warm_start(adapted, plan, still, torch.Generator().manual_seed(0))
    for layer in lora_layers(adapted).values():
        delta = layer.get_delta_weight(ADAPTER).detach()
        assert [bool(one.any()) for one in delta] == [True, False, True, True]
        rows = layer.lora_A[ADAPTER].weight.reshape(4, 2, -1)[1]
        columns = layer.lora_B[ADAPTER].weight[:, 1::4]
        assert bool(rows.any()) != bool(columns.any()), "one factor is zero, not both"


class Still:
    """Deltas of which the second expert's are zero."""

    def __init__(self, source: object) -> None:
        self.source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def expert(self, site: object, expert: int) -> object:
        found = self.source.expert(site, expert)  # type: ignore[attr-defined]
        return from_difference(found.matrix * (expert != 1), 1.0)


def test_a_lora_probe_of_the_experts(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["mixtral"]
    words = ["finetune", "--model_name", str(folder / "base"), "--task", "e2e_nlg", "--method", "lora", "--lora_r", "3"]
    assert cli.main([*words, "--data_path", str(folder / "trainset.csv"), "-o", str(tmp_path / "run"), *SHAPE]) == 0
    sites = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert all("experts" in row["path"] for row in sites["sites"])


def test_target_experts_of_a_model_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    words = ["finetune", "--model_name", str(base), "--task", "e2e_nlg", "--data_path", str(restaurants(tmp_path))]
    assert cli.main([*words, "-o", str(tmp_path / "run"), *SHAPE]) == 2
    assert "--target experts matches no matrix" in capsys.readouterr().err
