"""Adapters trained with added tokens: merged logits are the adapter's, new tokens included, and all files agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_vision import tiny_qwen25vl, tiny_smolvlm
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.cli import main
from rankwise.files.adapter import read_adapter
from rankwise.files.checkpoint import open_checkpoint
from rankwise.merge import plan as module
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]

BEFORE, ADDED = 384, 8
TARGETS = ["q_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]
NEW = list(range(BEFORE, BEFORE + ADDED))
IDS = torch.arange(BEFORE - 8, BEFORE + ADDED)[None]
# What of PEFT's config brings the rows; those of the resized base are saved beside it where it has no copy.
WAYS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ENDS},
    "tied modules_to_save": {"modules_to_save": ENDS, "ensure_weight_tying": True},
    "embeddings alone": {"modules_to_save": ["embed_tokens"]},
    "resized base": {},
    "lora on both": {"target_modules": [*TARGETS, *ENDS]},
    "tokens": {"trainable_token_indices": [BEFORE - 3, *NEW]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "padded": {"modules_to_save": ENDS, "pad": 64},
    "padded base": {"pad": 64},
}


def tuned(base: Path, folder: Path, rows: int | None = None, pad: int | None = None, **config: Any) -> Tensor:
    """A PEFT adapter on the base with eight more tokens, saved as PEFT saves it; its logits of old and new tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{index}>" for index in range(ADDED)])
    model.resize_token_embeddings(rows or len(tokenizer), pad_to_multiple_of=pad)
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    if rows is None:
        tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(IDS.clamp(max=(rows or len(tokenizer)) - 1)).logits


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return load_model(str(folder), torch.float32)(ids).logits


@pytest.mark.parametrize("way", WAYS)
def test_merged_logits_are_the_adapters(
    way: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tuned(base, tmp_path / "adapter", **WAYS[way])
    for limit in ("1GB", "150KB"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--max_memory", limit]) == 0
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)
    rows = 448 if "pad" in WAYS[way] else BEFORE + ADDED
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == BEFORE + ADDED
    assert f"the embeddings have {rows} rows, as the adapter's, and the base's {BEFORE}" in capsys.readouterr().out
    assert expected.shape[-1] == rows
    with torch.no_grad():
        adapted = load_adapter(load_model(str(base), torch.float32), tmp_path / "adapter")
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_compressed_to_all_its_energy_it_is_the_same_adapter(way: str, base: Path, tmp_path: Path) -> None:
    """Loaded by PEFT on the resized base, as its documentation has it, without a key left over."""
    expected = tuned(base, tmp_path / "adapter", **WAYS[way])
    assert main(["compress", str(tmp_path / "adapter"), "--energy", "1", "-o", str(tmp_path / "small")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == BEFORE + ADDED, "its tokens come along"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(expected.shape[-1])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(model, str(tmp_path / "small"))
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        adapted = load_adapter(load_model(str(base), torch.float32), tmp_path / "small")
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_fewer_rows_than_the_base(base: Path, tmp_path: Path) -> None:
    """`resize_token_embeddings(len(tokenizer))` on a padded base takes rows away."""
    expected = tuned(base, tmp_path / "adapter", rows=BEFORE - 4, modules_to_save=ENDS)
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    merged = logits(tmp_path / "out", IDS.clamp(max=BEFORE - 5))
    torch.testing.assert_close(merged, expected, rtol=0.1, atol=0.1)
    assert open_checkpoint(tmp_path / "out").shape("model.embed_tokens.weight") == (BEFORE - 4, 32)


def test_rows_that_were_not_saved_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(base, tmp_path / "adapter", target_modules=[*TARGETS, "embed_tokens"])
    out = tmp_path / "out"
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(out)]) == (0 if tied else 3)
    assert tied or "does not carry their rows of lm_head.weight" in capsys.readouterr().err
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    plain = {key: tensor for key, tensor in tensors.items() if "embed" not in key}
    save_file(plain, tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = TARGETS
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "other")]) == 3
    assert f"its tokenizer has {BEFORE + ADDED} tokens, and the embeddings {BEFORE} rows" in capsys.readouterr().err
    assert not (tmp_path / "other" / "config.json").exists()


def test_two_sizes_of_vocabulary_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(base, tmp_path / "adapter", modules_to_save=ENDS)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    cut = {key: tensor[:390].clone() if "lm_head" in key else tensor for key, tensor in load_file(file).items()}
    save_file(cut, file)
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 3
    assert "different vocabulary sizes" in capsys.readouterr().err


def test_special_tokens_of_the_training_are_the_merged_models(base: Path, tmp_path: Path) -> None:
    """A chat end token that training added: generation stops on it, and still on the base's own."""
    tuned(base, tmp_path / "adapter", modules_to_save=ENDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    tokenizer.eos_token, tokenizer.pad_token = "<new0>", "<new1>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 0
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert generation["eos_token_id"] == [BEFORE, 2]
    assert generation["pad_token_id"] == config["pad_token_id"] == BEFORE + 1
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == BEFORE
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["merge"]
    assert "eos_token_id [384, 2]" in manifest["copied"]["generation_config.json"]["changed"]


def test_a_merge_that_leaves_new_rows_empty_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(base, tmp_path / "adapter", trainable_token_indices=NEW)
    change = module.build_skeleton

    def without_tokens(*given: Any) -> Any:
        found = change(*given)
        found.tokens.clear()
        return found

    monkeypatch.setattr(module, "build_skeleton", without_tokens)
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 6
    assert "logits differ from base + adapter's" in capsys.readouterr().err


def test_spectra_of_an_adapter_with_added_tokens(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter", target_modules=[*TARGETS, "embed_tokens"])
    words = ["ranks", "--adapter", str(tmp_path / "adapter"), "--model_name", str(base), "--out", str(tmp_path / "out")]
    assert main([*words, "--no-plots"]) == 0
    assert read_adapter(tmp_path / "adapter").pairs["model.embed_tokens"].shape == (32, BEFORE + ADDED)


@pytest.mark.parametrize("make", [tiny_qwen25vl, tiny_smolvlm])
def test_a_model_that_sees_keeps_its_vocabulary_where_its_decoder_is_described(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    model = load_model(str(base), torch.float32)
    rows = model.config.get_text_config().vocab_size + ADDED
    model.resize_token_embeddings(rows)
    ends = [name for name, module in model.named_modules() if name and module is model.get_input_embeddings()]
    config = LoraConfig(
        r=4, target_modules=r".*(language_model|text_model).*q_proj", modules_to_save=[*ends, "lm_head"]
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(rows - 2 * ADDED, rows)[None]
    assert main(["merge", str(tmp_path / "adapter"), "--base_model", str(base), "-o", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = adapted.eval()(ids, attention_mask=torch.ones_like(ids)).logits
        merged = load_model(str(tmp_path / "out"), torch.float32)
        torch.testing.assert_close(
            merged(ids, attention_mask=torch.ones_like(ids)).logits, expected, rtol=1e-4, atol=1e-5
        )
    assert merged.config.get_text_config().vocab_size == rows
