"""The monitor: rows as samples come, GPUs as their driver tells of them, and a table of what each stage took."""

from __future__ import annotations

import csv
import json
import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rankwise.files.monitor import COLUMNS, MIB, CardState, Monitor, Sample, usage_of, visible
from rankwise.files.run_folder import read_marks, write_mark
from rankwise.page.blocks import table_lines
from rankwise.pipeline.times import BEFORE, UNREACHED, StageTime, time_table
from rankwise.report.report import build_report

GIB = 2**30


class FakeError(Exception):
    """What NVML raises."""


def refuse(*_: object) -> None:
    raise FakeError("Not Supported")


def fake_nvml(used: Callable[[int], int] = lambda card: (card + 1) * GIB) -> SimpleNamespace:
    """Two cards: handle n is busy 40 + 20·n percent; the second one tells no power."""
    return SimpleNamespace(
        NVMLError=FakeError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: {"GPU-second": 1}[name],
        nvmlDeviceGetName=lambda handle: b"Fake 80GB",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used(handle), total=80 * GIB),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40 + 20 * handle, memory=5),
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetPowerUsage=lambda handle: refuse() if handle else 250_000,
    )


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fresh_pages(size: int) -> mmap.mmap:
    """Memory that the process did not have: what it asks of malloc may be what it has freed, and held all along."""
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[::4096] = b"1" * (size // 4096)
    return held


def test_a_block_is_sampled_at_both_ends_and_between(tmp_path: Path, no_gpu: None) -> None:
    path = tmp_path / "logs" / "monitor.csv"
    with Monitor(path, seconds=0.05) as monitor:
        assert "no GPU found, CPU and memory only" in monitor.said
        assert "rankwise[track]" in monitor.said, "what would bring GPU figures"
        with monitor.watching("train") as samples:
            held = fresh_pages(64 * MIB)
            time.sleep(0.3)
        held.close()
        time.sleep(0.2)
        with monitor.watching("merge") as last:
            pass
    found = rows(path)
    assert [row["stage"] for row in found] == ["train"] * len(samples) + ["merge"] * len(last), "nothing between stages"
    assert len(last) >= 2, "its begin and its end; on a busy machine more"
    assert len(samples) >= 4
    own = psutil.Process().memory_info().rss
    assert usage_of(samples).peak_memory >= samples[0].memory + 50 * MIB
    assert 0.3 * own < samples[-1].memory
    assert {row["gpu"] for row in found} == {""}
    assert int(found[0]["memory_mib"]) == round(samples[0].memory / MIB)


def test_a_later_run_adds_rows_below_a_cut_line(tmp_path: Path, no_gpu: None) -> None:
    path = tmp_path / "monitor.csv"
    for _ in range(2):
        with Monitor(path) as monitor, monitor.watching("ranks"):
            pass
        with path.open("a", encoding="utf-8") as file:
            file.write("2026-01-01T00:00:00+00:00,ran")
    assert path.read_text(encoding="utf-8").count("time,stage") == 1
    whole = path.read_text(encoding="utf-8").splitlines()[:-1]
    assert len(whole) == 5 and all(line.count(",") == len(COLUMNS) - 1 for line in whole)


def test_every_card_has_its_row_and_what_it_does_not_tell_is_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "monitor.csv"
    with Monitor(path) as monitor, monitor.watching("train") as samples:
        assert monitor.said == "2 × Fake 80GB"
    first, second, *_ = rows(path)
    assert (first["gpu"], first["gpu_memory_used_mib"], first["gpu_power_w"]) == ("0", "1024", "250")
    assert (second["gpu"], second["gpu_utilisation_percent"], second["gpu_temperature_c"]) == ("1", "60", "61")
    assert second["gpu_power_w"] == ""
    usage = usage_of(samples)
    assert usage.peak_gpu_memory == 2 * GIB, "of one card, not their sum"
    assert usage.gpu_utilisation == 50.0


def test_only_the_cards_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    for given, names in (("1", ["1"]), ("GPU-second,0", ["GPU-second", "0"]), ("0,-1,1", ["0"]), ("", []), ("7", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert visible(2) == names
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-second")
    with Monitor(tmp_path / "monitor.csv") as monitor, monitor.watching("train") as samples:
        pass
    assert [card.memory_used for card in samples[0].cards] == [2 * GIB]


def test_a_driver_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fake_nvml()
    broken.nvmlInit = lambda: refuse()
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert Monitor(tmp_path / "monitor.csv").said == "no GPU found, CPU and memory only (Not Supported)"


def test_peaks_and_means_by_hand() -> None:
    def sample(memory: int, cpu: float, *cards: CardState) -> Sample:
        return Sample("now", "train", memory, cpu, cards)

    usage = usage_of(
        [
            sample(10, 900.0, CardState("0", 7, 9, 10.0), CardState("1", 3, 9, 30.0)),
            sample(30, 50.0, CardState("0", 4, 9, 80.0), CardState("1")),
            sample(20, 150.0, CardState("0", 5, 9, 40.0)),
        ]
    )
    assert usage.peak_memory == 30
    assert usage.cpu_percent == 100.0, "the first figure is about the time before the stage"
    assert (usage.peak_gpu_memory, usage.gpu_utilisation) == (7, 40.0)
    assert usage_of([]).peak_gpu_memory is None


def test_the_table_says_what_ran_what_was_done_before_and_what_was_not_reached() -> None:
    usage = {"peak_memory": 3 * GIB, "peak_gpu_memory": None, "gpu_utilisation": None}
    times = [
        StageTime("label", 5.0, usage, BEFORE),
        StageTime("train", 90.0, usage),
        StageTime("merge", note=UNREACHED),
    ]
    header, label, train, merge, total = table_lines(time_table(times))
    assert "GPU" not in header, "a column that says nothing"
    assert label.split() == ["label", "5.0", "s", "3.0", "GiB", "done", "before"]
    assert train.split() == ["train", "1", "min", "30", "s", "3.0", "GiB"]
    assert merge.split() == ["merge", "not", "reached"]
    assert total.split()[:5] == ["total", "1", "min", "30", "s"] and "and 5.0 s before" in total
    with_gpu = table_lines(
        time_table([StageTime("train", 1.0, {"peak_gpu_memory": 30 * GIB, "gpu_utilisation": 93.6})])
    )
    assert "30.0 GiB" in with_gpu[1] and "94 %" in with_gpu[1]


def test_the_report_shows_where_the_time_went(tmp_path: Path) -> None:
    write_mark(tmp_path, "train", {"done": "a1", "seconds": 81.2, "peak_memory": 3 * GIB, "gpu_utilisation": None})
    write_mark(tmp_path, "report", {"started": "b2"})
    assert read_marks(tmp_path)["report"] == {"started": "b2"}
    page = build_report(tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    table = page.split("## time and memory")[1]
    assert "1 min 21 s" in table and "3.0 GiB" in table
    assert "report" not in table.split("total")[0], "it is not finished while it writes"
    assert json.loads((tmp_path / ".stages" / "done.json").read_text())["train"]["seconds"] == 81.2
