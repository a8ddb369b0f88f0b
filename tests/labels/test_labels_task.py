"""A labelled data set as a task: its rows, reasons behind labels, and the commands that read it, end to end."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rows import logged
from safetensors.torch import load_file
from tiny_vision import tiny_smolvlm

from rankwise import cli
from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.example import Example
from rankwise.data.label_task import read_task, task_from
from rankwise.data.render import IGNORED, Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.labels import WHY
from rankwise.data.sources.load import load
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.classify import up_to_label
from rankwise.evaluate.likelihood import answer_ids
from rankwise.labels.dataset import LabelledRow, store_image, write_dataset
from rankwise.models.load import load_config
from rankwise.options.sections import DataSection, ModelSection

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}
TASK = task_from({"classes": list(COLOURS), "field": "colour"}, "the test", "colours")


def row(folder: Path, number: int, name: str, **more: Any) -> dict[str, Any]:
    """A row, and its picture: of one colour, none exactly like another."""
    path = f"images/{number:05d}_{name}.png"
    shade = tuple(min(255, value + number % 5) for value in COLOURS[name])
    Image.new("RGB", (32 + number % 3, 32), shade).save(folder / path)
    return {"image_id": f"{number:05d}", "image_path": path, "colour": name, "reason": f"It is {name}.", **more}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def dataset(folder: Path, train: str = "rrrrrrggggbb", val: str = "rgbrgb") -> Path:
    """A folder as `rankwise label` leaves it; one letter a row."""
    (folder / "images").mkdir(parents=True)
    names = {name[0]: name for name in COLOURS}
    for file, letters, start in (("train.jsonl", train, 0), ("val.jsonl", val, 500)):
        lines(folder / file, [row(folder, start + n, names[letter]) for n, letter in enumerate(letters)])
    TASK.save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("made") / "dataset")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_smolvlm(tmp_path_factory.mktemp("base"), longest_edge=32)


@pytest.fixture(scope="module")
def renderer(base: Path, data: Path) -> Renderer:
    return renderer_for(DataSection(task="labels", data_path=str(data)), ModelSection(), str(base), load_config(base))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: Any) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_question_about_its_picture(data: Path) -> None:
    rows, held_out = load("labels", data, "train"), load("labels", data, "dev")
    assert (len(rows), len(held_out)) == (12, 6)
    first = rows[0]
    assert [(turn.role, turn.text) for turn in first.turns] == [
        ("user", f"<image>\n{TASK.student_prompt}"),
        ("assistant", "red"),
    ]
    assert (first.id, first.images, first.references) == ("00000", ("images/00000_red.png",), ("red",))
    assert first.facts == {"label": "red", "labels": ("red", "green", "blue")}
    assert (first.stratum, first.group, first.line) == ("red", "images/00000_red.png", 1)
    assert [file.name for file in rows.files] == ["train.jsonl", "task.json"], "another task is other data"
    assert [each.id for each in load("labels", data / "val.jsonl")] == [each.id for each in held_out]


def test_pictures_of_one_content_are_one_group(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    TASK.save(tmp_path)
    twice = [row(tmp_path, n, "red", image_sha256="abc") for n in range(2)]
    assert {each.group for each in load("labels", lines(tmp_path / "train.jsonl", twice))} == {"abc"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"colour": "pink"}, "colour must be red, green, blue (task.json), found 'pink'"),
        ({"colour": None}, "found None"),
        ({"colour": ["red"]}, "found ['red']"),
        ({"colour": "red."}, "found 'red.'"),
        ({"image_path": ""}, "image_path must be a text"),
        ({"image_id": "00000"}, "ids must be unique"),
    ],
)
def test_a_broken_row_is_named_by_line_and_id(tmp_path: Path, broken: dict[str, Any], reason: str) -> None:
    dataset(tmp_path / "d", val="")
    rows = [json.loads(line) for line in (tmp_path / "d" / "train.jsonl").read_text().splitlines()]
    lines(tmp_path / "d" / "train.jsonl", [rows[0], rows[1] | broken, rows[2]])
    with pytest.raises(DataError) as refused:
        load("labels", tmp_path / "d")
    assert "train.jsonl, line 2" in str(refused.value)
    assert reason in str(refused.value)
    kept = load("labels", tmp_path / "d", how=DataSection(skip_bad=True))
    assert (len(kept), len(kept.skipped)) == (2, 1)


def test_without_a_task_or_with_a_broken_one_nothing_is_read(tmp_path: Path, data: Path) -> None:
    copied = lines(tmp_path / "train.jsonl", [])
    copied.write_bytes((data / "train.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"task\.json is missing"):
        load("labels", tmp_path)
    (tmp_path / "task.json").write_text('{"classes": []}')
    with pytest.raises(DataError, match="task"):
        load("labels", tmp_path)


# --- reasons -------------------------------------------------------------------------------------------------------


def test_a_reason_is_learnt_behind_the_label_and_never_asked_with_it(data: Path, renderer: Renderer) -> None:
    plain, reasoned = load("labels", data)[0], load("labels", data, how=DataSection(aux_reason=True))[0]
    assert [turn.text for turn in reasoned.turns[2:]] == [WHY, "It is red."]
    assert up_to_label(reasoned).turns == plain.turns
    short, long = renderer.training(plain), renderer.training(reasoned)
    assert long.input_ids[: len(short.input_ids)] == short.input_ids, "the label and its end come first, unchanged"
    assert long.labels[: len(short.labels)] == short.labels
    learnt = [token for token in long.labels[len(short.labels) :] if token != IGNORED]
    assert renderer.answer(learnt) == "It is red."
    assert renderer.prompt(up_to_label(reasoned)).input_ids == renderer.prompt(plain).input_ids
    assert "It is" not in renderer.text(renderer.prompt(up_to_label(reasoned)).input_ids)


def test_labels_are_compared_alike_with_and_without_reasons(data: Path, renderer: Renderer) -> None:
    plain, reasoned = load("labels", data)[0], load("labels", data, how=DataSection(aux_reason=True))[0]
    for label in COLOURS:
        ids = answer_ids(renderer, plain, label)
        assert ids == answer_ids(renderer, up_to_label(reasoned), label)
        assert ids[-1] in renderer.end_ids


def test_reasons_are_asked_of_data_that_have_them(tmp_path: Path, data: Path, call: Call) -> None:
    with pytest.raises(UsageError, match="rows of conversations have no reasons"):
        load("conversations", data / "train.jsonl", how=DataSection(aux_reason=True))
    dataset(tmp_path / "d")
    silent = [{**json.loads(line), "reason": None} for line in (data / "train.jsonl").read_text().splitlines()]
    with pytest.raises(DataError, match="reason must be a text"):
        load("labels", lines(tmp_path / "d" / "train.jsonl", silent), how=DataSection(aux_reason=True))
    code, _, said = call("evaluate", tmp_path, "--task", "labels", "--data_path", data, "--aux_reason")
    assert (code, "--aux_reason applies to training only" in said) == (2, True)


# --- commands ------------------------------------------------------------------------------------------------------

TRAIN = "--use_cpu --batch_size 4 --lr 1e-2 --logging_steps 1 --no_plots --log_frequency 0 --max_seq_length 256"


def measured(run: Path) -> list[float]:
    """Accuracy at each evaluation of a run."""
    return [float(each["eval_accuracy"]) for each in logged(run) if each["eval_accuracy"]]


def test_a_folder_with_a_task_trains_and_scores_without_more_words(
    tmp_path: Path, base: Path, data: Path, call: Call
) -> None:
    """Documented form: --dataset_dir, --num_epochs; rows of val.jsonl validate; task.json goes with the adapter."""
    words = f"--num_epochs 2 --select accuracy --early_stopping 3 --adapter_folder lora_adapter {TRAIN}".split()
    code, output, said = call("train", "--model_name", base, "--dataset_dir", data, "-o", tmp_path, *words)
    assert code == 0, said
    assert "kept the best checkpoint: checkpoint-" in output
    assert json.loads((tmp_path / "split.json").read_text())["val"] == [f"{n:05d}" for n in range(500, 506)]
    assert read_task(tmp_path / "lora_adapter") == TASK
    assert len(measured(tmp_path)) == 2
    assert all(value * 6 == pytest.approx(round(value * 6)) for value in measured(tmp_path)), "shares of six rows"
    code, output, said = call("evaluate", tmp_path, "--task", "labels", "--data_path", data, "--num_samples", 6)
    assert code == 0, said
    scores = json.loads((tmp_path / "evaluation" / "evaluation_results.json").read_text())
    assert scores["metrics"]["accuracy"] == pytest.approx(100 * max(measured(tmp_path))), (
        "what was kept is what was measured"
    )
    low, high = scores["intervals_95"]["accuracy"]
    assert low <= scores["metrics"]["accuracy"] <= high
    details = scores["settings"]["scoring"]
    assert details["labels"] == list(COLOURS)
    assert {name: each["n"] for name, each in details["by_class"].items()} == dict.fromkeys(COLOURS, 2)
    assert details["majority_baseline"]["accuracy"] == pytest.approx(100 / 3)
    with open(tmp_path / "evaluation" / "confusion.csv") as file:
        table = list(csv.reader(file))
    assert table[0] == ["true \\ guessed", *COLOURS, "unparsed"]
    assert [sum(map(int, line[1:])) for line in table[1:]] == [2, 2, 2]


def test_rare_classes_are_repeated_and_counted(tmp_path: Path, base: Path, data: Path, call: Call) -> None:
    words = ["--model_name", base, "--data_path", data, "--balance", "oversample", "--num_epochs", 1, *TRAIN.split()]
    code, output, said = call("train", *words, "-o", tmp_path / "run", "--save_strategy", "no")
    assert code == 0, said
    assert "balance: red 6 → 6, green 4 → 6, blue 2 → 6; 18 rows an epoch instead of 12" in output
    assert "fewer than 10 rows of red, green, blue" in output
    log = (tmp_path / "run" / "training_log.csv").read_text().splitlines()
    assert log[-1].startswith("5,"), "18 rows in batches of 4 are 5 steps"


def said_in(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in example.turns]


def test_what_label_writes_is_what_train_reads(tmp_path: Path, base: Path, call: Call) -> None:
    """The same samples as its conversations; the device's tokens; task.json and device.json go with the adapter."""
    data, target, rows = tmp_path / "data", DeviceTarget(image_size=64), []
    for number in range(9):
        name = list(COLOURS)[number % 3]
        shade = tuple(min(255, value + number) for value in COLOURS[name])
        stored = store_image(data, f"{number:05d}", Image.new("RGB", (90, 60), shade), target)
        rows.append(LabelledRow(f"{number:05d}", stored.path, stored.sha256, name, reason=f"It is {name}."))
    write_dataset(data, rows, TASK, target, val_fraction=0.34)
    for split in ("train", "val"):
        told = load("conversations", data / "conversations" / f"{split}.json")
        read = load("labels", data, split)
        assert [(each.id, said_in(each), each.images) for each in read] == [
            (each.id, said_in(each), each.images) for each in told
        ]
    words = ["--model_name", base, "--data_path", data, "--max_steps", 1, "-o", tmp_path / "run", *TRAIN.split()]
    code, _, said = call("train", *words, "--select", "accuracy", "--eval_strategy", "steps", "--eval_steps", 1)
    assert code == 0, said
    assert (read_target(tmp_path / "run"), read_task(tmp_path / "run")) == (target, TASK)
    section = DataSection(task="labels", data_path=str(data))
    rendered = renderer_for(section, ModelSection(), str(base), load_config(base)).training(load("labels", data)[0])
    plain = renderer_for(replace(section, device_target="off"), ModelSection(), str(base), load_config(base)).training(
        load("labels", data)[0]
    )
    assert len(rendered.input_ids) != len(plain.input_ids), "the runtime lays a picture out in its own way"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--balance sqrt --packing", "--packing puts several into one row"),
        ("--balance sqrt --group_by_length", "both decide the order"),
        ("--select accuracy --eval_strategy no", "give validation rows"),
        ("--select accuracy --val_fraction 0", "give validation rows"),
        ("--early_stopping -1", "--early_stopping is -1; give a number of at least 0"),
        ("--early_stopping 2 --save_strategy no", "keeps the best checkpoint"),
        ("--metric_for_best_model accuracy", "acts only where a checkpoint is chosen"),
        ("--task conversations --select accuracy", "needs rows with a class: --task multi_nli, labels"),
        ("--task samsum --balance sqrt", "samsum has none"),
        ("--task samsum --aux_reason", "acts only with --task labels"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_is_read(
    tmp_path: Path, base: Path, data: Path, call: Call, words: str, reason: str
) -> None:
    code, _, said = call("train", "--model_name", base, "--data_path", data, "-o", tmp_path / "run", *words.split())
    assert (code, reason in said) == (2, True), said


def test_early_stopping_can_be_turned_off(tmp_path: Path, base: Path, data: Path, call: Call) -> None:
    """As a recipe's own value is: training goes on through evaluations that are no better."""
    words = f"--num_epochs 4 --lr 0 --early_stopping 0 --eval_strategy epoch {TRAIN}".replace("--lr 1e-2", "").split()
    code, output, said = call("train", "--model_name", base, "--dataset_dir", data, "-o", tmp_path, *words)
    assert code == 0, said
    assert "early stopping" not in output and len({row["step"] for row in logged(tmp_path) if row["eval_loss"]}) == 4


@pytest.mark.slow
def test_what_a_picture_shows_is_learnt_and_the_best_checkpoint_knows_it(
    tmp_path: Path, base: Path, call: Call
) -> None:
    """No text tells the classes apart. One class is rare and has reasons; straight and resumed runs agree."""
    data = dataset(tmp_path / "data", train="r" * 24 + "g" * 24 + "b" * 4, val="rgb" * 6)
    words = ["--model_name", base, "--data_path", data, "--aux_reason", "--balance", "oversample", *TRAIN.split()]
    words += (
        "--select accuracy --select_by generation --num_epochs 8 --lora_dropout 0.1 --gradient_accumulation 2".split()
    )
    run = tmp_path / "run"
    assert call("train", *words, "-o", run)[0] == 0
    asked = ["--task", "labels", "--data_path", data, "--classify", "generation", "--max_new_tokens", 32]
    code, _, said = call("evaluate", run, *asked)
    assert code == 0, said
    scores = json.loads((run / "evaluation" / "evaluation_results.json").read_text())
    assert scores["metrics"]["accuracy"] == pytest.approx(100 * max(measured(run)))
    assert scores["metrics"]["accuracy"] > 90
    straight = load_file(run / "adapter_model.safetensors")
    (run / "adapter_model.safetensors").unlink()
    for checkpoint in sorted(run.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))[2:]:
        (checkpoint / "rankwise_manifest.json").unlink()
    code, output, _ = call("train", *words, "-o", run, "--resume_from_checkpoint", "true")
    assert code == 0 and f"resuming from {run / 'checkpoint-'}" in output, output
    resumed = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
