"""The command as people run it: data sets, stopping and going on, cost, and a key that is nowhere to be found."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import pytest
from misbehaving_teacher import Behaviour, chatting, failing, in_order, refusing, saying, slow, well
from PIL import Image

from rankwise.cli import main
from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.label_task import read_task
from rankwise.data.sources.load import load
from rankwise.device.llama.runtime import LlamaServer
from rankwise.files.atomic import read_object
from rankwise.files.run_folder import RunFolder
from rankwise.labels.dataset import pixel_hash, read_rows
from rankwise.labels.teacher import loopback
from rankwise.labels.teacher.loopback import LoopbackTeacher, Response, picture_of

COLOURS = {"water": (30, 90, 180), "wood": (45, 110, 45), "fire": (225, 50, 20), "metal": (120, 120, 125)}
SECRET = "sk-do-not-show-0123456789"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photos, five of each of four elements, of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        element = list(COLOURS)[number % 4]
        image = Image.new("RGB", (40 + number, 30), COLOURS[element])
        image.putpixel((0, 0), (number, 255, 255))
        image.save(folder / f"{element}{number:02d}.png")
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def words(photos: Path, out: Path, server: LoopbackTeacher | None = None, *more: str) -> list[str]:
    """The command line."""
    service = ["--base_url", server.url] if server else ["--loopback_teacher"]
    quick = ["--requests_per_minute", "60000", "--max_retries", "1", "--image_size", "32"]
    return ["label", str(photos), "-o", str(out), *service, *quick, *more]


def label(photos: Path, out: Path, behaviour: Behaviour, *more: str) -> tuple[int, LoopbackTeacher]:
    """Exit code, and the server that was asked."""
    with LoopbackTeacher(behaviour) as server:
        return main(words(photos, out, server, *more)), server


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a data set ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All photos, labelled by the loopback teacher."""
    out = tmp_path_factory.mktemp("labelled") / "dataset"
    assert main(words(photos, out)) == 0
    return out


def test_the_data_set_is_whole(dataset: Path, photos: Path) -> None:
    rows = read_rows(dataset)
    assert {row.image_id.split("_", 1)[1] for row in rows} == {f"{list(COLOURS)[n % 4]}{n:02d}" for n in range(20)}
    assert all(row.label == row.image_id[6:-2] for row in rows), "a photo of one colour is of its element"
    assert [row.image_id for row in rows] == sorted(row.image_id for row in rows)
    train, val = (read_rows(dataset / f"{part}.jsonl") for part in ("train", "val"))
    assert sorted(row.image_id for row in (*train, *val)) == [row.image_id for row in rows]
    assert Counter(row.label for row in val) == dict.fromkeys(COLOURS, 1)
    summary = read_object(dataset / "label.json")
    assert summary["rows"] == 20 and summary["classes"]["water"] == {"train": 4, "val": 1}
    assert summary["images"]["kept"] == summary["images"]["asked"] == 20
    assert summary["teacher"]["service"].startswith("loopback")
    assert summary["cost"]["usd"] == 0.0 and summary["cost"]["answers"] == 20
    assert read_task(dataset).name == "elements"
    assert read_target(dataset) == DeviceTarget(image_size=32)
    assert (dataset / "quarantine.jsonl").read_text() == ""


def test_images_are_the_device_s_pixels_and_the_teacher_saw_them(photos: Path, dataset: Path, tmp_path: Path) -> None:
    """The PNG holds exactly what was encoded as the JPEG that was sent."""
    code, server = label(photos, tmp_path / "d", well)
    assert code == 0
    target = DeviceTarget(image_size=32)
    sent = {picture_of(request) for request in server.requests}
    stored = [opened(dataset / row.image_path) for row in read_rows(dataset)]
    assert {target.jpeg(image) for image in stored} == sent
    assert all(pixel_hash(image) == row.image_sha256 for image, row in zip(stored, read_rows(dataset), strict=True))


def test_training_reads_it(dataset: Path) -> None:
    examples = load("labels", dataset, "train")
    assert len(examples) == 16
    assert examples[0].references == (read_rows(dataset / "train.jsonl")[0].label,)


def test_the_manifest_and_the_config_are_there(dataset: Path) -> None:
    assert (
        read_object(dataset / "manifest.json")["stages"]["label"]["outputs"]["labels.jsonl"]["path"] == "labels.jsonl"
    )
    assert read_object(dataset / "resolved_config.json")["min_confidence"] == 0.75


def test_the_same_pixels_are_asked_about_once(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    image = opened(photos / "water00.png")
    for name in ("one.png", "two.bmp", "three.tif"):
        image.save(folder / name)
    code, server = label(folder, tmp_path / "d", well)
    assert (code, len(server.requests)) == (0, 1)
    assert len(read_object(tmp_path / "d" / "label.json")["images"]["twins_left_out"]) == 2


def test_enough_is_enough(photos: Path, tmp_path: Path) -> None:
    """Seven rows are wanted: seven are asked for, and a rerun asks for none."""
    code, server = label(photos, tmp_path / "d", well, "--num_images", "7")
    assert (code, len(server.requests)) == (0, 7)
    before = (tmp_path / "d" / "labels.jsonl").read_bytes()
    code, server = label(photos, tmp_path / "d", well, "--num_images", "7")
    assert (code, len(server.requests)) == (0, 0)
    assert (tmp_path / "d" / "labels.jsonl").read_bytes() == before
    code, server = label(photos, tmp_path / "d", well, "--num_images", "9")
    assert (code, len(server.requests)) == (0, 2)


def test_the_order_of_answers_does_not_matter(photos: Path, tmp_path: Path) -> None:
    """Answers out of order and one by one give the same rows."""

    def restless(request: dict[str, Any]) -> Response:
        answer = saying(confidence=0.5 + (sum(picture_of(request)) % 50) / 100)(request)
        return Response(200, answer.content, delay=sum(picture_of(request)) % 5 / 50)

    for name, concurrency in (("many", "5"), ("one", "1")):
        more = ["--num_images", "6", "--concurrency", concurrency]
        assert label(photos, tmp_path / name, restless, *more)[0] == 0
    tables = [(tmp_path / name / "labels.jsonl").read_bytes() for name in ("many", "one")]
    assert tables[0] == tables[1]


def test_unsure_and_useless_answers_are_left_out_and_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour = in_order(saying(confidence=0.6), chatting, refusing, saying(element="sky"), saying(element="sky"))
    code, _ = label(photos, tmp_path / "d", behaviour, "--concurrency", "1")
    assert code == 0
    facts = read_object(tmp_path / "d" / "label.json")["images"]
    assert (facts["below_min_confidence"], facts["quarantined"], facts["kept"]) == (1, 2, 17)
    quarantine = lines(tmp_path / "d" / "quarantine.jsonl")
    assert ["refusal" in row["problem"] for row in quarantine] == [True, False]
    assert quarantine[0]["answers"] == ["It looks like a lake to me!", "I cannot help with this image."]
    assert "sky" in quarantine[1]["problem"]
    shown = capsys.readouterr().out
    assert "1 below --min_confidence, 2 in quarantine.jsonl" in shown
    assert "no more images" in shown


def test_nothing_kept_is_an_error_and_writes_no_table(photos: Path, tmp_path: Path) -> None:
    code, _ = label(photos, tmp_path / "d", saying(confidence=0.1))
    assert code == 3
    assert not (tmp_path / "d" / "labels.jsonl").exists()
    assert len(lines(tmp_path / "d" / "ledger.jsonl")) == 20


def test_an_unreadable_image_is_named_or_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("water00.png", "wood01.png", "fire02.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "broken.png").write_bytes((photos / "water00.png").read_bytes()[:60])
    assert label(folder, tmp_path / "d", well)[0] == 3
    assert "broken.png" in capsys.readouterr().err
    assert label(folder, tmp_path / "d", well, "--skip_bad")[0] == 0
    assert len(read_object(tmp_path / "d" / "label.json")["images"]["unreadable"]) == 1


def test_votes_are_reported(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = in_order(*[well, saying(element="land"), well] * 4)
    more = ["--votes", "3", "--num_images", "6", "--concurrency", "1"]
    code, server = label(photos, tmp_path / "d", behaviour, *more)
    assert (code, len(server.requests)) == (0, 18)
    facts = read_object(tmp_path / "d" / "label.json")["agreement"]
    assert facts["images"] == 6 and 0 < facts["kappa"] < 1 and 0.8 < facts["accuracy_ceiling"] < 1
    assert "Fleiss' kappa" in capsys.readouterr().out


def test_labels_that_are_there_need_no_teacher(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    for path in photos.glob("*.png"):
        place = folder / path.stem[:-2] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    out = tmp_path / "d"
    assert main(["label", str(folder), "--from_folders", "-o", str(out), "--image_size", "32"]) == 0
    assert read_task(out).labels == tuple(sorted(COLOURS))
    assert Counter(row.label for row in read_rows(out)) == dict.fromkeys(COLOURS, 5)
    assert not (out / "ledger.jsonl").exists()
    table = tmp_path / "table.csv"
    table.write_text("image,label\nwater/water00.png,wet\nwood/wood01.png,dry\n")
    out = tmp_path / "e"
    assert main(["label", str(folder), "--labels_file", str(table), "-o", str(out), "--image_size", "32"]) == 0
    assert {row.label for row in read_rows(out)} == {"wet", "dry"}


# --- stopping and going on ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_run_again_nothing_is_asked_twice(photos: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: what the server answered before its client died is the ledger or was on its way."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with LoopbackTeacher(slow(0.15)) as server:
        command = ["-m", "rankwise.cli", *words(photos, killed, server, "--concurrency", "2")]
        process = processes.start(command, tmp_path / "said.txt", tmp_path / "said.txt", dict(os.environ))
        wait_for(lambda: len(server.requests) >= 8, process)
        process.kill()
        process.join()
        time.sleep(0.3)
        asked = Counter(picture_of(request) for request in server.requests)
    answered = len(lines(killed / "ledger.jsonl"))
    assert 0 < answered <= len(asked) <= answered + 2, "at most those in flight are not in the ledger"
    assert not (killed / "labels.jsonl").exists()
    in_ledger = {row["image"] for row in lines(killed / "ledger.jsonl")}
    code, server = label(photos, killed, well)
    assert (code, len(server.requests)) == (0, 20 - answered)
    asked_again = {row["image"] for row in lines(killed / "ledger.jsonl")[answered:]}
    assert not asked_again & in_ledger
    assert label(photos, whole, well)[0] == 0
    assert (killed / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    assert (killed / "val.jsonl").read_bytes() == (whole / "val.jsonl").read_bytes()


def wait_for(done: Any, process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert process.is_alive(), "the command ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_with_all_answers_in_the_ledger(
    number: signal.Signals, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fifth request brings the signal: what is on its way is waited for, and nothing more is sent."""
    lock, seen = threading.Lock(), []

    def behave(request: dict[str, Any]) -> Response:
        with lock:
            seen.append(request)
            if len(seen) == 5:
                os.kill(os.getpid(), number)
        return slow(0.3)(request)

    before = signal.getsignal(number)
    code, server = label(photos, tmp_path / "d", behave, "--concurrency", "3")
    assert code == 128 + number
    assert signal.getsignal(number) is before
    assert len(lines(tmp_path / "d" / "ledger.jsonl")) == len(server.requests) < 9
    assert "the same command goes on" in capsys.readouterr().err
    code, again = label(photos, tmp_path / "d", well)
    assert (code, len(again.requests)) == (0, 20 - len(server.requests))


def test_budget_reached_is_exit_5_with_the_cost(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ["--usd_per_million_input", "10", "--usd_per_million_output", "10", "--max_tokens", "300"]
    code, server = label(photos, tmp_path / "d", well, *prices, "--budget_usd", "0.19")
    assert code == 5
    message = capsys.readouterr().err
    spent = sum(row["usd"] for row in lines(tmp_path / "d" / "ledger.jsonl"))
    assert 0.17 < spent <= 0.19
    assert f"${spent:.4f}" in message and "budget" in message and "rows kept" in message
    kept = len(server.requests)
    code, server = label(photos, tmp_path / "d", well, *prices, "--budget_usd", "0.19")
    assert (code, len(server.requests)) == (5, 0), "what earlier runs spent counts"
    code, server = label(photos, tmp_path / "d", well, *prices, "--num_images", str(kept))
    assert (code, len(server.requests)) == (0, 0), "as the message says"


def test_a_held_folder_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of two is told to wait, before anything is asked."""
    with RunFolder(tmp_path / "d").lock():
        code, server = label(photos, tmp_path / "d", well)
    assert (code, len(server.requests)) == (2, 0)
    assert "in use by" in capsys.readouterr().err


# --- the key ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour", [failing(401, f"Incorrect API key provided: {SECRET}"), well, failing(500, SECRET)]
)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_key_is_nowhere(
    behaviour: Behaviour,
    by: str,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in any file, not in the output, not in the log at its most talkative, not in the traceback, not in argv."""
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    with LoopbackTeacher(behaviour) as server:
        command = words(photos, tmp_path / "d", server, "--num_images", "3", "--max_retries", "0")
        command += ["--openai_api_key", SECRET] if by == "flag" else []
        if by == "variable":
            monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.setattr(sys, "argv", ["rankwise", *command])
        with caplog.at_level(logging.DEBUG):
            code = main()
    assert code == (0 if behaviour is well else 5)
    assert server.keys == {SECRET}, "it was sent, or this would prove nothing"
    output = capfd.readouterr()
    assert ("export OPENAI_API_KEY" in output.err) is (by == "flag")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "resolved_config.json" for path in written)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert SECRET not in output.out + output.err + caplog.text + " ".join(sys.argv)


def test_no_proxy_comes_between_a_teacher_on_this_machine(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one would refuse."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert label(photos, tmp_path / "d", well, "--num_images", "2")[0] == 0


def test_the_key_of_the_environment_is_not_for_the_loopback_teacher(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[LoopbackTeacher] = []

    class Watched(LoopbackTeacher):
        def __enter__(self) -> LoopbackTeacher:
            started.append(self)
            return super().__enter__()

    monkeypatch.setattr(loopback, "LoopbackTeacher", Watched)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert main(words(photos, tmp_path / "d", None, "--num_images", "2")) == 0
    assert [server.keys for server in started] == [{"none"}]


def test_a_dry_run_shows_no_key_and_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(photos, tmp_path / "d"), "--openai_api_key", SECRET, "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "loopback teacher" in shown.out
    assert not (tmp_path / "d").exists()


def test_a_key_in_a_recipe_is_refused_before_the_recipe_is_saved(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rankwise run` saves what it was told, `--set` included."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"stages:\n  - command: label\n    images: {photos}\n    loopback_teacher: true\n")
    more = ["--set", f"label.openai_api_key={SECRET}", "-o", str(tmp_path / "run")]
    assert main(["run", str(recipe), *more]) == 2
    shown = capsys.readouterr()
    assert "OPENAI_API_KEY" in shown.err and SECRET not in shown.out + shown.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--budget_usd", "1", "--teacher_model", "mine"], "--usd_per_million_input"),
        (["--usd_per_million_input", "1"], "both"),
        (["--votes", "0"], "--votes"),
        (["--num_images", "0"], "--num_images"),
        (["--min_confidence", "75"], "--min_confidence"),
        (["--val_fraction", "1"], "--val_fraction"),
        (["--concurrency", "0"], "--concurrency"),
        (["--requests_per_minute", "0"], "--requests_per_minute"),
        (["--from_folders", "--labels_file", "x.csv"], "exclude each other"),
        (["--label_column", "x"], "--labels_file"),
        (["--task_file", "elementz"], "elements"),
        (["--loopback_teacher", "--base_url", "http://127.0.0.1:9/v1"], "--loopback_teacher"),
        (["--base_url", "http://me:secret@127.0.0.1:9/v1"], "--base_url"),
    ],
)
def test_nonsense_is_refused_before_anything_is_asked(
    more: list[str], expected: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(photos), "-o", str(tmp_path / "d"), *more]) == 2
    message = capsys.readouterr().err
    assert expected in message and "me:secret" not in message
    assert not (tmp_path / "d").exists()


def test_without_images_or_a_key_it_says_what_to_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["label", "--loopback_teacher"]) == 2
    assert "--download" in capsys.readouterr().err
    assert main(["label", str(photos)]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_tables_of_something_else_are_not_overwritten(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "labels.jsonl").write_text("mine")
    assert main(words(photos, tmp_path / "d")) == 2
    assert (tmp_path / "d" / "labels.jsonl").read_text() == "mine"


# --- real images --------------------------------------------------------------------------------------------------


def test_real_coco_images(shared_data: Path, tmp_path: Path) -> None:
    """The official layout: stratified by what the annotations say, ids with COCO's file names."""
    out = tmp_path / "d"
    coco = shared_data / "coco" / "tiny_coco"
    if not coco.is_dir():
        pytest.skip(f"no COCO images at {coco}")
    code = main(
        ["label", str(coco), "--loopback_teacher", "--num_images", "8", "-o", str(out), "--min_confidence", "0"]
    )
    assert code == 0
    rows = read_rows(out)
    assert len(rows) == 8
    assert all(len(row.image_id) == len("00017_000000222564") for row in rows)
    assert all(opened(out / row.image_path).size == (256, 256) for row in rows)
    assert read_object(out / "label.json")["images"]["annotations"].endswith("instances_train2017.json")


# --- a real teacher -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_llama_cpp_server_is_a_teacher(vision_export: Path, photos: Path, tmp_path: Path) -> None:
    """It takes the picture and holds the model to the schema: a random model writes JSON, though it never ends it."""
    task = tmp_path / "two.json"
    task.write_text(json.dumps({"classes": ["red", "blue"], "teacher_prompt": "red or blue?"}))
    folder = tmp_path / "photos"
    folder.mkdir()
    opened(photos / "wood01.png").save(folder / "one.png")
    model, mmproj = vision_export / "model-f16.gguf", vision_export / "mmproj-model-f16.gguf"
    with LlamaServer(model, mmproj, threads=1) as runtime:
        service = ["--base_url", f"{runtime.talk.url}/v1", "--requests_per_minute", "60000", "--max_tokens", "16"]
        more = ["--task_file", str(task), "--num_images", "2", "--image_size", "64", "--concurrency", "1"]
        code = main(["label", str(folder), "-o", str(tmp_path / "d"), *service, *more])
    answers = lines(tmp_path / "d" / "ledger.jsonl")
    assert answers and all(row["input_tokens"] and row["output_tokens"] for row in answers)
    beginning = '{"visual_features":['
    assert all(row["text"] for row in answers)
    said = ["".join(row["text"].split())[: len(beginning)] for row in answers]  # it may spend its tokens on spaces
    assert all(beginning.startswith(text) for text in said), f"held to the schema: {said}"
    assert (code, len(answers)) == (3, 2), "asked once more, then in quarantine"
