"""What a training loss is divided by: the learnt tokens of the whole optimizer step, of all batches and processes.

Most models are told that number as `num_items_in_batch`. Many vision-language models say `accepts_loss_kwargs = False`,
from when they dropped it on its way to the loss; then every batch would weigh the same, however few tokens it has, and
a batch without any would be 0/0. They are told as well, and the first batch proves that it has an effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from rankwise.errors import UsageError, VerificationError

COUNT = "num_items_in_batch"


class NextTokenSmoother(LabelSmoother):
    """transformers' label smoothing, which takes models that see for classifiers and does not shift their labels."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = True, num_items_in_batch: Any = None
    ) -> Tensor:
        loss: Tensor = super().__call__(model_output, labels, True, num_items_in_batch)
        return loss


def counts_all_tokens(trainer: Trainer) -> bool:
    """Make a trainer's loss the mean over all tokens of a step; whether the model has yet to prove that it obeys.

    UsageError in several processes for a model that cannot be told.
    """
    if trainer.label_smoother is not None:
        trainer.label_smoother = NextTokenSmoother(trainer.label_smoother.epsilon)
    if trainer.model_accepts_loss_kwargs or not learns_labels(trainer.model):
        return False
    if takes_any(trainer.model):
        trainer.model_accepts_loss_kwargs = True
        return trainer.label_smoother is None
    if trainer.args.world_size > 1:
        raise UsageError(
            f"{type(plain(trainer.model)).__name__} takes no {COUNT}, so its processes could not be weighed by their "
            "tokens; train it in one process"
        )
    return False


def plain(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def learns_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(plain(model).forward).parameters


def takes_any(model: nn.Module) -> bool:
    parameters = inspect.signature(plain(model).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@torch.no_grad()
def prove_counting(trainer: Trainer, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """VerificationError where twice the count gives the same loss. Every process must ask, whatever it has to learn."""
    inputs = trainer._prepare_inputs(dict(inputs))
    model.eval()
    with trainer.compute_loss_context_manager():
        once, twice = (model(**inputs, **{COUNT: torch.tensor(count)}).loss for count in (1, 2))
    if torch.equal(once, twice) and bool((inputs["labels"] >= 0).any()):
        raise VerificationError(
            f"{type(plain(trainer.model)).__name__} does not divide its loss by {COUNT}: batches and processes would "
            "not be weighed by their tokens"
        )


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
