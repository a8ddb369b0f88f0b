"""Adapters and trainers of the tiny mixtures of experts of `experts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rows import SETTINGS, Rows
from transformers import set_seed

from rankwise.data.dataset import Collator
from rankwise.models.adapt import adapt
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.checkpoints import identity_of
from rankwise.train.trainer import RankwiseTrainer

FAMILIES = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3")
RANK = 2


def adapted(base: Path, target: str = "experts", dtype: torch.dtype = torch.float32) -> Any:
    """The model in this folder, its experts (or what `--target` names) adapted at one rank."""
    set_seed(0)
    model = load_model(str(base), dtype)
    return adapt(model, uniform_plan(choose_sites(model_sites(model), target), RANK, None, False, "x"), LoraSection())


def make(base: Path, folder: Path, target: str = "experts", dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    """Its trainer, as `rows.make_trainer`: 12 steps of two accumulated batches of two rows."""
    own = {name: given.pop(name) for name in ("phases", "gradients", "callbacks", "rows") if name in given}
    folder.mkdir(parents=True, exist_ok=True)
    arguments = build_arguments(folder, 1, {**SETTINGS, **given})
    return RankwiseTrainer(
        model=adapted(base, target, dtype),
        args=arguments,
        train_dataset=own.pop("rows", None) or Rows(),
        data_collator=Collator(0),
        identity=identity_of(arguments),
        **own,
    )
