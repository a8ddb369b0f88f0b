"""How well a model foretells given answers: teacher-forced loss of each sample, without generating anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from rankwise.data import Collator, Example, RenderedDataset, Renderer
from rankwise.data.render import IGNORED

Batch = dict[str, Tensor]


def training_batches(examples: Sequence[Example], renderer: Renderer, batch_size: int = 8) -> list[Batch]:
    """Padded batches of whole samples in their order, as `answer_losses` takes them."""
    data = RenderedDataset(examples, renderer)
    collate = Collator.of(renderer.tokenizer)
    starts = range(0, len(data), batch_size)
    return [collate([data[index] for index in range(s, min(s + batch_size, len(data)))]) for s in starts]


@torch.inference_mode()
def answer_losses(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats (n,) float64 and number of learnt tokens (n,) of every sample.

    `losses.sum() / tokens.sum()` is the mean loss per token; sums per sample are what a bootstrap resamples. The
    model is in eval mode meanwhile.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    losses, counts = [], []
    try:
        for batch in tqdm(batches, desc="loss", unit="batch", disable=None, leave=False):
            loss, count = _batch_losses(model, batch["input_ids"], batch["attention_mask"], batch["labels"], device)
            losses.append(loss)
            counts.append(count)
    finally:
        model.train(training)
    return torch.cat(losses), torch.cat(counts)


def _batch_losses(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Only the predictions of learnt tokens are made float32: a whole batch × length × vocabulary would not fit."""
    targets = labels[:, 1:].to(device)
    learnt = targets != IGNORED
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1][learnt]
    token_losses = F.cross_entropy(logits.float(), targets[learnt], reduction="none").double()
    rows = learnt.nonzero()[:, 0]
    sums = torch.zeros(len(ids), dtype=torch.float64, device=device).index_add(0, rows, token_losses)
    return sums.cpu(), learnt.sum(dim=1).cpu()
