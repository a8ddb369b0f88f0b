"""One reader of tensors' keys: what wraps a model in training (torch.compile, DDP, FSDP, adapter names) is off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_extract import tuned_from
from test_merge import adapter_on
from tiny import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise.cli import main
from rankwise.core.site import unwrapped
from rankwise.errors import DataError
from rankwise.files.adapter import read_adapter
from rankwise.files.checkpoint import open_checkpoint
from rankwise.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

IDS = torch.arange(40).reshape(2, 20)
UP = "model.layers.0.mlp.up_proj"
WRAPPED: dict[str, Callable[[str], str]] = {
    "compile": lambda key: f"_orig_mod.{key}",
    "ddp": lambda key: f"module.{key}",
    "ddp of compile": lambda key: f"module._orig_mod.{key}",
    "fsdp": lambda key: "_fsdp_wrapped_module." + key.replace("layers.0", "layers.0._fsdp_wrapped_module"),
    "checkpointing": lambda key: key.replace("layers.1", "layers.1._checkpoint_wrapped_module"),
    "compiled layers": lambda key: key.replace("mlp.", "mlp._orig_mod."),
}
NAMED: dict[str, Callable[[str], str]] = WRAPPED | {
    "state dict": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "other name": lambda key: key.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine."),
    "wrapped inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
}


def rewritten(folder: Path, out: Path, name: str, change: Callable[[str], str]) -> Path:
    """The folder with every key of its weights changed."""
    shutil.copytree(folder, out)
    save_file({change(key): tensor for key, tensor in load_file(folder / name).items()}, out / name)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_from(base, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head that is trained in full."""
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), ["q_proj", "up_proj"], modules_to_save=["lm_head"])


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def by_peft(base: Path, adapter: Path) -> Tensor:
    """PEFT's own reading of an adapter that was written; what its file lacks or has too much of is an error."""
    adapted = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter)).eval()
    names = {key.removeprefix("base_model.model.") for key in load_file(adapter / "adapter_model.safetensors")}
    held = {key.removeprefix("base_model.model.").replace(".default", "") for key in adapted.state_dict()}
    assert names <= held | {key.replace(".modules_to_save", "") for key in held}
    assert {key for key in held if "lora_" in key} <= names
    return logits_of(adapted)


@pytest.mark.parametrize("wrapped", NAMED)
def test_an_adapter_with_wrapped_keys_is_the_adapter(wrapped: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = rewritten(adapter, tmp_path / "adapter", "adapter_model.safetensors", NAMED[wrapped])
    expected = logits_of(PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter)).eval())
    assert main(["compress", str(other), "--energy", "1", "-o", str(tmp_path / "small")]) == 0
    torch.testing.assert_close(by_peft(base, tmp_path / "small"), expected, rtol=1e-4, atol=1e-5)
    assert main(["merge", str(other), "-o", str(tmp_path / "merged")]) == 0
    merged = logits_of(load_model(str(tmp_path / "merged"), torch.float32))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    words = ["ranks", "--adapter", str(other), "--model_name", str(base), "--out", str(tmp_path), "--no-plots"]
    assert main([*words, "--svd_threshold", "1"]) == 0
    plan = json.loads((tmp_path / "configs" / "lora_rank_config.json").read_text())
    assert {row["path"] for rows in plan["layer_metadata"].values() for row in rows} == set(read_adapter(adapter).pairs)


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_pair_with_wrapped_keys_gives_the_same_adapter(
    which: str, wrapped: str, base: Path, tuned: Path, tmp_path: Path
) -> None:
    folders = {"base": base, "tuned": tuned}
    folders[which] = rewritten(folders[which], tmp_path / which, "model.safetensors", WRAPPED[wrapped])
    words = ["extract", str(folders["base"]), str(folders["tuned"]), "--rank", "1000", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    expected = logits_of(load_model(str(tuned), torch.float32))
    torch.testing.assert_close(by_peft(base, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_in_one_file_are_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = {NAMED["state dict"](key): tensor for key, tensor in tensors.items()}
    second = {NAMED["other name"](key): tensor for key, tensor in tensors.items() if "lora_" in key}
    other = Path(shutil.copytree(adapter, tmp_path / "two"))
    save_file(first | {k: t.clone() for k, t in second.items()}, other / "adapter_model.safetensors")
    assert main(["compress", str(other), "--energy", "1", "-o", str(tmp_path / "small")]) == 3
    assert "several adapters in one file (default, mine)" in capsys.readouterr().err


def test_a_running_models_whole_state_is_read_as_its_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` of a PeftModel: base weights, adapter names and both copies of the head."""
    model = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter)).eval()
    other = Path(shutil.copytree(adapter, tmp_path / "whole"))
    save_file({key: t.clone() for key, t in model.state_dict().items()}, other / "adapter_model.safetensors")
    assert main(["compress", str(other), "--energy", "1", "-o", str(tmp_path / "small")]) == 0
    torch.testing.assert_close(by_peft(base, tmp_path / "small"), logits_of(model), rtol=1e-4, atol=1e-5)
    assert main(["merge", str(other), "-o", str(tmp_path / "merged")]) == 0
    merged = logits_of(load_model(str(tmp_path / "merged"), torch.float32))
    torch.testing.assert_close(merged, logits_of(model), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_unmerged_factors_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base weights are the base's: the delta would be zero, or the factors be taken for sites."""
    model = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter))
    other = Path(shutil.copytree(base, tmp_path / "unmerged"))
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, other / "model.safetensors")
    assert main(["extract", str(base), str(other), "--rank", "4", "-o", str(tmp_path / "out")]) == 3
    assert "holds an adapter that is not merged" in capsys.readouterr().err


# --- without a config, and with --rename -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_pair_without_config_are_no_matrices(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    tuned = tuned_from(base, tmp_path / "tuned", also=("model.embed_tokens.weight",))
    for folder in (base, tuned):
        (tmp_path / f"bare {folder.name}").mkdir()
        shutil.copy(folder / "model.safetensors", tmp_path / f"bare {folder.name}")
    words = [str(tmp_path / "bare base"), str(tmp_path / "bare tuned"), "--rank", "1000", "-o", str(tmp_path / "out")]
    assert main(["extract", *words]) == 0
    shown = capsys.readouterr().out
    assert "model.embed_tokens.weight are embeddings or heads, and no sites" in shown
    assert "not verified (no base with a config.json" in shown
    assert "1 tensors outside these sites changed as well" in shown
    pairs = read_adapter(tmp_path / "out").pairs
    assert len(pairs) == 14 and not any("embed" in path or "head" in path for path in pairs)
    assert main(["extract", str(base), str(tuned), "--rank", "1000", "-o", str(tmp_path / "known")]) == 0
    torch.testing.assert_close(by_peft(base, tmp_path / "out"), by_peft(base, tmp_path / "known"), rtol=1e-4, atol=1e-4)


def test_conv1d_of_a_pair_without_config_is_told_by_its_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    save_file(
        {key: tensor.clone() for key, tensor in model.state_dict().items() if "lm_head" not in key},
        tmp_path / "t.safetensors",
    )
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "b.safetensors")
    words = [str(tmp_path / "b.safetensors"), str(tmp_path / "t.safetensors"), "--rank", "1000"]
    assert main(["extract", *words, "-o", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(by_peft(tmp_path / "base", tmp_path / "out"), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda key: key.replace("model.", "backbone.", 1), "^backbone=model"),
        (lambda key: key.replace("model.", "backbone.", 1), "^(model|backbone)=trunk"),
        (lambda key: key.replace(".mlp.", ".ffn."), r"\.ffn\.=.mlp."),
    ],
)
def test_rename_keeps_the_config_and_the_models_names(
    change: Callable[[str], str], rule: str, base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = rewritten(tuned, tmp_path / "tuned", "model.safetensors", change)
    words = ["extract", str(base), str(other), "--rank", "1000", "-o", str(tmp_path / "out")]
    assert main(words) == 3
    assert main([*words, "--rename", rule]) == 0
    assert "verified: loaded by PEFT" in capsys.readouterr().out
    assert UP in read_adapter(tmp_path / "out").pairs
    expected = logits_of(load_model(str(tuned), torch.float32))
    torch.testing.assert_close(by_peft(base, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    words = ["ranks", str(base), str(other), "--rename", rule, "--out", str(tmp_path / "ranks"), "--no-plots"]
    assert main(words) == 0
    plan = json.loads((tmp_path / "ranks" / "configs" / "lora_rank_config.json").read_text())
    assert {row["tower"] for rows in plan["layer_metadata"].values() for row in rows} == {"language"}


# --- the names themselves --------------------------------------------------------------------------------------------

PARTS = st.lists(st.sampled_from(["model", "layers", "0", "mlp", "module", "weight"]), min_size=1, max_size=5)


@given(PARTS, st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module"]), max_size=3), st.integers(0, 5))
def test_wrappers_anywhere_are_off_and_nothing_else(parts: list[str], wrappers: list[str], place: int) -> None:
    wrapped = ".".join([*parts[:place], *wrappers, *parts[place:]])
    keys = {"other.weight": "other.weight", ".".join(parts): wrapped}
    assert unwrapped(keys.values(), "here") == keys


def test_a_module_of_that_name_is_no_wrapper() -> None:
    keys = ["module.up.weight", "head.weight"]
    assert unwrapped(keys, "here") == {key: key for key in keys}
    assert list(unwrapped(["module.up.weight", "module.head.weight"], "here")) == ["up.weight", "head.weight"]


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"two\.safetensors: .*are the same tensor, a\.weight"):
        open_checkpoint(tmp_path / "two.safetensors").keys()
