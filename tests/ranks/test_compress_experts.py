"""Laws of `compress` for adapters of experts: each expert's best factors, in a form that plain PEFT builds exactly."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from rankwise.errors import DataError, VerificationError
from rankwise.files import adapter as adapter_module
from rankwise.files.adapter import LoraAdapter, LoraPair, read_adapter, write_adapter
from rankwise.files.adapter_config import EXPERTS, lora_config
from rankwise.models.adapt import ADAPTER, built_shapes, lora_layers
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.options.commands import CompressConfig
from rankwise.ranks import compress
from rankwise.ranks.compress import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # of parameters
]
R = 4


@pytest.fixture(scope="module", params=experts.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def foreign(base: Path, folder: Path, modules: list[str], parameters: list[str], **config: Any) -> Path:
    """An adapter by plain PEFT, with falling singular values that differ from expert to expert."""
    settings: dict[str, Any] = {"r": R, "lora_alpha": 3, "target_modules": modules, "target_parameters": parameters}
    adapted = get_peft_model(load_model(str(base), torch.float32), LoraConfig(**settings | config))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.1)
                parameter *= torch.rand(len(parameter), 1)
            elif "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def on_all(base: Path, folder: Path, **config: Any) -> Path:
    sites = model_sites(load_model(str(base), torch.float32), routers=True).values()
    modules = [site.path for site in sites if site.peft != "parameter"]
    return foreign(base, folder, modules[:2], [site.weight for site in sites if site.peft == "parameter"], **config)


def loaded(base: Path, adapter: Path) -> PeftModel:
    """By plain PEFT, which must not warn of keys."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter))


def products(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Site → PEFT's own product, as the model stores the weight."""
    return {path: layer.get_delta_weight(ADAPTER) for path, layer in lora_layers(loaded(base, adapter)).items()}


def small(adapter: Path, out: Path, **options: Any) -> Path:
    run(CompressConfig(adapter=str(adapter), output_dir=str(out), **options))
    return out


def test_the_same_product_at_one_rank_is_the_same_for_plain_peft(base: Path, tmp_path: Path) -> None:
    adapter = on_all(base, tmp_path / "adapter", rank_pattern={"down_proj": 2})
    before, after = products(base, adapter), products(base, small(adapter, tmp_path / "same", uniform=True))
    assert before.keys() == after.keys()
    for path, product in before.items():
        assert float((after[path] - product).abs().max()) < 1e-6, path


def test_each_expert_keeps_its_own_best_directions(base: Path, tmp_path: Path) -> None:
    """Against float64 SVDs of PEFT's products, expert by expert; one rank for all of a parameter, by Σ_e σ²_{e,i}."""
    adapter, energy = on_all(base, tmp_path / "adapter"), 0.8
    before = products(base, adapter)
    out = small(adapter, tmp_path / "small", energy=energy)
    after = products(base, out)
    told = {row["path"]: row for row in json.loads((out / "fidelity.json").read_text())["sites"]}
    ranks = {path: pair.rank for path, pair in read_adapter(out).pairs.items()}
    for path, product in before.items():
        squares = torch.linalg.svdvals(product.double()).square()
        each = squares if squares.dim() == 2 else squares[None]
        shares = each.sum(0).cumsum(0) / each.sum()
        rank = int((shares < energy - 1e-9).sum()) + 1
        assert ranks[path] == rank, path
        assert told[path]["energy_kept"] == pytest.approx(float(shares[rank - 1]), abs=1e-6)
        u, values, vt = torch.linalg.svd(product.double(), full_matrices=False)
        best = (u[..., :rank] * values[..., None, :rank]) @ vt[..., :rank, :]
        assert float((after[path] - best).abs().max()) < 1e-5, path
        if squares.dim() == 2:
            expected = each[:, :rank].sum(1) / each.sum(1)
            assert torch.allclose(torch.tensor(told[path]["energy_kept_of_experts"]), expected.float(), atol=1e-5)


def planted(folder: Path, number: int = 8, shape: tuple[int, int] = (64, 48)) -> dict[int, int]:
    """A folder's adapter whose experts have products of different ranks, written as PEFT has them; the ranks."""
    ranks = {expert: expert % 4 for expert in range(number)}
    a, b = torch.zeros(number, R, shape[1]), torch.zeros(number, shape[0], R)
    generator = torch.Generator().manual_seed(1)
    for expert, rank in ranks.items():
        a[expert, :rank] = torch.randn(rank, shape[1], generator=generator)
        b[expert, :, :rank] = torch.randn(shape[0], rank, generator=generator)
    name = "model.layers.1.mlp.experts.down_proj"
    pair = LoraPair(a, b, 0.5, peft="parameter", order=1)
    write_adapter(folder, LoraAdapter(lora_config("base"), {name: pair}))
    return ranks


def test_distinct_planted_experts_are_each_recovered_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    ranks = planted(tmp_path / "adapter")
    before = next(iter(read_adapter(tmp_path / "adapter").pairs.values()))
    after = next(iter(read_adapter(small(tmp_path / "adapter", tmp_path / "out", energy=1)).pairs.values()))
    assert after.rank == max(ranks.values())
    for expert, rank in ranks.items():
        one, other = before.expert(expert).factors().product(), after.expert(expert).factors().product()
        assert torch.allclose(one, other, atol=1e-5)
        assert int((torch.linalg.svdvals(other.double()) > 1e-4).sum()) == rank


# --- the form that PEFT needs -----------------------------------------------------------------------------------------


def test_dense_sites_alone_are_built_as_they_are(base: Path, tmp_path: Path) -> None:
    """Of a regex PEFT keeps bare names there: one for layer 0's q_proj builds every q_proj."""
    sites = [site for site in model_sites(load_model(str(base), torch.float32)).values() if not site.experts]
    some = [site for index, site in enumerate(sites) if index % 3 == 0]
    modules = [site.path for site in some if site.peft != "parameter"]
    adapter = foreign(base, tmp_path / "adapter", modules, [site.weight for site in some if site.peft == "parameter"])
    out = small(adapter, tmp_path / "out", energy=0.9)
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(modules)
    assert built_shapes(loaded(base, out)).keys() == {site.path for site in some}
    assert not (out / EXPERTS.name).exists()


def test_the_base_decides_the_form_not_the_config(qwen: Path, tmp_path: Path) -> None:
    """A config with a regex, as earlier versions wrote it, whose tensors are of one layer."""
    path = "model.layers.0.self_attn.q_proj"
    adapter = foreign(qwen, tmp_path / "adapter", [path], [])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"target_modules": r"^(?:model\.layers\.0\.self_attn\.q_proj)$", "target_parameters": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    out = small(adapter, tmp_path / "out", uniform=True)
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == [path]
    assert list(built_shapes(loaded(qwen, out))) == [path]


def test_without_the_base_the_form_stays(qwen: Path, tmp_path: Path) -> None:
    adapter = on_all(qwen, tmp_path / "adapter")
    known = small(adapter, tmp_path / "known", energy=0.9)
    config = json.loads((known / "adapter_config.json").read_text())
    (known / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/model"}))
    again = json.loads((small(known, tmp_path / "again", energy=0.9) / "adapter_config.json").read_text())
    assert again["target_modules"] == config["target_modules"]
    assert again["target_parameters"] == config["target_parameters"]


def test_a_foreign_adapter_of_experts_needs_its_base(qwen: Path, tmp_path: Path) -> None:
    adapter = on_all(qwen, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(DataError, match="name the base model"):
        small(adapter, tmp_path / "out", energy=0.9)
    with pytest.raises(DataError, match=r"--base_model /nowhere: no folder with a config\.json"):
        small(adapter, tmp_path / "out", energy=0.9, base_model="/nowhere")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    out = small(adapter, tmp_path / "out", uniform=True, base_model=str(qwen))
    before, after = products(qwen, adapter), products(qwen, out)
    assert max(float((after[path] - before[path]).abs().max()) for path in before) < 1e-6


def test_another_base_is_noticed_by_its_shapes(qwen: Path, tmp_path: Path) -> None:
    adapter = on_all(qwen, tmp_path / "adapter")
    other = experts.saved("qwen3_moe", tmp_path / "other", inner=32)
    with pytest.raises(DataError, match=r"is \(8, 96, 64\) in the adapter and \(8, 64, 64\) in the base"):
        small(adapter, tmp_path / "out", energy=0.9, base_model=str(other))


# --- red --------------------------------------------------------------------------------------------------------------


def expect_red(adapter: Path, out: Path, said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        small(adapter, out, energy=0.8)
    assert not (out / "adapter_model.safetensors").exists()


def test_experts_that_changed_places(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = compress.shrink

    def exchanged(pair: LoraPair, *rest: Any) -> LoraPair:
        made = shrink(pair, *rest)
        if not made.experts:
            return made
        order = [*range(2, made.experts), 0, 1]
        return replace(made, lora_A=made.lora_A[order], lora_B=made.lora_B[order])

    monkeypatch.setattr(compress, "shrink", exchanged)
    expect_red(on_all(qwen, tmp_path / "adapter"), tmp_path / "out", "gate_up_proj, expert 0: its factors keep")


def test_naive_layout_of_the_written_file(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(a: Tensor, b: Tensor, swapped: bool = False) -> tuple[Tensor, Tensor]:
        return a.reshape(-1, a.shape[2]), b.permute(1, 0, 2).reshape(b.shape[1], -1)

    monkeypatch.setattr(adapter_module, "join_experts", naive)
    expect_red(on_all(qwen, tmp_path / "adapter"), tmp_path / "out", "expert .*: its factors keep")


def test_a_config_of_which_peft_builds_other_sites(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `compress` wrote before: a regex."""
    monkeypatch.setattr(compress, "in_form", lambda pair, path, sites: replace(pair, peft="pattern"))
    adapter = foreign(qwen, tmp_path / "adapter", ["model.layers.0.self_attn.q_proj"], [])
    with pytest.raises(DataError, match="weights are missing"):
        small(adapter, tmp_path / "out", energy=0.8)
