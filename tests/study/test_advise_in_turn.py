"""`rankwise advise` where runs cannot share a forward pass: rows with pictures, models with fused experts."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TEXTS, tiny_llama, tiny_tokenizer
from tiny_vision import tiny_qwen25vl, tiny_smolvlm
from transformers import MixtralConfig, MixtralForCausalLM

from rankwise import cli
from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.ledger import Ledger
from rankwise.models.load import load_model
from rankwise.models.sites import fused_experts, model_sites, tower_of, tower_prefixes
from rankwise.options.advise import AdviseConfig
from rankwise.options.sections import TOWERS, DataSection, ModelSection
from rankwise.study import advise
from rankwise.study.material import PicturedBatches
from rankwise.study.trials import why_in_turn
from rankwise.train.together.alone import adapted

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
QUESTIONS = ("<image>\nWhat colour?", "Which colour is this? <image>", "<image> Name its colour.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 pictures of one colour each: few questions, which alone would be near-duplicates of one another."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    rows = []
    for number in range(84):
        name, file = list(COLOURS)[number % 4], f"{number}.png"
        Image.new("RGB", (40 + number % 3 * 16, 48), COLOURS[name]).save(folder / "images" / file)
        turns = [{"from": "human", "value": QUESTIONS[number % 3]}, {"from": "gpt", "value": name}]
        rows.append({"id": str(number), "conversations": turns, "image": file})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def small(model: Path, data: DataSection, out: Path, **changes: Any) -> AdviseConfig:
    given = {"steps": 8, "batch_size": 4, "ranks": [2, 1], "rates": [1e-3, 1e-2, 3e-2], "choose_size": 20}
    given |= {"confirm_size": 20, "no_plots": True, "device": "cpu", "output_dir": str(out), "delta": 0.1}
    return AdviseConfig(model=ModelSection(model_name=str(model)), data=data, **given | changes)


def about_pictures(model: Path, rows: Path, out: Path, **changes: Any) -> AdviseConfig:
    data = DataSection(task="conversations", data_path=str(rows), image_folder=str(rows.parent / "images"))
    return small(model, data, out, **changes)


@pytest.mark.parametrize("family", [tiny_smolvlm, tiny_qwen25vl])
def test_rows_with_pictures_train_in_turn_and_the_pictures_are_seen(
    family: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = family(tmp_path / "model")
    config = about_pictures(model, pictures, tmp_path / "run", minutes=1e-6)
    advise.run(config)
    told = capsys.readouterr().out
    assert told.count("one after the other: rows have pictures") == 2, "before the runs, and on the screen"
    assert told.count("adapters in the language tower only; frozen: vision") == 1
    assert told.count("the real run, of the language tower only: ") == 1
    assert "adapters in the language tower only; frozen: vision" in "\n".join(advise.describe(config))
    bench, _, rows = advise.prepare(config, tmp_path / "run")
    assert (rows, len(bench.material.rows)) == (84, 32), "pictures of one question are no duplicates of one another"
    ledger = Ledger(tmp_path / "run")
    assert {row["batch"] for row in ledger.rows.values()} == {1}
    kept = load_file(next((tmp_path / "run" / "factors").rglob("*.safetensors")))
    towers = tower_prefixes(bench.material.model)
    assert {tower_of(name[:-2], towers) for name in kept} == {"language"}

    (row, *_) = ledger.rows.values()
    (file,) = (tmp_path / "run" / "factors").rglob(f"rank2-{row['key']['learning_rate']:g}.safetensors")
    tensors = load_file(file)
    pairs = {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.B"]) for name in tensors if name.endswith(".A")}
    base = load_model(str(model), torch.float32)
    scored = bench.material.dev
    assert isinstance(scored.batches, PicturedBatches) and "pixel_values" in scored.batches[0]
    losses, tokens = answer_losses(adapted(base, pairs, dict.fromkeys(pairs, 2.0)), scored.batches)
    assert torch.allclose(losses, ledger.numbers(row["key"], "dev").double(), atol=1e-4)
    assert tokens.tolist() == scored.tokens.tolist()
    other = [dict(batch) | {"pixel_values": -0.5 * batch["pixel_values"]} for batch in scored.batches]
    seen, unlike = (answer_losses(base, batches)[0] for batches in (scored.batches, other))
    assert not torch.allclose(seen, unlike, atol=1e-3), "pixels decide the losses"


def test_the_whole_ladder_of_rows_with_pictures_ends_in_an_advice_that_train_runs(
    pictures: Path, tmp_path: Path
) -> None:
    model = tiny_smolvlm(tmp_path / "model", longest_edge=32)
    advise.run(about_pictures(model, pictures, tmp_path / "run", placements=["mlp", "eva"]))
    advice = json.loads((tmp_path / "run" / "advice.json").read_text())
    assert (advice["rung"], advice["in_turn"]) == ("E", "rows have pictures")
    assert set(advice["placements"]) == {"mlp", "eva"}
    assert cli.main(["train", str(tmp_path / "run" / "advice.yaml"), "-o", str(tmp_path / "train")]) == 0
    adapted = load_file(tmp_path / "train" / "adapter_model.safetensors")
    assert adapted and not any("vision" in name or "connector" in name for name in adapted)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_is_no_target(tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "model", "rows.json", "--target", tower, "-o", str(tmp_path / "run")]) == 2
    assert f"--target takes attention_only, mlp_only, both, all; got '{tower}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def tiny_mixtral(folder: Path) -> Path:
    vocabulary = tiny_tokenizer(folder, TEXTS)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, vocab_size=len(vocabulary), num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    names, areas = ("Cotto", "Zizzi", "Aromi", "Strada", "Giraffe", "Clowns", "Alimentum"), range(12)
    rows = [f'"name[{name}], area[{area}]",{name} is in area {area}.' for name, area in product(names, areas)]
    file = tmp_path_factory.mktemp("data") / "trainset.csv"
    file.write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    return DataSection(task="e2e_nlg", data_path=str(file))


def test_a_model_with_fused_experts_trains_in_turn(
    texts: DataSection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_mixtral(tmp_path / "model")
    rates = [1e-3, 1e-2, 3e-2, 300.0]
    advise.run(small(model, texts, tmp_path / "run", minutes=1e-6, placements=[], rates=rates))
    told = capsys.readouterr().out
    assert "one after the other: the model has fused experts" in told and "tower" not in told
    rows = Ledger(tmp_path / "run").rows.values()
    left = {row["key"]["learning_rate"]: row["train_losses"].count(None) for row in rows if row["diverged"]}
    assert set(left) == {300.0} and left[300.0] > 0, "it leaves after an eighth"
    kept = load_file(next((tmp_path / "run" / "factors").rglob("*.safetensors")))
    base = load_model(str(model), torch.float32)
    assert fused_experts(base) and {name[:-2] for name in kept} <= set(model_sites(base))
    assert not any("experts" in name for name in kept)


def test_text_rows_of_a_language_model_share_a_forward_pass(texts: DataSection, tmp_path: Path) -> None:
    config = small(tiny_llama(tmp_path / "model"), texts, tmp_path / "run")
    bench, _, _ = advise.prepare(config, tmp_path / "run")
    material = bench.material
    assert bench.in_turn == ""
    assert why_in_turn(material.model, material.renderer, material.parts, material.rows) == ""


def test_text_rows_of_a_model_that_takes_more_than_tokens_train_in_turn(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n + 1}"}]}
        for n in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = DataSection(task="conversations", data_path=str(tmp_path / "rows.json"))
    model = tiny_qwen25vl(tmp_path / "model")
    bench, _, _ = advise.prepare(small(model, data, tmp_path / "run"), tmp_path / "run")
    assert bench.in_turn == "the model takes mm_token_type_ids beside the tokens"
