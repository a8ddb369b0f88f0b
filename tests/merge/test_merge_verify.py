"""Laws of a merge's verification: the same numbers with one layer in memory, on real prompts; the cost of rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_merge import CASES, TARGETS, adapter_on, anonymous_bytes
from test_towers_full import bases  # noqa: F401
from tiny import tiny_llama
from towered import ALL, Bases, adapted
from transformers import T5Config, T5ForConditionalGeneration

from rankwise.cli import main
from rankwise.data.device import DeviceTarget
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.errors import UsageError
from rankwise.files.checkpoint import open_checkpoint
from rankwise.merge import write as writing
from rankwise.merge.command import prompts_of, run
from rankwise.merge.logits import (
    FileWeights,
    last_tokens,
    layered_model,
    logits,
    needs_layers,
    prompt_batch,
    text_batch,
    whole_bytes,
)
from rankwise.merge.verify import reference_logits
from rankwise.merge.write import Rounding
from rankwise.models.adapters import save_adapter
from rankwise.models.load import load_model, load_processor
from rankwise.options.commands import MergeConfig
from rankwise.options.sections import DataSection, ModelSection

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def same_by_layers(base: Path, adapter: Path, *, pictures: bool = False) -> None:
    whole = reference_logits(str(base), adapter, pictures=pictures)
    layered = reference_logits(str(base), adapter, pictures=pictures, layered=True)
    assert whole.base.shape == layered.base.shape
    torch.testing.assert_close(layered.base, whole.base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layered.adapted, whole.adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole.base, whole.adapted, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_one_layer_in_memory_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    make, targets, config = CASES[case]
    base = make(tmp_path / "base")
    same_by_layers(base, adapter_on(base, tmp_path / "adapter", targets, **config))


def test_tied_weights_are_found_by_either_name(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    same_by_layers(base, adapter_on(base, tmp_path / "adapter", [*TARGETS, "lm_head"]))
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    same_by_layers(tmp_path / "t5", adapter_on(tmp_path / "t5", tmp_path / "other", ["q"]))


@pytest.mark.parametrize("family", ALL)
def test_families_that_see_run_layer_by_layer(family: str, bases: Bases, tmp_path: Path) -> None:  # noqa: F811
    base = bases(family)
    save_adapter(adapted(base, ("language", "vision"), ("projector",)), tmp_path, str(base))
    same_by_layers(base, tmp_path, pictures=True)


def test_a_layer_at_a_time_is_all_that_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 4}
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, **sizes)
    matrix = 256 * 4096 * 4
    peak: list[int] = []
    read = FileWeights.__getitem__

    def counted(self: FileWeights, name: str) -> torch.Tensor:
        found = read(self, name)
        peak.append(anonymous_bytes())
        return found

    model = layered_model(str(base))
    start = anonymous_bytes()
    monkeypatch.setattr(FileWeights, "__getitem__", counted)
    logits(model, [text_batch(model)])
    assert len(peak) > 40
    assert max(peak) - start < 4 * matrix < whole_bytes(open_checkpoint(base)) / 4


def test_a_limit_on_memory_decides_how_it_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    files = open_checkpoint(base)
    largest = 8 * 384 * 32
    assert needs_layers(files, whole_bytes(files) - 1) and not needs_layers(files, whole_bytes(files))
    with pytest.raises(UsageError, match=r"largest matrix.*--max_memory"):
        needs_layers(files, largest - 1)
    for limit, layered in ((f"{largest // 1000 + 1}KB", True), ("1GB", False)):
        words = ["merge", str(adapter), "-o", str(tmp_path / "out"), "--max-memory", limit]
        assert main(words) == 0
        assert ("layer by layer" in capsys.readouterr().out) == layered
        proof = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["merge"]["verification"]
        assert proof["layer_by_layer"] == layered and proof["on"] == "random tokens"
        assert proof["error"] < 1e-6 < proof["effect"]
    assert main(["merge", str(adapter), "-o", str(tmp_path / "no"), "--max_memory", "lots"]) == 2
    assert main(["merge", str(adapter), "-o", str(tmp_path / "no"), "--max_memory", "1KB"]) == 2
    assert not (tmp_path / "no" / "config.json").exists()


def test_a_wrong_merge_is_found_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    right = writing.merge_layer
    monkeypatch.setattr(writing, "merge_layer", lambda layer, weight: 2 * right(layer, weight) - weight)
    limit = ["--max_memory", "99KB"]
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), *limit]) == 6
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_that_reads_weights_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")

    def past_its_layer(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.down_proj.weight.T) @ self.down_proj.weight.T

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", past_its_layer)
    with pytest.raises(UsageError, match=r"LlamaForCausalLM cannot be compared layer by layer.*--no_verify"):
        reference_logits(str(base), adapter, layered=True)


# --- on what it is compared ---


def rows_of(bases: Bases) -> DataSection:  # noqa: F811
    return DataSection(data_path=str(bases.rows), image_folder=str(bases.rows.parent / "images"))


def test_padded_prompts_with_pictures_give_what_each_gives_alone(bases: Bases) -> None:  # noqa: F811
    base = bases("smolvlm")
    config = MergeConfig(data=rows_of(bases), num_samples=7)
    batch = prompts_of(config, str(base), base)
    assert batch is not None and batch["pixel_values"].shape[0] * batch["pixel_values"].shape[1] >= 6
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(lengths) == 7 and len(set(lengths)) > 1, "with and without pictures"
    model = load_model(str(base), torch.float32)
    together = logits(model, [batch]).split([min(length, 32) for length in lengths])
    renderer = renderer_for(replace(config.data, task="conversations"), ModelSection(), str(base), model.config)
    for example, found in zip(load("conversations", str(bases.rows), "dev").items[:7], together, strict=True):
        alone = logits(model, [prompt_batch(renderer, [example])])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_the_last_tokens_are_those_before_the_padding() -> None:
    mask = torch.tensor([[1] * 40 + [0] * 5, [1] * 3 + [0] * 42])
    found = last_tokens(mask)
    assert found[0].nonzero().flatten().tolist() == list(range(8, 40))
    assert found[1].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("limit", ["1GB", "140KB"])
def test_a_merge_is_proven_on_the_prompts_of_a_data_set(
    limit: str,
    bases: Bases,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = bases("smolvlm")
    save_adapter(adapted(base, ("language",), ("projector",)), tmp_path, str(base))
    words = ["merge", str(tmp_path), "-o", str(tmp_path / "out"), "--data_path", str(bases.rows), "--num_samples", "3"]
    words += ["--image_folder", str(bases.rows.parent / "images")]
    assert main([*words, "--max_memory", limit]) == 0
    assert f"verified on 3 prompts of {bases.rows}" in capsys.readouterr().out
    proof = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["merge"]["verification"]
    assert proof["on"] == f"3 prompts of {bases.rows}" and proof["layer_by_layer"] == (limit != "1GB")
    assert proof["error"] < 1e-5 < proof["effect"] and proof["same_top1"] == 1 and proof["max_difference"] < 1e-3


def test_half_of_what_prompts_need_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = str(adapter_on(base, tmp_path / "adapter"))
    for words in (["--task", "e2e_nlg"], ["--data_path", "folder"], ["--num_samples", "0"]):
        assert main(["merge", adapter, "-o", str(tmp_path / "out"), *words, "--dry-run"]) == 2


# --- rounding ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_takes_from_the_weights_is_measured(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_on(base, tmp_path / "adapter", std=0.01)
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "exact"), dtype="float32"))
    assert "rounding to" not in capsys.readouterr().out
    run(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out"), dtype=dtype))
    printed = capsys.readouterr().out
    before, exact = load_file(base / "model.safetensors"), load_file(tmp_path / "exact" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    changed = [key for key in before if not torch.equal(before[key], exact[key])]
    lost = sum(float((written[key].double() - exact[key].double()).square().sum()) for key in changed)
    change = sum(float((exact[key].double() - before[key].double()).square().sum()) for key in changed)
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["merge"]["rounding"]
    share = found["share_of_change_lost"]
    assert share[dtype] == pytest.approx((lost / change) ** 0.5, rel=1e-3)
    assert found["worst"]["weight"] in changed and found["worst"]["share"] >= share[dtype]
    assert f"{share[dtype]:.1%}" in printed
    assert ("--dtype float16 is the better one" in printed) == (dtype == "bfloat16")
    if dtype == "bfloat16":
        assert share["bfloat16"] > 5 * share["float16"] > 0


def test_float16_is_not_advised_where_it_overflows() -> None:
    rounding = Rounding()
    stored = torch.full((4, 4), 1e5)
    rounding.add("large", stored, stored + 100, torch.bfloat16)
    sentence = rounding.sentence()
    assert sentence is not None and "float32" in sentence and "float16 would" not in sentence
    json.dumps(rounding.as_dict(), allow_nan=False)


# --- what lies beside the weights ---


def test_every_file_beside_the_weights_is_accounted_for(bases: Bases, tmp_path: Path) -> None:  # noqa: F811
    base = bases("smolvlm")
    save_adapter(adapted(base, ("language",)), tmp_path, str(base))
    DeviceTarget(image_size=48, longest_edge=32).save(tmp_path)
    (tmp_path / "task.json").write_text('{"name": "colours"}')
    (tmp_path / "split.json").write_text("{}")
    out = tmp_path / "out"
    run(MergeConfig(adapter=str(tmp_path), output_dir=str(out)))
    entry = json.loads((out / "manifest.json").read_text())["stages"]["merge"]
    copied = entry["copied"]
    assert copied["device.json"]["from"] == copied["task.json"]["from"] == "adapter"
    assert copied["tokenizer.json"] == {"from": "base", "path": str(base / "tokenizer.json")}
    own = {"model.safetensors", "config.json", "manifest.json", "resolved_config.json"}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == own | set(copied)
    assert set(copied) < set(entry["outputs"]) and "split.json" not in copied
    assert load_processor(str(base)).image_processor.size == {"longest_edge": 64}
    assert load_processor(str(out)).image_processor.size == {"longest_edge": 32}, "as on the device"
    changed = [name for name, row in copied.items() if "changed" in row]
    assert len(changed) == 1 and "longest_edge 32" in copied[changed[0]]["changed"]
    for name in set(copied) - set(changed) - {"device.json", "task.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes()
