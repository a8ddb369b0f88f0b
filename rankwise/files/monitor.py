"""Resource usage of a run: memory and CPU of its processes, and what NVIDIA's driver says of every GPU.

with Monitor(run / "logs" / "monitor.csv") as monitor:
    with monitor.watching("train") as samples:      # a thread samples every two seconds
        train()
    usage = usage_of(samples)                       # peak memory, peak GPU memory, mean utilisation
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from rankwise.errors import UsageError, need
from rankwise.files.atomic import explained
from rankwise.files.document import drop_cut_line

MEMORY_SECONDS = 0.1  # between two samples


def own_memory(process: psutil.Process) -> int:
    """Bytes of anonymous memory (Linux); elsewhere all resident bytes, mapped files included."""
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


class PeakMemory:
    """Samples this process from `with` to its end. `bytes`: the most of `own_memory` that was seen."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(MEMORY_SECONDS):
            self.sample()

    def sample(self) -> None:
        self._most = max(self._most, own_memory(self._process))

    @property
    def bytes(self) -> int:
        """Peak memory so far, in bytes."""
        self.sample()
        return self._most


SECONDS = 2.0  # between two samples
MIB = 2**20
OWN_COLUMNS = ("time", "stage", "memory_mib", "cpu_percent")
GPU_COLUMNS = ("gpu_memory_used_mib", "gpu_memory_total_mib", "gpu_utilisation_percent", "gpu_temperature_c")
COLUMNS = (*OWN_COLUMNS, "gpu", *GPU_COLUMNS, "gpu_power_w")


@dataclass(frozen=True)
class CardState:
    """One GPU at one moment, all its users together; None where its driver has no answer.

    Memory in bytes, utilisation in percent (share of the time in which a kernel ran), °C, watts.
    """

    name: str
    memory_used: int | None = None
    memory_total: int | None = None
    utilisation: float | None = None
    temperature: float | None = None
    power: float | None = None


@dataclass(frozen=True)
class Sample:
    """One moment. memory: bytes that the process and its children hold for themselves (`own_memory`), added up.
    cpu: percent of one core since the sample before."""

    time: str
    stage: str
    memory: int
    cpu: float
    cards: tuple[CardState, ...] = ()

    def rows(self) -> list[list[str]]:
        """One row per GPU, or one with empty GPU columns."""
        own = [self.time, self.stage, f"{self.memory / MIB:.0f}", f"{self.cpu:.0f}"]
        return [own + card_cells(card) for card in self.cards] or [own + [""] * (len(COLUMNS) - len(own))]


@dataclass(frozen=True)
class Usage:
    """Resource usage of a stage: bytes and percent. GPU memory is the most that one GPU held; None without a GPU."""

    peak_memory: int
    cpu_percent: float
    peak_gpu_memory: int | None = None
    gpu_utilisation: float | None = None


class Monitor:
    """Samples in a thread of its own, from `with` to its end; every sample is a row of the file at once.

    `said` is one line for people: what is watched. A later run of the same folder adds its rows below.
    """

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self.path, self.seconds = path, seconds
        self.processes = Processes()
        self.cards, self.said = find_cards()
        self._stage, self._samples = "", list[Sample]()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_cut_line(self.path)
        if not self.path.is_file() or not self.path.stat().st_size:
            self._write([list(COLUMNS)])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def watching(self, stage: str) -> Iterator[list[Sample]]:
        """Samples of this block, including one at its start and one at its end."""
        with self._lock:
            self._stage, self._samples = stage, []
            samples = self._samples
        self.sample()
        try:
            yield samples
        finally:
            self.sample()
            with self._lock:
                self._stage, self._samples = "", []

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds):
            self.sample()

    def sample(self) -> None:
        """Measure now. Between stages nothing is measured."""
        with self._lock:
            if not self._stage:
                return
            memory, cpu = self.processes.measure()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            sample = Sample(now, self._stage, memory, cpu, tuple(read() for read in self.cards))
            self._samples.append(sample)
            self._write(sample.rows())

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with explained(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(text.getvalue())


def usage_of(samples: Sequence[Sample]) -> Usage:
    """Peaks and means over a stage's samples. The first CPU figure is of the time before it, so it does not count."""
    cpu = [sample.cpu for sample in samples[1:]]
    cards = [card for sample in samples for card in sample.cards]
    used = [card.memory_used for card in cards if card.memory_used is not None]
    busy = [card.utilisation for card in cards if card.utilisation is not None]
    return Usage(
        peak_memory=max((sample.memory for sample in samples), default=0),
        cpu_percent=round(sum(cpu) / len(cpu), 1) if cpu else 0.0,
        peak_gpu_memory=max(used, default=None),
        gpu_utilisation=round(sum(busy) / len(busy), 1) if busy else None,
    )


class Processes:
    """This process and all below it: torchrun's, data loaders', a runtime's child."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._known: dict[Any, Any] = {}

    def measure(self) -> tuple[int, float]:
        """(own bytes, CPU percent since the last call), added up; a process that has just ended is left out."""
        found = [self._own, *self._own.children(recursive=True)]
        self._known = {process: self._known.get(process, process) for process in found}
        memory, cpu = 0, 0.0
        for process in self._known.values():  # CPU time is counted from the object's last call, so objects are kept
            try:
                with process.oneshot():
                    memory += own_memory(process)
                    cpu += process.cpu_percent(None)
            except psutil.Error:
                continue
        return memory, cpu


def find_cards() -> tuple[list[Callable[[], CardState]], str]:
    """A reader for each NVIDIA GPU that this process may use, and what to tell people about it."""
    nothing = "no GPU found, CPU and memory only"
    try:
        nvml = need("pynvml", extra="track")
    except UsageError:
        return [], f"{nothing} (NVIDIA GPUs need: pip install 'rankwise[track]')"
    try:
        nvml.nvmlInit()
        handles = {name: handle_of(nvml, name) for name in visible(int(nvml.nvmlDeviceGetCount()))}
        names = ", ".join(dict.fromkeys(as_text(nvml.nvmlDeviceGetName(handle)) for handle in handles.values()))
    except nvml.NVMLError as error:
        return [], f"{nothing} ({error})"
    if not handles:
        return [], nothing
    return [reader(nvml, name, handle) for name, handle in handles.items()], f"{len(handles)} × {names}"


def visible(count: int) -> list[str]:
    """Indexes or UUIDs, as CUDA_VISIBLE_DEVICES has them where it is set. As in CUDA, the first wrong one ends it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(count)]
    found: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-") or (name.isdecimal() and int(name) >= count):
            break
        found.append(name)
    return found


def handle_of(nvml: ModuleType, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def reader(nvml: ModuleType, name: str, handle: Any) -> Callable[[], CardState]:
    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:  # this card does not say
            return None

    def read() -> CardState:
        memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return CardState(
            name,
            None if memory is None else int(memory.used),
            None if memory is None else int(memory.total),
            None if rates is None else float(rates.gpu),
            ask(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            None if power is None else power / 1000,  # the driver counts milliwatts
        )

    return read


def card_cells(card: CardState) -> list[str]:
    used, total = (None if count is None else count / MIB for count in (card.memory_used, card.memory_total))
    numbers = (used, total, card.utilisation, card.temperature, card.power)
    return [card.name, *("" if value is None else f"{value:.0f}" for value in numbers)]


def as_text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
