"""Training of all weights of a small model on its own: how the demos' bases learn to speak, and to see."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from rankwise.train.arguments import build_arguments
from rankwise.train.trainer import RankwiseTrainer

Rows = Sequence[dict[str, Any]] | Dataset[dict[str, Any]]


def pretrain(
    model: nn.Module,
    rows: Rows,
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train all weights in place on samples as the collator takes them; returns the last logged loss in nats."""
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, steps),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = RankwiseTrainer(
            model=model, args=build_arguments(folder, seed, settings), train_dataset=rows, data_collator=collator
        )
        trainer.train()
    return float(next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row))
