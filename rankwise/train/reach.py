"""How far backward goes: to the first thing that trains, and not into rows that nothing trainable sees."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def within_reach(model: nn.Module, _: Any, output: Any) -> None:
    """A forward hook. Text does not reach a vision tower: where nothing else trains, its gradient is zero, no error.

    Inside the model, because DDP looks from its output for parameters that were used.
    """
    if not isinstance(output, MutableMapping):
        return
    name = "loss" if output.get("loss") is not None else "logits"
    if torch.is_grad_enabled() and not output[name].requires_grad:
        trained = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
        if trained is not None:
            output[name] = output[name] + 0.0 * trained.flatten()[0]


class FrozenPrefix(TrainerCallback):
    """Keeps backward from going further than the first thing that trains.

    With checkpointing transformers makes the embeddings' outputs require gradients, a vision tower's too; then all
    frozen layers are computed twice and passed through. Only reentrant checkpointing needs that.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        if args.activation_checkpointing and not reentrant:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            if hasattr(base, "disable_input_require_grads"):
                base.disable_input_require_grads()
