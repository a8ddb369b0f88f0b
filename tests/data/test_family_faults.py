"""Families that were silently wrong, or a traceback: each is right now, or refused in a sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import CONVERSATIONS, batch_of, checked, losses, renderer_of, rows, talk
from tiny import CHAT_TEMPLATE, tiny_llama
from torch import Tensor
from transformers import Blip2Processor, BlipImageProcessor

from rankwise.cli import main
from rankwise.data import renderer_for as tested
from rankwise.data.check.comparison import Oracle
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.device.handoff.variants import Asked, log_probs
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import answer_ids
from rankwise.models.load import forward_inputs, load_config, load_model, load_processor

SEEN = tuple(name for name, example in CONVERSATIONS.items() if example.images)
CLOSED = ("mm_input_projection_weight", "cross_attn_attn_gate", "cross_attn_mlp_gate")  # new models have zeros there


def sees(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, with whatever keeps images from its text opened."""
    model = load_model(str(folder), dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(CLOSED):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) + 1)
    return model


def given(renderer: Renderer, name: str) -> dict[str, Tensor]:
    """One call of the processor for a conversation."""
    sight, example = renderer.sight, CONVERSATIONS[name]
    assert sight
    found = sight.processor.apply_chat_template(
        renderer.template.messages(example.turns),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": [sight.reader.open(reference) for reference in example.images]},
    )
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("family", ["gemma3", "llava_onevision", "idefics2", "llama4", "mllama"])
def test_one_call_of_the_processor_makes_the_same(
    family: str, name: str, family_models: Callable[[str], Path], pictures: Path
) -> None:
    renderer, example = renderer_of(family_models(family), pictures), CONVERSATIONS[name]
    sample = (example, renderer.training(example), renderer.prompt_ids(example))
    assert list(Oracle(renderer).differences([sample])) == []
    assert Oracle(renderer).difference_seen(*sample) is None


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gemma3", "llava_onevision", "idefics2", "mllama"])
def test_logits_are_those_of_the_familys_own_inputs(
    family: str, family_models: Callable[[str], Path], pictures: Path
) -> None:
    renderer, model = renderer_of(family_models(family), pictures), sees(family_models(family))
    ours = batch_of(renderer, [CONVERSATIONS["two images"]])
    ours.pop("labels")
    own = given(renderer, "two images")
    length = len(renderer.prompt_ids(CONVERSATIONS["two images"])) - 2  # its last tokens join with an answer in Mllama
    torch.testing.assert_close(model(**ours).logits[:, :length], model(**own).logits[:, :length], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gemma3", "llava_onevision", "idefics2", "mllama"])
def test_rows_of_a_batch_are_as_alone(family: str, family_models: Callable[[str], Path], pictures: Path) -> None:
    """One image, several, none; and another order of two pictures is another answer. In Mllama rows with different
    numbers of images change each other, so they are refused in one batch."""
    renderer, model = renderer_of(family_models(family), pictures), sees(family_models(family))
    examples = list(CONVERSATIONS.values())
    if family == "mllama":
        with pytest.raises(UsageError, match="batch size of 1"):
            batch_of(renderer, examples)
        examples = [CONVERSATIONS["image within"], CONVERSATIONS["turns"], CONVERSATIONS["two images"]]
    together = losses(model, batch_of(renderer, examples))
    alone = torch.cat([losses(model, batch_of(renderer, [example])) for example in examples])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    swapped = replace(CONVERSATIONS["two images"], images=CONVERSATIONS["two images"].images[::-1])
    assert (
        losses(model, batch_of(renderer, [swapped])) - alone[examples.index(CONVERSATIONS["two images"])]
    ).abs() > 1e-5


def test_image_tokens_are_counted_as_the_model_counts_them(
    family_models: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """Gemma 3's image token is not the one in the sequence, nor is Llama 4's."""
    for family in ("gemma3", "llama4", "aya_vision", "llava_onevision"):
        renderer = renderer_of(family_models(family), pictures)
        image_id = load_config(str(family_models(family))).image_token_id
        tokens = int((given(renderer, "one image")["input_ids"] == image_id).sum())
        code, report = checked(family_models(family), rows(tmp_path, "one image"), pictures)
        assert (code, report["tokens"]["of_images"]) == (0, tokens)
        assert renderer.sight and renderer.sight.placeholder_id == image_id


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_fit_the_models_precision(
    dtype: torch.dtype, family_models: Callable[[str], Path], pictures: Path
) -> None:
    """Llama 4's processor makes bfloat16, and its model casts nothing."""
    renderer = renderer_of(family_models("llama4"), pictures)
    assert (
        losses(sees(family_models("llama4"), dtype), batch_of(renderer, [CONVERSATIONS["two images"]])).isfinite().all()
    )


def test_rows_that_would_change_each_other_are_refused_before_training(
    family_models: Callable[[str], Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data_path", str(rows(tmp_path, "one image", "two images", "no image")), "--image_folder", str(pictures)]
    start = ["train", "--model_name", str(family_models("mllama")), *data, "--task", "conversations", "--lora_r", "2"]
    start += ["--max_steps", "2", "--use_cpu", "-o", str(tmp_path / "run")]
    assert main([*start, "--per_device_train_batch_size", "2"]) == 2
    assert "MllamaProcessor: rows with different numbers of images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*start, "--per_device_train_batch_size", "1"]) == 0


PALIGEMMA = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in its processor


@PALIGEMMA
def test_only_what_forward_takes_is_made(family_models: Callable[[str], Path], pictures: Path) -> None:
    """PaliGemma's processor makes labels, which would replace those of the answers."""
    folder = family_models("paligemma")
    takes = forward_inputs(load_config(str(folder)))
    assert takes and {"labels", "pixel_values", "token_type_ids"} <= takes
    made = Sight(load_processor(str(folder)), ImageReader(pictures), takes=takes).inputs([["0.png"]])
    assert set(made) == {"pixel_values"}
    assert Sight(load_processor(str(folder)), ImageReader(pictures), takes=frozenset()).inputs([["0.png"]]) == {}


def test_a_processor_that_works_otherwise_is_refused_by_name(
    family_models: Callable[[str], Path], pictures: Path
) -> None:
    """BLIP-2 puts its image tokens before the prompt, wherever the image is."""
    tokenizer = load_processor(str(family_models("llava"))).tokenizer
    processor = Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    renderer = Renderer(tokenizer, style="chat", sight=Sight(processor, ImageReader(pictures)))
    with pytest.raises(UsageError, match="Blip2Processor"):
        renderer.training(talk("<image>\nWhat?", "Red.", images=(0,)))


def test_a_refused_family_stops_before_weights_load(
    family_models: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = {"families": {"qwen2_vl": {"state": "refused", "why": "of a reason"}}}
    monkeypatch.setattr(tested, "table", lambda _: table)
    monkeypatch.setattr("rankwise.models.load.check_index", lambda _: pytest.fail("weights were loaded"))
    model, data = str(family_models("qwen2_vl")), ["--data_path", str(rows(tmp_path, "one image"))]
    for command in ("train", "finetune", "check"):
        flags = ["--lora_r", "4"] if command == "train" else []
        where = ["--image_folder", str(pictures), "--task", "conversations", "-o", str(tmp_path / command)]
        assert main([command, "--model_name", model, *data, *where, *flags]) == 2, command
        assert "qwen2_vl cannot be used with images: of a reason" in capsys.readouterr().err


def test_a_family_outside_the_table_is_warned_of(
    family_models: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = rows(tmp_path, "one image")
    assert checked(family_models("qwen2_vl"), file, pictures)[0] == 0
    assert "not among the tested" not in capsys.readouterr().out
    monkeypatch.setattr(tested, "table", lambda _: {"families": {}})
    assert checked(family_models("qwen2_vl"), file, pictures)[0] == 0
    assert "the family qwen2_vl is not among the tested ones" in capsys.readouterr().out


def test_a_family_whose_images_are_not_followed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has no vision tower in its config (Emu3, Chameleon, Fuyu): its rows are text."""
    model = tiny_llama(tmp_path / "model", tokenizer={"chat_template": CHAT_TEMPLATE})
    monkeypatch.setattr(tested, "table", lambda _: {"families": {"llama": {"state": "untested"}}})
    assert checked(model, rows(tmp_path, "one image"), tmp_path)[0] == 0
    out = capsys.readouterr().out
    assert "images are not supported for the family llama" in out
    assert "samples have images; this run uses their text only" in out


def test_the_table_names_states_and_versions() -> None:
    table = tested.table(tested.TABLE)
    assert table["versions"]["transformers"]
    assert {entry["state"] for entry in table["families"].values()} <= {"exact", "refused", "untested"}
    assert all(entry["why"] for entry in table["families"].values() if entry["state"] == "refused")


def talks(renderer: Renderer, example: Any) -> dict[str, Tensor]:
    """PaliGemma's own call for training: prompt, answer as suffix, labels."""
    assert renderer.sight
    prompt, answer = (turn.text.replace("<image>\n", "<image>") for turn in example.turns)
    pictures = [[renderer.sight.reader.open(reference) for reference in example.images]]
    found: dict[str, Tensor] = renderer.sight.processor(
        text=[prompt], images=pictures, suffix=[answer], return_tensors="pt"
    )
    return found


@PALIGEMMA
@torch.inference_mode()
def test_paligemma_sees_prompts_in_both_directions(family_models: Callable[[str], Path], pictures: Path) -> None:
    """Ids, labels and the mask of its own call; no answer sees what comes behind it."""
    processor = load_processor(str(family_models("paligemma")))
    renderer = Renderer(processor.tokenizer, style="raw", sight=Sight(processor, ImageReader(pictures)))
    model = sees(family_models("paligemma"))
    for name in ("one image", "two images"):
        example = CONVERSATIONS[name]
        ours, own = batch_of(renderer, [example]), talks(renderer, example)
        for each in ("input_ids", "labels", "token_type_ids", "pixel_values"):
            assert torch.equal(ours[each], own[each].to(ours[each].dtype)), (name, each)
        assert ours["input_ids"].shape[1] > len(renderer.prompt_ids(example)) == int((own["labels"] == -100).sum())
    together = losses(model, batch_of(renderer, [CONVERSATIONS["one image"], CONVERSATIONS["two images"]]))
    alone = [losses(model, batch_of(renderer, [CONVERSATIONS[name]])) for name in ("one image", "two images")]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)
    batch = batch_of(renderer, [CONVERSATIONS["one image"]])
    changed = batch["input_ids"].clone()
    changed[0, -1] = 5  # the last token of the answer
    before, after = (model(**{**batch, "input_ids": ids}).logits for ids in (batch["input_ids"], changed))
    torch.testing.assert_close(before[:, :-1], after[:, :-1], atol=1e-6, rtol=0)


@PALIGEMMA
@torch.inference_mode()
def test_a_forced_answer_is_masked_as_in_training(family_models: Callable[[str], Path], pictures: Path) -> None:
    """No place of an answer that a server is asked about sees what comes behind it, as in training."""
    processor = load_processor(str(family_models("paligemma")))
    renderer = Renderer(processor.tokenizer, style="raw", sight=Sight(processor, ImageReader(pictures)))
    model, example = sees(family_models("paligemma")), CONVERSATIONS["one image"]
    prompt, answer = renderer.prompt(example), answer_ids(renderer, example, example.answer)
    places = tuple(range(len(answer)))
    batch = batch_of(renderer, [example])
    learnt = (batch.pop("labels")[0] != -100).nonzero()[:, 0] - 1
    asked = Asked(tuple(prompt.input_ids), tuple(answer), places, example.images)
    found = log_probs(model, renderer.sight, [asked])[0]
    torch.testing.assert_close(found, model(**batch).logits[0, learnt].log_softmax(-1), atol=1e-5, rtol=0)


@PALIGEMMA
def test_paligemma_takes_its_own_form_only(
    family_models: Callable[[str], Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = family_models("paligemma")
    code, report = checked(model, rows(tmp_path, "one image", "two images"), pictures)
    assert (code, report["model_run"]["samples"]) == (0, 2)
    code, report = checked(model, rows(tmp_path, "one image", "no image", "turns"), pictures)
    assert code == 3 and report["bad"]["text"] == 2
    said = capsys.readouterr().out
    assert "takes no row without images" in said and "one prompt and one answer" in said
    assert (
        checked(model, rows(tmp_path, "one image"), pictures, "--prompt", "chat", "--chat_template", "{{ x }}")[0] == 2
    )
    assert "PaliGemmaProcessor makes rows of one prompt and one answer" in capsys.readouterr().err
