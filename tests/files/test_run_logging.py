"""A run's log has all that was printed, and how it ended; a run in the background can be stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_llama

from rankwise import cli
from rankwise.demo.restaurants import write_task
from rankwise.errors import DataError, Interrupted, UsageError
from rankwise.files import log_copy
from rankwise.files.log import NOBODY, copier, logged, wait
from rankwise.files.log_copy import Lines, secrets_of
from rankwise.files.run_folder import RunFolder
from rankwise.options.commands import RunConfig
from rankwise.options.field import SECRET
from rankwise.pipeline import run
from rankwise.pipeline.run import wait_for
from rankwise.train.checkpoints import MANIFEST

KEY = "sk-0123456789abcdef"
PAGE = """
name: page
description: One stage that writes a page.
stages:
  - {command: report, run: "${run}/made"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "page.yaml"
    path.write_text(PAGE, encoding="utf-8")
    return path


def print_by_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python prints goes to descriptor 1, as outside of pytest."""
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False, encoding="utf-8"))  # noqa: SIM115


def something_to_report(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_log.csv").write_text("step,loss\n1,2.5\n2,2.0\n", encoding="utf-8")


def test_the_log_has_our_words_the_childrens_and_the_last_ones(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    print_by_descriptor(monkeypatch)
    path = tmp_path / "logs" / "a.log"

    @logged(path)
    def work() -> None:
        print(f"ours, with {KEY}")
        subprocess.run(["sh", "-c", "echo a child; echo its trouble >&2"], check=True)
        raise DataError("row 7 is broken")

    with pytest.raises(DataError):
        work()
    printed = capfd.readouterr()
    assert "a child" in printed.out and "its trouble" in printed.err, "streams stay apart in the terminal"
    text = path.read_text(encoding="utf-8")
    assert {"ours, with [OPENAI_API_KEY]", "a child", "its trouble"} <= set(text.splitlines())
    assert text.endswith("rankwise: row 7 is broken (exit code 3)\n")
    assert KEY not in text
    print("afterwards", flush=True)
    assert "afterwards" in capfd.readouterr().out
    assert "afterwards" not in path.read_text(encoding="utf-8")
    with logged(path):
        print("a second block")
    assert path.read_text(encoding="utf-8").startswith("ours")


def test_an_unexpected_error_leaves_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), logged(tmp_path / "a.log"):
        raise ZeroDivisionError("on purpose")
    text = (tmp_path / "a.log").read_text(encoding="utf-8")
    assert "Traceback" in text and text.endswith("ZeroDivisionError: on purpose\n")


def test_a_log_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"), logged(tmp_path / "file" / "a.log"):
        pytest.fail("the block ran")


def test_of_a_progress_bar_the_last_state_stays() -> None:
    lines = Lines({})
    pieces = [b"loading\n 10%|#", b"  |\r 50%|#### |\r100%", b"|########|\nnext", b" line\n", b"\r 1%\r 2%"]
    found = [line for piece in pieces for line in lines.add(piece)] + list(lines.end())
    assert found == [b"loading\n", b"100%|########|\n", b"next line\n", b" 2%\n"]
    windows = Lines({})
    assert list(windows.add(b"one\r\ntwo\r\n")) == [b"one\n", b"two\n"]


def test_secrets_are_the_long_values_of_variables_that_say_so() -> None:
    found = secrets_of(
        {"HF_TOKEN": "hf_123456789", "MY_API_KEY": KEY, "TOKENS": "512", "HOME": "/home/somebody"}, SECRET
    )
    assert found == {KEY.encode(): b"[MY_API_KEY]", b"hf_123456789": b"[HF_TOKEN]"}
    assert list(Lines(found).add(f"use {KEY[:9]}".encode())) == []
    lines = Lines(found)
    assert [*lines.add(f"use {KEY[:9]}".encode()), *lines.add(f"{KEY[9:]} now\n".encode())] == [
        b"use [MY_API_KEY] now\n"
    ]


def test_the_last_words_of_a_process_that_dies_are_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with copier(path, NOBODY) as (process, pipes):
        code = "import os; os.write(1, b'before'); os.write(2, b' the end\\n'); os.abort()"
        dead = subprocess.run([sys.executable, "-c", code], stdout=pipes[1], stderr=pipes[2], check=False)
    wait(process)
    assert dead.returncode < 0
    assert path.read_text(encoding="utf-8") == "before the end\n", "one target, one order"


def test_the_copying_process_needs_no_package(tmp_path: Path) -> None:
    """Isolated, and without site-packages: where the package was installed for one user, say."""
    command = [sys.executable, "-I", "-S", log_copy.__file__, str(tmp_path / "a.log"), "utf-8", SECRET.pattern, "0:1"]
    done = subprocess.run(command, input=b"a line\n", capture_output=True, check=True)
    assert done.stdout == b"a line\n" == (tmp_path / "a.log").read_bytes()


def test_a_run_writes_its_log_and_watches_itself(
    tmp_path: Path, recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    print_by_descriptor(monkeypatch)
    (out / "made").mkdir(parents=True)
    assert cli.main(["run", str(recipe), "-o", str(out), "--log_file", str(tmp_path / "first.log")]) == 3
    assert "(exit code 3)" in (tmp_path / "first.log").read_text(encoding="utf-8")
    assert "not finished" in (tmp_path / "first.log").read_text(encoding="utf-8")
    something_to_report(out / "made")
    capfd.readouterr()
    assert cli.main(["run", str(recipe), "-o", str(out), "--log-file", "auto"]) == 0
    printed = capfd.readouterr().out
    (log,) = (out / "logs").glob("*.log")
    assert log.read_text(encoding="utf-8") == printed
    assert f"log: {log}" in printed and "watching: " in printed
    assert "total" in printed.splitlines()[-3]
    stages = (out / "logs" / "monitor.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(stages) >= 4 and all(",report," in line for line in stages)
    entry = json.loads((out / ".stages" / "done.json").read_text(encoding="utf-8"))["report"]
    assert entry["seconds"] > 0 and entry["peak_memory"] > 10_000_000
    assert cli.main(["run", str(recipe), "-o", str(out)]) == 0
    assert "done before" in capfd.readouterr().out


def test_a_key_in_a_recipe_is_not_recorded(tmp_path: Path) -> None:
    stages = [{"name": "label", "openai_api_key": KEY}]
    saved = RunFolder(tmp_path).save_config({"stages": stages, "hub_token": KEY, "max_new_tokens": 32})
    assert json.loads(saved.read_text(encoding="utf-8")) == {
        "stages": [{"name": "label", "openai_api_key": None}],
        "hub_token": None,
        "max_new_tokens": 32,
    }
    config = RunConfig("recipe", set=[f"label.openai_api_key={KEY}"])
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        run.start(config, tmp_path, tmp_path / "a.log")


def test_the_background_runs_the_same_command(tmp_path: Path) -> None:
    config = RunConfig("quick", set=["a.b=1", "c.d=x y"], only=["a", "c"], from_="a", force=True, log_file="auto")
    given, dry = cli.resolve("run", run.words(config, tmp_path))
    assert not dry
    assert given == RunConfig("quick", str(tmp_path), ["a.b=1", "c.d=x y"], ["a", "c"], "a", True)


def test_sigterm_is_an_interruption_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    @run.stoppable("run it again")
    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(Interrupted, match="run it again") as stopped:
        work()
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_are_told_and_waited_for(tmp_path: Path) -> None:
    mark, ready = tmp_path / "told", tmp_path / "ready"
    script = f"trap 'sleep 0.3; touch {mark}; exit 0' TERM; touch {ready}; while true; do sleep 0.05; done"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=stop)
    teller.start()
    with pytest.raises(Interrupted), run.stoppable("again"):
        wait_for(["sh", "-c", script])
    teller.join()
    assert mark.exists(), "the child saved what it had before the parent went on"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_background_run_is_alone_and_stops_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data, out = tiny_llama(tmp_path / "base"), tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_task(data / "trainset.csv", random.Random(0), count=60, references=1, held_out=False)
    stage = {"command": "train", "model_name": str(base), "task": "e2e_nlg", "data_path": str(data)}
    stage |= {"output_dir": "${run}/train", "max_steps": 100_000, "batch_size": 2, "logging_steps": 1}
    recipe = tmp_path / "long.yaml"
    recipe.write_text(json.dumps({"name": "long", "description": "d", "stages": [stage]}), encoding="utf-8")
    command = ["run", str(recipe), "-o", str(out)]
    assert cli.main([*command, "--background"]) == 0
    said = capsys.readouterr().out
    pid = int(said.split("process ")[1].split(";")[0])
    (log,) = (out / "logs").glob("*.log")
    assert str(log) in said and f"kill {pid}" in said
    rows = out / "train" / "training_log.csv"
    until(lambda: rows.is_file() and rows.read_text(encoding="utf-8").count("\n") > 3, log)
    for flags in ([], ["--background"]):
        assert cli.main([*command, *flags]) == 2
        assert f"in use by process {pid}" in capsys.readouterr().err
    os.kill(pid, signal.SIGTERM)
    until(lambda: "checkpoint is complete" in log.read_text(encoding="utf-8"), log)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert "not finished" in log.read_text(encoding="utf-8")
    assert not (out / ".stages" / ".rankwise.lock.json").exists()
    assert list((out / "train").glob(f"checkpoint-*/{MANIFEST}"))


def until(condition: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    """Wait for a condition; a busy machine takes its time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, log.read_text(encoding="utf-8")
        time.sleep(0.2)
