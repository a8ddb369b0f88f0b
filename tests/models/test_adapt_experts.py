"""Adapters of experts: what PEFT builds from a plan, how its files are written and read, against PEFT's own product."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from rankwise.core.experts import join_experts, split_experts
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import base_and_adapter, known_places, read_adapter, write_adapter
from rankwise.files.adapter_config import EXPERTS
from rankwise.models import adapt as adapt_module
from rankwise.models.adapt import ADAPTER, adapt, lora_layers, lora_pairs, quiet_peft, site_parameters
from rankwise.models.adapters import load_adapter, save_adapter, subtract_pairs
from rankwise.models.sites import model_sites
from rankwise.options.sections import LoraSection

PLAIN = LoraSection(lora_dropout=0.0)
SMALL = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SMALL | {"num_key_value_heads": 2}


def mixtral(inner: int = 20) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**GROUPED, intermediate_size=inner, num_local_experts=4))


def half_width() -> PreTrainedModel:
    """2I = H: gate_up and down have one shape, so nothing but their names tells them apart."""
    return mixtral(12)


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**GROUPED, intermediate_size=20, num_local_experts=4, head_dim=12))


def llama4() -> PreTrainedModel:
    sizes = {"intermediate_size": 20, "intermediate_size_mlp": 28, "head_dim": 12, "num_local_experts": 4}
    return Llama4ForCausalLM(Llama4TextConfig(**GROUPED, **sizes, interleave_moe_layer_step=1))


def deepseek() -> PreTrainedModel:
    sizes = {"intermediate_size": 28, "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**GROUPED, **sizes, **heads, **groups))


FAMILIES = [mixtral, half_width, gpt_oss, llama4, deepseek]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(3)
    return request.param().float().eval()  # type: ignore[no-any-return]


def plan_of(model: PreTrainedModel, keep: Callable[[int, str], bool] = lambda index, path: True) -> RankPlan:
    """Different ranks everywhere, of the sites that are kept."""
    sites = model_sites(model).values()
    return RankPlan(
        tuple(PlannedSite(site, 2 + index % 3) for index, site in enumerate(sites) if keep(index, site.path))
    )


def fill(model: PeftModel) -> None:
    torch.manual_seed(5)
    for parameters in site_parameters(model).values():
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)


def products(model: PeftModel, transposed: bool) -> dict[str, Tensor]:
    """Path → the product as PEFT computes it, (experts,) out, in; transposed: the experts are stored (in, out)."""
    found = {path: layer.get_delta_weight(ADAPTER).detach() for path, layer in lora_layers(model).items()}
    return {path: product.mT if transposed and product.dim() == 3 else product for path, product in found.items()}


def is_transposed(model: PreTrainedModel) -> bool:
    return any(site.transposed for site in model_sites(model).values())


PARTS: dict[str, Callable[[int, str], bool]] = {
    "all": lambda index, path: True,
    "every other": lambda index, path: index % 2 == 0,
    "experts alone": lambda index, path: "experts." in path,
    "one of a module's two": lambda index, path: path.endswith("down_proj"),
    "dense alone": lambda index, path: "experts." not in path,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_is_built_saved_and_read_by_plain_peft(base: PreTrainedModel, part: str, tmp_path: Path) -> None:
    plan, transposed = plan_of(base, PARTS[part]), is_transposed(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted = adapt(base, plan, PLAIN)
    fill(adapted)
    expected, ids = products(adapted, transposed), torch.arange(24).reshape(2, 12)
    save_adapter(adapted, tmp_path, "base")
    logits = adapted(ids).logits.detach()
    adapter = read_adapter(tmp_path)
    assert set(adapter.pairs) == set(plan.ranks) == set(expected)
    for path, pair in adapter.pairs.items():
        product = pair.scale * (pair.lora_B @ pair.lora_A)
        assert torch.allclose(product, expected[path], atol=1e-6), path
        assert pair.rank == plan.ranks[path]
        assert pair.shape == plan.adapted[path].shape
    write_adapter(tmp_path / "again", adapter)
    clean = adapted.unload()
    with quiet_peft():
        again = PeftModel.from_pretrained(clean, str(tmp_path / "again"))
    built = products(again, transposed)
    assert set(built) == set(expected)
    assert all(torch.allclose(built[path], expected[path], atol=1e-6) for path in built)
    assert torch.allclose(again(ids).logits, logits, atol=1e-5)
    clean = again.unload()
    assert torch.allclose(load_adapter(clean, tmp_path)(ids).logits, logits, atol=1e-5)


def test_pairs_of_a_running_model_are_those_of_its_file(base: PreTrainedModel, tmp_path: Path) -> None:
    adapted = adapt(base, plan_of(base), PLAIN)
    fill(adapted)
    save_adapter(adapted, tmp_path, "base")
    stored = read_adapter(tmp_path).pairs
    for path, pair in lora_pairs(adapted).items():
        assert torch.equal(pair.lora_A, stored[path].lora_A)
        assert torch.equal(pair.lora_B, stored[path].lora_B)
        assert replace(pair, lora_A=stored[path].lora_A, lora_B=stored[path].lora_B) == stored[path]


def test_what_trains_at_a_site_is_its_own_pair(base: PreTrainedModel) -> None:
    parameters = site_parameters(adapt(base, plan_of(base), PLAIN))
    assert all(len(each) == 2 for each in parameters.values())
    assert len({id(one) for each in parameters.values() for one in each}) == 2 * len(parameters)


def test_a_foreign_adapter_is_read_by_the_model(base: PreTrainedModel, tmp_path: Path) -> None:
    names, transposed = [path for path, site in model_sites(base).items() if site.experts], is_transposed(base)
    with quiet_peft():
        adapted = get_peft_model(base, LoraConfig(r=3, target_modules=[], target_parameters=names), ADAPTER)
    fill(adapted)
    adapted.save_pretrained(str(tmp_path))
    expected = products(adapted, transposed)
    with pytest.raises(DataError, match=r"no experts\.json"):
        read_adapter(tmp_path)
    pairs = read_adapter(tmp_path, places=known_places(model_sites(adapted.unload()), tmp_path)).pairs
    assert set(pairs) == set(expected)
    for path, pair in pairs.items():
        assert torch.allclose(pair.scale * (pair.lora_B @ pair.lora_A), expected[path], atol=1e-6)


def test_a_wrong_record_is_refused(tmp_path: Path) -> None:
    adapted = adapt(mixtral(), plan_of(mixtral()), PLAIN)
    save_adapter(adapted, tmp_path, "base")
    file = tmp_path / EXPERTS.name
    content = json.loads(file.read_text())
    for row in content["pairs"]:
        row["experts"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"experts"):
        read_adapter(tmp_path)


def test_layout_of_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail: naive slicing has the right shapes and other products."""

    def naive(a: Tensor, b: Tensor, experts: int, swapped: bool = False) -> tuple[Tensor, Tensor]:
        return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], experts, -1).permute(1, 0, 2)

    monkeypatch.setattr(adapt_module, "split_experts", naive)
    adapted = adapt(mixtral(), plan_of(mixtral()), PLAIN)
    fill(adapted)
    expected = products(adapted, transposed=False)
    pairs = {path: pair for path, pair in lora_pairs(adapted).items() if pair.experts}
    assert pairs
    wrong = [
        p for p, pair in pairs.items() if not torch.allclose(pair.scale * (pair.lora_B @ pair.lora_A), expected[p])
    ]
    assert wrong == list(pairs)


def test_other_shapes_than_planned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    plan = plan_of(model)
    monkeypatch.setattr(
        adapt_module,
        "plan_fields",
        lambda plan: {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    )
    with pytest.raises(VerificationError, match="otherwise than planned"):
        adapt(model, plan, PLAIN)


@pytest.mark.parametrize("swapped", [False, True])
def test_split_and_join_are_inverse(swapped: bool) -> None:
    a, b = torch.randn(4 * 3, 5), torch.randn(7, 4 * 3)
    left, right = split_experts(a, b, 4, swapped)
    assert left.shape == ((4, 3, 7) if swapped else (4, 3, 5))
    assert right.shape == ((4, 5, 3) if swapped else (4, 7, 3))
    assert all(torch.equal(one, other) for one, other in zip(join_experts(left, right, swapped), (a, b), strict=True))


@pytest.mark.parametrize(("a", "b", "experts"), [((12, 5), (7, 11), 4), ((12, 5), (7, 12), 5), ((12,), (7, 12), 4)])
def test_pairs_that_do_not_divide_are_refused(a: tuple[int, ...], b: tuple[int, ...], experts: int) -> None:
    with pytest.raises(DataError):
        split_experts(torch.zeros(a), torch.zeros(b), experts)


def test_wrappers_are_peft_s_own(base: PreTrainedModel) -> None:
    """Every site of a model with experts that is named as a parameter is a ParamWrapper, every other one is not."""
    plan = plan_of(base)
    for path, layer in lora_layers(adapt(base, plan, PLAIN)).items():
        assert isinstance(layer, ParamWrapper) == (plan.adapted[path].peft == "parameter")


def test_a_difference_of_pairs_is_named_as_they_are(tmp_path: Path) -> None:
    """After an initialisation that moved the base (pissa): of a mixture's attention, too, PEFT builds the plan."""
    model = mixtral()
    plan = plan_of(model, lambda index, path: "layers.0.self_attn" in path)
    adapted = adapt(model, plan, replace(PLAIN, init_lora_weights="pissa"))
    initial = lora_pairs(adapted)
    fill(adapted)
    save_adapter(adapted, tmp_path, "base", initial)
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], list)
    assert set(lora_layers(load_adapter(mixtral(), tmp_path))) == set(plan.ranks)


def test_a_difference_of_experts_is_one_for_each() -> None:
    adapted = adapt(mixtral(), plan_of(mixtral(), lambda index, path: path.endswith("down_proj")), PLAIN)
    before = lora_pairs(adapted)
    fill(adapted)
    now = lora_pairs(adapted)
    for path, pair in subtract_pairs(now, before).items():
        products = [one.lora_B @ one.lora_A for one in (now[path], before[path])]
        assert torch.allclose(pair.lora_B @ pair.lora_A, products[0] - products[1], atol=1e-6)
        assert pair.experts == 4


def test_the_base_of_a_foreign_adapter_is_read_from_its_config(tmp_path: Path) -> None:
    """Without a record of the experts, too: `evaluate` and `validate` ask for the base first."""
    base = mixtral()
    names = [path for path, site in model_sites(base).items() if site.experts]
    with quiet_peft():
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=names), ADAPTER)
    adapted.peft_config[ADAPTER].base_model_name_or_path = "some/base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for some/base on the hub
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert base_and_adapter(str(tmp_path), None) == ("some/base", tmp_path)


def edited(folder: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    file = folder / EXPERTS.name
    content = json.loads(file.read_text())
    change(content["pairs"])
    file.write_text(json.dumps(content))


def exchange_layers(rows: list[dict[str, object]]) -> None:
    for row in rows:
        row["parameter"] = str(row["parameter"]).translate(str.maketrans("01", "10"))


def exchange_places(rows: list[dict[str, object]]) -> None:
    """Right by themselves, wrong for the class that registers them."""
    names = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
    for row in rows:
        owner, _, name = str(row["parameter"]).rpartition(".")
        row["parameter"] = f"{owner}.{names[name]}"


def exchange_keys(rows: list[dict[str, object]]) -> None:
    for row in rows:
        row["order"] = 1 - int(str(row["order"]))


@pytest.mark.parametrize("change", [exchange_layers, exchange_keys])
def test_a_record_that_its_keys_refute_is_refused(
    change: Callable[[list[dict[str, object]]], None], tmp_path: Path
) -> None:
    save_adapter(adapt(half_width(), plan_of(half_width()), PLAIN), tmp_path, "base")
    edited(tmp_path, change)
    with pytest.raises(DataError, match="cannot be the pair of"):
        read_adapter(tmp_path)


def test_a_record_that_the_model_refutes_is_refused(tmp_path: Path) -> None:
    plan = RankPlan(tuple(PlannedSite(site, 3) for site in model_sites(half_width()).values()))
    save_adapter(adapt(half_width(), plan, PLAIN), tmp_path, "base")
    assert known_places(model_sites(half_width()), tmp_path)
    edited(tmp_path, exchange_places)
    read_adapter(tmp_path)
    with pytest.raises(DataError, match="another base, or a changed file"):
        known_places(model_sites(half_width()), tmp_path)
