"""Memory and speed of GPUs: a table from the vendors' data sheets, or this machine, measured.

card("rtx4090")  ─▶ [Card]          card("24GB")  ─▶ the cards of about that memory, with the memory as given
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from rankwise.errors import UsageError

FLOAT32 = 4
# Bytes of optimizer state per trained parameter, by the beginning of the optimizer's name; AdamW's two moments else.
STATE_BYTES = {"adafactor": 0, "sgd": 0, "lomo": 0, "adagrad": 4, "rmsprop": 4, "lion": 4}
EIGHT_BIT = "8bit"
MEMINFO, CGROUP_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes: weights, gradients and optimizer state are certain, activations are an estimate."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def certain(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.certain + self.activations

    def __str__(self) -> str:
        return (
            f"{gib(self.total)} (float32 weights {gib(self.weights)}, gradients {gib(self.gradients)}, optimizer "
            f"{gib(self.optimizer)}, activations about {gib(self.activations)})"
        )


def memory_needed(model: PreTrainedModel, trained: int, arguments: TrainingArguments, longest: int) -> Memory:
    """For one process. `model` may be on the meta device; `longest` is the longest sample in tokens.

    Activations by Korthikanti et al. 2022, eq. 2 without the attention scores (34·s·b·h per layer at 16 bits),
    one layer's worth more per checkpoint, and three float32 copies of the logits.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.get_text_config()
    tokens = arguments.per_device_train_batch_size * longest
    wide = 1 if arguments.bf16 or arguments.fp16 else 2
    layer = 34 * wide * tokens * text.hidden_size
    kept = 2 * wide * tokens * text.hidden_size if arguments.gradient_checkpointing else layer
    activations = kept * text.num_hidden_layers + layer + 3 * FLOAT32 * tokens * text.vocab_size
    return Memory(FLOAT32 * total, FLOAT32 * trained, state_bytes(str(arguments.optim)) * trained, activations)


def state_bytes(optimizer: str) -> int:
    name = optimizer.rsplit(".", 1)[-1].lower()
    known = next((size for start, size in STATE_BYTES.items() if start in name), 8)
    return known // 4 if EIGHT_BIT in name else known


def memory_available(device: torch.device) -> int:
    """Free bytes on the device; for a CPU what the machine, or this container, can still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return machine_memory() if limit == "max" else min(machine_memory(), int(limit))


def machine_memory() -> int:
    """Available memory as the kernel states it (Linux), else all that is installed."""
    if MEMINFO.is_file():
        rows = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return 1024 * int(rows["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_too_large(needed: Memory, available: int) -> str:
    """The line that states the estimate. UsageError where even the certain part does not fit."""
    line = f"memory: {needed} of {gib(available)} available"
    if needed.certain > available:
        raise UsageError(
            f"full fine-tuning does not fit: {line}. Ways out: --optim adafactor or adamw_8bit, several GPUs with FSDP "
            "(accelerate launch --use_fsdp), or the cheap probe --method lora"
        )
    return line + ("" if needed.total <= available else "; tight: add --gradient_checkpointing")


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


GIB = 2**30
UNITS = {"gb": 10**9, "gib": GIB, "g": 10**9}
ALIKE = 0.12  # cards count as being of a given size when their memory differs by no more than this share
MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class Card:
    """memory: usable bytes. half, single: FLOP/s of dense matrix products with 16-bit inputs and float32 sums, and in
    float32. bandwidth: bytes per second. bf16: whether it computes in bfloat16. measured: rates that were reached here,
    not those of a data sheet."""

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    bf16: bool = True
    measured: bool = False
    cpu: bool = False

    def flops(self, dtype: torch.dtype | None) -> float:
        """For autocast to `dtype`; None computes in float32."""
        return self.single if dtype is None else self.half


# name: GiB that the driver shows, then TFLOP/s at 16 bits (dense, float32 sums) and in float32, and GB/s
SHEETS = {
    "t4": (15.0, 65, 8.1, 320),
    "v100-16gb": (15.8, 125, 15.7, 900),
    "v100-32gb": (31.7, 125, 15.7, 900),
    "rtx3080": (10.0, 59.5, 29.8, 760),
    "rtx3090": (24.0, 71, 35.6, 936),
    "rtx4080": (16.0, 97.5, 48.7, 717),
    "rtx4090": (24.0, 165.2, 82.6, 1008),
    "rtx5090": (31.8, 209.5, 104.8, 1792),
    "a10": (22.5, 125, 31.2, 600),
    "a10g": (22.5, 70, 35, 600),
    "a6000": (48.0, 154.8, 38.7, 768),
    "l4": (22.5, 121, 30.3, 300),
    "l40s": (45.0, 362, 91.6, 864),
    "rtx6000-ada": (48.0, 364, 91.1, 960),
    "a100-40gb": (40.0, 312, 19.5, 1555),
    "a100-80gb": (80.0, 312, 19.5, 2039),
    "h100": (79.6, 989, 67, 3350),
    "h100-pcie": (79.6, 756, 51, 2000),
    "h200": (140.4, 989, 67, 4800),
    "b200": (179.0, 2250, 75, 7700),
    "mi300x": (191.7, 1307, 163.4, 5300),
}
WITHOUT_BF16 = ("t4", "v100-16gb", "v100-32gb")
CARDS = {
    name: Card(name, gib * GIB, half * 1e12, single * 1e12, bandwidth * 1e9, bf16=name not in WITHOUT_BF16)
    for name, (gib, half, single, bandwidth) in SHEETS.items()
}


def cards(text: str) -> list[Card]:
    """The GPUs selected by --gpu: one by its name, or all of about a memory size, which they then have exactly.

    UsageError for a name that is not in the table, with near ones, and for a size that says nothing.
    """
    word = text.strip().lower().replace("_", "-").replace(" ", "-")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)-?(gib|gb|g)", word)
    if found is None:
        return [named(word, text)]
    count = float(found[1]) * UNITS[found[2]]
    if not count:
        raise UsageError(f"--gpu {text}: the memory must be above 0")
    return [replace(card, memory=count) for card in CARDS.values() if abs(card.memory / count - 1) <= ALIKE] or [
        Card(text, count, 0, 0, 0)
    ]


def named(word: str, text: str) -> Card:
    plain = {name.replace("-", ""): card for name, card in CARDS.items()}
    card = plain.get(word.replace("-", "").removeprefix("nvidia").removeprefix("geforce"))
    if card is None:
        near = difflib.get_close_matches(word, CARDS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"--gpu {text}: unknown GPU; {hint}Known: {', '.join(CARDS)}; or its memory: 24GB")
    return card


def this_machine(device: torch.device, autocast: torch.dtype | None) -> Card:
    """The device as it is now: free memory, and rates measured in about a second. A CPU computes with as many threads
    as torch uses."""
    product = measured_flops(device, autocast or torch.float32)
    threads = f"this CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    memory, on_cpu = memory_available(device), device.type == "cpu"
    return Card(name, memory, product, product, measured_bandwidth(device), measured=True, cpu=on_cpu)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products of the size that a model's are."""
    side = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right, device)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second that adding two arrays reads and writes, with a new result each time as in training."""
    count = 2**26 if device.type == "cuda" else 2**22
    left, right = torch.ones(count, device=device), torch.ones(count, device=device)
    return 3 * 4 * count / seconds_of(lambda: left + right, device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of as many runs as fit into the time; of a CPU its own time by thread, since others may use it."""
    threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    clock: Callable[[], float] = (lambda: time.process_time() / threads) if on_cpu else time.perf_counter
    times: list[float] = []
    while sum(times) < MEASURED_SECONDS or len(times) < 3:
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - started)
    return min(times)
