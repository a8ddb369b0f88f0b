"""A GGUF as an engine of evaluation: the same prompts, texts and label scores as transformers', on texts and images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served import text_gguf, text_model

from rankwise.data.device import DeviceReader, DeviceTarget, device_processor, read_target
from rankwise.data.example import Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.device.llama.generator import GGUFGenerator
from rankwise.device.llama.runtime import Completion, LlamaServer, RuntimeInfo
from rankwise.errors import UsageError
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.evaluate.tasks import evaluate, task
from rankwise.models.load import load_model, load_processor, load_tokenizer

LABELS = ("water", "land", "fire")
DECODING = GenerationSettings(max_new_tokens=8, batch_size=1)


def sample(number: int, text: str, label: str, images: tuple[str, ...] = ()) -> Example:
    turns = (Turn("user", text), Turn("assistant", label))
    return Example(id=f"s{number}", group=f"s{number}", turns=turns, images=images, facts={"labels": LABELS})


TEXTS = [sample(n, f"Is it {word}? Element:", LABELS[n]) for n, word in enumerate(("red", "a pub", "the city centre"))]


def agree(one: GGUFGenerator, other: HFGenerator, examples: list[Example], within: float) -> None:
    ours = {found.position: found for found in one.label_scores(examples, LABELS)}
    theirs = {found.position: found for found in other.label_scores(examples, LABELS)}
    assert ours.keys() == theirs.keys() == set(range(len(examples)))
    for position, found in ours.items():
        assert found.prompt == theirs[position].prompt
        assert found.log_likelihoods == pytest.approx(theirs[position].log_likelihoods, abs=within)


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(str(text_model())), style="chat", max_length=200, reserve=8)


@pytest.fixture(scope="module")
def hf(renderer: Renderer) -> HFGenerator:
    return HFGenerator(load_model(str(text_model()), dtype=torch.float32), renderer, DECODING)


@pytest.fixture(scope="module")
def gguf(renderer: Renderer) -> Iterator[GGUFGenerator]:
    with LlamaServer(text_gguf(), context=256, threads=1, exact=True) as runtime:
        yield GGUFGenerator(runtime, renderer, DECODING)


def test_label_scores_of_texts_are_transformers(gguf: GGUFGenerator, hf: HFGenerator) -> None:
    agree(gguf, hf, TEXTS, within=3e-4)
    assert not gguf.unlike
    assert gguf.latencies.keys() == {example.id for example in TEXTS} and min(gguf.latencies.values()) > 0


def test_texts_are_transformers_in_the_order_of_the_samples(gguf: GGUFGenerator, hf: HFGenerator) -> None:
    ours = list(gguf.generate(TEXTS))
    theirs = sorted(hf.generate(TEXTS), key=lambda found: found.position)
    assert [found.position for found in ours] == [0, 1, 2]
    assert [(found.prompt, found.text) for found in ours] == [(found.prompt, found.text) for found in theirs]
    assert len({found.text for found in ours}) > 1


def test_evaluate_takes_it_as_any_engine(gguf: GGUFGenerator, hf: HFGenerator, tmp_path: Path) -> None:
    results = {
        name: evaluate(task("multi_nli"), engine, TEXTS, tmp_path / name, by="likelihood")
        for name, engine in (("gguf", gguf), ("hf", hf))
    }
    ours, theirs = results["gguf"], results["hf"]
    assert ours is not None and theirs is not None
    assert ours.metrics == theirs.metrics and ours.n == 3
    assert ours.settings["engine"] == "llama.cpp" and ours.settings["build"].startswith("xllamacpp")


def test_it_is_greedy_only(gguf: GGUFGenerator) -> None:
    for decoding in (GenerationSettings(do_sample=True), GenerationSettings(num_beams=2)):
        with pytest.raises(UsageError, match="greedily"):
            replace(gguf, decoding=decoding)


# --- what is asked of the runtime ---------------------------------------------------------------------------------


@dataclass
class Listening:
    """A runtime that keeps what it is asked and reads one token too many."""

    renderer: Renderer
    asked: list = field(default_factory=list)
    info = RuntimeInfo("build 1", "<x>", "/a/b.gguf", 100, False)

    def complete(self, prompt, images=(), **how) -> Completion:
        self.asked.append((prompt, images, how))
        force = how.get("force", [5])
        return Completion("", tuple(force), len(prompt) + 1, "", 0.25, True, logprobs=tuple(-1.0 for _ in force))


def test_prompts_go_as_ids_and_differences_are_counted(renderer: Renderer) -> None:
    heard = Listening(renderer)
    engine = GGUFGenerator(heard, renderer, DECODING)
    scores = list(engine.label_scores(TEXTS[:1], LABELS))
    ids = renderer.prompt_ids(TEXTS[0])
    assert [asked[0] for asked in heard.asked] == [ids] * 3
    assert [asked[2]["reuse"] for asked in heard.asked] == [False, True, True]
    assert engine.unlike == {"s0": (len(ids), len(ids) + 1)}
    assert engine.latencies == {"s0": 0.75}
    for label, value in scores[0].log_likelihoods.items():
        given = next(asked[2]["force"] for asked in heard.asked if renderer.answer(asked[2]["force"]) == label)
        assert given[-1] in renderer.end_ids and value == -len(given)


def test_a_prompt_as_text_has_the_ids_of_the_prompt(renderer: Renderer) -> None:
    turns = (Turn("user", "A?"), Turn("assistant", "yes"), Turn("user", "And B?"), Turn("assistant", "no"))
    for style in ("sections", "chat", "raw"):
        styled = replace(renderer, style=style)
        for example in (TEXTS[0], replace(TEXTS[0], turns=turns)):
            text = styled.prompt_text(example, "<__media__>")
            assert text.startswith("<s>") and not text.startswith("<s><s>")
            assert styled.text(styled.prompt_ids(example)).replace(" ", "") == text.replace(" ", "")


# --- images -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(vision_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("seen") / "vision"
    shutil.copytree(vision_export.parent, folder)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(2):
        coarse = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        coarse.resize((90, 70), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    return folder


def seeing(folder: Path, target: DeviceTarget, tiling: str = "runtime") -> Renderer:
    processor = load_processor(str(folder / "model"))
    reader = DeviceReader(ImageReader(folder / "images"), target)
    sight = Sight(device_processor(processor, replace(target, tiling=tiling)), reader)
    return Renderer(processor.tokenizer, style="chat", sight=sight, max_length=300, reserve=8)


def test_label_scores_of_images_are_transformers(vision: Path) -> None:
    """And a renderer that lays images out in its own way is found out by the number of tokens."""
    target = read_target(vision / "export")
    assert target is not None
    renderer = seeing(vision, target)
    pictures = [sample(n, "<image>\nWhich element is it?", LABELS[n], (f"{n}.png",)) for n in range(2)]
    hf = HFGenerator(load_model(str(vision / "model"), dtype=torch.float32), renderer, DECODING)
    model, mmproj = vision / "export/model-f16.gguf", vision / "export/mmproj-model-f16.gguf"
    with LlamaServer(model, mmproj, context=300, threads=1, exact=True) as runtime:
        engine = GGUFGenerator(runtime, renderer, DECODING, target)
        agree(engine, hf, pictures, within=5e-3)
        assert not engine.unlike
        first, second = (found.log_likelihoods for found in engine.label_scores(pictures, LABELS))
        assert max(abs(first[label] - second[label]) for label in LABELS) > 0.05, "the pictures don't show"
        texts = {found.position: found.text for found in hf.generate(pictures)}
        assert {found.position: found.text for found in engine.generate(pictures)} == texts
        other = GGUFGenerator(runtime, seeing(vision, target, tiling="processor"), DECODING, target)
        list(other.label_scores(pictures[:1], LABELS))
        assert other.unlike["s0"][0] < other.unlike["s0"][1]
