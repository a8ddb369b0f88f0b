"""Tiny models of every family, adapted by tower, and a trainer on rows of tokens: for the tests of towers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rows import Rows
from test_train_vision import colour_rows
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.data.dataset import Collator
from rankwise.merge.logits import image_batch
from rankwise.models.adapt import adapt
from rankwise.models.load import load_model
from rankwise.models.sites import full_modules, model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.trainer import RankwiseTrainer

ALL = {**FAMILIES, "isaac": tiny_isaac}
TOWERS = ("language", "vision", "projector")


class Bases:
    """Model folders by family, made once; and rows with pictures."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.made: dict[str, Path] = {}

    def __call__(self, family: str) -> Path:
        if family not in self.made:
            self.made[family] = ALL[family](self.factory.mktemp(family))
        return self.made[family]

    @property
    def rows(self) -> Path:
        if "rows" not in self.made:
            self.made["rows"] = colour_rows(self.factory.mktemp("colours"), 16)
        return self.made["rows"]


def loaded(base: Path) -> PreTrainedModel:
    return load_model(str(base), torch.float32)


def adapted(base: Path, lora: tuple[str, ...], full: tuple[str, ...] = (), **settings: Any) -> PeftModel:
    """Ranks of 2 in some towers, others in full, moved off their start."""
    torch.manual_seed(0)
    model = loaded(base)
    plan = uniform_plan(choose_sites(model_sites(model), towers=lora), 2, None, False, "tiny")
    found = adapt(model, plan, LoraSection(lora_dropout=0.0, **settings), full_modules(model, full).paths)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "lora_" in name else 0.05))
    return found.eval()


@cache
def pictures(base: Path) -> dict[str, Tensor]:
    """Two pictures with text."""
    return image_batch(loaded(base), str(base))


@torch.no_grad()
def seen(model: Any, base: Path) -> Tensor:
    """Logits of the pictures."""
    return model.eval()(**pictures(base)).logits


def trainer_of(model: nn.Module, folder: Path, rates: dict[str, float] | None = None, **given: Any) -> RankwiseTrainer:
    own = {name: given.pop(name) for name in ("loraplus_lr_ratio", "phases", "callbacks") if name in given}
    settings: dict[str, Any] = {"use_cpu": True, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}
    arguments = build_arguments(folder, 1, {**settings, "eval_strategy": "no", "save_strategy": "no", **given})
    rows, collator = Rows(8), Collator(0)
    return RankwiseTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, tower_rates=rates, **own
    )


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}
