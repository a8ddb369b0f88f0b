"""Train arms and score what they have learnt: what `study` does with its batches, and `advise` with its rungs.

    fitted = fit(model, arms, rows, collate, settings, {"choose": batches}, watch=True)
    fitted.losses["choose"]           # (arms, items): summed nats of every item, nan for arms that diverged
    fitted.tokens, fitted.training_seconds, fitted.seconds, fitted.peak_bytes

Arms share one frozen base and one forward pass; what cannot (rows with pictures) trains in turn, `in_turn`, by the
Trainer, from the same starts on the same rows. Those that diverge leave early, however they train (`watch`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.monitor import PeakMemory
from rankwise.train.together.alone import StepLosses, adapted, train_alone, twin_of
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.starts import Pairs
from rankwise.train.together.train import Arm, Batch, Collate, TokenRows, TrainedArm, losses_together, train_together


@dataclass(frozen=True)
class Fitted:
    """Arms, trained and scored.

    losses: name of the rows → (arms, items) float64, the summed nats of every item; nan for arms that diverged. tokens:
    trained on, of all arms, padding excluded. training_seconds: without scoring. seconds, peak_bytes: of training and
    scoring; the memory of the process, on a GPU that of the card.
    """

    trained: list[TrainedArm]
    losses: dict[str, Tensor]
    tokens: int
    training_seconds: float
    seconds: float
    peak_bytes: int


def fit(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    rows: TokenRows,
    collate: Collate,
    settings: ArmSettings,
    scored: Mapping[str, Sequence[Batch]],
    *,
    in_turn: bool = False,
    watch: bool = False,
    base_losses: StepLosses | None = None,
    **how: Any,
) -> Fitted:
    """Train all arms and score each on these batches; the model is only read, and afterwards as it was.

    in_turn: one after the other by the Trainer. base_losses: what such arms are watched against, as far as it is known,
    and kept for the next. how: further keywords of `train_together`.
    """
    started, on_gpu = time.monotonic(), model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with PeakMemory() as memory:
        if in_turn:
            known = ({} if base_losses is None else base_losses) if watch else None
            trained = [train_alone(model, arm, None, rows, collate, settings, known)[0] for arm in arms]
        else:
            trained = train_together(model, arms, rows, collate, settings, watch=watch, **how)
        training = time.monotonic() - started
        found = score(model, trained, [arm.scales for arm in arms], scored, in_turn=in_turn)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else memory.bytes
    tokens = sum(arm.tokens for arm in trained)
    return Fitted(trained, found, tokens, training, time.monotonic() - started, peak)


def score(
    model: PreTrainedModel,
    trained: Sequence[TrainedArm],
    scales: Sequence[Mapping[str, float]],
    scored: Mapping[str, Sequence[Batch]],
    *,
    in_turn: bool = False,
) -> dict[str, Tensor]:
    """Losses of the arms' factors on each set of rows, as `Fitted` has them."""
    pairs = [arm.pairs for arm in trained]
    losses = score_in_turn if in_turn else losses_together
    found = {name: losses(model, pairs, scales, batches)[0].clone() for name, batches in scored.items()}
    bad = torch.tensor([arm.diverged for arm in trained])
    for matrix in found.values():
        matrix[bad | ~matrix.isfinite().all(1)] = torch.nan
    return found


def score_in_turn(
    model: PreTrainedModel,
    pairs: Sequence[Pairs],
    scales: Sequence[Mapping[str, float]],
    batches: Sequence[Batch],
) -> tuple[Tensor, Tensor]:
    """`losses_together`, adapter after adapter, of rows that may have pictures."""
    sums = []
    for own, factor in zip(pairs, scales, strict=True):
        with twin_of(model) as twin:
            losses, tokens = answer_losses(adapted(twin, own, factor) if own else twin, batches)
        sums.append(losses)
    return torch.stack(sums), tokens
