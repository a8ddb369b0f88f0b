"""How much memory full fine-tuning takes, and how much there is: known before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
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
    """What the kernel says it can give (Linux), else all that is built in."""
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
