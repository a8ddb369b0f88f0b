"""Plans become exactly the PEFT shapes they name, adapters survive the disk, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    set_seed,
)

from rankwise.core.factors import truncate
from rankwise.core.measure import Delta, from_difference
from rankwise.core.plan import PlannedSite, RankPlan, load_plan
from rankwise.core.site import Site
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, read_adapter, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.models.adapt import ADAPTER, adapt, built_shapes, lora_layers, lora_pairs, quiet_peft
from rankwise.models.adapters import load_adapter, save_adapter, write_sites
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import check_plan, choose_sites, restrict_plan, scales, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.adapter import eva_start, input_directions, warm_start

IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def fresh(base: Path) -> LlamaForCausalLM:
    return load_model(str(base), torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def uneven(sites: dict[str, Site], start: int = 1) -> RankPlan:
    rows = tuple(PlannedSite(site, start + index % 7) for index, site in enumerate(sites.values()))
    return RankPlan(rows, "tiny")


def disturb(model: PeftModel, seed: int = 3) -> None:
    """As if trained: every A and B moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                part.weight.add_(torch.randn(part.weight.shape, generator=generator) * 0.1)


@settings(
    max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 40), min_size=14, max_size=14).filter(any), st.booleans())
def test_a_plan_is_built_and_read_back_in_exactly_its_shapes(
    base: Path, tmp_path: Path, ranks: list[int], rslora: bool
) -> None:
    model = fresh(base)
    sites = model_sites(model)
    written = RankPlan(tuple(PlannedSite(s, r) for s, r in zip(sites.values(), ranks, strict=True)), "tiny", rslora)
    plan = load_plan(json.loads(written.dumps()), sites, "plan")
    adapted = adapt(model, plan, LoraSection())
    wanted = {
        path: ((min(rank, site.full_rank), site.shape[1]), (site.shape[0], min(rank, site.full_rank)))
        for (path, site), rank in zip(sites.items(), ranks, strict=True)
        if rank
    }
    assert built_shapes(adapted) == wanted
    disturb(adapted)
    save_adapter(adapted, tmp_path, "tiny")
    with quiet_peft():
        again = PeftModel.from_pretrained(fresh(base), tmp_path)
    assert built_shapes(again) == wanted
    assert {p: x.scaling[ADAPTER] for p, x in lora_layers(again).items()} == pytest.approx(scales(plan))
    torch.testing.assert_close(logits(again), logits(adapted))


def test_the_scale_is_two_at_every_site_and_in_readers_that_ignore_patterns(base: Path, tmp_path: Path) -> None:
    model = fresh(base)
    adapted = adapt(model, uneven(model_sites(model)), LoraSection())
    assert {layer.scaling[ADAPTER] for layer in lora_layers(adapted).values()} == {2.0}
    save_adapter(adapted, tmp_path, "org/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 * config["r"] == 2 * max(uneven(model_sites(fresh(base))).ranks.values())
    assert config["base_model_name_or_path"] == "org/model"
    assert isinstance(config["target_modules"], str)


def test_one_rank_needs_no_patterns(base: Path) -> None:
    model = fresh(base)
    plan = uniform_plan(choose_sites(model_sites(model)), 8, 32.0, False, "tiny")
    config = adapt(model, plan, LoraSection()).peft_config[ADAPTER]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (8, 32, {}, {})


def test_known_number_of_parameters_of_tinyllama() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    plan = uniform_plan(choose_sites(model_sites(model)), 4, None, False, "tinyllama")
    adapted = adapt(model, plan, LoraSection())
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert (sum(p.numel() for p in trained), len(trained), plan.parameters) == (3_153_920, 308, 3_153_920)


def projections(sites: dict[str, Site]) -> set[str]:
    return {site.projection for site in sites.values()}


def test_targets_on_llama(base: Path) -> None:
    sites = model_sites(fresh(base))
    seven = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert projections(choose_sites(sites, "attention_only")) == {"q_proj", "v_proj"}
    assert projections(choose_sites(sites, "mlp_only")) == {"gate_proj", "up_proj", "down_proj"}
    assert projections(choose_sites(sites, "both")) == projections(choose_sites(sites)) == seven
    assert choose_sites(sites, "all") == choose_sites(sites, names=["all-linear"]) == sites
    one = "model.layers.1.mlp.up_proj"
    assert list(choose_sites(sites, names=["q_proj", one]))[-1] == one


def test_targets_and_shapes_on_fused_transposed_projections(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    before = logits(model)
    sites = model_sites(model)
    assert projections(choose_sites(sites, "attention_only")) == {"c_attn"}
    assert {site.path.split(".", 3)[-1] for site in choose_sites(sites, "mlp_only").values()} == {
        "mlp.c_fc",
        "mlp.c_proj",
    }
    adapted = adapt(model, uneven(choose_sites(sites)), LoraSection())
    torch.testing.assert_close(logits(adapted), before)
    disturb(adapted)
    save_adapter(adapted, tmp_path, "gpt2")
    pairs = read_adapter(tmp_path).pairs
    assert all(pairs[path].shape == site.shape and pairs[path].fan_in_fan_out for path, site in sites.items())


@pytest.fixture(scope="module")
def vlm_sites() -> dict[str, Site]:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    with torch.device("meta"):
        return model_sites(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


def test_the_vision_tower_is_never_adapted_unasked(vlm_sites: dict[str, Site]) -> None:
    assert "vision" in {site.tower for site in vlm_sites.values()}
    for names in ([], ["gate_proj"], ["all-linear"]):
        assert {site.tower for site in choose_sites(vlm_sites, names=names).values()} == {"language"}
    path = next(path for path, site in vlm_sites.items() if site.tower == "vision")
    for name in ("qkv", path):
        with pytest.raises(UsageError, match="vision"):
            choose_sites(vlm_sites, names=[name])
    with pytest.raises(UsageError, match="stay frozen"):
        check_plan(RankPlan((PlannedSite(vlm_sites[path], 4),)))


def test_names_that_match_nothing_are_refused_with_near_ones(base: Path) -> None:
    sites = model_sites(fresh(base))
    with pytest.raises(UsageError, match="q_proj"):
        choose_sites(sites, names=["q_prj"])
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj"):
        choose_sites(sites, names=["model.layers.7.mlp.up_proj"])
    with pytest.raises(UsageError, match="give one"):
        choose_sites(sites, "both", ["q_proj"])


def test_plans_that_do_not_fit_the_model(base: Path) -> None:
    sites = model_sites(fresh(base))
    other = {path.replace("model.", "transformer."): site for path, site in sites.items()}
    foreign = RankPlan(tuple(PlannedSite(replace(site, path=path), 4) for path, site in other.items()))
    with pytest.raises(DataError, match=r"nearest: model\.layers\.0\.self_attn\.q_proj"):
        load_plan(json.loads(foreign.dumps()), sites, "plan.json")
    nothing = RankPlan(tuple(PlannedSite(site, 0) for site in sites.values()))
    with pytest.raises(UsageError, match="nothing would train"):
        check_plan(nothing)


def test_too_large_a_rank_is_cut_and_recorded_and_rank_zero_left_out(base: Path, tmp_path: Path) -> None:
    sites = model_sites(fresh(base))
    paths = list(sites)
    content = {"rank_pattern": {paths[0]: 999, paths[1]: 0, paths[2]: 4}}
    plan = load_plan(content, sites, "plan.json")
    check_plan(plan)
    record = json.loads(write_sites(tmp_path, plan, []).read_text())
    assert [row["rank"] for row in record["sites"]] == [sites[paths[0]].full_rank, 4]
    assert "999" in record["sites"][0]["clipped"]
    assert record["left_out"] == [paths[1]]


def test_a_uniform_rank_is_cut_where_a_matrix_is_smaller(base: Path) -> None:
    sites = model_sites(fresh(base))
    plan = uniform_plan(sites, 999, None, False, "tiny")
    assert plan.ranks == {path: site.full_rank for path, site in sites.items()}
    assert all(row.clipped and row.clipped.startswith("999 is above min(m, n)") for row in plan.sites)
    assert all(row.clipped is None for row in uniform_plan(sites, 2, None, False, "tiny").sites)


def test_a_target_narrows_a_plan(base: Path) -> None:
    sites = model_sites(fresh(base))
    attention = choose_sites(sites, "attention_only")
    narrowed, left_out = restrict_plan(uneven(sites), attention)
    assert list(narrowed.ranks) == list(attention)
    assert set(left_out) == set(sites) - set(attention)
    with pytest.raises(UsageError, match="excludes every site"):
        restrict_plan(narrowed, choose_sites(sites, "mlp_only"))


def test_a_narrowed_plan_keeps_its_scales(base: Path) -> None:
    """rsLoRA's one alpha is that of the whole plan, though the largest rank is left out."""
    sites = model_sites(fresh(base))
    attention = choose_sites(sites, "attention_only")
    for rslora in (False, True):
        plan = replace(uneven(sites), use_rslora=rslora)
        small = min(plan.ranks[path] for path in attention)
        few = [path for path in attention if plan.ranks[path] == small]
        assert plan.largest > small
        narrowed, _ = restrict_plan(plan, few)
        assert narrowed.largest == small and narrowed.scale(small) == pytest.approx(plan.scale(small))


class Probe:
    """Deltas in memory."""

    description = "made here"

    def __init__(self, sites: dict[str, Site], scale: float = 0.1) -> None:
        self.sites = sites
        generator = torch.Generator().manual_seed(5)
        self.matrices = {path: torch.randn(site.shape, generator=generator) * scale for path, site in sites.items()}

    def read(self, site: Site) -> Delta:
        return from_difference(self.matrices[site.path])

    def prefetch(self, site: Site) -> None:
        pass


def test_a_warm_start_is_the_truncated_delta(base: Path) -> None:
    model = fresh(base)
    sites = model_sites(model)
    plan, probe = uneven(sites, start=2), Probe(sites)
    adapted = adapt(model, plan, LoraSection())
    warm_start(adapted, plan, probe, torch.Generator().manual_seed(0))
    expected = fresh(base)
    with torch.no_grad():
        for path, rank in plan.ranks.items():
            expected.get_submodule(path).weight.add_(truncate(probe.matrices[path], rank).product())
    torch.testing.assert_close(logits(adapted), logits(expected), atol=1e-4, rtol=1e-4)
    assert (logits(adapted) - logits(fresh(base))).abs().max() > 1e-2
    with pytest.raises(DataError, match="no delta"):
        warm_start(adapted, plan, Probe({}), torch.Generator())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base_are_saved_as_plain_lora(base: Path, tmp_path: Path, init: str) -> None:
    model = fresh(base)
    adapted = adapt(model, uneven(model_sites(model)), LoraSection(init_lora_weights=init))
    torch.testing.assert_close(logits(adapted), logits(fresh(base)), atol=1e-4, rtol=1e-4)
    before = lora_pairs(adapted)
    disturb(adapted)
    save_adapter(adapted, tmp_path, "tiny", initial=before)
    torch.testing.assert_close(logits(load_adapter(fresh(base), tmp_path)), logits(adapted), atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_starts_that_cannot_be_saved_plainly_are_refused(base: Path) -> None:
    model = fresh(base)
    with pytest.raises(UsageError, match="load_in_4bit"):
        adapt(model, uneven(model_sites(model)), LoraSection(init_lora_weights="loftq"))
    with pytest.raises(UsageError, match="even"):
        adapt(model, uneven(model_sites(model)), LoraSection(init_lora_weights="orthogonal"))


def test_eva_starts_from_the_inputs_and_changes_nothing_yet(base: Path) -> None:
    model = fresh(base)
    plan = uneven(model_sites(model))
    batches = [{"input_ids": IDS + shift, "attention_mask": torch.ones_like(IDS)} for shift in range(4)]
    directions = input_directions(model, plan, batches)
    adapted = adapt(model, plan, LoraSection(init_lora_weights="eva"))
    eva_start(adapted, directions)
    torch.testing.assert_close(logits(adapted), logits(fresh(base)))
    for path, rank in plan.ranks.items():
        rows = lora_layers(adapted)[path].lora_A[ADAPTER].weight
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-3, rtol=1e-3)


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    set_seed(0)
    model = fresh(base)
    plan = uneven(model_sites(model))
    adapted = adapt(model, plan, LoraSection())
    disturb(adapted)
    save_adapter(adapted, tmp_path, "tiny")
    write_sites(tmp_path, plan, [])
    return tmp_path


def test_loading_names_missing_and_surplus_weights(base: Path, saved: Path) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != key}, saved / "adapter_model.safetensors")
    with pytest.raises(DataError, match="1 weights are missing"):
        load_adapter(fresh(base), saved)
    save_file({**weights, "base_model.model.nowhere.lora_A.weight": torch.ones(1)}, saved / "adapter_model.safetensors")
    with pytest.raises(DataError, match="1 unexpected weights"):
        load_adapter(fresh(base), saved)


def test_loading_on_another_base_names_both(saved: Path, tmp_path: Path) -> None:
    wider = load_model(str(tiny_llama(tmp_path / "wider", hidden_size=64)), torch.float32)
    with pytest.raises(DataError, match=r"(?s)made for tiny.*wider.*different shapes"):
        load_adapter(wider, saved)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(DataError, match="made for tiny"):
        load_adapter(gpt, saved)


def test_loading_refuses_an_adapter_without_effect(base: Path, tmp_path: Path) -> None:
    model = fresh(base)
    save_adapter(adapt(model, uneven(model_sites(model)), LoraSection()), tmp_path, "tiny")
    with pytest.raises(DataError, match="no effect"):
        load_adapter(fresh(base), tmp_path)


def test_loading_compares_with_the_recorded_sites(base: Path, saved: Path) -> None:
    record = json.loads((saved / "sites.json").read_text())
    (saved / "sites.json").write_text(json.dumps(record | {"sites": record["sites"][1:]}))
    with pytest.raises(DataError, match=r"1 sites differ from sites\.json"):
        load_adapter(fresh(base), saved)


def uniform_form(adapter: LoraAdapter, rank: int) -> LoraAdapter:
    """Zero-padded to one rank, as `compress --uniform` writes it."""
    pairs = {path: LoraPair.of(pair.factors().padded(rank)) for path, pair in adapter.pairs.items()}
    return LoraAdapter(lora_config("tiny"), pairs)


def test_plans_of_different_ranks_swap_in_their_uniform_form(base: Path, tmp_path: Path) -> None:
    outputs = []
    for name, start, rank in (("small", 1, 8), ("large", 4, 16)):
        model = fresh(base)
        adapted = adapt(model, uneven(model_sites(model), start), LoraSection())
        disturb(adapted, seed=rank)
        save_adapter(adapted, tmp_path, "tiny")
        write_adapter(tmp_path / name, uniform_form(read_adapter(tmp_path), rank))
        outputs.append(logits(adapted))
    running = load_adapter(fresh(base), tmp_path / "small")
    torch.testing.assert_close(logits(running), outputs[0], atol=1e-4, rtol=1e-4)
    for name, expected in (("large", outputs[1]), ("small", outputs[0])):
        hotswap_adapter(running, str(tmp_path / name), adapter_name=ADAPTER, torch_device="cpu")
        torch.testing.assert_close(logits(running), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantized_base_takes_an_adapter(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    wide = tiny_llama(tmp_path, hidden_size=64, intermediate_size=128)  # bitsandbytes' blocks are 64 wide
    model = load_model(str(wide), torch.float32, quantization=kind)
    adapted = adapt(model, uneven(model_sites(model)), LoraSection(lora_dropout=0.0))
    gradients = []
    for _ in range(2):  # an evaluation before the second changes nothing
        adapted.train().zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([layer.lora_B[ADAPTER].weight.grad.clone() for layer in lora_layers(adapted).values()])
        logits(adapted)
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(UsageError, match="quantized"):
        adapt(model, uneven(model_sites(model)), LoraSection(init_lora_weights="pissa"))
