"""Laws of experts in files: one expert is the loaded parameter's, and a change of it comes back out of the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import experts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, PermuteForRope
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rankwise.errors import DataError
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.models.expert_files import ALL, ExpertFiles, known
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites, weight_table

Change = Callable[[str, Tensor], dict[str, Tensor]]
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def files_of(folder: Path) -> tuple[Checkpoint, dict[str, ExpertFiles]]:
    """The checkpoint and the files of its expert sites."""
    checkpoint, model = open_checkpoint(folder), meta_model(str(folder))
    found = weight_table(model, checkpoint.keys()).experts
    return checkpoint, {site.weight: found[site.weight] for site in model_sites(model).values() if site.experts}


def require_same(checkpoint: Checkpoint, place: ExpertFiles, loaded: Tensor) -> None:
    """Every expert is its part of the loaded parameter, and a change of it is what the files' changes make."""
    assert place.problem(checkpoint) is None
    assert torch.equal(place.read(checkpoint), loaded)
    for expert in range(place.experts):
        assert torch.equal(place.expert(checkpoint, expert), loaded[expert]), (place.parameter, expert)
        change = torch.randn(place.shape[1:], generator=torch.Generator().manual_seed(expert))
        back = place.in_files(checkpoint, expert, change)
        keys = place.keys_of(expert)
        assert set(back) == set(keys.values())
        for key, part in back.items():
            assert part.shape == checkpoint.shape(key)[1 if place.fused else 0 :], key
        parts = {name: back[key][None] if place.fused else back[key] for name, key in keys.items()}
        assert torch.equal(place.converted(parts), change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", experts.FAMILIES)
def test_one_expert_is_its_part_of_the_loaded_parameter(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = experts.built(family, dtype=dtype)
    model.save_pretrained(tmp_path)
    checkpoint, places = files_of(tmp_path)
    loaded = model.state_dict()
    assert places, family
    for name, place in places.items():
        require_same(checkpoint, place, loaded[name])


def test_from_fused_files_and_from_per_expert_files_the_same(tmp_path: Path) -> None:
    model = experts.built("qwen3_moe")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    (single, singles), (fused, fuseds) = files_of(tmp_path / "single"), files_of(tmp_path / "fused")
    assert not singles[GATE_UP].fused and fuseds[GATE_UP].fused
    for name in singles:
        assert torch.equal(singles[name].read(single), fuseds[name].read(fused))


def tiny_ernie() -> PreTrainedModel:
    config = AutoConfig.for_model("ernie4_5_vl_moe")
    for name, value in {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": [48, 32], "vocab_size": 96,
                        "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "moe_num_experts": 4, "mlp_layer_types": ["dense", "sparse"], "moe_k": 2}.items():  # fmt: skip
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters |= {"mrope_section": [2, 2, 4]}
    for name, value in {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}.items():
        setattr(config.vision_config, name, value)
    config.vision_config.text_hidden_size = config.vision_config.vision_config_hidden_size = 64
    return AutoModelForImageTextToText.from_config(config)


def test_the_two_sets_of_ernie_share_one_numbering_of_files(tmp_path: Path) -> None:
    model = tiny_ernie()
    model.save_pretrained(tmp_path)
    checkpoint, model_ = open_checkpoint(tmp_path), meta_model(str(tmp_path))
    places = weight_table(model_, checkpoint.keys()).experts
    loaded = {name: value for name, value in model.state_dict().items() if value.dim() == 3 and "experts" in name}
    assert len(loaded) == 4
    for name, value in loaded.items():
        require_same(checkpoint, places[name], value)
    text = places[next(name for name in loaded if "text_moe.experts.gate_up" in name)]
    vision = places[next(name for name in loaded if "vision_moe.experts.gate_up" in name)]
    assert set(text.keys).isdisjoint(vision.keys)
    assert any("experts.4." in key for key in vision.keys)  # the fifth file is vision's first expert


def test_mxfp4_is_read_one_expert_at_a_time_and_takes_no_change(tmp_path: Path) -> None:
    experts.built("gpt_oss", dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    count, inner, outer = tensors.pop(GATE_UP).shape
    blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(120, 130, (count, outer, inner // 32), generator=draw, dtype=torch.uint8)
    save_file(tensors | {f"{GATE_UP}_blocks": blocks, f"{GATE_UP}_scales": scales}, tmp_path / "model.safetensors")
    checkpoint, places = files_of(tmp_path)
    place, whole = places[GATE_UP], convert_moe_packed_tensors(blocks, scales)
    assert place.problem(checkpoint) is None and whole.shape == place.shape
    assert torch.equal(place.read(checkpoint), whole) and place.dtype(checkpoint) is torch.bfloat16
    with pytest.raises(DataError, match=f"{GATE_UP} is MXFP4"):
        place.in_files(checkpoint, 0, torch.zeros(place.shape[1:]))


def test_an_operation_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    experts.built("mixtral").save_pretrained(tmp_path)
    checkpoint, places = files_of(tmp_path)
    sources = places[GATE_UP].sources
    for steps in ((MergeModulelist(0), PermuteForRope()), (MergeModulelist(1), Concatenate(1))):
        odd = ExpertFiles(GATE_UP, places[GATE_UP].shape, sources, steps, "t", ("t",))
        name = next(type(step).__name__ for step in steps if not known(step))
        with pytest.raises(DataError, match=rf"{GATE_UP} of its files by {name}, which is not known"):
            odd.expert(checkpoint, 0)
        with pytest.raises(DataError, match=name):
            odd.in_files(checkpoint, 0, torch.zeros(places[GATE_UP].shape[1:]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, t: {} if ".experts.2.w3." in key else {key: t}, r"has no .experts.\*.w3.weight of expert 2"),
        (lambda key, t: {} if ".experts.3." in key else {key: t}, r"has 3 experts .* where the model has 4"),
        (lambda key, t: {key: t[:-1] if ".experts.1.w1." in key else t}, r"is .* for expert 1 where the model has"),
    ],
)
def test_what_is_wrong_is_named_by_expert(change: Change, said: str, tmp_path: Path) -> None:
    experts.built("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {k: v.contiguous() for key, tensor in tensors.items() for k, v in change(key, tensor).items()}
    save_file(kept, tmp_path / "model.safetensors")
    checkpoint, places = files_of(tmp_path)
    found = places[GATE_UP].problem(checkpoint)
    assert found is not None and re.search(said, found), found


def test_keys_tell_whose_tensor_they_are(tmp_path: Path) -> None:
    experts.built("mixtral").save_pretrained(tmp_path)
    _, places = files_of(tmp_path)
    assert places[DOWN].keys["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == 3
    experts.built("gpt_oss").save_pretrained(tmp_path / "fused")
    _, fused = files_of(tmp_path / "fused")
    assert fused[DOWN].keys == {DOWN: ALL}
