"""The vision demo: its base loads like any model, its two tokenizers agree, and it makes everything it promises."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from rankwise import cli
from rankwise.data.example import Example
from rankwise.demo.base import spoken
from rankwise.demo.command import lacking_parts
from rankwise.demo.drawings import captioned, draw, paint, seen
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.tiny import (
    BREAK,
    IMAGE_TOKENS,
    SIDE,
    TEXT,
    Eye,
    check_same_ids,
    random_smolvlm,
    save_vision_tokenizer,
    vision_processor,
)


def captions(count: int) -> list[Example]:
    return captioned(seen(random.Random(0), count), random.Random(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = save_vision_tokenizer(folder, spoken(captions(60)), 330)
    vision_processor(tokenizer).save_pretrained(folder)
    random_smolvlm(tokenizer, 0).save_pretrained(folder)
    return folder


def test_the_saved_folder_is_a_model_of_the_family(base: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(base), AutoModelForImageTextToText.from_pretrained(base)
    content = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>User:<image>What do you see?<end_of_utterance>\nAssistant:"
    inputs = processor(text=[text], images=[[paint(draw(random.Random(0)))]], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 1, 3, SIDE, SIDE), "one picture, no tiles"
    assert 0.7e6 < model.num_parameters() < 1.5e6
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits[:, -1], model(**other).logits[:, -1]), (
            "it looks at the picture"
        )


def test_what_a_converter_reads(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["VLlama3ForCausalLM"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    assert tokenizer(BREAK)["input_ids"] == [pieces.piece_to_id(BREAK)]
    template = "<|im_start|>User:<image>Ünïcode £5?<end_of_utterance>\nAssistant: red  green\n\n<end_of_utterance>\n"
    check_same_ids(pieces, tokenizer, [template, "", " a", "a\n\n\nb", *spoken(captions(20))])
    ids = tokenizer(template)["input_ids"]
    assert tokenizer.decode(ids) == template


class Numbered(torch.nn.Module):
    """In place of the vision tower and the projector: image token n of every picture is the vector (n, n, …)."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        width = TEXT["hidden_size"]
        return torch.arange(float(IMAGE_TOKENS))[None, :, None].expand(len(pictures), IMAGE_TOKENS, width)


class Passing(torch.nn.Module):
    def forward(self, pictures: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=pictures)


def test_the_eye_looks_at_the_tokens_of_each_quarter(base: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    eye = Eye(model, [2, 3])
    eye.projector = Numbered()
    eye.vision = Passing()
    with torch.no_grad():
        eye.classifier.weight.fill_(1 / TEXT["hidden_size"])
        eye.classifier.bias.zero_()
    labels = torch.zeros(2, 4, 2, dtype=torch.long)
    output = eye(torch.zeros(2, 3, SIDE, SIDE), labels)
    rows = torch.arange(16.0).view(4, 4)
    quarters = [
        rows[:2, :2],
        rows[:2, 2:],
        rows[2:, :2],
        rows[2:, 2:],
    ]  # in reading order
    wanted = torch.stack([quarter.mean() for quarter in quarters])
    assert torch.allclose(output["logits"], wanted[None, :, None].expand(2, 4, 5))
    assert torch.allclose(output["loss"], torch.tensor([2.0, 3.0]).log().sum()), "equal logits: log of the classes"


@pytest.mark.slow
def test_the_quick_demo_makes_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--vision", "--quick", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "exact_match" in printed
    assert str(folder / "report.html") in printed.splitlines()[-1]
    wanted = (
        *("data/train.json", "data/heldout.json", "data/images/train-0000.png", "base/model.safetensors"),
        *("base/tokenizer.model", "base/processor_config.json", "base/chat_template.jinja", "probe/deltas"),
        *("ranks/configs/lora_rank_config.json", "train/adapter_config.json", "after/predictions.jsonl", "report.md"),
    )
    assert not [name for name in wanted if not (folder / name).exists()]
    before, after = (EvaluationResult.load(folder / name) for name in ("before", "after"))
    assert before.n == after.n > 0
    assert set(after) == {"exact_match", "token_f1", "rouge_l", "num_samples"}
    assert '<div class="gallery">' in (folder / "report.html").read_text(encoding="utf-8")
    sites = json.loads((folder / "train" / "sites.json").read_text(encoding="utf-8"))["sites"]
    assert not [site["path"] for site in sites if "text_model" not in site["path"]]
    assert cli.main(["demo", "--vision", "--quick", "-o", str(folder)]) == 0
    assert capsys.readouterr().out.count("done already") == (6 if lacking_parts() else 9), "nothing again"
