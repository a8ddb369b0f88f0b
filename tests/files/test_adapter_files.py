"""Laws of adapter files: what is read is what PEFT would apply, what is written is what PEFT would write."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rankwise.core.factors import Factors
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, read_adapter, write_adapter
from rankwise.files.adapter_config import lora_config, target_regex

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SOUND = {
    "dialogpt-small-patient_r4": (36, 4, 2.0, True, 0),
    "distilbert-imdb_r8": (12, 8, 2.0, False, 4),
    "gemma3-270m-svg_r4_main": (72, 4, 4.0, False, 0),
    "gemma3-270m-svg_r4_seed123": (72, 4, 4.0, False, 0),
    "gemma3-270m-svg_r4_stage1": (72, 4, 4.0, False, 0),
    "gpt-neo-125m-movies_r8": (24, 8, 2.0, False, 0),
    "gpt2-cls-bin_r8": (24, 8, 4.0, True, 1),
    "gpt2-cls_r8": (12, 8, 1.0, True, 1),
    "gpt2-great-bin_r8": (12, 8, 4.0, True, 0),
    "gpt2-medium-therapy_r8": (24, 8, 2.0, True, 0),
    "open-calm-1b-fp16_r1": (24, 1, 32.0, False, 0),
    "opt-125m-bf16_r16": (24, 16, 2.0, False, 0),
    "zeroB_stella-400m_r16": (24, 16, 2.0, False, 0),
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=12,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def tensors_of(path: str = "l.q_proj", rank: int = 2, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    return {
        f"{prefix}{path}.lora_A.weight": torch.randn(rank, 6),
        f"{prefix}{path}.lora_B.weight": torch.randn(5, rank),
    }


def save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return folder


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """PEFT's own deltas by module path, as they are added to the stored weights."""
    modules = model.get_base_model().named_modules()
    layers = {path: module for path, module in modules if hasattr(module, "get_delta_weight")}
    return {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()}


def product(pair: LoraPair) -> Tensor:
    """As the base stores the weight."""
    dense = pair.factors().product()
    return dense.T if pair.fan_in_fan_out else dense


def assert_reads_as_peft_applies(folder: Path, model: PeftModel) -> None:
    adapter, expected = read_adapter(folder), deltas(model)
    assert adapter.pairs.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(product(adapter.pairs[path]), delta)


@pytest.mark.parametrize("name", SOUND)
def test_the_real_adapters_read_right(shared_data: Path, name: str) -> None:
    sites, rank, scale, transposed, extra = SOUND[name]
    adapter = read_adapter(shared_data / "adapters" / name)
    assert (len(adapter.pairs), len(adapter.extra)) == (sites, extra)
    for path, pair in adapter.pairs.items():
        assert not path.startswith("base_model")
        assert (pair.rank, pair.scale, pair.fan_in_fan_out) == (rank, scale, transposed)
    moved = [bool(pair.factors().left.any()) for pair in adapter.pairs.values()]
    assert any(moved) != name.startswith("zeroB")


def test_the_loralib_file_needs_a_scale(shared_data: Path) -> None:
    folder = shared_data / "adapters" / "loralib_roberta-base-mnli_r8"
    with pytest.raises(DataError, match=r"no adapter_config\.json .* scale"):
        read_adapter(folder)
    adapter = read_adapter(folder, scale=2.0)
    assert len(adapter.pairs) == 24
    assert adapter.pairs["roberta.encoder.layer.0.attention.self.query"].shape == (768, 768)
    assert {key.split(".")[0] for key in adapter.extra} == {"classifier"}


def test_the_real_traps_are_refused(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"lora_[AB]\.weight has NaN"):
        read_adapter(shared_data / "adapters" / "broken_gemma-2b-allNaN_r16")
    with pytest.raises(DataError, match="PROMPT_TUNING"):
        read_adapter(shared_data / "adapters" / "notlora_gpt2-prompt-tuning")


@pytest.mark.filterwarnings("ignore:.*rank_pattern:RuntimeWarning")  # two match nothing, on purpose
@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_scale_as_peft_scales(tmp_path: Path, use_rslora: bool) -> None:
    """Bare, anchored and overlapping patterns; the first match wins; parts of a name and prefixes match nothing."""
    patterns = {
        "_proj": 9,
        "self_attn": 8,
        "layers.1.self_attn.q_proj": 3,
        "q_proj": 5,
        r"layers\.\d+\.mlp\.up_proj": 6,
        "^model.*v_proj$": 7,
    }
    alphas = {"q_proj": 11, r"^model\.layers\.3\.mlp\.up_proj$": 13}
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern=patterns,
        alpha_pattern=alphas,
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    assert_reads_as_peft_applies(tmp_path, model)


class Mixed(nn.Module):
    """A Conv1D layer, a linear one and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.c_attn = Conv1D(18, 6)
        self.head = nn.Linear(18, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.c_attn(self.embed_tokens(ids)))


@pytest.mark.parametrize("name", ["c_attn", "embed_tokens"])
def test_transposed_weights_and_embeddings(tmp_path: Path, name: str) -> None:
    config = LoraConfig(
        r=2,
        target_modules=[name],
        fan_in_fan_out=name == "c_attn",
        init_lora_weights=False,
        modules_to_save=["head"],
    )
    model = get_peft_model(Mixed(), config)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_reads_as_peft_applies(tmp_path, model)
    adapter = read_adapter(tmp_path)
    assert set(adapter.extra) == {"head.weight", "head.bias"}
    write_adapter(tmp_path / "again", adapter)
    again, before = (
        load_file(tmp_path / "again" / "adapter_model.safetensors"),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def planned(ranks: dict[str, int], model: nn.Module, scale: float) -> LoraAdapter:
    """A random adapter of the given ranks for a model of linear layers."""
    shapes = {path: module.weight.shape for path, module in model.named_modules() if path in ranks}
    pairs = {
        path: LoraPair.of(Factors(torch.randn(shapes[path][0], r), torch.randn(r, shapes[path][1])), scale)
        for path, r in ranks.items()
    }
    return LoraAdapter(lora_config("tiny"), pairs)


def load_strictly(folder: Path, base: nn.Module) -> PeftModel:
    """PEFT's load with its warnings (missing and unexpected keys are only that) as errors."""
    model = PeftModel.from_pretrained(base, folder)
    state = load_file(folder / "adapter_model.safetensors")
    result = model.load_adapter(folder, "second")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    assert len(state) == sum("lora_" in key and "default" in key for key in model.state_dict())
    return model


RANKS = {
    "model.layers.1.self_attn.q_proj": 3,
    "model.layers.11.self_attn.q_proj": 5,
    "model.layers.1.mlp.down_proj": 1,
    "lm_head": 2,
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_is_written(tmp_path: Path, use_rslora: bool) -> None:
    """Different ranks per site: PEFT builds exactly these sites, shapes and deltas, and nothing else."""
    base = tiny_llama()
    adapter = planned(RANKS, base, scale=2.0)
    adapter = replace(adapter, config={**adapter.config, "use_rslora": use_rslora})
    write_adapter(tmp_path, adapter)
    found = deltas(load_strictly(tmp_path, base))
    assert found.keys() == RANKS.keys()
    for path, pair in adapter.pairs.items():
        torch.testing.assert_close(found[path], pair.factors().product())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_written_config_is_anchored_and_scales_right_without_patterns(tmp_path: Path) -> None:
    write_adapter(tmp_path, planned(RANKS, tiny_llama(), scale=2.0))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    assert config["rank_pattern"][r"^model\.layers\.1\.self_attn\.q_proj$"] == 3
    assert all(key.startswith("^") and key.endswith("$") for key in config["rank_pattern"])
    assert config["target_modules"] == target_regex(RANKS)
    assert all(value == int(value) for value in config["alpha_pattern"].values())


def test_one_rank_needs_no_patterns(tmp_path: Path) -> None:
    write_adapter(tmp_path, planned(dict.fromkeys(RANKS, 4), tiny_llama(), scale=0.5))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["r"], config["lora_alpha"]) == (4, 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    scales=st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
    use_rslora=st.booleans(),
)
def test_reading_undoes_writing(tmp_path: Path, ranks: list[int], scales: list[float], use_rslora: bool) -> None:
    """Any ranks, any scales, alpha/r and alpha/√r, paths that are prefixes of each other."""
    pairs = {
        "x." * index + "q": LoraPair(torch.randn(r, 4), torch.randn(3, r), scale)
        for index, (r, scale) in enumerate(zip(ranks, scales, strict=False))
    }
    config = lora_config(None) | {"use_rslora": use_rslora}
    again = read_adapter(write_adapter(tmp_path, LoraAdapter(config, pairs, {"head.bias": torch.ones(2)})))
    assert again.pairs.keys() == pairs.keys()
    assert set(again.extra) == {"head.bias"}
    for path, pair in pairs.items():
        assert torch.equal(again.pairs[path].lora_A, pair.lora_A)
        assert torch.equal(again.pairs[path].lora_B, pair.lora_B)
        assert math.isclose(again.pairs[path].scale, pair.scale, rel_tol=1e-8)


def test_a_real_adapter_survives_rewriting(shared_data: Path, tmp_path: Path) -> None:
    """A .bin with old config keys becomes PEFT's present form, extra tensors included."""
    before = read_adapter(shared_data / "adapters" / "gpt2-cls-bin_r8")
    after = read_adapter(write_adapter(tmp_path, before))
    assert after.base_model == before.base_model == "gpt2"
    assert torch.equal(after.extra["score.weight"], before.extra["score.weight"])
    for path, pair in before.pairs.items():
        assert torch.equal(after.pairs[path].lora_B, pair.lora_B)
        assert (after.pairs[path].scale, after.pairs[path].fan_in_fan_out) == (pair.scale, True)
    assert LoraConfig.from_pretrained(tmp_path).task_type == "SEQ_CLS"


@pytest.mark.parametrize("place", ["", "final_model", "lora_adapter"])
def test_a_run_folder_is_an_adapter(tmp_path: Path, place: str) -> None:
    save(tmp_path / place, tensors_of())
    assert list(read_adapter(tmp_path).pairs) == ["l.q_proj"]
    assert list(read_adapter(tmp_path / place / "adapter_model.safetensors").pairs) == ["l.q_proj"]


def test_a_folder_without_an_adapter_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="final_model or lora_adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="has adapter_config"):
        read_adapter(tmp_path)


def test_a_scale_beside_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave the explicit scale"):
        read_adapter(save(tmp_path, tensors_of()), scale=1.0)


def test_keys_with_an_adapter_name_and_without_prefix(tmp_path: Path) -> None:
    named = {key.replace(".weight", ".default.weight"): t for key, t in tensors_of(prefix="").items()}
    assert list(read_adapter(save(tmp_path, named)).pairs) == ["l.q_proj"]


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": None}, "missing"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"lora_bias": True}, "bias on B"),
        ({"enable_lora": [True, False, True]}, "MergedLinear"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": "4"}}, "a number is needed"),
        ({"r": 3}, "rank 3, but its tensors have rank 2"),
    ],
)
def test_other_methods_and_broken_configs_are_refused_by_name(
    tmp_path: Path, option: dict[str, Any], name: str
) -> None:
    with pytest.raises(DataError, match=name) as caught:
        read_adapter(save(tmp_path, tensors_of(), **option))
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l.q_proj.lora_B.weight": None}, "l.q_proj has lora_A but no lora_B"),
        ({"l.q_proj.lora_A.weight": None}, "l.q_proj has lora_B but no lora_A"),
        ({"l.q_proj.lora_B.weight": torch.ones(5, 3)}, "the ranks differ"),
        ({"l.q_proj.lora_A.weight": torch.ones(4, 6)}, "l.q_proj.*MergedLinear"),
        (  # as an early PEFT saved it: a grouped convolution
            {"l.q_proj.lora_A.weight": torch.ones(4, 6), "l.q_proj.lora_B.weight": torch.ones(10, 2, 1)},
            "l.q_proj.*MergedLinear",
        ),
        ({"l.q_proj.lora_A.weight": torch.ones(2, 6, 1, 1)}, "not matrices"),
        ({"l.q_proj.lora_A.weight": torch.ones(0, 6), "l.q_proj.lora_B.weight": torch.ones(5, 0)}, "empty"),
        ({"l.q_proj.lora_B.weight": torch.full((5, 2), math.inf)}, "lora_B.weight has NaN or inf"),
        ({"head.weight": torch.tensor([math.nan])}, "head.weight has NaN"),
        ({"l.q_proj.lora_magnitude_vector": torch.ones(5)}, "DoRA"),
        ({"l.q_proj.lora_E": torch.ones(2)}, "AdaLoRA"),
        ({"l.q_proj.lora_A.other.weight": torch.ones(2, 6)}, "several adapters in one file"),
        ({"l.q_proj.lora_A.weight": None, "l.q_proj.lora_B.weight": None, "x": torch.ones(1)}, "no lora_A"),
    ],
)
def test_unfit_tensors_are_named(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    changed = tensors_of() | {f"base_model.model.{key}": tensor for key, tensor in change.items()}
    folder = save(tmp_path, {key: tensor for key, tensor in changed.items() if tensor is not None})
    with pytest.raises(DataError, match=message):
        read_adapter(folder)


def test_nothing_unloadable_is_written(tmp_path: Path) -> None:
    empty = LoraPair(torch.ones(0, 4), torch.ones(3, 0), 1.0)
    with pytest.raises(DataError, match="rank 0"):
        write_adapter(tmp_path / "x", LoraAdapter(lora_config(None), {"q": empty}))
    with pytest.raises(DataError, match="needs at least one"):
        write_adapter(tmp_path / "x", LoraAdapter(lora_config(None), {}))
    assert not (tmp_path / "x").exists()


def test_factors_that_share_a_storage_can_be_written(tmp_path: Path) -> None:
    """Slices of one SVD's U and Vᵀ are views; the file holds each tensor by itself."""
    whole = torch.randn(4, 4)
    pairs = {name: LoraPair(whole[:2], whole[:, :2], 1.0) for name in ("a", "b")}
    again = read_adapter(write_adapter(tmp_path, LoraAdapter(lora_config(None), pairs)))
    assert torch.equal(again.pairs["b"].lora_B, whole[:, :2])
