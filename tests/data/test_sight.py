"""What a vision-language model is given: image tokens, labels, pixels; for every family, proven by decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import CONVERSATIONS, batch_of, losses, renderer_of, talk
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tiny_vision import drawn_image

from rankwise.data.check.comparison import Oracle
from rankwise.data.example import Example
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.render import IGNORED, Overlong, Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.models.load import load_model, load_processor

FAMILIES = ("idefics3", "isaac", "llava", "qwen2_5_vl", "qwen2_vl", "smolvlm")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_models: Callable[[str], Path]) -> Path:
    return family_models(request.param)


@pytest.fixture(scope="module")
def renderer(family: Path, pictures: Path) -> Renderer:
    return renderer_of(family, pictures)


@pytest.fixture(scope="module")
def model(family: Path) -> Any:
    return load_model(str(family), torch.float32).eval()


def parts(example: Example) -> list[dict[str, Any]]:
    """The sample as transformers' processors take it, slots and line breaks beside them taken out by hand."""
    messages = []
    for turn in example.turns:
        content: list[dict[str, str]] = []
        for number, piece in enumerate(turn.text.split("<image>")):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
        messages.append({"role": turn.role, "content": content})
    return messages


def decoded(renderer: Renderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def learnt_texts(renderer: Renderer, example: Example) -> list[str]:
    """Each run of unmasked labels, as text."""
    rendered, runs = renderer.training(example), [[]]
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (IGNORED, token)
        if label == IGNORED:
            runs += [[]] if runs[-1] else []
        else:
            runs[-1].append(label)
    return [decoded(renderer, run) for run in runs if run]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_the_answers_and_their_end_tokens(renderer: Renderer, name: str) -> None:
    example = CONVERSATIONS[name]
    end = renderer.tokenizer.eos_token
    answers = [turn.text for turn in example.turns if turn.role == "assistant"]
    assert [text.strip() for text in learnt_texts(renderer, example)] == [answer + end for answer in answers]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_what_the_familys_own_processor_makes(renderer: Renderer, name: str) -> None:
    example = CONVERSATIONS[name]
    assert renderer.sight is not None
    processor, messages = renderer.sight.processor, parts(example)
    text = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    images = [renderer.sight.reader.open(reference) for reference in example.images] or None
    own = processor(text=[text], images=images, add_special_tokens=False)
    prompt = renderer.prompt(example)
    begin = renderer.tokenizer.bos_token_id
    expected = list(own["input_ids"][0])
    assert prompt.input_ids in (expected, [begin, *expected])
    assert prompt.images == example.images


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_one_call_of_the_processor_makes_the_same_ids_and_pixels(renderer: Renderer, name: str) -> None:
    example, oracle = CONVERSATIONS[name], Oracle(renderer)
    sample = (example, renderer.training(example), renderer.prompt_ids(example))
    assert list(oracle.differences([sample])) == []
    if example.images:
        assert oracle.difference_seen(*sample) is None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_starts_with_the_prompt_of_evaluation(renderer: Renderer, name: str) -> None:
    example = CONVERSATIONS[name]
    prompt, training = renderer.prompt_ids(example), renderer.training(example)
    assert training.input_ids[: len(prompt)] == prompt
    assert training.labels[len(prompt) - 1] == IGNORED
    assert IGNORED not in training.labels[len(prompt) :]


@torch.inference_mode()
def test_a_batch_is_its_samples_alone(renderer: Renderer, model: Any) -> None:
    """Several images of several sizes, text-only rows between them, padding: none changes a sample's loss."""
    examples = list(CONVERSATIONS.values())
    together = losses(model, batch_of(renderer, examples))
    alone = torch.cat([losses(model, batch_of(renderer, [example])) for example in examples])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_the_pictures_reach_the_answer(renderer: Renderer, model: Any) -> None:
    """Another picture, or the same two in the other order, changes what the model thinks of the answer."""
    example = CONVERSATIONS["two images"]
    swapped = replace(example, images=example.images[::-1])
    first, second = (losses(model, batch_of(renderer, [each])) for each in (example, swapped))
    assert (first - second).abs() > 1e-4


def test_answers_are_generated_alike_alone_and_together(renderer: Renderer, model: Any) -> None:
    examples = list(CONVERSATIONS.values())
    settings = GenerationSettings(max_new_tokens=6, batch_size=4)
    generator = HFGenerator(model, replace(renderer, reserve=6), settings)
    together = {found.position: found.text for found in generator.generate(examples)}
    single = HFGenerator(model, generator.renderer, replace(settings, batch_size=1))
    assert together == {found.position: found.text for found in single.generate(examples)}
    labels = ["red", "a square"]
    scores = {found.position: found.log_likelihoods for found in generator.label_scores(examples, labels)}
    for found in single.label_scores(examples, labels):
        assert found.log_likelihoods == pytest.approx(scores[found.position], abs=1e-3)


def test_generation_continues_the_forward_pass(renderer: Renderer, model: Any) -> None:
    """Greedy tokens with the cache are those that a whole forward pass finds likeliest."""
    assert renderer.sight is not None
    prompt = renderer.prompt(CONVERSATIONS["two images"])
    ids, images = torch.tensor([prompt.input_ids]), renderer.sight.inputs([prompt.images])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None,
        **images, **renderer.sight.row_inputs(ids),
    )  # fmt: skip
    whole = model(input_ids=made, attention_mask=torch.ones_like(made), **images, **renderer.sight.row_inputs(made))
    assert whole.logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == made[0, ids.shape[1] :].tolist()


def test_beams_with_images_are_refused(renderer: Renderer, model: Any) -> None:
    generator = HFGenerator(model, renderer, GenerationSettings(num_beams=2))
    with pytest.raises(UsageError, match="num_beams"):
        list(generator.generate([CONVERSATIONS["one image"]]))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (talk("<image>\nWhat?", "Red."), "1 image slots .* and 0 images"),
        (talk("What?", "Red.", images=(0,)), "0 image slots .* and 1 images"),
        (talk("<image> or <image>?", "Red.", images=(0,)), "2 image slots .* and 1 images"),
        (talk("What?", "This: <image>", images=(0,)), "1 image slots .*, 1 of them in answers"),
    ],
)
def test_slots_and_images_must_agree(renderer: Renderer, example: Example, reason: str) -> None:
    with pytest.raises(DataError, match=f"sample 1: {reason}"):
        renderer.training(example)


def test_the_image_token_is_never_text(family_models: Callable[[str], Path], pictures: Path) -> None:
    renderer = renderer_of(family_models("qwen2_5_vl"), pictures)
    with pytest.raises(DataError, match=r"sample 1: its text holds <\|image_pad\|>"):
        renderer.training(talk("<image> and <|image_pad|>", "Red.", images=(0,)))


@pytest.mark.parametrize("overlong", ["error", "truncate_source"])
def test_an_image_is_never_cut(family_models: Callable[[str], Path], pictures: Path, overlong: str) -> None:
    renderer = renderer_of(family_models("llava"), pictures, max_length=30, overlong=overlong)
    example = talk("<image><image>\nWhat?", "Red.", images=(0, 1))
    with pytest.raises(Overlong, match=r"sample 1 needs \d+ tokens, 32 of them for its images, the limit is 30"):
        renderer.training(example)


def test_a_size_that_the_processor_refuses_is_named(family_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen's processor takes no picture of more than 200:1."""
    drawn_image(0, (3000, 8)).save(tmp_path / "0.png")
    renderer = renderer_of(family_models("qwen2_5_vl"), tmp_path)
    with pytest.raises(BadImage, match=r"sample 1: image 0.png: the processor refuses 3000×8 pixels"):
        renderer.training(CONVERSATIONS["one image"])


def test_images_need_a_chat_template(family_models: Callable[[str], Path], pictures: Path) -> None:
    renderer = replace(renderer_of(family_models("llava"), pictures), style="sections")
    assert renderer.training(CONVERSATIONS["no image"]).images == ()
    with pytest.raises(UsageError, match="--prompt chat"):
        renderer.training(CONVERSATIONS["one image"])


def test_a_template_that_loses_images_is_refused(family_models: Callable[[str], Path], pictures: Path) -> None:
    renderer = renderer_of(family_models("qwen2_5_vl"), pictures)
    template = CHAT_TEMPLATE.replace("m['content']", "m['content'] | string | replace('<','')")
    with pytest.raises(UsageError, match="does not put one"):
        replace(renderer, chat_template=template)


def test_a_template_that_takes_strings_gets_the_image_token(
    family_models: Callable[[str], Path], pictures: Path
) -> None:
    """Old LLaVA models have templates that only paste the content."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %} "
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = replace(renderer_of(family_models("llava"), pictures), chat_template=template)
    rendered = renderer.training(CONVERSATIONS["two images"])
    token = renderer.sight.placeholder_id  # type: ignore[union-attr]
    assert rendered.input_ids.count(token) == 32
    assert learnt_texts(renderer, CONVERSATIONS["two images"]) == ["The first.</s>"]


def test_a_text_model_has_no_sight(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE)
    rendered = Renderer(tokenizer, style="chat").training(CONVERSATIONS["one image"])
    assert rendered.images == ()
    assert "<image>" not in tokenizer.decode(rendered.input_ids)


def real_renderer(folder: Path, pictures: Path, **changes: Any) -> Renderer:
    processor = load_processor(str(folder))
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    sight = Sight(processor, ImageReader(pictures))
    return Renderer(processor.tokenizer, style="chat", max_length=8192, sight=sight, generation_eos=eos, **changes)


@pytest.mark.parametrize("name", ["SmolVLM-256M-Instruct", "Qwen2.5-VL-7B-Instruct"])
def test_real_processors(shared_data: Path, pictures: Path, name: str) -> None:
    """The released tokenizers, templates and processors: prompts as they make them, labels the answers."""
    renderer = real_renderer(shared_data / "model_configs" / name, pictures)
    for each, example in CONVERSATIONS.items():
        test_prompts_are_what_the_familys_own_processor_makes(renderer, each)
        learnt = [text.strip() for text in learnt_texts(renderer, example)]
        answers = [turn.text for turn in example.turns if turn.role == "assistant"]
        assert learnt == [answer + renderer.tokenizer.eos_token for answer in answers]
