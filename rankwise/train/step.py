"""One optimizer step: loss normalization, extent of the backward pass, and the check before it is taken.

The divisor is the number of learnt tokens of the whole step, of all batches and processes. Most models are told it as
`num_items_in_batch`. Many vision-language models say `accepts_loss_kwargs = False`, from when they dropped it on its
way to the loss; then every batch would weigh the same, however few tokens it has, and a batch without any would be 0/0.
They are told as well, and the first batch proves that it has an effect.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from rankwise.errors import DivergedError, RankwiseError, UsageError, VerificationError
from rankwise.train.gradients import gradient_norm

COUNT = "num_items_in_batch"


class NextTokenSmoother(LabelSmoother):
    """Label smoothing with shifted labels: transformers' takes vision-language models for classifiers, unshifted."""

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
    parameters = inspect.signature(plain(trainer.model).forward).parameters
    if trainer.model_accepts_loss_kwargs or "labels" not in parameters:
        return False
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        trainer.model_accepts_loss_kwargs = True
        return trainer.label_smoother is None
    if trainer.args.world_size > 1:
        raise UsageError(
            f"{type(plain(trainer.model)).__name__} takes no {COUNT}, so its processes could not be weighted by their "
            "token counts; train it in one process"
        )
    return False


def plain(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


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
            "not be weighted by their token counts"
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
    """Stops the backward pass at the first trainable parameter.

    With checkpointing transformers makes the embeddings' outputs require gradients, a vision tower's too; then all
    frozen layers are computed twice and passed through. Only reentrant checkpointing needs that.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        if args.activation_checkpointing and not reentrant:
            base: Any = plain(model)
            if hasattr(base, "disable_input_require_grads"):
                base.disable_input_require_grads()


SKIPPED_IN_A_ROW = 20  # fp16: the scaler halves its scale at each skip; 2^20 is beyond every useful scale
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StepGuard:
    """Collects the losses and sample numbers of one optimizer step and decides whether it may be taken."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.skipped = 0  # by the gradient scaler, in a row
        self.skipped_total = 0

    def reset(self) -> None:
        self.losses, self.samples = [], []

    def values(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """(summed loss, gradient norm) of this step, on the device."""
        loss = torch.stack([item.detach().float().reshape(()) for item in self.losses]).sum()
        return torch.stack([loss, gradient_norm(parameters).to(loss.device, torch.float32)])

    def check(self, loss: float, norm: float, *, scaled: bool) -> str | None:
        """The fault of this step, or None. With a gradient scaler a non-finite gradient is its skipped step."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if math.isfinite(norm):
            self.skipped = 0
            return None
        if not scaled:
            return f"the gradient's norm is {norm}"
        self.skipped += 1
        self.skipped_total += 1
        if self.skipped >= SKIPPED_IN_A_ROW:
            return f"{self.skipped} steps in a row had gradients that are not finite at any loss scale"
        return None


def diverged(reason: str, step: int, samples: Sequence[str], folder: str) -> DivergedError:
    """The error for a step that must not be taken."""
    shown = ", ".join(samples[:32]) + (f" and {len(samples) - 32} more" if len(samples) > 32 else "")
    return DivergedError(
        f"step {step}: {reason}; the step was not taken. Samples in it: {shown or 'unknown'}. Look at these samples, "
        f"or lower --learning_rate or --max_grad_norm; earlier checkpoints in {folder} are intact"
    )


SMALLER_BATCHES = (
    "Halve --per_device_train_batch_size and double --gradient_accumulation_steps (the same result), add "
    "--gradient_checkpointing, lower --max_seq_length, or load the base with --load_in_8bit or --load_in_4bit; "
    "checkpoints written before are intact"
)


@contextmanager
def memory_advice(advice: str = SMALLER_BATCHES) -> Iterator[None]:
    """Turn "out of memory" into an error that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in MEMORY_TEXTS):
            raise
        reason = next(iter(str(error).splitlines()), "MemoryError")
        raise RankwiseError(f"out of memory ({reason}). {advice}") from error
