"""Token rows and a small trainer for the tests of training; no tokenizer, no files of others."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from rankwise.data.dataset import Collator
from rankwise.models.adapt import adapt, lora_layers
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.checkpoints import identity_of, resume_point
from rankwise.train.trainer import RankwiseTrainer


class Rows(Dataset[dict[str, Any]]):
    """`count` rows of ids that follow from their position."""

    def __init__(self, count: int = 24, length: int = 8) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [4 + (index * 31 + place * 17) % 300 for place in range(self.length)]
        return {"input_ids": ids, "labels": ids, "sample_index": index}

    def sample_id(self, index: int) -> str:
        return f"row-{index}"


SETTINGS: Mapping[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
}


TRAINER_OWN = ("callbacks", "loraplus_lr_ratio", "phases", "gradients", "accuracy", "sampler")


def adapted_base(base: Path, dropout: float = 0.1) -> torch.nn.Module:
    set_seed(0)
    model = load_model(str(base), torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model)), 4, None, False, "tiny")
    return adapt(model, plan, LoraSection(lora_dropout=dropout))


def make_trainer(
    base: Path, folder: Path, *, rows: Any = None, facts: Mapping[str, Any] | None = None, **given: Any
) -> RankwiseTrainer:
    """A LoRA trainer with dropout and accumulation: 6 optimizer steps an epoch, 12 in all."""
    extra = {name: given.pop(name) for name in TRAINER_OWN if name in given}
    dropout = given.pop("dropout", 0.1)
    arguments = build_arguments(folder, 1, {**SETTINGS, **given})
    return RankwiseTrainer(
        model=adapted_base(base, dropout),
        args=arguments,
        train_dataset=Rows() if rows is None else rows,
        eval_dataset=Rows(4),
        data_collator=Collator(0),
        identity=identity_of(arguments),
        **extra,
    )


def resumed(trainer: RankwiseTrainer, asked: str = "true", **options: Any) -> RankwiseTrainer:
    """The same, after training on from where the folder's checkpoints end."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_point(asked, folder, identity_of(trainer.args), **options))
    return trainer


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's training_log.csv."""
    return list(csv.DictReader((folder / "training_log.csv").read_text().splitlines()))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Watch(TrainerCallback):
    """Which sites moved in each optimizer step, seen from the weights themselves."""

    def __init__(self) -> None:
        self.moved: list[frozenset[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.before = factors(model)

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        now = factors(model)
        self.moved.append(frozenset(path for path in now if not torch.equal(now[path], self.before[path])))


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = lora_layers(model)
    return {
        path: torch.cat([layer.lora_A["default"].weight.flatten(), layer.lora_B["default"].weight.flatten()]).clone()
        for path, layer in layers.items()
    }


class SendWhileValidating(TrainerCallback):
    """Sends SIGTERM after the first batch of the evaluation at this step, and counts the batches that follow it."""

    def __init__(self, step: int) -> None:
        self.step, self.batches = step, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == 1:
                os.kill(os.getpid(), signal.SIGTERM)
