"""What the training benchmarks share: a random model of a real architecture, random rows, and a clock per step."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from rankwise.models.adapt import adapt
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments


class RandomRows(Dataset[dict[str, Any]]):
    """Rows of random ids, all learnt; `lengths` are known."""

    def __init__(self, lengths: Sequence[int], vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = tuple(lengths)
        self.ids = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index], "sample_index": index}

    def sample_id(self, index: int) -> str:
        return str(index)


def llama(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 16 * 16, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=hidden // 64, vocab_size=vocabulary))


def with_lora(model: LlamaForCausalLM, rank: int) -> PeftModel:
    plan = uniform_plan(choose_sites(model_sites(model)), rank, None, False, "random")
    return adapt(model, plan, LoraSection(lora_dropout=0.0))


def arguments(folder: Path | str, batch_size: int, steps: int, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "logging_steps": 10,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return build_arguments(folder, 1, settings | more)


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, all that lies between included; on a GPU with
    its queue emptied. The first one counts from the beginning of training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        at = now()
        self.seconds.append(at - self._last)
        self._last = at


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device} · torch {torch.__version__}"


def command() -> str:
    """This run's command line, folders by their last name: what to type to repeat it."""
    given = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
