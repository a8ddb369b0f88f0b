"""Laws of `extract` for mixtures of experts: each expert's delta factored alone, in a form that plain PEFT builds."""

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
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.errors import DataError, VerificationError
from rankwise.files import adapter as adapter_module
from rankwise.files.adapter import LoraPair, read_adapter
from rankwise.files.adapter_config import EXPERTS
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.plan import write_plan
from rankwise.merge import command as merge
from rankwise.models.adapt import ADAPTER, built_shapes, lora_layers
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import model_sites, weight_table
from rankwise.options.commands import ExtractConfig, MergeConfig
from rankwise.ranks import extract, proof
from rankwise.ranks.deltas import BaseWeights, write_deltas
from rankwise.ranks.extract import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # of parameters
]
CASES = [(family, inner) for family in experts.FAMILIES for inner in (experts.INNER, experts.HIDDEN // 2)]
RANK = 3


def change_of(shape: torch.Size, rank: int, generator: torch.Generator) -> Tensor:
    """A matrix, or one per expert, of this rank; no two are alike."""
    left = torch.randn(*shape[:-1], rank, generator=generator)
    return 0.05 * left @ torch.randn(*shape[:-2], rank, shape[-1], generator=generator)


def tuned_from(base: Path, folder: Path, rank: int = RANK, among: Any = None) -> Path:
    """A copy of the base in which every site (or those that `among` takes) has moved by a delta of this rank."""
    model = load_model(str(base), torch.float32)
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for site in model_sites(model).values():
            if among is None or among(site):
                parameters[site.weight] += change_of(parameters[site.weight].shape, rank, generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = experts.saved(request.param[0], tmp_path_factory.mktemp("base"), inner=request.param[1])
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = experts.saved("qwen3_moe", tmp_path_factory.mktemp("base"))
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned"))


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def loaded(base: Path, adapter: Path) -> PeftModel:
    """By plain PEFT, which must not warn of keys."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter))


def extracted(pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    run(ExtractConfig(base=str(pair[0]), tuned=str(pair[1]), output_dir=str(out), **options))
    return out


def test_every_expert_comes_back_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Deltas of rank 3, at rank 3: base + adapter by plain PEFT is the tuned model, entry by entry."""
    out = extracted(pair, tmp_path / "out", rank=RANK)
    before, after = (weights(load_model(str(folder), torch.float32)) for folder in pair)
    sites = model_sites(load_model(str(pair[0]), torch.float32))
    layers = lora_layers(loaded(pair[0], out))
    assert layers.keys() == sites.keys()
    for path, site in sites.items():
        delta, product = after[site.weight] - before[site.weight], layers[path].get_delta_weight(ADAPTER)
        assert float((product - delta).abs().max()) < 1e-5, path
    pairs = read_adapter(out).pairs
    assert {path: (one.experts, one.shape) for path, one in pairs.items()} == {
        path: (site.experts, site.shape) for path, site in sites.items()
    }


def test_extracted_and_merged_it_is_the_tuned_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = extracted(pair, tmp_path / "out", rank=RANK)
    merge.run(MergeConfig(adapter=str(out), output_dir=str(tmp_path / "merged")))
    found, wanted = (weights(load_model(str(folder), torch.float32)) for folder in (tmp_path / "merged", pair[1]))
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5


def test_saved_deltas_of_experts_are_extracted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of `finetune`, read and proved against the base that they record."""
    base, structure = open_checkpoint(pair[0]), meta_model(str(pair[0]))
    before, after = (weights(load_model(str(folder), torch.float32)) for folder in pair)
    unchanged = BaseWeights.before_training(base, weight_table(structure, base.keys()), before)
    facts = {"model_name": str(pair[0])}
    write_deltas(tmp_path / "run/deltas", after, unchanged, model_sites(structure), facts)
    run(ExtractConfig(deltas=str(tmp_path / "run"), rank=RANK, output_dir=str(tmp_path / "out")))
    extracted(pair, tmp_path / "same", rank=RANK)
    found, wanted = read_adapter(tmp_path / "out").pairs, read_adapter(tmp_path / "same").pairs
    assert found.keys() == wanted.keys()
    for path, one in found.items():
        for left, right in zip(one.matrices(), wanted[path].matrices(), strict=True):
            assert torch.allclose(left.factors().product(), right.factors().product(), atol=1e-5), path


def planned(base: Path, keep: Any) -> RankPlan:
    sites = model_sites(load_model(str(base), torch.float32)).values()
    return RankPlan(
        tuple(PlannedSite(site, 1 + index % 3 if keep(index, site) else 0) for index, site in enumerate(sites))
    )


PARTS = {
    "every other site": lambda index, site: index % 2 == 0,
    "one of a module's two": lambda index, site: site.path.endswith("down_proj"),
    "dense sites": lambda index, site: not site.experts,
    "the first layer": lambda index, site: site.layer == 0,
}


@pytest.mark.parametrize("part", PARTS)
def test_plain_peft_builds_exactly_the_plan(pair: tuple[Path, Path], part: str, tmp_path: Path) -> None:
    plan = planned(pair[0], PARTS[part])
    write_plan(tmp_path / "plan.json", plan)
    out = extracted(pair, tmp_path / "out", plan=str(tmp_path / "plan.json"))
    model = loaded(pair[0], out)
    built = {path: (a[-2], b[-2], a[-1]) for path, (a, b) in built_shapes(model).items()}
    assert built == {path: (plan.ranks[path], *plan.adapted[path].shape) for path in plan.ranks}
    before, after = (weights(load_model(str(folder), torch.float32)) for folder in pair)
    for path, layer in lora_layers(model).items():
        site = plan.adapted[path]
        u, values, vt = torch.linalg.svd((after[site.weight] - before[site.weight]).double(), full_matrices=False)
        rank = plan.ranks[path]
        best = (u[..., :rank] * values[..., None, :rank]) @ vt[..., :rank, :]
        assert float((layer.get_delta_weight(ADAPTER) - best).abs().max()) < 1e-4, path


def test_experts_of_different_ranks_share_one_padded(qwen: tuple[Path, Path], tmp_path: Path) -> None:
    """Experts 0 … 7 with deltas of rank 0 … 3: at rank 3 each is its own, and one that has not moved stays."""
    base, name = qwen[0], "model.layers.1.mlp.experts.down_proj"
    model, generator = load_model(str(base), torch.float32), torch.Generator().manual_seed(3)
    stack = dict(model.named_parameters())[name]
    with torch.no_grad():
        for expert, matrix in enumerate(stack):
            matrix += change_of(matrix.shape, expert % 4, generator)
    model.save_pretrained(tmp_path / "tuned")
    out = extracted((base, tmp_path / "tuned"), tmp_path / "out", rank=3)
    found = read_adapter(out).pairs
    assert list(found) == [name]
    before = dict(load_model(str(base), torch.float32).named_parameters())[name]
    for expert in range(8):
        product = found[name].expert(expert).factors().product()
        assert torch.allclose(product, (stack - before)[expert], atol=1e-5)
        assert int((torch.linalg.svdvals(product.double()) > 1e-4).sum()) == expert % 4
    row = json.loads((out / "fidelity.json").read_text())
    told = next(one for one in row["sites"] if one["path"] == name)
    assert told["energy_kept_of_experts"] == pytest.approx([1.0] * 8, abs=1e-5)
    assert EXPERTS.name in json.loads((out / "manifest.json").read_text())["stages"]["extract"]["outputs"]


def test_what_each_expert_keeps_is_told(qwen: tuple[Path, Path], tmp_path: Path) -> None:
    out = extracted(qwen, tmp_path / "out", rank=1)
    before, after = (weights(load_model(str(folder), torch.float32)) for folder in qwen)
    for row in json.loads((out / "fidelity.json").read_text())["sites"]:
        if "experts." in row["path"]:
            squares = torch.linalg.svdvals((after[row["path"]] - before[row["path"]]).double()).square()
            assert row["energy_kept_of_experts"] == pytest.approx((squares[:, 0] / squares.sum(1)).tolist(), abs=1e-4)
            assert row["energy_kept"] == pytest.approx(float(squares[:, 0].sum() / squares.sum()), abs=1e-4)


def test_nan_in_one_expert_is_named(qwen: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(qwen[1] / "model.safetensors")
    tensors["model.layers.0.mlp.experts.6.down_proj.weight"][0, 0] = torch.nan
    for file in qwen[1].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.experts\.down_proj, expert 6: the delta has NaN"):
        extracted((qwen[0], tmp_path), tmp_path / "out", rank=1)


def test_experts_that_are_left_out_are_no_module_to_save(tmp_path: Path) -> None:
    """gpt-oss: the biases beside the experts have changed, and lie in the module that the pairs adapt."""
    base = experts.saved("gpt_oss", tmp_path / "base")
    tuned = tuned_from(base, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_bias"] += 0.1
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    out = extracted((base, tuned), tmp_path / "out", rank=RANK, save_modules=True)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    told = json.loads((out / "fidelity.json").read_text())["left_out"]
    assert [row["name"] for row in told] == ["model.layers.0.mlp.experts.down_proj_bias"]


# --- red --------------------------------------------------------------------------------------------------------------


def expect_red(pair: tuple[Path, Path], out: Path) -> None:
    with pytest.raises(VerificationError, match="loaded by PEFT, differs from the tuned model"):
        extracted(pair, out, rank=RANK)
    assert not (out / "adapter_model.safetensors").exists()


def test_naive_layout_of_the_written_file(
    qwen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def naive(a: Tensor, b: Tensor, swapped: bool = False) -> tuple[Tensor, Tensor]:
        return a.reshape(-1, a.shape[2]), b.permute(1, 0, 2).reshape(b.shape[1], -1)

    monkeypatch.setattr(adapter_module, "join_experts", naive)
    expect_red(qwen, tmp_path / "out")


def test_two_experts_that_changed_places(
    qwen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pairs themselves, so that what is expected of the logits is as wrong."""
    factor = extract.factor_site

    def exchanged(*given: Any) -> tuple[LoraPair | None, Any]:
        found, row = factor(*given)
        order = [0, 2, 1, *range(3, 8)]
        if found is None or not found.experts:
            return found, row
        return replace(found, lora_A=found.lora_A[order], lora_B=found.lora_B[order]), row

    monkeypatch.setattr(extract, "factor_site", exchanged)
    with pytest.raises(VerificationError, match="expert 1: its factors keep"):
        extracted(qwen, tmp_path / "out", rank=RANK)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_pair_of_an_expert_that_has_not_changed(
    qwen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = qwen
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    shutil.copytree(tuned, tmp_path / "tuned")
    kept = {key: before[key] if ".experts.1." in key else tensor for key, tensor in after.items()}
    save_file(kept, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    factor = extract.factor_site

    def moved(*given: Any) -> tuple[LoraPair | None, Any]:
        found, row = factor(*given)
        if found is None or not found.experts:
            return found, row
        return replace(found, lora_A=found.lora_A.roll(1, 0), lora_B=found.lora_B.roll(1, 0)), row

    monkeypatch.setattr(extract, "factor_site", moved)
    monkeypatch.setattr(proof, "require_kept", lambda *_: None)
    with pytest.raises(VerificationError, match="expert 1 has a pair, and has not changed; nothing was written"):
        extracted((base, tmp_path / "tuned"), tmp_path / "out", rank=RANK)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_config_as_it_was_written_before(
    qwen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One regex for some q_proj: PEFT builds all of them."""
    plan = planned(qwen[0], lambda index, site: site.path == "model.layers.0.self_attn.q_proj")
    write_plan(tmp_path / "plan.json", plan)
    of = LoraPair.of
    monkeypatch.setattr(LoraPair, "of", lambda factors, scale, turned, peft: of(factors, scale, turned, "pattern"))
    with pytest.raises(DataError, match="weights are missing"):
        extracted(qwen, tmp_path / "out", plan=str(tmp_path / "plan.json"))
