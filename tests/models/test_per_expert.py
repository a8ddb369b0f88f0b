"""Laws of adapters of single experts, as transformers 4 had them: base + converted adapter is W + s·B·A of each expert
put in by hand, by plain PEFT and by every command that takes an adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import cli
from rankwise.core.site import PEFT_PREFIX
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.evaluate.vllm_engine import max_rank
from rankwise.files.adapter import CONFIG_NAME, read_adapter
from rankwise.gguf.lora import refuse_experts
from rankwise.merge import command as merge
from rankwise.merge.plan import plan_merge
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model
from rankwise.models.per_expert import in_todays_layout
from rankwise.options.commands import CompressConfig, MergeConfig
from rankwise.options.sections import SitesSection
from rankwise.ranks import compress, probe

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # of parameters
]
R, ALPHA = 3, 5
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
HALVES = {"w1": GATE, "w3": UP, "w2": DOWN}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved("mixtral", tmp_path_factory.mktemp("mixtral"))


def old_names(base: Path) -> dict[str, tuple[int, ...]]:
    """Module path in transformers 4 → shape of its weight: there files had the modules' names."""
    stored = load_file(base / "model.safetensors")
    return {name.removesuffix(".weight"): tuple(value.shape) for name, value in stored.items() if value.dim() == 2}


def trained(
    base: Path, folder: Path, wanted: Callable[[str], bool], *, ranks: dict[str, int] | None = None, **config: Any
) -> Path:
    """An adapter of these modules as PEFT saved it then; `ranks`: leaf name → rank, where it is not R."""
    generator = torch.Generator().manual_seed(5)
    names = {name: shape for name, shape in old_names(base).items() if "embed" not in name and "lm_head" not in name}
    tensors: dict[str, Tensor] = {}
    for name, (m, n) in names.items():
        if wanted(name):
            rank = (ranks or {}).get(name.rpartition(".")[2], R)
            for half, shape in {"A": (rank, n), "B": (m, rank)}.items():
                tensors[f"{PEFT_PREFIX}{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.1
    leaves = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05}
    told |= {
        "target_modules": leaves,
        "base_model_name_or_path": str(base),
        "rank_pattern": ranks or {},
        "bias": "none",
    }
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(told | config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def by_hand(base: Path, folder: Path) -> PreTrainedModel:
    """The base with s·B·A added to each matrix of its files, in float64, loaded again."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    tensors, stored = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix(PEFT_PREFIX).split(".lora_A")[0]
        alpha = config.get("alpha_pattern", {}).get(name.rpartition(".")[2], config["lora_alpha"])
        scale = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        change = scale * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
        stored[f"{name}.weight"] = (stored[f"{name}.weight"].double() + change).float()
    return changed(base, stored)


def changed(base: Path, stored: dict[str, Tensor]) -> PreTrainedModel:
    other = base.parent / "by-hand"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((base / "config.json").read_text())
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    return load_model(str(other), torch.float32).eval()


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 90).reshape(3, 29)
    with torch.no_grad():
        return model(ids).logits


def assert_same(one: Any, other: Any) -> None:
    found, wanted = logits(one), logits(other)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


CASES: dict[str, dict[str, Any]] = {
    "all": {"wanted": lambda name: True},
    "experts, rsLoRA": {"wanted": lambda name: ".experts." in name, "config": {"use_rslora": True}},
    "some experts": {"wanted": lambda name: ".experts.1." in name or ".experts.2." in name},
    "gate alone": {"wanted": lambda name: ".experts." in name and name.endswith(("gate_proj", "w1"))},
    "ranks and scales": {
        "wanted": lambda name: ".experts." in name,
        "ranks": {"up_proj": 5, "w3": 5, "down_proj": 2, "w2": 2},
        "config": {"alpha_pattern": {"gate_proj": 11, "w1": 11}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_each_expert_is_the_one_that_was_trained(base: Path, case: str, tmp_path: Path) -> None:
    """By ours, and by plain PEFT from the folder that is made."""
    told = CASES[case]
    folder = trained(base, tmp_path / "old", told["wanted"], ranks=told.get("ranks"), **told.get("config", {}))
    wanted = by_hand(base, folder)
    assert float((logits(wanted) - logits(load_model(str(base), torch.float32).eval())).norm()) > 0.1
    assert_same(load_adapter(load_model(str(base), torch.float32), folder), wanted)
    model = load_model(str(base), torch.float32).eval()
    converted = in_todays_layout(model, folder)
    assert_same(PeftModel.from_pretrained(model, str(converted)).eval(), wanted)


def test_gate_and_up_are_one_block_diagonal_pair(mixtral: Path, tmp_path: Path) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    old, place = load_file(folder / "adapter_model.safetensors"), "model.layers.1.mlp.experts"
    pairs = read_adapter(in_todays_layout(load_model(str(mixtral), torch.float32), folder)).pairs
    assert {name.rpartition(".")[2]: pair.rank for name, pair in pairs.items()} == {"gate_up_proj": 2 * R, DOWN: R}
    pair, before = pairs[f"{place}.gate_up_proj"], f"{PEFT_PREFIX}model.layers.1.block_sparse_moe.experts.2"
    w1, w3 = ([old[f"{before}.{name}.lora_{half}.weight"] for half in "AB"] for name in ("w1", "w3"))
    assert torch.equal(pair.lora_A[2], torch.cat([w1[0], w3[0]]))
    assert torch.equal(pair.lora_B[2], torch.block_diag(w1[1], w3[1]))
    assert pair.scale == ALPHA / R


def test_where_peft_converts_rightly_it_does_the_same(mixtral: Path, tmp_path: Path) -> None:
    """One rank, all experts, both halves, no dropout. With rsLoRA PEFT's joined pair has another scale."""

    def by_peft(folder: Path) -> PeftModel:
        return PeftModel.from_pretrained(load_model(str(mixtral), torch.float32).eval(), str(folder)).eval()

    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name, lora_dropout=0.0)
    assert_same(by_peft(folder), load_adapter(load_model(str(mixtral), torch.float32), folder))
    other = trained(mixtral, tmp_path / "rs", lambda name: ".experts." in name, lora_dropout=0.0, use_rslora=True)
    with pytest.raises(AssertionError):
        assert_same(by_peft(other), load_adapter(load_model(str(mixtral), torch.float32), other))


def test_every_command_takes_it(mixtral: Path, tmp_path: Path) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: True)
    wanted = by_hand(mixtral, folder)
    agreement = merge.run(MergeConfig(adapter=str(folder), output_dir=str(tmp_path / "merged")))
    assert agreement is not None
    assert_same(load_model(str(tmp_path / "merged"), torch.float32).eval(), wanted)
    compress.run(CompressConfig(adapter=str(folder), energy=1.0, output_dir=str(tmp_path / "small")))
    assert_same(load_adapter(load_model(str(mixtral), torch.float32), tmp_path / "small"), wanted)
    source = probe.open_adapter(str(folder), str(mixtral), SitesSection(), [])
    stacks = {path: site for path, site in source.sites.items() if site.experts}
    assert {site.projection for site in stacks.values()} == {"gate_up_proj", DOWN}


def test_experts_alone_have_ranks_and_no_intruder_count(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    line = ["ranks", str(mixtral), "--adapter", str(folder), "--min-rank", "1", "--no-plots"]
    assert cli.main([*line, "--dry-run"]) == 0
    assert cli.main([*line, "--out", str(tmp_path / "out")]) == 0
    assert "have no intruder count" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("intruders.json"))


def test_what_goes_with_the_adapter_goes_with_the_converted_one(mixtral: Path, tmp_path: Path) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    (folder / "tokenizer_config.json").write_text("{}")
    converted = in_todays_layout(load_model(str(mixtral), torch.float32), folder)
    assert (converted / "tokenizer_config.json").read_text() == "{}"
    assert in_todays_layout(load_model(str(mixtral), torch.float32), folder) == converted
    assert in_todays_layout(load_model(str(mixtral), torch.float32), converted) == converted


@pytest.mark.parametrize("fault", ["every B·A is zero", "1 unexpected weights"])
def test_what_does_not_act_or_fit_is_refused_by_the_folder_that_was_given(
    fault: str, mixtral: Path, tmp_path: Path
) -> None:
    """And not by the temporary one that it was converted to."""
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    weights = load_file(folder / "adapter_model.safetensors")
    zero = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in weights.items()}
    biased = weights | {f"{PEFT_PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.bias": torch.ones(8)}
    save_file(zero if "zero" in fault else biased, folder / "adapter_model.safetensors")
    model = load_model(str(mixtral), torch.float32)
    for refuse in (lambda: load_adapter(model, folder), lambda: plan_merge(str(mixtral), folder)):
        with pytest.raises((DataError, VerificationError), match=fault) as caught:
            refuse()
        assert f"adapter {folder} " in str(caught.value) and "rankwise-adapter-" not in str(caught.value)


def test_each_base_has_its_own_conversion(mixtral: Path, tmp_path: Path) -> None:
    """Of one class, one with more experts: those that the adapter leaves out are zero."""
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    model = load_model(str(mixtral), torch.float32)
    more = copy.deepcopy(model.config)
    more.num_local_experts += 2
    found = [in_todays_layout(one, folder) for one in (model, type(model)(more))]
    counts = [{pair.experts for pair in read_adapter(one).pairs.values()} for one in found]
    assert counts == [{model.config.num_local_experts}, {more.num_local_experts}]


def test_what_cannot_be_read_is_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    with pytest.raises(DataError, match=r"experts one by one .*experts.0.w1 .*--model_name"):
        probe.open_adapter(str(folder), None, SitesSection(), [])
    with pytest.raises(UsageError, match="rankwise merge"):
        refuse_experts(folder)
    with pytest.raises(UsageError, match="single experts"):
        max_rank(folder)
    (folder / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text().replace(str(mixtral), str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"experts one by one .*--base_model"):
        compress.run(CompressConfig(adapter=str(folder), energy=1.0, output_dir=str(tmp_path / "small")))


def test_another_base_is_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    folder = trained(mixtral, tmp_path / "old", lambda name: ".experts." in name)
    fewer = experts.built("mixtral", num_local_experts=2)
    with pytest.raises(DataError, match=r"of expert 2, and model\.layers\.0\.mlp\.experts"):
        load_adapter(fewer, folder)
    narrow = experts.built("mixtral", inner=32)
    with pytest.raises(DataError, match=r"\(48, 64\).*another base"):
        load_adapter(narrow, folder)
    other = experts.built("granitemoe")
    with pytest.raises(DataError, match="no place in the model"):
        load_adapter(other, folder)
