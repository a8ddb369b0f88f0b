"""What an estimate says of experts: the copies that PEFT makes, the products of routed tokens alone, and 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from experts_trained import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.core.site import Site
from rankwise.models.adapt import adapt
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.estimate.cost import QUANTIZED
from rankwise.train.estimate.gpus import CARDS
from rankwise.train.estimate.shapes import Hardware, Rows, Shapes, Way, measure_way
from rankwise.train.estimate.trace import empty, trace_step

GPU = Hardware((CARDS["h100"],), torch.bfloat16, torch.bfloat16)
VOCABULARY = 96


def base_of(family: str, device: str = "meta", **sizes: Any) -> Any:
    config = AutoConfig.for_model(family, **{"vocab_size": VOCABULARY} | experts.FAMILIES[family](48) | sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def shapes_of(family: str, target: str, rank: int = 2, **sizes: Any) -> Shapes:
    base = base_of(family, **sizes)
    return Shapes(base, uniform_plan(sites_of(base, target), rank, None, False, "x"), LoraSection(), (), None)


def sites_of(base: Any, target: str) -> dict[str, Site]:
    return choose_sites(model_sites(base), target)


def batch_of(count: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_without_weights_is_that_of_a_real_step(family: str, checkpointing: bool) -> None:
    """Whatever the router would say: how much there is to hold and to do does not depend on it."""
    traces = []
    for device in ("meta", "cpu"):
        base = base_of(family, device)
        model = adapt(base, uniform_plan(sites_of(base, "both"), 2, None, False, "x"), LoraSection())
        model.config.use_cache = False
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model = empty(model, torch.float32) if device == "meta" else model
        traces.append(trace_step(model, batch_of(2, 24)))
    assert traces[0].flops == pytest.approx(traces[1].flops, rel=0.02)
    assert traces[0].peak == pytest.approx(traces[1].peak, rel=0.05)


def test_every_layers_experts_are_held_once_more() -> None:
    """W + s·B·A of each layer, in the base's precision, until the backward pass has come to it; with checkpointing
    those of one layer at a time."""
    peaks: dict[tuple[int, bool], int] = {}
    sizes = {"intermediate_size": 512, "hidden_size": 64}
    for layers in (2, 4):
        shapes = shapes_of("mixtral", "experts", num_hidden_layers=layers, **sizes)
        held = 2 * sum(site.size for site in sites_of(shapes.base, "experts").values()) // layers
        for checkpointing in (False, True):
            empty(shapes.model, torch.bfloat16)
            shapes.set_checkpointing(checkpointing, {})
            peaks[layers, checkpointing] = trace_step(shapes.model, batch_of(1, 4), autocast=torch.bfloat16).peak
    assert 0.95 * 2 * held < peaks[4, False] - peaks[2, False] < 1.2 * 2 * held
    assert peaks[4, True] - peaks[2, True] < 0.2 * held
    attention = shapes_of("mixtral", "attention_only", num_hidden_layers=4, **sizes)
    empty(attention.model, torch.bfloat16)
    assert trace_step(attention.model, batch_of(1, 4), autocast=torch.bfloat16).peak < 0.5 * held


def test_products_are_those_of_the_experts_that_a_token_goes_to() -> None:
    """Three products forward and back for top-k of E, not for all of them."""
    flops = {}
    for k in (1, 2, 4):
        shapes = shapes_of("mixtral", "experts", num_experts_per_tok=k)
        empty(shapes.model, torch.bfloat16)
        flops[k] = trace_step(shapes.model, batch_of(2, 32)).flops
    one = 2 * 64 * (96 * 64 + 64 * 48)  # of a layer: 64 tokens, gate_up (2·48 × 64) and down (64 × 48)
    first = 2 * 64 * 96 * 64  # nothing trains before the first layer's experts: their input needs no gradient
    assert flops[2] - flops[1] == pytest.approx(2 * 3 * one - first, rel=1e-6)
    assert flops[4] - flops[2] == pytest.approx(2 * (2 * 3 * one - first), rel=1e-6)


def test_experts_of_a_four_bit_base_are_counted_in_16_bits(tmp_path: Path) -> None:
    shapes = shapes_of("mixtral", "experts")
    arguments = build_arguments(tmp_path, 1, {"use_cpu": True})
    way = Way("", "", "4bit", False)
    fixed = measure_way(shapes, way, GPU, Rows(None, 0, None, 16), arguments).profile.fixed
    base = base_of("mixtral")
    sites = model_sites(base)
    held = sum(site.size for site in sites.values() if site.experts)
    linear = sum(site.size for site in sites.values() if not site.experts)
    whole = sum(parameter.numel() for parameter in base.parameters()) - held - linear
    assert fixed.weights == pytest.approx(2 * held + QUANTIZED["4bit"] * linear + 4 * whole, rel=1e-6)
