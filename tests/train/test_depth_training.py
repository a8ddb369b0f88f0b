"""Depth through the command line: maps are made first, training uses them, and every way of loading gives them back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_depth import tiny_estimator
from tiny_isaac import tiny_isaac
from tiny_vision import drawn_image, tiny_qwen25vl, tiny_smolvlm

import rankwise
from rankwise import cli
from rankwise.data.dataset import Collator
from rankwise.data.depth.maps import DepthCache, DepthMaps, image_grids, source_name
from rankwise.data.depth.prepare import asked, depth_facts, idle, overruled, prepared
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load as load_rows
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import engines
from rankwise.evaluate.engines import Subject, add_depth
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.files.adapter import base_and_adapter
from rankwise.models.adapt import quiet_peft
from rankwise.models.depth.encoder import encoder_of, read_depth, write_depth
from rankwise.models.isaac.modeling import IsaacForConditionalGeneration
from rankwise.models.load import load_config, load_processor
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import DataSection, DepthSection, DepthUseSection, ModelSection, ScoredData

MAKERS = {"qwen25vl": tiny_qwen25vl, "smolvlm": tiny_smolvlm, "isaac": tiny_isaac}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with drawn pictures (two of them in one row, one row of text), an estimator, a base of each family."""
    root = tmp_path_factory.mktemp("depth")
    (root / "images").mkdir()
    rows = []
    for number in range(12):
        drawn_image(number, (64 - number % 2 * 16, 48 + number % 3 * 8)).save(root / "images" / f"{number}.png")
        names = [f"{number}.png"] if number != 3 else ["3.png", "4.png"]
        asked = " and ".join(["<image>"] * len(names)) + "\nWhat is near?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "red" if number % 2 else "blue"}]
        rows.append({"id": str(number), "conversations": turns, "image": names})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}]})
    (root / "rows.json").write_text(json.dumps(rows))
    tiny_estimator(root / "estimator")
    for name, make in MAKERS.items():
        make(root / name)
    return root


def words(place: Path, family: str, out: Path, *more: str) -> list[str]:
    own = f"train --model_path {place / family} --data_path {place / 'rows.json'} --image_folder {place / 'images'}"
    depth = f"--use_depth True --depth_checkpoint_path {place / 'estimator'} --depth_input_size 56"
    fixed = f"--depth_cache {out.parent / 'cache'} --output_dir {out} --use_cpu --per_device_train_batch_size 4"
    rest = "--lr 1e-2 --lora_r 4 --max_steps 3 --val_fraction 0 --logging_steps 1 --save_strategy no --no_plots"
    return [*own.split(), *depth.split(), *fixed.split(), *rest.split(), *more]


def maps_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("family", MAKERS)
def test_training_learns_the_gate(family: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert cli.main(words(place, family, out)) == 0
    said = capsys.readouterr().out
    assert "depth: 12 maps made" in said
    assert "training the depth tower in full: model.depth_preproc (1 parameter)" in said
    weights = load_file(out / "adapter_model.safetensors")
    gates = [value for name, value in weights.items() if "depth_preproc" in name]
    assert len(gates) == 1 and gates[0] != 0
    assert not any("depth_model" in name for name in weights)
    settings = read_depth(out)
    assert settings is not None and settings.estimator == str(place / "estimator")
    assert settings.estimator_hash and settings.input_size == 56
    assert {"path": "model.depth_preproc", "tower": "depth"} in json.loads((out / "sites.json").read_text())["full"]
    assert len(maps_in(tmp_path / "cache")) == 12
    before = [file.stat().st_mtime_ns for file in maps_in(tmp_path / "cache")]
    assert cli.main(words(place, family, tmp_path / "again")) == 0
    assert "maps made" not in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in maps_in(tmp_path / "cache")] == before
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == weights.keys()
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_resuming_is_exact_although_the_cache_is_made_again(place: Path, tmp_path: Path) -> None:
    more = ["--max_steps", "4", "--lora_dropout", "0.2"]
    assert cli.main(words(place, "smolvlm", tmp_path / "straight", *more)) == 0
    saving = [*more, "--save_strategy", "steps", "--save_steps", "2"]
    assert cli.main(words(place, "smolvlm", tmp_path / "resumed", *saving)) == 0
    (tmp_path / "resumed" / "checkpoint-4" / "trainer_state.json").unlink()
    assert read_depth(tmp_path / "resumed" / "checkpoint-2") == read_depth(tmp_path / "resumed")
    shutil.rmtree(tmp_path / "cache")
    again = [*saving, "--resume_from_checkpoint", "true"]
    assert cli.main(words(place, "smolvlm", tmp_path / "resumed", *again)) == 0
    straight, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    other = [*again, "--depth_alpha", "50"]
    assert cli.main(words(place, "smolvlm", tmp_path / "resumed", *other)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("control", ["off", "shuffled", "constant", "luminance", "ramp", "permuted"])
def test_controls_train_with_the_same_parameters_and_load_as_they_were_trained(
    control: str, place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli.main(words(place, "smolvlm", run, "--depth_control", control)) == 0
    weights = load_file(run / "adapter_model.safetensors")
    (gate,) = [value for name, value in weights.items() if "depth_preproc" in name]
    assert bool(gate == 0) == (control == "off")
    trained = rankwise.load(run, device="cpu")
    assert trained.depth.control == control
    assert (trained.depth.estimator is not None) == (control in ("shuffled", "permuted"))
    if control == "shuffled":
        with pytest.raises(UsageError, match="needs a whole data set"):
            prompt_of(trained, place, "2.png")
        own = torch.rand(sum(grid.tokens for grid in image_grids(trained.processor, 64, 64)))
        picture = drawn_image(0, (64, 64))
        inputs = trained.processor(text=["<image>"], images=[picture], depth=own, return_tensors="pt")
        assert torch.equal(inputs["depth"], own)
        return
    inputs = prompt_of(trained, place, "2.png")
    sight = sight_of(trained, place, "smolvlm", tmp_path / "cache")
    assert torch.equal(sight.inputs([["2.png"]])["depth"], inputs["depth"])


def renderer_of(place: Path, family: str) -> Renderer:
    data = DataSection(task="conversations", data_path=str(place / "rows.json"), image_folder=str(place / "images"))
    return renderer_for(data, ModelSection(), str(place / family), load_config(str(place / family)))


def sight_of(trained: Any, place: Path, family: str, cache: Path) -> Sight:
    """As training makes it, with the maps of row 2."""
    renderer = renderer_of(place, family)
    rows = [load_rows("conversations", place / "rows.json")[2]]
    use = DepthUseSection(depth_cache=str(cache))
    return prepared(trained.depth, use, renderer.sight, rows, seed=42, device=torch.device("cpu"))[1]


def test_measured_depth_trains(place: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for file in (place / "images").iterdir():
        distance = np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 100 + 1
        Image.fromarray(distance).save(tmp_path / "maps" / file.name)
    more = ["--depth_control", "file", "--depth_maps", str(tmp_path / "maps")]
    assert cli.main(words(place, "qwen25vl", tmp_path / "run", *more)) == 0
    assert len(maps_in(tmp_path / "cache")) == 12
    (tmp_path / "maps" / "5.png").unlink()
    assert cli.main(words(place, "qwen25vl", tmp_path / "other", *more)) == 3


def test_a_broken_map_is_made_again(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(words(place, "smolvlm", tmp_path / "run")) == 0
    broken = maps_in(tmp_path / "cache")[4]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:30])
    capsys.readouterr()
    assert cli.main(words(place, "smolvlm", tmp_path / "again")) == 0
    said = capsys.readouterr().out
    assert f"warning: {broken}" in said and "depth: 1 maps made" in said
    assert broken.read_bytes() == whole


def test_no_estimator_no_training(place: Path, tmp_path: Path, capsys: Any) -> None:
    for path, said in (("nothing.pth", "no such file"), (place / "smolvlm", "not Depth Anything")):
        more = ["--depth_checkpoint_path", str(path)]
        assert cli.main(words(place, "smolvlm", tmp_path / "run", *more)) == 3
        error = capsys.readouterr().err
        assert said in error and "--depth_checkpoint_path takes" in error


def test_an_estimate_that_fails_stops_before_training(place: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import DepthAnythingForDepthEstimation

    model = DepthAnythingForDepthEstimation.from_pretrained(place / "estimator")
    with torch.no_grad():
        model.head.conv3.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    assert cli.main(words(place, "smolvlm", tmp_path / "run", "--depth_checkpoint_path", str(tmp_path / "nan"))) == 3
    assert "image 0.png: its depth estimate failed" in capsys.readouterr().err
    assert not maps_in(tmp_path / "cache") and not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_options() -> None:
    assert asked(DepthSection()) is None
    assert asked(DepthSection(depth_alpha=50.0)) is None
    assert idle(DepthSection(depth_alpha=50.0)) == ["note: no depth: --depth_alpha act with --use_depth only"]
    assert idle(DepthSection()) == idle(DepthSection(use_depth=True, depth_alpha=50.0)) == []
    with pytest.raises(UsageError, match="--depth_control file needs --depth_maps"):
        asked(DepthSection(use_depth=True, depth_control="file"))
    with pytest.raises(UsageError, match="--depth_control file needs --depth_maps"):
        asked(DepthSection(use_depth=True, depth_maps="x"))
    found = asked(DepthSection(use_depth=True))
    assert found is not None and found.estimator == "depth-anything/Depth-Anything-V2-Small-hf"
    off = asked(DepthSection(use_depth=True, depth_control="off"))
    assert off is not None and off.estimator is None
    with pytest.raises(UsageError, match="names no estimator"):
        overruled(off, DepthUseSection(depth_control="estimated"))
    assert overruled(found, DepthUseSection(depth_control="ramp")) == replace(found, control="ramp")


# loading what was trained


@pytest.fixture(scope="module")
def runs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run of each family, with one checkpoint; the gates are opened wide, so that depth shows."""
    root = tmp_path_factory.mktemp("runs")
    for family in MAKERS:
        saving = ["--save_strategy", "steps", "--save_steps", "2"]
        assert cli.main(words(place, family, root / family, *saving)) == 0
        for folder in (root / family, root / family / "checkpoint-2"):
            weights = load_file(folder / "adapter_model.safetensors")
            opened = {name: value + 0.5 if "depth_preproc" in name else value for name, value in weights.items()}
            save_file(opened, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {family: root / family for family in MAKERS}


def prompt_of(trained: Any, place: Path, *names: str) -> Any:
    images = [Image.open(place / "images" / name) for name in names]
    token = trained.processor.image_token
    return trained.processor(text=[" and ".join([token] * len(names)) + " near?"], images=images, return_tensors="pt")


@pytest.mark.parametrize("family", MAKERS)
def test_load_gives_the_depth_of_training(family: str, runs: dict[str, Path], place: Path) -> None:
    """The processor's values are those of the cache that training read; the model is the trained one."""
    trained = rankwise.load(runs[family], device="cpu")
    inputs = prompt_of(trained, place, "2.png", "5.png")
    maps = DepthMaps(
        ImageReader(place / "images"),
        trained.processor,
        DepthCache(runs[family].parent / "cache"),
        source_name(str(trained.depth.estimator_hash), 56),
    )
    assert torch.equal(inputs["depth"], torch.cat([maps.for_image(name) for name in ("2.png", "5.png")]).float())
    with torch.no_grad():
        found = trained.model(**inputs).logits
        set_zero = {**inputs, "depth": torch.zeros_like(inputs["depth"])}
        assert (trained.model(**set_zero).logits - found).abs().max() > 1e-3
    assert trained.model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert not any("depth_model" in name for name in trained.model.state_dict())
    with pytest.raises(DataError, match="trained with depth"):
        trained.model(**{name: value for name, value in inputs.items() if name != "depth"})


@pytest.mark.parametrize("family", MAKERS)
def test_load_agrees_with_the_trainers_own_batches(family: str, runs: dict[str, Path], place: Path) -> None:
    """Logits of one row: through Sight and the collator as in training, and through the loaded processor."""
    trained = rankwise.load(runs[family], device="cpu")
    sight = sight_of(trained, place, family, runs[family].parent / "cache")
    renderer = replace(renderer_of(place, family), sight=sight)
    row = load_rows("conversations", place / "rows.json")[2]
    batch = Collator.of(renderer.tokenizer, sight=sight)([{**vars(renderer.training(row))}])
    taken = {name: value for name, value in batch.items() if name not in ("labels", "sample_index")}
    by_hand = prompt_of(trained, place, "2.png")
    assert torch.equal(taken["depth"], by_hand["depth"])
    assert torch.equal(taken["pixel_values"].flatten(), by_hand["pixel_values"].flatten())
    with torch.no_grad():
        assert trained.model(**taken).logits.isfinite().all()


def test_a_checkpoint_loads_too(runs: dict[str, Path], place: Path) -> None:
    trained = rankwise.load(runs["smolvlm"] / "checkpoint-2", device="cpu")
    assert encoder_of(trained.model).gate.item() != encoder_of(rankwise.load(runs["smolvlm"]).model).gate.item()
    assert trained.depth == read_depth(runs["smolvlm"])


def test_the_chat_template_gives_depth_as_well(runs: dict[str, Path], place: Path) -> None:
    trained = rankwise.load(runs["qwen25vl"], device="cpu")
    picture = Image.open(place / "images" / "2.png")
    turns = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "near?"}]}]
    inputs = trained.processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert torch.equal(inputs["depth"], prompt_of(trained, place, "2.png")["depth"])
    assert trained.model(**inputs).logits.isfinite().all()
    half = {**inputs, "depth": inputs["depth"].bfloat16()}
    with pytest.raises(DataError, match="bfloat16"):
        trained.model(**half)


def test_without_the_estimator_nothing_runs(runs: dict[str, Path], place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["smolvlm"], run)
    settings = read_depth(run)
    assert settings is not None
    write_depth(run, replace(settings, estimator=str(tmp_path / "gone")))
    with pytest.raises(DataError, match="depth needs its estimator"):
        rankwise.load(run, device="cpu")
    assert rankwise.load(run, depth_checkpoint_path=str(place / "estimator"), device="cpu").depth is not None
    with pytest.raises(DataError, match="is not the estimator that this model was trained with"):
        rankwise.load(run, depth_checkpoint_path=str(tiny_estimator(tmp_path / "other", seed=9)), device="cpu")
    (run / "depth.json").unlink()
    with pytest.raises(DataError, match="depth_preproc"):
        rankwise.load(run, device="cpu")
    with pytest.raises(UsageError, match="was not trained with depth"):
        rankwise.load(place / "smolvlm", depth_checkpoint_path="x", device="cpu")


def test_the_documented_isaac_lines(runs: dict[str, Path], place: Path) -> None:
    """Base with depth by keywords, plain PEFT, merge: as the guide writes it."""
    how = {"use_depth": True, "depth_checkpoint_path": str(place / "estimator"), "depth_input_size": 56}
    base = IsaacForConditionalGeneration.from_pretrained(place / "isaac", dtype=torch.float32, **how)
    assert set(base.state_dict()) - {"model.depth_preproc.gate"} == set(
        IsaacForConditionalGeneration.from_pretrained(place / "isaac").state_dict()
    )
    with quiet_peft():
        model = PeftModel.from_pretrained(base, runs["isaac"]).eval()
    processor = rankwise.depth_processor(load_processor(str(place / "isaac")), model)
    trained = rankwise.load(runs["isaac"], device="cpu")
    inputs = prompt_of(trained, place, "1.png")
    picture = Image.open(place / "images" / "1.png")
    own = processor(text=[processor.image_token + " near?"], images=[picture], return_tensors="pt")
    assert all(torch.equal(own[name], inputs[name]) for name in inputs)
    with torch.no_grad():
        expected = trained.model(**inputs).logits
        assert torch.equal(model(**own).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(**own).logits, expected, atol=1e-4)
    assert encoder_of(merged).gate.item() == encoder_of(trained.model).gate.item()
    assert merged.depth_model is base.depth_model
    with pytest.raises(UsageError, match="needs use_depth=True"):
        IsaacForConditionalGeneration.from_pretrained(place / "isaac", depth_alpha=10.0)
    bare = IsaacForConditionalGeneration.from_pretrained(place / "isaac", use_depth=True)
    with pytest.raises(UsageError, match="no depth estimator"):
        rankwise.depth_processor(processor, bare)
    with pytest.raises(UsageError, match="no depth encoder"):
        rankwise.depth_processor(processor, IsaacForConditionalGeneration.from_pretrained(place / "isaac"))


@pytest.mark.parametrize("family", MAKERS)
def test_merging_keeps_depth(family: str, runs: dict[str, Path], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert cli.main(["merge", str(runs[family]), "-o", str(out)]) == 0
    trained, merged = rankwise.load(runs[family], device="cpu"), rankwise.load(out, device="cpu")
    assert merged.depth == replace(trained.depth, gate_value=encoder_of(trained.model).gate.item())
    inputs = prompt_of(trained, place, "7.png")
    again = prompt_of(merged, place, "7.png")
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    with torch.no_grad():
        assert torch.allclose(merged.model(**again).logits, trained.model(**inputs).logits, atol=2e-4)
    with pytest.raises(DataError, match="trained with depth"):
        merged.model(**{name: value for name, value in again.items() if name != "depth"})
    assert not any("depth" in name for name in load_file(out / "model.safetensors"))


def test_a_compressed_adapter_keeps_depth(runs: dict[str, Path], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    assert cli.main(["compress", str(runs["smolvlm"]), "--energy", "1", "-o", str(out)]) == 0
    trained, smaller = rankwise.load(runs["smolvlm"], device="cpu"), rankwise.load(out, device="cpu")
    assert smaller.depth == trained.depth
    inputs = prompt_of(trained, place, "7.png")
    with torch.no_grad():
        assert torch.allclose(smaller.model(**inputs).logits, trained.model(**inputs).logits, atol=1e-4)


# evaluation


def evaluation(run: Path, place: Path, **depth: Any) -> EvaluateConfig:
    data = ScoredData(task="conversations", data_path=str(place / "rows.json"), image_folder=str(place / "images"))
    use = DepthUseSection(depth_cache=str(run.parent / "cache"), **depth)
    return EvaluateConfig(model_name=str(run), data=data, depth=use, device="cpu")


def under_test(config: EvaluateConfig, rows: Any) -> Subject:
    base, adapter = base_and_adapter(str(config.model_name), None)
    renderer = engines.renderer_of(config, base, adapter)
    return add_depth(config, engines.subject(config, base, adapter, renderer), rows)


def texts(tested: Subject, rows: Any, batch_size: int = 4) -> list[str]:
    generator = HFGenerator(tested.model, tested.renderer, GenerationSettings(6, batch_size=batch_size))
    return [found.text for found in sorted(generator.generate(rows), key=lambda one: one.position)]


@pytest.mark.parametrize("family", MAKERS)
def test_evaluation_sees_depth(family: str, runs: dict[str, Path], place: Path) -> None:
    """Batches and single rows give the same texts; `off` is the model with its gate shut."""
    rows = load_rows("conversations", place / "rows.json").items
    tested = under_test(evaluation(runs[family], place), rows)
    found = texts(tested, rows)
    assert texts(tested, rows, 1) == found
    off = under_test(evaluation(runs[family], place, depth_control="off"), rows)
    without = texts(off, rows)
    assert without != found
    assert without[-1] == found[-1], "the row of text has no depth"
    with torch.no_grad():
        encoder_of(tested.model).gate.zero_()
    assert texts(tested, rows) == without


def test_evaluation_refuses(runs: dict[str, Path], place: Path, tmp_path: Path) -> None:
    rows = load_rows("conversations", place / "rows.json").items
    with pytest.raises(DataError, match="depth needs its estimator"):
        under_test(evaluation(runs["smolvlm"], place, depth_checkpoint_path=str(tmp_path / "gone")), rows)
    with pytest.raises(UsageError, match=r"--depth_cache: .* was not trained with depth"):
        under_test(evaluation(place / "smolvlm", place), rows)
    config = evaluation(runs["smolvlm"], place)
    by_vllm = replace(config, engine="vllm", data=replace(config.data, task="samsum"))
    with pytest.raises(UsageError, match="vllm does not support depth"):
        under_test(by_vllm, rows)


def test_an_evaluation_knows_its_control(runs: dict[str, Path], place: Path) -> None:
    """Predictions of one control are never mixed into another's: the settings are part of what they were made from."""
    facts = [
        depth_facts(under_test(evaluation(runs["smolvlm"], place, **use), []).depth)
        for use in ({}, {"depth_control": "ramp"})
    ]
    assert facts[0] != facts[1] and "estimator" not in facts[0]["depth"]


# beside other ways of training


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--schedule", "attention:2 > mlp"], ["--init_lora_weights", "pissa"], ["--full", "projector"]],
    ids=["phases", "pissa", "full"],
)
def test_the_gate_trains_beside(more: list[str], place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(words(place, "smolvlm", run, *more)) == 0
    trained = rankwise.load(run, device="cpu")
    assert encoder_of(trained.model).gate.item() != 0
    assert trained.model(**prompt_of(trained, place, "1.png")).logits.isfinite().all()


@pytest.mark.slow
def test_two_processes_share_the_maps(place: Path, tmp_path: Path) -> None:
    """Each makes its part, none waits for a map that never comes, and both train on the same values as one does."""
    alone, both = words(place, "smolvlm", tmp_path / "one" / "run"), words(place, "smolvlm", tmp_path / "two" / "run")
    assert cli.main(alone) == 0
    found = processes.run("-m", "rankwise.cli", *both, count=2)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "depth: 12 maps made" in found.stdout
    one, two = (maps_in(tmp_path / name / "cache") for name in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
