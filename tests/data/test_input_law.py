"""A law: training, adapter, merged model and GGUF are asked the same, though no flag is repeated."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import text_model
from PIL import Image
from recorded_runs import (
    THINKING,
    chat_base,
    evaluate,
    exported_by_hand,
    jsonl,
    overheard,
    run,
    talks,
    train,
    trained_prompts,
)
from tiny_vision import tiny_smolvlm

from rankwise.data.device import DeviceTarget
from rankwise.data.input_record import as_recorded, read_input, recorded
from rankwise.data.label_task import task_from
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.device.llama.generator import GGUFGenerator
from rankwise.device.llama.runtime import Completion, RuntimeInfo
from rankwise.device.sides import shipment, trained_side
from rankwise.evaluate.tasks import task as scored_task
from rankwise.files.adapter import INPUT
from rankwise.files.atomic import read_object, write_json
from rankwise.gguf.converter import Converter
from rankwise.models.load import load_config, load_processor, load_tokenizer
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import DataSection, ModelSection, ScoredData


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    return overheard(monkeypatch)


# --- the printed next command asks as training did -------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chat", "raw", "sections"])
def test_the_line_that_train_prints_asks_as_training_did(
    style: str, base: Path, tmp_path: Path, asked: dict[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts of the printed command are, id for id, what stood before the answers in training."""
    data = tmp_path / "some rows"
    data.mkdir()
    for name in ("trainset.csv", "devset.csv"):
        (data / name).write_text("mr,ref\n" + "".join(f'"name[a{n}]",text of a{n}\n' for n in range(6)))
    train(base, tmp_path / "run", "--task", "e2e_nlg", "--data_path", data, "--prompt", style)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: rankwise "))
    assert run(*words, "--device", "cpu", "--max_new_tokens", 2) == 0
    said = capsys.readouterr().out
    assert f"— from {tmp_path / 'run' / INPUT}" in said.splitlines()[0]
    renderer = renderer_for(DataSection(prompt=style), ModelSection(), str(base), load_config(str(base)))
    assert asked == trained_prompts(renderer, load("e2e_nlg", data, "dev"))


def test_what_training_saw_whole_is_asked_whole(base: Path, tmp_path: Path, asked: dict[str, list[int]]) -> None:
    """Room for the answer comes on top of the training's length: a prompt that fitted is not cut for it."""
    data = talks(tmp_path / "rows.jsonl", length=20)
    renderer = renderer_for(
        DataSection(task="conversations", data_path=str(data)), ModelSection(), str(base), load_config(str(base))
    )
    longest = max(len(renderer.training(row).input_ids) for row in load("conversations", data))
    train(base, tmp_path / "run", "--data_path", data, "--max_seq_length", longest)
    words = ("--task", "conversations", "--data_path", data, "--max_new_tokens", 40)
    assert evaluate(tmp_path / "run", *words) == 0
    expected = trained_prompts(renderer, load("conversations", data))
    assert asked == {name: expected[name] for name in asked}


# --- a law: adapter, merged model and GGUF are asked the same --------------------------------------------------------


class Listening:
    """A llama.cpp that only hears: the ids, or the text and pictures, that it is sent."""

    info = RuntimeInfo("none", "<__media__>", "model.gguf", 512, False)

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def complete(self, prompt: Any, images: Any = (), **_: Any) -> Completion:
        self.heard.append((prompt if isinstance(prompt, str) else list(prompt), tuple(images)))
        return Completion("", (), len(prompt), "", 0.0, True)


def samsum(folder: Path) -> Path:
    dialogues = [{"id": f"s{n}", "dialogue": f"Ann: near[{n}]?\nBo: yes", "summary": f"Café {n}."} for n in range(6)]
    write_json(folder / "train.json", dialogues)
    write_json(folder / "val.json", dialogues)
    return folder


def e2e(folder: Path) -> Path:
    for name in ("trainset.csv", "devset.csv"):
        (folder / name).write_text("mr,ref\n" + "".join(f'"name[a{n}]",text of a{n}\n' for n in range(6)))
    return folder


def multi_nli(folder: Path) -> Path:
    labels = ("neutral", "entailment", "contradiction")
    pairs = [
        {"pairID": f"m{n}", "sentence1": f"It rains {n}.", "sentence2": "Wet.", "gold_label": labels[n % 3]}
        for n in range(6)
    ]
    for name in ("multinli_1.0_train.jsonl", "multinli_1.0_dev_matched.jsonl"):
        jsonl(folder / name, pairs)
    return folder


def wikisql(folder: Path) -> Path:
    table = {"id": "t", "header": ["Name", "Town"], "types": ["text", "text"], "rows": [["Vaults", "Ely"]]}
    sql = {"sel": 0, "agg": 0, "conds": [[1, 0, "Ely"]]}
    for part in ("train", "dev"):
        jsonl(folder / f"{part}.tables.jsonl", [table])
        jsonl(folder / f"{part}.jsonl", [{"table_id": "t", "question": f"Who {n}?", "sql": sql} for n in range(6)])
    return folder


def conversations(folder: Path) -> Path:
    return talks(folder / "rows.jsonl", system="Be brief.")


DATA: dict[str, Callable[[Path], Path]] = {
    "e2e_nlg": e2e,
    "samsum": samsum,
    "multi_nli": multi_nli,
    "wikisql": wikisql,
    "conversations": conversations,
}


def sent(export: Path, task: str, data: Path) -> dict[str, Any]:
    """Sample → what `validate` sends to llama.cpp for it."""
    scored = ScoredData(task=task, data_path=str(data))
    config = ValidateConfig(export=str(export), data=scored, num_samples=2, device="cpu")
    trained = trained_side(config, shipment(config))
    runtime = Listening()
    list(GGUFGenerator(runtime, trained.renderer, trained.decoding).generate(trained.items))
    return {example.id: heard for example, heard in zip(trained.items, runtime.heard, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["sections", "chat", "raw"])
def test_adapter_merged_model_and_gguf_are_asked_the_same(
    style: str, base: Path, tmp_path: Path, asked: dict[str, list[int]]
) -> None:
    """All tasks, no flag repeated; a template of its own with a variable, and a length that cuts nothing."""
    (tmp_path / "own.jinja").write_text(THINKING)
    template = ["--chat_template", tmp_path / "own.jinja", "--chat_template_kwargs", '{"thinking": true}']
    for name, made in DATA.items():
        (tmp_path / name).mkdir()
        data = made(tmp_path / name)
        own = ("--task", name, "--data_path", data)
        out = train(base, tmp_path / name / "run", *own, "--prompt", style, *(template if style == "chat" else []))
        assert run("merge", out, "-o", tmp_path / name / "merged") == 0
        found = []
        for model in (out, tmp_path / name / "merged"):
            asked.clear()
            assert evaluate(model, *own) == 0
            found.append(dict(asked))
        shipped = sent(exported_by_hand(tmp_path / name / "merged", tmp_path / name / "export"), name, data)
        assert found[0] == found[1] == {key: ids for key, (ids, _) in shipped.items()}, name
        record = read_input(out)
        assert record
        seen = as_recorded(DataSection(task=name), recorded([out]))
        renderer = renderer_for(seen, ModelSection(), str(base), load_config(str(base)))
        items = scored_task(name).examples(str(data), "dev").items[:2]
        assert found[0] == trained_prompts(renderer, items), name


WITHOUT_START = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.slow
def test_a_gguf_adds_no_start_token_that_training_never_saw(converter: Converter, tmp_path: Path) -> None:
    """The template writes none, while the tokenizer adds one to other texts and would tell llama.cpp to."""
    pytest.importorskip("xllamacpp")
    base = text_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text(WITHOUT_START)
    data = talks(tmp_path / "rows.jsonl")
    out = train(base, tmp_path / "run", "--data_path", data, "--prompt", "chat")
    assert read_object(out / INPUT)["begin_tokens"] == {} and load_tokenizer(str(base))("a")["input_ids"][0] == 1
    assert run("merge", out, "-o", tmp_path / "merged") == 0
    assert run("export", tmp_path / "merged", "--outtype", "f16", "-o", tmp_path / "export") == 0
    rows = ("--task", "conversations", "--data_path", data, "--device", "cpu", "--threads", 1, "--max_new_tokens", 8)
    assert run("validate", tmp_path / "export", *rows, "-o", tmp_path / "validation") == 0


def pictures(folder: Path) -> Path:
    """A labelled data set made for a device."""
    (folder / "images").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (40, 32), (40 * number, 200, 10)).save(folder / "images" / f"{number}.png")
    rows = [{"image_id": f"{n}", "image_path": f"images/{n}.png", "colour": "red", "reason": "r"} for n in range(6)]
    for name in ("train.jsonl", "val.jsonl"):
        jsonl(folder / name, rows)
    task_from({"classes": ["red", "green"], "field": "colour"}, "the test", "colours").save(folder)
    DeviceTarget(image_size=32, longest_edge=32).save(folder)
    return folder


def without_a_device(base: Path, data: Path, folder: Path, asked: dict[str, list[int]]) -> None:
    """Trained as the processor takes pictures: the data's device, and one of the base's, are no longer its own."""
    own, before = Path(shutil.copytree(base, folder / "own")), dict(asked)
    DeviceTarget(image_size=32, longest_edge=32).save(own)
    out = train(own, folder / "off", "--data_path", data, "--device_target", "off", "--prompt", "chat")
    assert read_object(out / INPUT)["image_geometry"] == {}
    assert run("merge", out, "-o", folder / "off merged") == 0
    found = []
    for model in (out, folder / "off merged"):
        asked.clear()
        assert evaluate(model, "--task", "labels", "--data_path", data) == 0
        found.append(dict(asked))
    assert found[0] == found[1] != before
    assert not (folder / "off merged" / "device.json").exists()


def with_its_own_processor(base: Path, out: Path, data: Path, folder: Path, asked: dict[str, list[int]]) -> None:
    """Of another program, which writes a processor beside the adapter and no record."""
    other, words = Path(shutil.copytree(out, folder / "other")), ("--task", "labels", "--data_path", data)
    (other / INPUT).unlink()
    processor = load_processor(str(base))
    processor.chat_template = "Look! " + processor.chat_template
    processor.save_pretrained(other)
    asked.clear()
    assert evaluate(other, *words, "--prompt", "chat", "-o", folder / "other scores") == 0
    before = dict(asked)
    assert run("merge", other, "-o", folder / "other merged") == 0
    asked.clear()
    assert evaluate(folder / "other merged", *words, "--prompt", "chat") == 0
    assert before == asked
    assert all(processor.tokenizer.decode(ids).count("Look!") == 1 for ids in asked.values())


def with_its_own_tokenizer(base: Path, out: Path, data: Path, folder: Path, asked: dict[str, list[int]]) -> None:
    """Beside the adapter, without a processor: pictures are the base's matter, the template is the adapter's."""
    other, words = Path(shutil.copytree(out, folder / "worded")), ("--task", "labels", "--data_path", data)
    for name in (INPUT, "processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (other / name).unlink(missing_ok=True)
    processor = load_processor(str(base))
    processor.tokenizer.chat_template = "Listen! " + processor.chat_template
    processor.tokenizer.save_pretrained(other)
    asked.clear()
    assert evaluate(other, *words, "--prompt", "chat", "-o", folder / "worded scores") == 0
    before = dict(asked)
    assert run("merge", other, "-o", folder / "worded merged") == 0
    asked.clear()
    assert evaluate(folder / "worded merged", *words, "--prompt", "chat") == 0
    assert before == asked
    assert all(processor.tokenizer.decode(ids).count("Listen!") == 1 for ids in asked.values())


def trained_anew(base: Path, data: Path, folder: Path) -> None:
    """From a model that was trained without a device, on data that declare one: for that device."""
    record = read_object(folder / "off merged" / INPUT)
    assert record["image_geometry"] == {}
    again = train(folder / "off merged", folder / "anew", "--data_path", data, "--prompt", "chat")
    assert read_object(again / INPUT)["image_geometry"]["image_size"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("style", ["chat", "raw"])
def test_pictures_are_asked_about_the_same(style: str, tmp_path: Path, asked: dict[str, list[int]]) -> None:
    """Ids of adapter and merged model; text and pixels of the GGUF; and device.json that is another one is refused."""
    base, data = tiny_smolvlm(tmp_path / "base", longest_edge=32), pictures(tmp_path / "data")
    out = train(base, tmp_path / "run", "--data_path", data, "--prompt", style)
    assert read_object(out / INPUT)["image_geometry"]["image_size"] == 32
    assert run("merge", out, "-o", tmp_path / "merged") == 0
    own, found = ("--task", "labels", "--data_path", data), []
    for model in (out, tmp_path / "merged"):
        asked.clear()
        assert evaluate(model, *own) == 0
        found.append(dict(asked))
    assert found[0] == found[1]
    export = exported_by_hand(tmp_path / "merged", tmp_path / "export")
    shutil.copyfile(tmp_path / "merged" / "device.json", export / "device.json")
    shipped = sent(export, "labels", data)
    place = DataSection(task="labels", data_path=str(data), prompt=style)
    renderer = renderer_for(place, ModelSection(), str(base), load_config(str(base)))
    assert renderer.sight
    for example in load("labels", data, "dev").items[:2]:
        text, images = shipped[example.id]
        assert text == renderer.prompt_text(example, "<__media__>")
        assert len(images) == 1
        assert found[0][example.id] == renderer.prompt_ids(example)
    without_a_device(base, data, tmp_path, asked)
    trained_anew(base, data, tmp_path)
    with_its_own_processor(base, out, data, tmp_path, asked)
    with_its_own_tokenizer(base, out, data, tmp_path, asked)
    DeviceTarget(image_size=64, longest_edge=32).save(out)
    assert evaluate(out, *own) == 3
    (out / "device.json").unlink()
    assert evaluate(out, *own) == 3
