"""Isaac in the rest of Rankwise: sites and towers, LoRA, phases, merge, ranks, and a picture that is learnt."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_isaac import tiny_isaac
from torch import Tensor, nn
from torch.nn import functional

from rankwise import cli
from rankwise.core.site import Site
from rankwise.data.renderer_for import positions, renderer_for
from rankwise.data.sources.load import load
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.files.plan import read_plan
from rankwise.merge.command import run as merge
from rankwise.models.adapt import ADAPTER, adapt, lora_layers
from rankwise.models.adapters import load_adapter, save_adapter
from rankwise.models.load import load_config, load_model, load_processor, meta_model
from rankwise.models.sites import model_sites, weight_table
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.commands import MergeConfig
from rankwise.options.sections import DataSection, LoraSection, ModelSection

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_isaac(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sites(base: Path) -> dict[str, Site]:
    return model_sites(meta_model(str(base)))


@pytest.fixture(scope="module")
def batch(base: Path) -> dict[str, Tensor]:
    processor = load_processor(str(base))
    pictures = [Image.new("RGB", (64, 48), colour) for colour in COLOURS.values()]
    texts = ["<|image_pad|> What colour?", "<|image_pad|> or <|image_pad|>?", "<|image_pad|>"]
    return dict(processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt"))


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def test_every_matrix_is_in_its_tower(sites: dict[str, Site]) -> None:
    towers = {path: site.tower for path, site in sites.items()}
    assert towers["model.layers.1.mlp.down_proj"] == "language"
    assert towers["model.vision_embedding.0.encoder.layers.1.self_attn.out_proj"] == "vision"
    assert towers["model.vision_embedding.0.embeddings.patch_embedding"] == "vision"
    assert {path for path, tower in towers.items() if tower == "projector"} == {
        "model.vision_embedding.1",
        "model.vision_embedding.3",
    }
    assert sum(tower == "language" for tower in towers.values()) == 2 * 7
    assert sum(tower == "vision" for tower in towers.values()) == 2 * 6 + 1
    assert sites["model.vision_embedding.0.encoder.layers.1.mlp.fc1"].layer == 1
    assert {path for path, site in sites.items() if site.kind == "attention"} == {
        path for path in sites if "self_attn" in path
    }


def test_what_is_adapted_unasked_is_the_language_tower(sites: dict[str, Site]) -> None:
    assert set(choose_sites(sites)) == {path for path in sites if path.startswith("model.layers.")}
    named = choose_sites(sites, names=["q_proj"])
    assert set(named) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def disturbed_adapter(base: Path, folder: Path, chosen: dict[str, Site]) -> Path:
    model = load_model(str(base), torch.float32)
    torch.manual_seed(0)
    adapted = adapt(model, uniform_plan(chosen, 2, None, False, str(base)), LoraSection())
    assert set(lora_layers(adapted)) == set(chosen)
    with torch.no_grad():
        for layer in lora_layers(adapted).values():
            layer.lora_B[ADAPTER].weight.normal_(std=0.3)
    folder.mkdir()
    save_adapter(adapted, folder, str(base))
    return folder


@pytest.mark.parametrize("tower", ["language", "projector", "vision"])
def test_an_adapter_on_a_tower_acts_and_merges_into_the_released_layout(
    tower: str, base: Path, sites: dict[str, Site], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    chosen = {path: site for path, site in sites.items() if site.tower == tower}
    adapter = disturbed_adapter(base, tmp_path / "adapter", chosen)
    adapted = load_adapter(load_model(str(base), torch.float32), adapter)
    expected = logits(adapted, batch)
    assert (expected - logits(load_model(str(base), torch.float32), batch)).abs().max() > 1e-2
    merge(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "merged")))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(chosen)
    merged = load_model(str(tmp_path / "merged"), torch.float32)
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-3, rtol=1e-4)
    assert load_processor(str(tmp_path / "merged")).image_token_id == load_processor(str(base)).image_token_id


def test_a_quantized_base_keeps_its_vision_whole(batch: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny_isaac(tmp_path, hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    model = load_model(str(base), torch.float32, quantization="4bit")
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed = {path for path, kind in kinds.items() if kind is not nn.Linear}
    assert packed == {path for path in kinds if path.startswith("model.layers.")}
    similar = functional.cosine_similarity(logits(model, batch), logits(load_model(str(base), torch.float32), batch))
    assert similar.min() > 0.8


def moved(base: Path, folder: Path, paths: list[str]) -> Path:
    """The base with changes of these matrices: the first of rank 1, the next of rank 2, …"""
    model = load_model(str(base), torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for rank, path in enumerate(paths, 1):
            weight = model.get_submodule(path).weight
            left, right = (torch.linalg.qr(torch.randn(side, rank))[0] for side in weight.shape)
            weight += left @ right.T
    model.save_pretrained(folder)
    return folder


def test_the_released_keys_are_the_sites_names(base: Path, sites: dict[str, Site]) -> None:
    keys = list(load_file(base / "model.safetensors"))
    table = weight_table(meta_model(str(base)), keys)
    found = {path: table.weights[f"{path}.weight"] for path in sites}
    assert {path: weight.key for path, weight in found.items()} == {path: f"{path}.weight" for path in sites}


def test_ranks_names_what_moved(base: Path, sites: dict[str, Site], tmp_path: Path) -> None:
    paths = [
        "model.vision_embedding.3",
        "model.layers.0.self_attn.q_proj",
        "model.vision_embedding.0.encoder.layers.1.mlp.fc2",
    ]
    tuned = moved(base, tmp_path / "tuned", paths)
    words = f"ranks {base} {tuned} --out {tmp_path / 'out'} --towers language,vision,projector --no_plots"
    bounds = "--min_rank 1 --svd_threshold 0.999 --smoothing_factor 0"
    assert cli.main([*words.split(), *bounds.split()]) == 0
    rows = {row.site.path: row for row in read_plan(tmp_path / "out").sites}
    assert {path: row.site for path, row in rows.items()} == sites
    assert [rows[path].r_raw for path in paths] == [1, 2, 3]
    assert {path for path, row in rows.items() if row.r_raw} == set(paths)


def colour_rows(folder: Path, count: int = 32) -> Path:
    """Pictures of one colour each, some in pairs and some rows without."""
    folder.mkdir()
    rows = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (40 + number % 3 * 16, 48 - number % 2 * 16), COLOURS[name]).save(folder / f"{number}.png")
        asked, answer, images = "<image>\nWhat colour?", name, [f"{number}.png"]
        if number % 8 == 6:
            asked, images = "<image> Before?", [f"{number - 1}.png"]
            answer = list(COLOURS)[(number - 1) % len(COLOURS)]
        if number % 8 == 7:
            asked, answer, images = "Hi", "Hi.", []
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns, "image": images})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def train(base: Path, data: Path, out: Path, *more: str) -> int:
    fixed = f"train --model_path {base} --data_path {data} --output_dir {out} --use_cpu --per_device_train_batch_size 8"
    return cli.main([*fixed.split(), *"--lr 1e-2 --logging_steps 1 --save_strategy no --no_plots".split(), *more])


def test_phases_and_gradient_tables(base: Path, tmp_path: Path) -> None:
    data = colour_rows(tmp_path / "data", count=16)
    more = "--schedule attention:2>mlp --max_steps 4 --gradient_checkpointing --eval_strategy no".split()
    assert train(base, data, tmp_path / "run", *more) == 0
    with (tmp_path / "run" / "gradient_norms.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    kinds = {step: {row["kind"] for row in rows if int(row["step"]) == step} for step in range(1, 5)}
    assert kinds == {1: {"attention"}, 2: {"attention"}, 3: {"mlp"}, 4: {"mlp"}}
    assert {row["tower"] for row in rows} == {"language"}


def test_the_limit_on_tokens_is_known_before_training(base: Path) -> None:
    config = load_config(str(base))
    assert positions(config) == 1024
    config.max_sequence_length = 100
    assert positions(config) == 100


@pytest.mark.slow
def test_what_a_picture_shows_is_learnt_and_survives_the_merge(base: Path, tmp_path: Path) -> None:
    """No text tells the colours apart: right answers come from the pixels alone."""
    data = colour_rows(tmp_path / "data")
    assert train(base, data, tmp_path / "run", "--max_steps", "60", "--val_fraction", "0") == 0
    merge(MergeConfig(adapter=str(tmp_path / "run"), output_dir=str(tmp_path / "merged")))
    model = load_model(str(tmp_path / "merged"), torch.float32)
    section = DataSection(task="conversations", data_path=str(data))
    renderer = renderer_for(section, ModelSection(), str(base), load_config(str(base)))
    rows = [row for row in load("conversations", data) if row.images]
    found = {each.position: each.text for each in HFGenerator(model, renderer, GenerationSettings(8)).generate(rows)}
    right = [row.answer == found[position] for position, row in enumerate(rows)]
    assert sum(right) > 0.9 * len(rows), found
