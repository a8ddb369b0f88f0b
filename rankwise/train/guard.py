"""Is it safe to step? Loss and gradients are checked at the accumulation boundary, before the optimizer moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rankwise.errors import DivergedError, RankwiseError

SKIPPED_IN_A_ROW = 20  # fp16: the scaler halves its scale at each skip; 2^20 is beyond every useful scale
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """‖gradient‖₂ over all parameters that have one, as a scalar tensor: nothing is copied to the host.

    With FSDP2 the norm is that of the whole gradient (a collective call, so every process must make it).
    """
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


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
        """What is wrong with this step, or None. With a gradient scaler a non-finite gradient is its skipped step."""
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


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn "out of memory" into an error that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in MEMORY_TEXTS):
            raise
        reason = next(iter(str(error).splitlines()), "MemoryError")
        raise RankwiseError(
            f"out of memory ({reason}). Halve --per_device_train_batch_size and double "
            "--gradient_accumulation_steps (the same result), add --gradient_checkpointing, lower --max_seq_length, or "
            "load the base with --load_in_8bit or --load_in_4bit; checkpoints written before are intact"
        ) from error
