"""Laws of sites: every matrix of every architecture is found, named by its module, and read as the model has it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from rankwise.core.site import KINDS, Site, describe, nearest, pattern
from rankwise.errors import DataError, UsageError
from rankwise.files.checkpoint import open_checkpoint
from rankwise.models.load import load_config, load_model, meta_model
from rankwise.models.sites import fused_experts, model_sites, weight_table
from rankwise.options.sections import TOWERS, SitesSection
from rankwise.ranks.deltas import logical
from rankwise.ranks.probe import filter_sites

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
QWEN_TEXT = SMALL | {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
SMOL_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "opt": ("OPTConfig", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "phi3": ("Phi3Config", SMALL),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {"text_config": QWEN_TEXT, "vision_config": VISION}),
    "idefics3": ("Idefics3Config", {"text_config": SMALL | {"model_type": "llama"}, "vision_config": SMOL_VISION}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 2, "num_key_value_heads": 1}),
}
VLMS = ("qwen2_5_vl", "idefics3")


def tiny_model(name: str) -> PreTrainedModel:
    config_class, values = TINY[name]
    config = getattr(transformers, config_class)(**values)
    auto = transformers.AutoModelForImageTextToText if name in VLMS else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config, dtype=torch.float32)


def counted(sites: dict[str, Site]) -> Counter[tuple[str, str, str]]:
    return Counter((site.tower, site.kind, site.projection) for site in sites.values())


def config_folder(shared_data: Path, name: str) -> Path:
    return shared_data / "model_configs" / name


def test_towers_of_the_real_qwen_and_every_key_of_its_files(shared_data: Path) -> None:
    folder = config_folder(shared_data, "Qwen2.5-VL-7B-Instruct")
    model = meta_model(str(folder))
    sites = model_sites(model)
    language = {("language", "attention", f"{name}_proj"): 28 for name in "qkvo"}
    language |= {("language", "mlp", f"{name}_proj"): 28 for name in ("gate", "up", "down")}
    vision = {("vision", "attention", name): 32 for name in ("qkv", "proj")}
    vision |= {("vision", "mlp", f"{name}_proj"): 32 for name in ("gate", "up", "down")}
    assert counted(sites) == language | vision | {("projector", "other", "mlp"): 2}

    keys = list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    table = weight_table(model, keys)
    assert len(keys) == 729
    assert set(table.weights) == {name for name, _ in model.named_parameters()}
    assert not table.rewritten
    moved = table.weights["model.language_model.layers.0.mlp.up_proj.weight"]
    assert moved.key == "model.layers.0.mlp.up_proj.weight", "the file's name is not the module's"
    assert all(f"{path}.weight" in table.weights for path in sites)


def test_towers_of_the_real_smolvlm_and_tinyllama(shared_data: Path) -> None:
    smol = model_sites(meta_model(str(config_folder(shared_data, "SmolVLM-256M-Instruct"))))
    towers = Counter(site.tower for site in smol.values())
    assert towers == {"language": 30 * 7, "vision": 12 * 6, "projector": 1}
    assert {site.projection for site in smol.values() if site.tower == "vision"} > {"q_proj"}, "so names cannot tell"
    llama = model_sites(meta_model(str(config_folder(shared_data, "TinyLlama-1.1B-Chat-v1.0"))))
    assert len(llama) == 22 * 7
    assert {site.tower for site in llama.values()} == {"language"}
    assert llama["model.layers.3.self_attn.k_proj"] == Site(
        "model.layers.3.self_attn.k_proj", (256, 2048), "language", "attention", 3, "k_proj"
    )


@pytest.mark.parametrize("name", TINY)
def test_every_site_is_read_from_its_file_as_the_model_has_it(tmp_path: Path, name: str) -> None:
    """The (out, in) matrix that x ↦ x·Wᵀ uses, from files that transformers wrote under its own names."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    sites = model_sites(model)
    assert sites == model_sites(meta_model(str(tmp_path))), "weights are not needed to know the sites"
    table = weight_table(model, checkpoint.keys())
    assert {site.weight for site in sites.values()} <= {*table.weights, *table.experts}
    weights = {path: table.weights[site.weight] for path, site in sites.items() if not site.experts}
    for path in weights:  # experts: test_expert_files.py
        site = sites[path]
        module = model.get_submodule(path)
        matrix = logical(weights[path].read(checkpoint), site)
        assert tuple(matrix.shape) == site.shape
        inputs = torch.randn(3, site.shape[1])
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(inputs), inputs @ matrix.T + bias, atol=1e-5), path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gpt2",
            {
                ("attention", "c_attn", True),
                ("attention", "c_proj", True),
                ("mlp", "c_fc", True),
                ("mlp", "c_proj", True),
            },
        ),
        ("gpt_neox", {("attention", "query_key_value", False), ("attention", "dense", False)}),
        ("opt", {("attention", "out_proj", False), ("mlp", "fc1", False), ("mlp", "fc2", False)}),
        ("phi3", {("attention", "qkv_proj", False), ("mlp", "gate_up_proj", False)}),
    ],
)
def test_kinds_of_other_architectures(name: str, expected: set[tuple[str, str, bool]]) -> None:
    sites = model_sites(tiny_model(name)).values()
    assert expected <= {(site.kind, site.projection, site.transposed) for site in sites}
    assert {site.layer for site in sites} == {0, 1}
    assert not any(site.kind in ("head", "embed") for site in sites)


def test_a_router_that_returns_scores_beside_logits_is_no_site() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, num_local_experts=2, moe_layers=[1]))
    assert any(path.endswith("router") for path, _ in model.named_modules())
    assert not any(path.endswith("router") for path in model_sites(model))


def test_fused_experts_are_sites_and_listed() -> None:
    model = tiny_model("mixtral")
    assert fused_experts(model) == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    assert [path for path, site in model_sites(model).items() if site.experts] == fused_experts(model)


@pytest.mark.parametrize(
    ("path", "kind", "layer"),
    [
        ("bert.encoder.layer.3.attention.output.dense", "attention", 3),
        ("bert.encoder.layer.3.intermediate.dense", "mlp", 3),
        ("bert.encoder.layer.3.output.dense", "mlp", 3),
        ("transformer.h.11.mlp.c_proj", "mlp", 11),
        ("model.layers.2.mlp.experts.7.down_proj", "mlp", 2),
        ("lm_head", "head", None),
        ("model.embed_tokens", "embed", None),
        ("stage3.1.3", "other", 1),
    ],
)
def test_kind_and_layer_from_a_path(path: str, kind: str, layer: int | None) -> None:
    site = describe(path, (4, 6))
    assert (site.kind, site.layer) == (kind, layer)
    assert site.tower == "unknown"


@given(path=st.text("abc.0123", min_size=1, max_size=20), shape=st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_any_name_is_a_site_with_a_sound_limit(path: str, shape: tuple[int, int]) -> None:
    site = describe(path, shape)
    assert site.kind in KINDS
    assert site.tower in TOWERS
    assert site.path == path
    assert 1 <= site.largest_rank <= site.full_rank
    if site.largest_rank > 1:
        assert site.parameters(site.largest_rank) <= site.size < site.parameters(site.largest_rank + 1)


def test_only_matrices_are_sites() -> None:
    with pytest.raises(ValueError, match="a site is a matrix"):
        describe("conv", (4, 3, 3, 3))


def test_names_that_look_alike_are_found() -> None:
    known = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert nearest("model.layer.1.self_attn.q_proj", known)[0] == known[1]
    assert pattern("a.b") == r"^a\.b$"


def test_filters_choose_by_tower_and_regex(shared_data: Path) -> None:
    sites = model_sites(meta_model(str(config_folder(shared_data, "SmolVLM-256M-Instruct"))))
    assert {site.tower for site in filter_sites(sites, SitesSection()).values()} == {"language"}
    assert len(filter_sites(sites, SitesSection(towers=["language", "projector"]))) == 211
    chosen = filter_sites(sites, SitesSection(include=r"layers\.[0-4]\.", exclude="mlp"))
    assert len(chosen) == 5 * 4
    with pytest.raises(UsageError, match=r"--towers takes language, vision.*got 'text'"):
        SitesSection(towers=["text"])
    with pytest.raises(UsageError, match="--include"):
        filter_sites(sites, SitesSection(include="("))
    with pytest.raises(UsageError, match="none of 283 sites selected"):
        filter_sites(sites, SitesSection(include="nothing"))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({witness!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def needs_code(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder with code of its own, and the file that the code leaves when it runs."""
    folder, witness = tmp_path / "model", tmp_path / "the code ran"
    tiny_model("llama").save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": "own", "architectures": ["OwnModel"]}
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(REMOTE.format(witness=str(witness)))
    return folder, witness


def test_code_of_a_repository_runs_only_when_asked_for(
    needs_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, witness = needs_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (load_config, meta_model):
        with pytest.raises(DataError, match="--trust_remote_code --revision COMMIT"):
            load(str(folder))
    with pytest.raises(DataError):
        load_model(str(folder), torch.float32)
    assert not witness.exists()
    assert len(model_sites(meta_model(str(folder), trust_remote_code=True))) == 14
    assert type(load_model(str(folder), torch.float32, trust_remote_code=True)).__name__ == "OwnModel"
    assert witness.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_code_from_the_hub_needs_a_full_commit(revision: str | None) -> None:
    with pytest.raises(UsageError, match="40-character commit hash"):
        load_config("org/model", revision, trust_remote_code=True)


def test_broken_and_unknown_configs_are_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        load_config(str(tmp_path))
    for content in ("{", '{"model_type": "no-such-model"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DataError, match=r"config\.json"):
            load_config(str(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DataError, match=r"lack 1 weights of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path), torch.float32)
