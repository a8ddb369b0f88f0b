"""A plain training loop over all weights of a model: for probes, and for the arm `full` that a study refers to.

The rows, their order, the optimizer and its schedule are those of the arms that are trained together
(`batched.train_together`), so that full fine-tuning and adapters differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from rankwise.train.batched import ArmSettings

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


def train_weights(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Mapping[str, Any]],
    order: Sequence[int],
    collate: Collate,
    settings: ArmSettings,
    learning_rate: float,
) -> bool:
    """Train these parameters in place, without dropout; whether it stayed finite (it stops where it did not)."""
    model.eval()
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, settings.warmup_steps, settings.steps)
    device = parameters[0].device
    for step in tqdm(range(settings.steps), desc="full", unit="step", disable=None, leave=False):
        taken = order[step * settings.batch_size : (step + 1) * settings.batch_size]
        batch = {name: value.to(device) for name, value in collate([rows[index] for index in taken]).items()}
        batch.pop("sample_index", None)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        if not torch.isfinite(loss + norm):
            return False
        optimizer.step()
        scheduler.step()
    return True


@contextmanager
def borrowed(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """These parameters to train, the others frozen; afterwards all are as they were, bit for bit."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield list(parameters.values())
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        for parameter, state in before.items():
            parameter.requires_grad_(state)
            parameter.grad = None
