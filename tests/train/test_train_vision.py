"""Training on images through the command line: the picture is learnt from, resuming is exact, phases hold."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rows import logged
from safetensors.torch import load_file
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES, drawn_image, tiny_smolvlm

from rankwise import cli
from rankwise.data.images import ImageReader
from rankwise.data.renderer_for import decode_aside, renderer_for
from rankwise.data.sources.load import load
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.files.processes import default_workers
from rankwise.models.adapt import adapt
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_config, load_model, load_processor
from rankwise.models.sites import tower_of, tower_prefixes
from rankwise.options.sections import DataSection, ModelSection

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
Train = Callable[..., int]


def colour_rows(folder: Path, count: int = 48) -> Path:
    """Pictures of one colour each, in several sizes; every sixth row is text only."""
    (folder / "images").mkdir()
    rows = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        file, size = f"{number}.png", (40 + number % 3 * 16, 48 - number % 2 * 16)
        Image.new("RGB", size, COLOURS[name]).save(folder / "images" / file)
        asked = {"from": "human", "value": "<image>\nWhat colour?"}
        rows.append({"id": str(number), "conversations": [asked, {"from": "gpt", "value": name}], "image": file})
        if number % 6 == 5:
            rows[-1] = {
                "id": str(number),
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}],
            }
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def row(number: int, asked: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "conversations": turns}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_rows(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_smolvlm(tmp_path_factory.mktemp("smolvlm"), longest_edge=32)


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = f"train --model_path {base} --data_path {data} --image_folder {data.parent / 'images'} --output_dir {out}"
    fixed = "--use_cpu --per_device_train_batch_size 8 --lr 1e-2 --logging_steps 1 --save_strategy no --no_plots"
    return [*own.split(), *fixed.split(), *more]


def answers(base: Path, adapter: Path, data: Path) -> list[tuple[str, str]]:
    """(asked-for answer, generated answer) of the rows with pictures."""
    model = load_adapter(load_model(str(base), torch.float32), adapter)
    section = DataSection(task="conversations", data_path=str(data), image_folder=str(data.parent / "images"))
    renderer = renderer_for(section, ModelSection(), str(base), load_config(str(base)))
    rows = [row for row in load("conversations", data) if row.images]
    found = {each.position: each.text for each in HFGenerator(model, renderer, GenerationSettings(8)).generate(rows)}
    return [(row.answer, found[position]) for position, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smolvlm", "qwen25vl", "llava", "isaac"])
def test_what_a_picture_shows_is_learnt(family: str, data: Path, tmp_path: Path) -> None:
    """No text tells the colours apart: right answers come from the pixels alone. No --task: the model sees images."""
    base = {**FAMILIES, "isaac": tiny_isaac}[family](tmp_path / "base")
    assert cli.main(words(base, data, tmp_path / "run", "--max_steps", "60", "--val_fraction", "0.1")) == 0
    pairs = answers(base, tmp_path / "run", data)
    right = sum(expected == found for expected, found in pairs) / len(pairs)
    assert right > 0.9, pairs
    losses = [float(row["loss"]) for row in logged(tmp_path / "run") if row["loss"]]
    assert losses[-1] < losses[0] - 1


def test_stopping_and_resuming_is_exact_with_images(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    """Rows shuffle, dropout acts, gradients accumulate; a text-only row is among them."""
    more = [
        "--gradient_accumulation_steps",
        "2",
        "--lora_dropout",
        "0.2",
        "--eval_strategy",
        "no",
        "--val_fraction",
        "0",
    ]
    more += ["--per_device_train_batch_size", "3", "--max_steps", "6"]
    assert cli.main(words(smolvlm, data, tmp_path / "straight", *more)) == 0
    saving = [*more, "--save_strategy", "steps", "--save_steps", "3"]
    assert cli.main(words(smolvlm, data, tmp_path / "resumed", *saving)) == 0
    (tmp_path / "resumed" / "checkpoint-6" / "trainer_state.json").unlink()
    assert cli.main(words(smolvlm, data, tmp_path / "resumed", *saving, "--resume_from_checkpoint", "true")) == 0
    straight, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_phases_and_gradient_tables_on_a_model_that_sees(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    more = ["--schedule", "attention:2 > mlp", "--max_steps", "4", "--gradient_checkpointing", "--eval_strategy", "no"]
    assert cli.main(words(smolvlm, data, tmp_path, *more)) == 0
    with (tmp_path / "gradient_norms.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    kinds = {int(row["step"]): {each["kind"] for each in rows if each["step"] == row["step"]} for row in rows}
    assert kinds == {1: {"attention"}, 2: {"attention"}, 3: {"mlp"}, 4: {"mlp"}}
    assert {row["tower"] for row in rows} == {"language"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--packing"], "--packing supports text rows only"),
        (["--prompt", "sections"], "images need the model's chat template"),
        (["--max_seq_length", "12"], "longer than 12 tokens"),
    ],
)
def test_what_cannot_work_with_images_is_refused(
    smolvlm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert cli.main(words(smolvlm, data, tmp_path, *more)) in (2, 3)
    assert reason in capsys.readouterr().err


def test_a_missing_picture_is_named_before_training(
    smolvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = colour_rows(tmp_path, count=8)
    (tmp_path / "images" / "3.png").unlink()
    assert cli.main(words(smolvlm, data, tmp_path / "run")) == 3
    printed = capsys.readouterr().err
    assert "sample 3" in printed
    assert "3.png" in printed


def test_validation_pictures_lie_beside_the_validation_file(
    smolvlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the training rows' folder has pictures of the same names."""
    opened = []
    plain = ImageReader.open
    monkeypatch.setattr(ImageReader, "open", lambda self, name: opened.append(name) or plain(self, name))
    for part, count in (("train", 8), ("val", 4)):
        (tmp_path / part).mkdir()
        rows = json.loads(colour_rows(tmp_path / part, count).read_text())
        for row in rows:
            row |= {"image": f"images/{row['image']}"} if "image" in row else {}
        (tmp_path / part / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "train" / "images" / "1.png").unlink()
    command = words(smolvlm, tmp_path / "train" / "rows.json", tmp_path / "run", "--max_steps", "1")
    place = command.index("--image_folder")
    command[place : place + 2] = ["--val_path", str(tmp_path / "val" / "rows.json"), "--dataloader_num_workers", "0"]
    assert cli.main(command) == 3, "the training row's own picture is still missed"
    assert "train/images" in capsys.readouterr().err
    colour_rows_again = json.loads((tmp_path / "train" / "rows.json").read_text())
    (tmp_path / "train" / "rows.json").write_text(json.dumps([row for row in colour_rows_again if row["id"] != "1"]))
    opened.clear()
    assert cli.main(command) == 0
    seen = {Path(name) for name in opened}
    assert {tmp_path / "val" / "images" / f"{number}.png" for number in range(4)} <= seen
    assert not {Path("images/1.png")} & seen
    assert logged(tmp_path / "run")[-1]["eval_loss"]


def test_pictures_that_differ_only_in_content_make_the_same_prompt(smolvlm: Path, tmp_path: Path) -> None:
    """Tokens depend on the size alone, so nothing of a picture is decoded to know a sample's length."""
    for number in range(2):
        drawn_image(number, (90, 30)).save(tmp_path / f"{number}.png")
    section = DataSection(task="conversations", data_path=str(tmp_path))
    renderer = renderer_for(section, ModelSection(), str(smolvlm), load_config(str(smolvlm)))
    assert renderer.sight is not None
    assert renderer.sight.expansions(["0.png"]) == renderer.sight.expansions(["1.png"])
    assert len(renderer.sight._expansions) == 1


def test_a_fine_tuned_model_is_saved_with_its_processor(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    """--save checkpoints makes folders that load as the model they came from, ready to see."""
    line = f"finetune --model_name {smolvlm} --data_path {data} --image_folder {data.parent / 'images'} -o {tmp_path}"
    more = "--subset_ratio 0.2 --full projector,vision --freeze language --save checkpoints --use_cpu --num_epochs 9"
    assert cli.main([*line.split(), *more.split()]) == 0
    for name in ("pretrained", "finetuned"):
        processor = load_processor(str(tmp_path / name))
        assert type(processor) is type(load_processor(str(smolvlm)))
        assert processor.tokenizer.chat_template
    before, after = (load_model(str(tmp_path / name), torch.float32) for name in ("pretrained", "finetuned"))
    towers = tower_prefixes(before)
    moved = {name for name, value in before.named_parameters() if not torch.equal(value, after.get_parameter(name))}
    assert {tower_of(name, towers) for name in moved} == {"vision", "projector"}


def test_worker_processes_change_nothing(smolvlm: Path, data: Path, tmp_path: Path) -> None:
    more = "--max_steps 3 --eval_strategy no --val_fraction 0".split()
    for workers in ("0", "2"):
        assert cli.main(words(smolvlm, data, tmp_path / workers, *more, "--dataloader_num_workers", workers)) == 0
    alone, aside = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("0", "2"))
    assert all(torch.equal(alone[key], aside[key]) for key in alone)


@pytest.mark.parametrize(
    ("use_cpu", "given", "expected"),
    [(True, {}, 0), (False, {}, default_workers()), (False, {"dataloader_num_workers": 0}, 0)],
)
def test_images_are_decoded_aside_on_a_gpu(smolvlm: Path, use_cpu: bool, given: dict[str, int], expected: int) -> None:
    section = DataSection(task="conversations", data_path="rows.json")
    renderer = renderer_for(section, ModelSection(), str(smolvlm), load_config(str(smolvlm)))
    arguments = SimpleNamespace(use_cpu=use_cpu, dataloader_num_workers=0)
    decode_aside(arguments, given, renderer)  # type: ignore[arg-type]
    assert arguments.dataloader_num_workers == expected


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert default_workers() == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert default_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert default_workers() == 1


@pytest.mark.parametrize("family", ["smolvlm", "qwen25vl", "isaac"])
def test_checkpointing_leaves_a_frozen_vision_tower_alone(
    family: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed once a step and nothing flows back through it; the language layers are computed twice."""
    base = {**FAMILIES, "isaac": tiny_isaac}[family](tmp_path / "base")
    calls: Counter[str] = Counter()

    def counted(model: torch.nn.Module, *rest: Any) -> Any:
        towers = tower_prefixes(model)
        for path, module in model.named_modules():
            if type(module).__name__.endswith("Attention"):  # within a layer: its own hooks lie around the checkpoint
                tower = tower_of(path, towers)
                module.register_forward_pre_hook(lambda own, *_, tower=tower: calls.update([tower] * own.training))
        return adapt(model, *rest)

    monkeypatch.setattr("rankwise.train.adapter.adapt", counted)
    more = "--max_steps 2 --gradient_checkpointing --eval_strategy no --val_fraction 0".split()
    assert cli.main(words(base, data, tmp_path / "run", *more)) == 0
    config = load_config(str(base))
    vision_layers = getattr(config.vision_config, "num_hidden_layers", None) or config.vision_config.depth
    assert calls["vision"] == 2 * vision_layers
    assert calls["language"] == 2 * 2 * config.get_text_config().num_hidden_layers
