"""Laws of `merge`: bit for bit what PEFT merges, in the base's own layout, proven before it bears its name."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rankwise.cli import main
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.atomic import fingerprint
from rankwise.files.checkpoint import Weight, open_checkpoint
from rankwise.files.run_folder import RunFolder
from rankwise.merge import write as writing
from rankwise.merge.command import describe, made_from, run
from rankwise.merge.plan import Entry, Skeleton, entries_of, plan_merge
from rankwise.merge.verify import Agreement, ReferenceLogits, compare
from rankwise.merge.write import make_tensor, shard_bytes, write_merged, write_shards
from rankwise.models.load import load_model
from rankwise.options.commands import MergeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What PEFT says when the tests make adapters on embeddings:
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TARGETS = ["q_proj", "down_proj"]


def tiny_gpt2(folder: Path) -> Path:
    tiny_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=384, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, targets: Any = TARGETS, std: float = 0.1, **config: Any) -> Path:
    """A PEFT adapter with random factors (and random changes of what else it trains), saved by PEFT."""
    model = load_model(str(base), torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=std)
            elif parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(load_model(str(base), dtype), str(adapter)).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key).clone() for key in checkpoint}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("adapter"))


CASES: dict[str, tuple[Callable[[Path], Path], Any, dict[str, Any]]] = {
    "llama": (tiny_llama, TARGETS, {"rank_pattern": {"down_proj": 7}, "use_rslora": True}),
    "llama bf16": (lambda folder: tiny_llama(folder, dtype=torch.bfloat16), TARGETS, {}),
    "conv1d": (tiny_gpt2, ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "embedding": (tiny_llama, ["q_proj", "embed_tokens"], {}),
    "dora": (tiny_llama, TARGETS, {"use_dora": True}),
    "head and biases": (tiny_bert, ["query"], {"modules_to_save": ["classifier"], "bias": "all"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_bit_for_bit_what_peft_merges(case: str, tmp_path: Path) -> None:
    make, targets, config = CASES[case]
    base = make(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", targets, **config)
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))
    before, after = weights(base), weights(tmp_path / "out")
    expected = merged_by_peft(base, adapter, torch.bfloat16 if "bf16" in case else torch.float32)
    assert after.keys() == before.keys(), "the base's own layout"
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, expected[key]), key
    assert any(not torch.equal(after[key], before[key]) for key in after)


def test_more_digits_on_disk_are_merged_digits(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_on(base, tmp_path / "adapter")
    agreement = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out"), dtype="float32"))
    assert agreement is not None and agreement.error < 1e-6
    expected = merged_by_peft(base, adapter, torch.float32)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(tmp_path / "out").items())


def test_a_plan_can_be_written_again(base: Path, adapter: Path) -> None:
    plan = plan_merge(str(base), adapter)
    assert all(torch.equal(make_tensor(plan, entry), make_tensor(plan, entry)) for entry in plan.entries)


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_shards_hold_what_was_given_aligned(size: str, tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(5, dtype=torch.int8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "flag": torch.tensor(True),
        "half": torch.randn(30_000).to(torch.bfloat16),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(100, 300).T,
    }
    entries = [Entry(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    files = write_shards(tmp_path, entries, tensors.__getitem__, size)
    assert len(files) == (1 if size == "1GB" else 3)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(key), tensor) and checkpoint.dtype(key) == tensor.dtype
        assert checkpoint.shards[key].entries[key].start % tensor.dtype.itemsize == 0, key


def test_the_result_is_a_whole_model_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "-o", str(out), "--max_shard_size", "40KB"]) == 0
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2 and all((out / name).stat().st_size < 55_000 for name in shards)
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "single")))
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert all(torch.equal(tensor, single[key]) for key, tensor in weights(out).items())
    beside = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"}
    assert beside <= {path.name for path in out.iterdir()}
    text = "The Vaults pub near Café Adriatic"
    assert (
        AutoTokenizer.from_pretrained(out)(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    )
    adapted = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    entry = json.loads((out / "manifest.json").read_text())["stages"]["merge"]
    assert entry["verification"]["error"] < 1e-6 < entry["verification"]["effect"]
    assert set(entry["inputs"]) == {"base", "adapter"} and "model.safetensors.index.json" in entry["outputs"]
    assert all(fingerprint(out / row["path"]) == row["fingerprint"] for row in entry["outputs"].values())
    assert entry["inputs"]["adapter"] == {"path": str(adapter), "fingerprint": fingerprint(adapter)}


def test_precision_is_the_asked_one_and_its_cost_is_stated(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agreement = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path), dtype="bfloat16"))
    assert agreement is not None and 1e-4 < agreement.error < 0.02 and 0 < agreement.effect_lost < 0.1
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "rounding costs" in printed and "bfloat16" in printed


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_untied(target: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_on(base, tmp_path / "adapter", ["q_proj", target])
    agreement = run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))
    assert agreement is not None and agreement.error < 1e-6
    after, tied = weights(tmp_path / "out"), weights(base)["model.embed_tokens.weight"]
    changed = "lm_head.weight" if target == "lm_head" else "model.embed_tokens.weight"
    kept = ({"lm_head.weight", "model.embed_tokens.weight"} - {changed}).pop()
    assert torch.equal(after[kept], tied) and not torch.equal(after[changed], tied)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_architecture_that_always_ties_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    adapter = adapter_on(tmp_path / "base", tmp_path / "adapter", ["q", "lm_head"])
    with pytest.raises(VerificationError, match="always ties"):
        run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_for_another_base_names_both(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = tiny_llama(tmp_path / "wider", hidden_size=64)
    deeper = tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    for other in (wider, deeper, tiny_gpt2(tmp_path / "gpt2"), tiny_bert(tmp_path / "bert")):
        with pytest.raises(DataError) as caught:
            run(MergeConfig(adapter=str(adapter), base_model=str(other), output_dir=str(tmp_path / "out")))
        assert str(adapter) in str(caught.value) and str(base) in str(caught.value) and str(other) in str(caught.value)
    assert not (tmp_path / "out").exists()


def edited(adapter: Path, folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def key_of(half: str) -> str:
    return f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], type[Exception], str]] = {
    "half missing": (lambda tensors, config: tensors.pop(key_of("B")), DataError, "1 weights are missing"),
    "stray factor": (
        lambda t, c: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}),
        DataError,
        "1 unexpected weights",
    ),
    "stray head": (
        lambda t, c: t.update({"base_model.model.score.weight": torch.ones(2, 32)}),
        DataError,
        "score.weight",
    ),
    "nan": (lambda t, c: t[key_of("A")].fill_(float("nan")), DataError, "NaN"),
    "moved base": (lambda t, c: c.update(init_lora_weights="pissa"), DataError, "changes the base"),
    "not lora": (lambda t, c: c.update(peft_type="IA3"), DataError, "peft_type is IA3"),
    "single tokens": (lambda t, c: c.update(trainable_token_indices=[1]), DataError, "trainable_tokens_delta"),
    "no effect": (
        lambda t, c: [tensor.zero_() for key, tensor in t.items() if "lora_B" in key],
        VerificationError,
        "no effect",
    ),
    "next to no effect": (
        lambda t, c: [tensor.mul_(1e-9) for key, tensor in t.items() if "lora_B" in key],
        VerificationError,
        "no effect",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_cannot_be_merged_is_refused(damage: str, adapter: Path, tmp_path: Path) -> None:
    change, error, message = DAMAGES[damage]
    broken = edited(adapter, tmp_path / "broken", change)
    with pytest.raises(error, match=message):
        run(MergeConfig(adapter=str(broken), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_wrong_merge_is_found_and_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writing.merge_layer
    monkeypatch.setattr(writing, "merge_layer", lambda layer, weight: 2 * right(layer, weight) - weight)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out")]) == 6
    assert list(tmp_path.iterdir()) == [], "neither a temporary folder nor the output's"
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), "--no_verify"]) == 0


def test_an_index_that_transformers_does_not_load_is_named(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `metadata` it ends in a KeyError, after the merge is planned."""
    model = load_model(str(base), torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    words = ["merge", str(adapter), "--base_model", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    assert main(words) == 3
    assert f'{index}: has no "metadata"' in capsys.readouterr().err
    index.write_text(json.dumps({"metadata": {}, "weight_map": content["weight_map"]}))
    assert main(words) == 0


def test_an_effect_smaller_than_the_rounding_is_not_written(base: Path, tmp_path: Path) -> None:
    faint = adapter_on(base, tmp_path / "faint", std=0.002)
    with pytest.raises(VerificationError, match="would be lost"):
        run(MergeConfig(adapter=str(faint), output_dir=str(tmp_path / "out"), dtype="bfloat16"))
    assert run(MergeConfig(adapter=str(faint), output_dir=str(tmp_path / "out"), dtype="float32")) is not None


def test_agreement_measures_what_it_says() -> None:
    torch.manual_seed(0)
    start, moved = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    same = compare(ReferenceLogits((), start, moved), moved)
    assert (same.error, same.max_difference, same.same_top1, same.kl) == (0, 0, 1, 0)
    assert same.effect == pytest.approx(float((moved - start).norm() / moved.norm()))
    off = compare(ReferenceLogits((), start, moved), start)
    assert off.effect_lost == pytest.approx(1) and off.kl > 0
    with pytest.raises(VerificationError, match="differ"):
        Agreement(float("nan"), 1.0, 0.0, 1.0, 0.0).require(torch.float32)


def test_a_quantized_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    quantized = tiny_llama(tmp_path / "base")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"quantized \(bitsandbytes\).*--base_model"):
        run(MergeConfig(adapter=str(adapter), base_model=str(quantized), output_dir=str(tmp_path / "out")))


def test_older_layouts_keep_their_names(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", ["c_attn"], fan_in_fan_out=True)
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "new")))
    tensors = load_file(base / "model.safetensors")
    old = {key.removeprefix("transformer."): tensor.clone() for key, tensor in tensors.items()}
    (base / "model.safetensors").unlink()
    torch.save(old, base / "pytorch_model.bin")
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "old")))
    after, expected = weights(tmp_path / "old"), weights(tmp_path / "new")
    assert after.keys() == old.keys()
    assert all(torch.equal(tensor, expected[f"transformer.{key}"]) for key, tensor in after.items())


def test_the_tokenizer_that_the_adapter_was_trained_with_wins(adapter: Path, tmp_path: Path) -> None:
    own = edited(adapter, tmp_path / "own", lambda tensors, config: None)
    tiny_tokenizer(own, chat_template="{{ messages[0]['content'] }}")
    run(MergeConfig(adapter=str(own), output_dir=str(tmp_path / "out")))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"


def test_only_an_earlier_merge_is_replaced(base: Path, adapter: Path, tmp_path: Path) -> None:
    for folder in (base, tmp_path):
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="holds other files"):
            run(MergeConfig(adapter=str(adapter), output_dir=str(folder)))
        assert (folder / "notes.txt").read_text() == "mine"
        (folder / "notes.txt").unlink()
    for dtype in ("float32", "float16"):
        run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out"), dtype=dtype))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float16}


def test_a_second_process_is_refused(adapter: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out").lock(), pytest.raises(UsageError, match="in use"):
        run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))


def anonymous_bytes() -> int:
    """Anonymous memory that is in use (what the allocator keeps for later is given back first)."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon and malloc_trim are Linux's")
def test_memory_is_that_of_a_few_matrices_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 4}
    base = tiny_llama(tmp_path / "base", **sizes)
    adapter = adapter_on(base, tmp_path / "adapter", ["up_proj", "gate_proj", "down_proj"])
    plan = plan_merge(str(base), adapter)
    (tmp_path / "out").mkdir()
    seen: list[int] = []
    one = writing.merge_layer
    monkeypatch.setattr(
        writing, "merge_layer", lambda layer, weight: (one(layer, weight), seen.append(anonymous_bytes()))[0]
    )
    start = anonymous_bytes()
    write_merged(plan, tmp_path / "out", "5GB")
    matrix = 512 * 4096 * 4
    assert len(seen) == 18 and max(seen) - start < 4 * matrix < 18 * matrix


def test_what_cannot_work_is_refused_before_anything_is_read(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an adapter"):
        made_from(MergeConfig())
    for size in ("5", "many", "0GB"):
        with pytest.raises(UsageError, match="max_shard_size"):
            made_from(MergeConfig(adapter=str(adapter), max_shard_size=size))
    assert shard_bytes("5GB") == 5 * 10**9
    gone = edited(adapter, tmp_path / "gone", lambda t, config: config.update(base_model_name_or_path="C:/me/model"))
    with pytest.raises(DataError, match="not on this machine; give the base with --base_model"):
        made_from(MergeConfig(adapter=str(gone)))
    assert any("compare" in line for line in describe(MergeConfig(adapter=str(adapter))))


def test_row_blocks_of_one_key_are_written_in_their_order(tmp_path: Path) -> None:
    """A fused tensor of a file (q, k and v in one) is put together block by block, however the names are listed."""
    file = tmp_path / "model.safetensors"
    save_file({"qkv.weight": torch.zeros(6, 4), "norm.weight": torch.zeros(4)}, file)
    weights = {name: Weight("qkv.weight", part=(index, 3)) for index, name in [(2, "v"), (0, "q"), (1, "k")]}
    entries = entries_of(open_checkpoint(file), weights, {}, Skeleton({}, {}, {}, frozenset()), (0, 0), "auto")
    assert {entry.key: entry.names for entry in entries} == {"qkv.weight": ("q", "k", "v"), "norm.weight": ()}
