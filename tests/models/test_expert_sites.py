"""Laws of experts' sites: what an expert's matrix is, whose tokens it serves, what PEFT builds of a plan of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import experts
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN as PEFT_FAMILIES
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rankwise.core.experts import join_experts
from rankwise.core.site import ROUTER, Site, describe, from_row
from rankwise.errors import UsageError
from rankwise.models.sites import (
    EXPERT_NAMES,
    flat_experts,
    fused_experts,
    model_sites,
    names_paths,
    past_modules,
    stored_in_out,
)
from rankwise.models.targets import adaptable_sites, choose_sites

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(96).reshape(4, 24)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(family: str, **values: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | values)), dtype=torch.float32)
        for parameter in model.parameters():  # none at zero
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def expert_sites(model: PreTrainedModel) -> dict[str, Site]:
    return {path: site for path, site in model_sites(model).items() if site.experts}


def owners(model: PreTrainedModel) -> Iterator[tuple[Site, str]]:
    """Every expert site with the path of its layer's mixture."""
    for path, site in expert_sites(model).items():
        yield site, path.rpartition(".experts.")[0]


@pytest.mark.parametrize("inner", [experts.INNER, experts.HIDDEN // 2])
@pytest.mark.parametrize("family", experts.FAMILIES)
def test_one_experts_matrix_is_of_the_tokens_routed_to_it(family: str, inner: int) -> None:
    """Of the last mixture: what it adds to the stream moves at the tokens that have the expert, and at no other."""
    model = experts.built(family, inner=inner)
    assert experts.margin(model, IDS) > 1
    routed = experts.routed(model, IDS)
    last = list(routed)[-1]
    block = model.get_submodule(last)
    seen: list[torch.Tensor] = []
    block.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    found = [site for site, owner in owners(model) if owner == last]
    assert len(found) == 2
    for site in found:
        count = model.get_parameter(site.weight).shape[0]
        assert site.experts == count
        for expert in range(count):
            matrix = model.get_parameter(site.weight)[expert]
            plain = matrix.detach().clone()
            seen.clear()
            with torch.no_grad():
                model(IDS)
                matrix.add_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
                model(IDS)
                matrix.copy_(plain)
            before, after = (output.reshape(IDS.numel(), -1) for output in seen)
            moved = (before - after).abs().amax(dim=1) > 0
            assert torch.equal(moved, (routed[last] == expert).any(dim=1)), (site.path, expert)
            assert 0 < int(moved.sum()) < IDS.numel()


@pytest.mark.parametrize("inner", [experts.INNER, experts.HIDDEN // 2])
@pytest.mark.parametrize("family", experts.FAMILIES)
def test_an_experts_shape_is_out_and_in_whatever_the_storage(family: str, inner: int) -> None:
    """What an expert reads is as wide as the stream, and so is what it writes."""
    model = experts.built(family, inner=inner)
    read: dict[str, int] = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args, path=path: read.update({path: args[0].shape[-1]}))
    with torch.no_grad():
        model(IDS)
    shapes = {site.projection: site.shape for site in expert_sites(model).values()}
    assert set(read.values()) == {experts.HIDDEN}
    assert shapes == {"gate_up_proj": (2 * inner, experts.HIDDEN), "down_proj": (experts.HIDDEN, inner)}
    for path, site in expert_sites(model).items():
        stored = tuple(model.get_parameter(path).shape[1:])
        assert stored == (site.shape[::-1] if site.transposed else site.shape)
        assert site.swapped == (family == "llama4_text")
        assert site.transposed == (family in ("llama4_text", "gpt_oss"))


def built_pairs(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            place = path.removeprefix("base_model.model.").replace(".base_layer", "")
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            found[f"{place}.{leaf}"] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return found


def config_for(sites: dict[str, Site], rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank,
        target_modules=[path for path, site in sites.items() if site.peft != "parameter"],
        target_parameters=[site.weight for site in sites.values() if site.peft == "parameter"],
    )


@pytest.mark.parametrize("part", ["everything", "some", "first attention", "mlp weights", "one expert parameter"])
@pytest.mark.parametrize("family", experts.FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_peft_builds_exactly_the_sites_and_loads_them_again(family: str, part: str, tmp_path: Path) -> None:
    """A dense first layer and shared experts included: of a regex PEFT would take `down_proj` for the experts'."""
    layers = 3 if family in ("deepseek_v3",) else 2
    model = experts.built(family, num_hidden_layers=layers)
    every = model_sites(model, routers=True)
    sites = {
        "everything": every,
        "some": {path: every[path] for path in random.Random(0).sample(sorted(every), len(every) // 2)},
        "first attention": {path: site for path, site in every.items() if site.kind == "attention" and not site.layer},
        "mlp weights": {path: site for path, site in every.items() if site.kind == "mlp" and not site.experts},
        "one expert parameter": {path: site for path, site in every.items() if site.experts and "down" in path},
    }[part]
    if not sites:
        assert part == "mlp weights"
        assert family not in ("deepseek_v3", "llama4_text"), "a dense layer and shared experts are there"
        return
    rank = 3
    wrapped = get_peft_model(model, config_for(sites, rank))
    pairs = built_pairs(wrapped)
    assert set(pairs) == {site.weight for site in sites.values()}
    for site in sites.values():
        a, b = join_experts(
            torch.empty(site.matrices, rank, site.shape[1]),
            torch.empty(site.matrices, site.shape[0], rank),
            site.swapped,
        )
        assert [tuple(half.shape) for half in pairs[site.weight]] == [tuple(a.shape), tuple(b.shape)], site.path
    with torch.no_grad():
        for _, b in pairs.values():
            b.normal_()
    expected = wrapped(IDS).logits
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(experts.built(family, num_hidden_layers=layers), tmp_path)
    loaded = built_pairs(again)
    assert set(loaded) == set(pairs)
    assert all(torch.equal(x, y) for name in pairs for x, y in zip(pairs[name], loaded[name], strict=True))
    assert torch.equal(again(IDS).logits, expected)


def test_every_name_that_peft_takes_for_experts_is_known() -> None:
    assert {name for table in _MOE_TARGET_MODULE_MAPPING.values() for name in table} <= EXPERT_NAMES
    for family, like in PEFT_FAMILIES.items():
        model = nn.Module()
        model.config = type("Config", (), {"model_type": family})  # type: ignore[assignment]
        assert names_paths(model) == (like in _MOE_TARGET_MODULE_MAPPING), family  # type: ignore[arg-type]


def test_a_dense_model_of_a_family_with_experts_is_named_by_paths() -> None:
    """PEFT reads its config as one of a mixture's, too."""
    model = made("qwen3_moe", num_experts=4, mlp_only_layers=[0, 1])
    assert not fused_experts(model)
    sites = model_sites(model)
    assert {site.peft for path, site in sites.items() if site.kind == "mlp"} == {"parameter"}
    assert {site.peft for path, site in sites.items() if site.kind == "attention"} == {"path"}
    assert set(built_pairs(get_peft_model(model, config_for(sites, 2)))) == {site.weight for site in sites.values()}


def test_routers_are_sites_when_asked_for_only() -> None:
    for family in experts.FAMILIES:
        model = experts.built(family)
        plain, all_sites = model_sites(model), model_sites(model, routers=True)
        routers = {path: site for path, site in all_sites.items() if path not in plain}
        assert set(routers) == {
            f"{path}.{name}"
            for path, router in experts.routers(model).items()
            for name, module in model.get_submodule(path).named_children()
            if module is router
        }
        assert {(site.kind, site.peft) for site in routers.values()} == {(ROUTER, "parameter")}
        assert all(site.kind != ROUTER for site in plain.values())
        assert all(from_row(site.as_dict()) == site for site in all_sites.values())


def test_the_gate_of_a_shared_expert_is_a_router() -> None:
    model = made("qwen2_moe", moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate not in model_sites(model)
    assert model_sites(model, routers=True)[gate].kind == ROUTER
    assert model_sites(model)["model.layers.0.mlp.shared_expert.down_proj"].kind == "mlp"


def test_experts_of_attention_are_sites_too() -> None:
    """JetMoE: a module for each stack, with `weight` as its parameter, in MLP and attention."""
    model = made("jetmoe", kv_channels=16, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    found = {(site.kind, site.projection, site.shape) for site in expert_sites(model).values()}
    assert found == {
        ("mlp", "input_linear", (96, 64)),
        ("mlp", "output_linear", (64, 48)),
        ("attention", "input_linear", (32, 64)),
        ("attention", "output_linear", (64, 32)),
    }
    assert not any("router" in path for path in model_sites(model))


def test_bias_convolution_and_tables_are_no_experts() -> None:
    oss = experts.built("gpt_oss")
    assert any(name.endswith("gate_up_proj_bias") for name, _ in oss.named_parameters())
    assert not any("bias" in path for path in model_sites(oss))
    mamba = made("mamba", state_size=4, expand=2, time_step_rank=6)
    assert any(one.dim() == 3 for _, one in mamba.named_parameters()), "its convolution is (channels, 1, width)"
    assert not expert_sites(mamba)


class UndeclaredExperts(nn.Module):
    """Of a repository's own code: stored (E, in, out), and nothing says so."""

    def __init__(self, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, *shapes[0]))
        self.down_proj = nn.Parameter(torch.zeros(4, *shapes[1]))


@pytest.mark.parametrize(("hidden", "inner"), [(64, 48), (64, 32), (32, 64), (32, 32)])
def test_storage_that_no_attribute_declares_is_told_from_the_shapes(hidden: int, inner: int) -> None:
    assert stored_in_out(UndeclaredExperts(((hidden, 2 * inner), (inner, hidden))))
    assert not stored_in_out(UndeclaredExperts(((2 * inner, hidden), (hidden, inner))))
    told = UndeclaredExperts(((hidden, 2 * inner), (inner, hidden)))
    told.is_transposed = True  # type: ignore[assignment]
    assert not stored_in_out(told), "PEFT reads that itself"


def dbrx() -> PreTrainedModel:
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 96}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("dbrx", attn_config=attention, ffn_config=ffn, **sizes), dtype=torch.float32
    )


def test_experts_below_one_another_in_one_matrix_are_refused_by_name() -> None:
    model = dbrx()
    assert flat_experts(model) == [f"transformer.blocks.0.ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")]
    for target in (None, "both", "all", "mlp_only", "experts"):
        with pytest.raises(
            UsageError, match=r"DbrxForCausalLM keeps the experts .*ffn\.experts\.mlp\.w1.*attention_only"
        ):
            adaptable_sites(model, target)
    chosen = choose_sites(adaptable_sites(model, "attention_only"), "attention_only")
    assert [site.projection for site in chosen.values()] == ["Wqkv"]
    assert adaptable_sites(model, names=["out_proj"])
    assert not any(flat_experts(experts.built(family)) for family in experts.FAMILIES)


def test_targets_choose_experts_and_leave_routers_to_lora_router() -> None:
    model = experts.built("deepseek_v3")
    sites = adaptable_sites(model)
    only = choose_sites(sites, "experts")
    assert {path.split(".")[2] for path in only} == {"1", "2"}, "the first layer is dense"
    assert all(site.experts == 8 for site in only.values())
    assert {site.kind for site in choose_sites(sites).values()} == {"attention", "mlp"}
    mlp = choose_sites(sites, "mlp_only")
    assert set(only) < set(mlp)
    assert {site.projection for site in choose_sites(sites, "attention_only").values()} == {"q_b_proj", "kv_b_proj"}
    with_routers = choose_sites(adaptable_sites(model, routers=True), "experts")
    assert {site.kind for path, site in with_routers.items() if path not in only} == {ROUTER}
    with pytest.raises(UsageError, match="--lora router: LlamaForCausalLM has no router"):
        adaptable_sites(made("llama"), routers=True)
    with pytest.raises(UsageError, match="--target experts matches no matrix of the language tower"):
        choose_sites(model_sites(made("llama")), "experts")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("backbone.layers.0.mixer.x_proj", "mixer"),
        ("backbone.layers.0.mixer.in_proj", "mixer"),
        ("backbone.layers.0.mixer.out_proj", "mixer"),
        ("model.layers.0.mamba.dt_proj", "mixer"),
        ("model.layers.0.self_attn.dt_proj", "attention"),
        ("model.layers.1.mixer.q_proj", "attention"),
        ("model.layers.2.mixer.up_proj", "mlp"),
        ("model.layers.2.mixer.experts.up_proj", "mlp"),
        ("model.layers.0.temporal_block.linear_x", "mixer"),
        ("model.layers.0.temporal_block.linear_out", "mixer"),
        ("model.layers.2.temporal_block.q_proj", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "mixer"),
        ("model.layers.0.linear_attn.q_proj", "mixer"),
        ("model.layers.0.linear_attn.out_proj", "mixer"),
        ("model.layers.0.conv.in_proj", "mixer"),
        ("backbone.blocks.0.mlstm_layer.igate_preact", "mixer"),
        ("backbone.blocks.0.mlstm_layer.q", "mixer"),
        ("backbone.blocks.0.ffn.proj_up", "mlp"),
        ("rwkv.blocks.0.feed_forward.key", "mlp"),
        ("rwkv.blocks.0.attention.key", "attention"),
        ("decoder.block.0.layer.2.DenseReluDense.wi", "mlp"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "mlp"),
        ("decoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("transformer.h.0.ffn.0", "mlp"),
        ("layers.0.to_kv", "attention"),
        ("layers.0.to_out", "attention"),
        ("model.layers.0.self_attention.experts.input_linear.weight", "attention"),
        ("model.layers.0.mlp.input_linear.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.gate_up_proj", "mlp"),
        ("layer.0.ff.layer_1", "mlp"),
    ],
)
def test_kinds_of_mixers_and_of_what_stands_beside_them(path: str, kind: str) -> None:
    assert describe(path, (4, 6)).kind == kind


STATE_SPACE = {
    "mamba": {"state_size": 4, "expand": 2, "time_step_rank": 6},
    "falcon_mamba": {"state_size": 4, "expand": 2, "time_step_rank": 6},
    "mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1, "expand": 2},
    "xlstm": {"num_heads": 2, "num_blocks": 2},
}


@pytest.mark.parametrize("family", STATE_SPACE)
def test_a_model_of_mixers_alone_is_adapted_by_default(family: str) -> None:
    model = made(family, **STATE_SPACE[family])
    sites = choose_sites(adaptable_sites(model))
    assert "mixer" in {site.kind for site in sites.values()}
    with pytest.raises(UsageError, match=r"--target attention_only matches no matrix .*\(mixer\)"):
        choose_sites(adaptable_sites(model), "attention_only")
    model.requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=list(sites)))
    wrapped(torch.arange(3, 15)[None], use_cache=False).logits.square().sum().backward()
    for name, (_, b) in built_pairs(wrapped).items():
        assert b.grad is not None, name
        assert bool(b.grad.abs().max() > 0), name


def test_what_mixers_read_past_a_module_is_no_site() -> None:
    model = made("mamba", **STATE_SPACE["mamba"])
    assert past_modules(model) == {
        f"backbone.layers.{n}.mixer.{name}" for n in (0, 1) for name in ("dt_proj", "out_proj")
    }
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["backbone.layers.0.mixer.out_proj"]))
