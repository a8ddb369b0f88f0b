"""A preliminary run gives exactly tuned − base, says what it takes, and refuses what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from rankwise import cli
from rankwise.data.sources.load import load
from rankwise.errors import UsageError
from rankwise.files.adapter import INPUT
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.run_folder import RunFolder
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import model_sites, weight_table
from rankwise.ranks.deltas import BaseWeights, open_deltas, write_deltas
from rankwise.train import finetune
from rankwise.train.arguments import build_arguments
from rankwise.train.estimate.gpus import Memory, memory_needed, refuse_too_large, state_bytes
from rankwise.train.finetune import language_parameters

NAMES = ("The Vaults", "Alimentum", "Café Adriatic", "Cotto", "Zizzi", "Aromi")
AREAS = ("riverside", "city centre")


def restaurants(folder: Path) -> Path:
    """An E2E file: 12 meaning representations with two sentences each."""
    rows = ["mr,ref"]
    for name in NAMES:
        for area in AREAS:
            facts = f'"name[{name}], area[{area}]"'
            rows += [f"{facts},{name} is in the {area}.", f"{facts},In the {area} there is {name}."]
    file = folder / "trainset.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as most published models are."""
    return tiny_llama(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = f"--model_name {base} --task e2e_nlg --data_path {data} -o {out} --subset_ratio 1 --lr 1e-3"
    return ["finetune", *own.split(), "--use_cpu", "--gradient_accumulation", "2", *more]


@pytest.fixture(scope="module")
def probe(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe")
    assert cli.main(words(base, data, out, "--save", "both", "--save_strategy", "steps", "--save_steps", "8")) == 0
    return out


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_base_plus_deltas_is_the_tuned_model(base: Path, probe: Path) -> None:
    pretrained, finetuned = (open_checkpoint(probe / name) for name in ("pretrained", "finetuned"))
    deltas = saved_tensors(probe / "deltas")
    assert set(deltas) == set(finetuned.keys()) == set(open_checkpoint(base).keys())
    for key in finetuned.keys():  # noqa: SIM118 (a checkpoint is no mapping)
        assert {deltas[key].dtype, pretrained.dtype(key), finetuned.dtype(key)} == {torch.float32}
        before = pretrained.tensor(key)
        assert torch.equal(before, open_checkpoint(base).tensor(key).float())
        assert torch.equal(deltas[key], finetuned.tensor(key) - before)
        assert deltas[key].any(), key


def test_the_deltas_say_what_they_are_deltas_of(base: Path, probe: Path) -> None:
    saved = open_deltas(probe)
    assert saved.sites == model_sites(meta_model(str(base)))
    assert saved.metadata["model_name"] == str(base)
    assert saved.metadata["num_samples"] == 24
    assert (saved.metadata["seed"], saved.metadata["steps"], saved.metadata["learning_rate"]) == (42, 12, 1e-3)
    for site in saved.sites.values():
        delta = saved.read(site)
        assert 0 < delta.relative_change < 1
        assert delta.noise_share == 0


def test_the_manifest_lists_what_was_trained(probe: Path) -> None:
    entry = json.loads((probe / "manifest.json").read_text())["stages"]["finetune"]
    names = dict(load_model(str(probe / "finetuned"), torch.float32).named_parameters())
    assert entry["trained"] == list(names)
    assert entry["trainable_parameters"] == sum(value.numel() for value in names.values())
    assert {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"} <= set(entry["trained"])
    assert AutoTokenizer.from_pretrained(probe / "finetuned")("a")["input_ids"]
    records = [(probe / name / INPUT).read_bytes() for name in ("pretrained", "finetuned")]
    assert records[0] == records[1], "the two are asked with the same prompts"


def test_a_full_run_resumes_exactly(base: Path, data: Path, probe: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-8"
    checkpoint.parent.mkdir()
    (probe / "checkpoint-8").rename(checkpoint)
    more = ("--save_strategy", "steps", "--save_steps", "8", "--resume_from_checkpoint", "true")
    assert cli.main(words(base, data, tmp_path / "run", *more)) == 0
    for file in (probe / "deltas").glob("*.safetensors"):
        expected, found = load_file(file), load_file(tmp_path / "run" / "deltas" / file.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_shards_hold_what_one_file_holds(base: Path, tmp_path: Path) -> None:
    model = load_model(str(base), torch.float32)
    parameters = dict(model.named_parameters())
    files = open_checkpoint(base)
    weights = BaseWeights.before_training(files, weight_table(meta_model(str(base)), files.keys()), parameters)
    assert not weights.copies, "this architecture's weights are all found in the files"
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    write_deltas(tmp_path / "deltas", parameters, weights, model_sites(model), {}, limit=20_000)
    assert len(list((tmp_path / "deltas").glob("*.safetensors"))) > 3
    found = saved_tensors(tmp_path / "deltas")
    assert found.keys() == parameters.keys()
    assert all((delta - 1).abs().max() < 1e-6 for delta in found.values())


def config_of(base: Path, data: Path, out: Path, *more: str) -> Any:
    line = words(base, data, out, *more)
    return cli.resolve(line[0], line[1:])[0]


def test_further_subsets_are_disjoint_and_of_equal_size(base: Path, data: Path, tmp_path: Path) -> None:
    examples = load("e2e_nlg", data)
    picks = []
    for shard in range(3):
        config = config_of(base, data, tmp_path, "--subset_ratio", "0.25", "--skip_shards", str(shard))
        picks.append([example.id for example in finetune.choose_subset(config, examples)])
    assert [len(pick) for pick in picks] == [6, 6, 6]
    assert len({name for pick in picks for name in pick}) == 18
    config = config_of(base, data, tmp_path, "--subset_ratio", "0.25", "--skip_shards", "4")
    with pytest.raises(UsageError, match="are left"):
        finetune.choose_subset(config, examples)


def test_few_updates_are_warned_of(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.warn_few_updates(24, build_arguments(tmp_path, 1, {"gradient_accumulation_steps": 8}))
    assert "warning" in capsys.readouterr().out
    finetune.warn_few_updates(24, build_arguments(tmp_path, 1, {"max_steps": 50}))
    assert not capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_loading(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "memory_available", lambda device: 1000)
    monkeypatch.setattr("rankwise.models.load.load_model", None)
    assert cli.main(words(base, data, tmp_path)) == 2
    error = capsys.readouterr().err
    for way_out in ("--method lora", "--optim", "FSDP"):
        assert way_out in error


def test_memory_is_weights_gradients_and_two_moments(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100)
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    needed = memory_needed(model, count, build_arguments(tmp_path, 1, {}), longest=16)
    assert needed.certain == 16 * count
    less = memory_needed(model, count, build_arguments(tmp_path, 1, {"activation_checkpointing": True}), longest=16)
    assert less.activations < needed.activations
    assert (state_bytes("adafactor"), state_bytes("adamw_bnb_8bit"), state_bytes("adamw_torch_fused")) == (0, 2, 8)
    assert "tight" in refuse_too_large(Memory(10, 10, 10, 10), available=35)


def test_only_the_language_tower_trains() -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    names = set(language_parameters(model))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} <= names
    assert not any(name.startswith("model.visual") for name in names)


def test_a_lora_probe_saves_its_adapter(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(base, data, tmp_path, "--method", "lora", "--lora_r", "64")) == 0
    printed = capsys.readouterr().out
    assert f"rankwise ranks --adapter {tmp_path}" in printed
    adapted = load_adapter(load_model(str(base), torch.float32), tmp_path)
    assert adapted.peft_config["default"].r == 32, "cut to min(m, n) of the widest site"
    assert cli.main(words(base, data, tmp_path, "--method", "lora", "--save", "both")) == 2


def test_a_folder_in_use_is_refused(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path).lock():
        assert cli.main(words(base, data, tmp_path)) == 2
    assert "in use by process" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words(tmp_path / "model", data, tmp_path / "out"), "--dry-run"]) == 3
    assert cli.main([*words(base, data, tmp_path / "out"), "--dry-run"]) == 0
    assert "would fine-tune every language parameter" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["finetune", "--task", "e2e_nlg"]) == 2
