"""Laws of `merge` for mixtures of experts: what PEFT merges, in the base's own files, each expert proved alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import MergeModulelist
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import LoraPair
from rankwise.files.checkpoint import open_checkpoint
from rankwise.merge import write
from rankwise.merge.command import run
from rankwise.merge.plan import plan_merge
from rankwise.merge.routing import RoutedExperts, routed
from rankwise.merge.verify import require_effect
from rankwise.models import adapt as adapt_module
from rankwise.models import expert_files as files_module
from rankwise.models import sites as sites_module
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.options.commands import MergeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # of parameters
]

WIDTHS = {"": experts.INNER, ", 2I = H": experts.HIDDEN // 2}
CASES = [f"{family}{width}" for family in experts.FAMILIES for width in WIDTHS]


def made_base(case: str, folder: Path, **config: Any) -> Path:
    family, _, width = case.partition(",")
    return experts.saved(family, folder, inner=WIDTHS[f",{width}" if width else ""], **config)


def targets_of(base: Path) -> tuple[list[str], list[str]]:
    """Modules, and parameters: all experts, and the dense linear layers that PEFT would take for experts."""
    sites = model_sites(load_model(str(base), torch.float32)).values()
    modules = [site.path for site in sites if site.peft != "parameter"]
    return modules[:3], [site.weight for site in sites if site.peft == "parameter"]


def adapter_on(base: Path, folder: Path, **config: Any) -> Path:
    """A plain PEFT adapter of experts, of dense layers by their parameter, and of attention; saved by PEFT alone."""
    modules, parameters = targets_of(base)
    settings: dict[str, Any] = {"target_modules": modules, "target_parameters": parameters} | config
    adapted = get_peft_model(load_model(str(base), torch.float32), LoraConfig(r=3, lora_alpha=5, **settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter)).merge_and_unload()
    return dict(model.state_dict())


def merge(adapter: Path, out: Path, **options: Any) -> Path:
    run(MergeConfig(adapter=str(adapter), output_dir=str(out), **options))
    return out


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = made_base(request.param, tmp_path_factory.mktemp("base"))
    return base, adapter_on(base, tmp_path_factory.mktemp("adapter"), rank_pattern={"down_proj": 2})


def test_a_foreign_adapter_is_merged_as_peft_does_into_the_base_s_own_files(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    out = merge(adapter, tmp_path / "out")
    expected, found = merged_by_peft(base, adapter), load_model(str(out), torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-7
    before, after = open_checkpoint(base), open_checkpoint(out)
    assert before.keys() == after.keys()
    assert all(before.shape(key) == after.shape(key) and before.dtype(key) == after.dtype(key) for key in before)
    changed = {key for key in before if not torch.equal(before.tensor(key), after.tensor(key))}
    assert any("experts" in key or "linear" in key for key in changed)
    assert not any("norm" in key or "router" in key or "embed" in key for key in changed)


def test_layer_by_layer_says_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One expert parameter alone, the last that its module registered: PEFT nests nothing."""
    base, _ = pair
    last = [name for name in targets_of(base)[1] if name.endswith("experts.down_proj")]
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=[], target_parameters=last)
    whole = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "whole")))
    layered = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "layered"), max_memory="450KB"))
    assert whole
    assert layered
    assert layered.effect == pytest.approx(whole.effect, rel=1e-4)
    assert layered.error < 1e-6
    expected, found = merged_by_peft(base, adapter), load_model(str(tmp_path / "layered"), torch.float32).state_dict()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-7


@pytest.mark.parametrize("family", experts.FAMILIES)
def test_a_router_beside_its_experts(family: str, tmp_path: Path) -> None:
    base = experts.saved(family, tmp_path / "base")
    sites = model_sites(load_model(str(base), torch.float32), routers=True).values()
    routers = [site.weight for site in sites if site.kind == "router"]
    assert routers
    down = [site.weight for site in sites if site.experts and "down" in site.path]
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=[], target_parameters=routers + down)
    found = load_model(str(merge(adapter, tmp_path / "out")), torch.float32).state_dict()
    expected = merged_by_peft(base, adapter)
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-7


def test_ends_of_names_are_targets_as_peft_has_them(tmp_path: Path) -> None:
    base = made_base("mixtral", tmp_path / "base")
    ends = ["experts.down_proj", "experts.gate_up_proj"]
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=ends)
    found = load_model(str(merge(adapter, tmp_path / "out")), torch.float32).state_dict()
    expected = merged_by_peft(base, adapter)
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-7


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_half_precision_is_rounded_once_and_judged_per_expert(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made_base(family, tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_on(base, tmp_path / "adapter")
    plan = plan_merge(str(base), adapter)
    entry = next(entry for entry in plan.entries if entry.experts and "down_proj" in entry.key)
    rounding = write.Rounding()
    write.make_tensor(plan, entry, rounding)
    assert rounding.worst
    assert ", expert " in rounding.worst[0]
    merge(adapter, tmp_path / "out")
    assert "rounding to bfloat16" in capsys.readouterr().out


# --- red: a fault in the product's own code, seen expert by expert ----------------------------------------------------


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = made_base("qwen3_moe", tmp_path_factory.mktemp("base"))
    return base, adapter_on(base, tmp_path_factory.mktemp("adapter"))


def expect_red(adapter: Path, out: Path, said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        merge(adapter, out)
    assert not out.exists() or not list(out.glob("*.safetensors"))


def test_naive_slices_of_the_factors(red: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right shapes, other experts (unsloth-zoo#1269)."""

    def naive(a: Tensor, b: Tensor, number: int, swapped: bool = False) -> tuple[Tensor, Tensor]:
        return a.reshape(number, -1, a.shape[1]), b.reshape(b.shape[0], number, -1).permute(1, 0, 2)

    monkeypatch.setattr(adapt_module, "split_experts", naive)
    expect_red(red[1], tmp_path / "out", r"32 tensors .*down_proj, expert 0, is not base \+ adapter")


def test_two_experts_that_changed_places(
    red: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = LoraPair.expert
    monkeypatch.setattr(LoraPair, "expert", lambda self, e: expert(self, {6: 7, 7: 6}.get(e, e)))
    expect_red(red[1], tmp_path / "out", r"8 tensors .*down_proj, expert 6, is not .*down_proj, expert 7, is not")


def test_one_expert_left_unmerged(red: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = LoraPair.expert
    monkeypatch.setattr(LoraPair, "expert", lambda self, e: replace(expert(self, e), scale=self.scale * (e != 5)))
    expect_red(red[1], tmp_path / "out", "4 tensors .*expert 5, is not")


def test_gate_and_up_that_changed_places(
    red: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and written the same wrong way: the files agree with each other, the model that loads them does not."""
    real = sites_module.converted_experts
    monkeypatch.setattr(sites_module, "converted_experts", lambda found, shapes: map(exchanged, real(found, shapes)))
    expect_red(red[1], tmp_path / "out", "logits differ")


def exchanged(files: files_module.ExpertFiles) -> files_module.ExpertFiles:
    return replace(files, sources=dict(reversed(files.sources.items())))


def test_an_expert_that_no_token_reaches_is_proved_by_its_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made_base("qwen3_moe", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 3] = -3 * experts.CHOSEN
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_on(base, tmp_path / "adapter")
    out = merge(adapter, tmp_path / "out")
    assert "reach 14 of 16 adapted experts" in capsys.readouterr().out
    record = json.loads((out / "manifest.json").read_text())["stages"]["merge"]["verification"]["experts"]
    assert record == {"adapted": 16, "reached": 14}
    expert = LoraPair.expert
    monkeypatch.setattr(LoraPair, "expert", lambda self, e: replace(expert(self, e), scale=self.scale * (e != 3)))
    expect_red(adapter, tmp_path / "red", "expert 3, is not base")


# --- files that are refused, or held in another form ------------------------------------------------------------------


def test_a_missing_expert_is_refused_by_name(red: tuple[Path, Path], tmp_path: Path) -> None:
    base = made_base("qwen3_moe", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.gate_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.experts\.gate_up_proj has no .*gate_proj.* of expert 2"):
        plan_merge(str(base), red[1])


def test_an_operation_that_is_not_known_backwards_is_refused_by_name(
    red: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "known", lambda operation: type(operation) is not MergeModulelist)
    with pytest.raises(DataError, match=r"by MergeModulelist, which is not known here"):
        plan_merge(str(red[0]), red[1])


def packed(base: Path) -> Path:
    """The experts of a saved gpt-oss in MXFP4, as its own files hold them."""
    tensors, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        number, inner, outer = tensors.pop(key).shape
        sizes = (number, outer, inner // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*sizes, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{key}_scales"] = torch.randint(119, 123, sizes, dtype=torch.uint8, generator=generator)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_mxfp4_is_merged_dequantized_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = packed(experts.saved("gpt_oss", tmp_path / "base", inner=96, dtype=torch.bfloat16))
    names = ["model.layers.1.mlp.experts.gate_up_proj"]
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names)
    out = merge(adapter, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "stores its experts in MXFP4; they are used dequantized" in printed
    assert "experts are in MXFP4: trained and merged dequantized, written as bfloat16" in printed
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    expected = merged_by_peft(base, adapter)
    found, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert not any(key.endswith(("_blocks", "_scales")) for key in found)
    for name in (key for key in expected if key.endswith(("gate_up_proj", "experts.down_proj"))):
        assert torch.equal(found[name], expected[name].bfloat16())
        if name not in names:
            assert torch.equal(
                found[name], convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"])
            )
    layered = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "layered"), max_memory="800KB"))
    assert layered
    assert layered.error < layered.effect


def test_an_expert_packed_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = packed(experts.saved("gpt_oss", tmp_path / "base", inner=96, dtype=torch.bfloat16))
    names = ["model.layers.1.mlp.experts.gate_up_proj"]
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=[], target_parameters=names)
    make = write.make_experts

    def damaged(plan: Any, entry: Any, *rest: Any) -> Tensor:
        made = make(plan, entry, *rest)
        if "layers.0.mlp.experts.down_proj" in entry.key:
            made[2, 0, 0] += 1
        return made

    monkeypatch.setattr(write, "make_experts", damaged)
    expect_red(adapter, tmp_path / "out", r"layers\.0\.mlp\.experts\.down_proj, expert 2, is not")


# --- which experts tokens reach ---------------------------------------------------------------------------------------


def test_what_a_module_of_experts_is_given_tells_where_tokens_go() -> None:
    hidden = torch.zeros(5, 8)
    assert routed([hidden, torch.tensor([[0, 2], [2, 3]]), torch.ones(2, 2)], 6) == {0, 2, 3}
    assert routed([hidden, [3, 0, 2]], 3) == {0, 2}
    assert routed([hidden, torch.tensor([0, 5])], 2) == {1}
    assert routed([hidden], 3) == {0, 1, 2}
    assert routed([hidden, torch.ones(5, 8)], 3) == set()
    assert RoutedExperts.of({"a": {0, 1}, "b": {2}}, {"a": {1, 5}}) == RoutedExperts(3, 1)


def test_a_base_with_nan_is_named_as_what_is_wrong() -> None:
    with pytest.raises(DataError, match="its weights are damaged"):
        require_effect(float("nan"))
    with pytest.raises(VerificationError, match="no effect"):
        require_effect(0.0)
