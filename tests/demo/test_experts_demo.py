"""The demo of a mixture: its base routes to all experts, and its small version goes the whole way to llama.cpp."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from rankwise import cli
from rankwise.demo.command import lacking_parts
from rankwise.demo.restaurants import guide
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.checkpoint import open_checkpoint
from rankwise.models.sites import model_sites
from rankwise.models.tiny import random_mixtral, save_tokenizer


def test_the_base_is_a_mixture_of_a_few_million_parameters(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, guide(random.Random(0), 150), 320)
    model = random_mixtral(tokenizer, 0)
    assert 2e6 < model.num_parameters() < 5e6
    experts = [site for site in model_sites(model).values() if site.experts]
    assert len(experts) == 2 * model.config.num_hidden_layers
    ids = tokenizer(guide(random.Random(1), 4), return_tensors="pt", padding=True)["input_ids"]
    with torch.no_grad():
        routed = model(input_ids=ids, output_router_logits=True).router_logits
    for layer in routed:
        chosen = layer.reshape(-1, 8).topk(2).indices
        assert set(chosen.flatten().tolist()) == set(range(8)), "every expert gets tokens"
    again = random_mixtral(tokenizer, 0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_the_quick_demo_of_experts_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--experts", "--quick", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert str(folder / "report.html") in printed.splitlines()[-1]
    keys = {name: open_checkpoint(folder / name).keys() for name in ("base", "merged")}
    assert "model.layers.2.block_sparse_moe.experts.7.w2.weight" in keys["base"], "each expert has tensors of its own"
    assert sorted(keys["merged"]) == sorted(keys["base"])
    plan = json.loads((folder / "ranks" / "configs" / "lora_rank_config.json").read_text(encoding="utf-8"))
    assert (
        len([name for name in plan["rank_pattern"] if "experts" in name]) == 2 * 3 and len(plan["rank_pattern"]) == 18
    )
    adapter = json.loads((folder / "train" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(adapter["target_parameters"]) == 2 * 3 and adapter["lora_dropout"] == 0.0
    assert EvaluationResult.load(folder / "after").n == EvaluationResult.load(folder / "before").n > 0
    if not lacking_parts():
        parity = json.loads((folder / "validation" / "validation.json").read_text(encoding="utf-8"))["parity"]
        assert {form: ladder["first_broken"] for form, ladder in parity.items()} == {"f16": None, "q8_0": None}
    assert cli.main(["demo", "--experts", "--quick", "-o", str(folder)]) == 0
    assert capsys.readouterr().out.count("done already") == (6 if lacking_parts() else 9), "nothing again"
