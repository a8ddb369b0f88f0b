"""Long work says how far it is: a bar on a terminal, lines elsewhere, of every library and from one process."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_llama
from tqdm import auto, std

from rankwise import cli
from rankwise.page import progress as module
from rankwise.page.progress import LibraryLines, LogLines, progress

Said = Callable[[], str]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What was printed on standard error so far, where a minute lasts a fiftieth of a second."""
    monkeypatch.setattr(module, "INTERVAL", 0.02)
    pieces: list[str] = []

    def so_far() -> str:
        pieces.append(capfd.readouterr().err)
        return "".join(pieces)

    return so_far


@contextlib.contextmanager
def to_a_file(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
        yield


def test_lines_at_the_start_between_and_at_the_end(said: Said) -> None:
    with progress(total=3, desc="spectra", unit="site", leave=True) as bar:
        bar.set_postfix(loss=1.5)
        bar.update(2)
        time.sleep(0.05)  # in the middle of an item
        bar.update()
    first, *between, last = said().splitlines()
    assert first == "spectra: 3 sites"
    assert re.fullmatch(
        r"spectra: 2 of 3 sites \(67%\), 0\.\d s so far, .* sites/s, about 0\.\d s left; loss=1\.5", between[0]
    )
    assert 1 <= len(between) <= 4
    assert re.fullmatch(r"spectra: done, 3 sites in 0\.\d s", last)
    assert "\r" not in said()


def test_an_iterator_counts_and_ends_where_it_is_left(said: Said) -> None:
    for number in progress(range(5), desc="merge", unit="batch", leave=True):
        if number == 2:
            break
    assert re.fullmatch(r"merge: ended after 2 of 5 batches in 0\.\d s", said().splitlines()[-1])
    assert list(progress(iter("ab"), desc="read", unit="row", leave=True)) == ["a", "b"]
    assert said().splitlines()[-2:][0] == "read: started" and "read: done, 2 rows in" in said()


def test_short_and_inner_bars_are_silent_until_a_minute_has_passed(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 60)
    module.BEAT.last = time.monotonic()
    list(progress(range(3), desc="tokenize", unit="sample"))
    assert said() == ""
    monkeypatch.setattr(module, "INTERVAL", 0.02)
    with progress(total=2, desc="train", unit="step", leave=True) as outer:
        outer.update()
        for _ in progress(range(1), desc="validate", unit="batch", leave=True):
            time.sleep(0.05)
    lines = said().splitlines()
    assert lines[0] == "train: 2 steps" and lines[-1].startswith("train: ended after 1 of 2 steps")
    assert re.match(r"train: 1 of 2 steps .* \| validate: 0 of 1 batch \(0%\), 0\.\d s so far$", lines[1])


def test_one_process_prints(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with progress(total=1, desc="spectra", unit="site", leave=True) as bar:
        time.sleep(0.05)
        bar.update()
    assert list(progress(range(2), desc="train", unit="step")) == [0, 1]
    assert said() == ""


def test_bars_of_libraries_are_lines_too(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(one, vars(one)["tqdm"]) for one in (module.package, std, auto)]
    try:
        module.adopt_libraries()
        assert module.adopted() and auto.tqdm is LibraryLines
        for _ in auto.tqdm(range(1), desc="Downloading", disable=None):
            time.sleep(0.05)
        with std.tqdm(total=2**21, desc="model.safetensors", unit="B", unit_scale=True) as bar:
            bar.update(2**20)
            time.sleep(0.05)
    finally:
        for one, kind in before:
            monkeypatch.setattr(one, "tqdm", kind)
    assert "Downloading: 0 of 1 item (0%)" in said() and "Downloading: done, 1 item in" in said()
    assert "model.safetensors: 1 MiB of 2 MiB (50%)" in said() and "\r" not in said()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "terminal", lambda: True)
    with progress(total=1, desc="spectra", unit="site") as bar:
        assert type(bar) is not LogLines and isinstance(bar, module.BAR)
    monkeypatch.setattr(auto, "tqdm", module.BAR)
    module.adopt_libraries()
    assert not module.adopted()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_bars_of_its_own(said: Said) -> None:
    with progress(total=1, desc="outer", unit="row", leave=True) as outer:
        child = os.fork()
        if child == 0:
            list(progress(range(1), desc="inner", unit="row", leave=True))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        outer.update()
    assert "inner: done, 1 row" in said() and said().count("outer: 1 row") == 1


def test_ranks_in_a_log(said: Said, tmp_path: Path) -> None:
    base, tuned = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "tuned", seed=1)
    log = tmp_path / "log"
    with to_a_file(log):
        assert cli.main(["ranks", str(base), str(tuned), "--no_plots", "-o", str(tmp_path / "ranks")]) == 0
    lines = log.read_text().splitlines()
    assert "spectra: 14 sites" in lines and any(line.startswith("spectra: done, 14 sites in") for line in lines)
    assert "\r" not in log.read_text() and "it/s]" not in log.read_text()
    assert said() == ""


def test_train_in_a_log(said: Said, tmp_path: Path) -> None:
    base, rows = tiny_llama(tmp_path / "base"), tmp_path / "trainset.csv"
    rows.write_text("mr,ref\n" + "".join(f"name[{name}],{name} is here.\n" for name in "ABCDEFGH"))
    line = f"train --model_name {base} --task e2e_nlg --data_path {rows} --max_steps 12 --val_fraction 0.3 --use_cpu"
    more = f"--eval_strategy steps --eval_steps 6 --logging_steps 1 --no_plots --save_strategy no -o {tmp_path}/run"
    log = tmp_path / "log"
    with to_a_file(log):
        assert cli.main([*line.split(), *more.split()]) == 0
    lines = [one for one in log.read_text().splitlines() if one.startswith("train: ")]
    assert lines[0] == "train: 12 steps" and re.fullmatch(r"train: done, 12 steps in \d.*", lines[-1])
    assert any(
        re.match(r"train: \d+ of 12 steps \(\d+%\), .* so far, .*left; loss=[\d.]+, .*learning_rate=", one)
        for one in lines
    )
    assert "\r" not in log.read_text() and "it/s]" not in log.read_text()
    assert said() == ""
