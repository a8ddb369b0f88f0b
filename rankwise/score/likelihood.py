"""How well a model foretells given answers: teacher-forced loss of each sample, without generating anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from rankwise.data import Collator, Example, Rendered, RenderedDataset, Renderer
from rankwise.data.render import IGNORED

Batch = Mapping[str, Tensor]
BESIDE = ("labels", "sample_index")  # what a batch holds for the loss and for messages, not for the model


def answered(renderer: Renderer, examples: Sequence[Example], answers: Sequence[str]) -> list[list[Rendered]]:
    """Each sample with each of the answers in place of its own, all of a sample over one and the same prompt.

    The ids are those of training: `renderer.prompt_ids`, then the answer and its end token as `renderer.training`
    ends with them. Pieces are tokenised apart, so the answers' ids are the same behind every prompt. Where the source
    was cut to the limit, training may have cut it elsewhere.
    """
    prompts = [renderer.prompt(example) for example in examples]
    ends = [answer_ids(renderer, examples[0], answer) for answer in answers]
    return [[continued(prompt, end) for end in ends] for prompt in prompts]


def continued(prompt: Rendered, end: list[int]) -> Rendered:
    """A prompt with an answer's ids behind it, which alone are learnt."""
    return Rendered(prompt.input_ids + end, prompt.labels + end, images=prompt.images)


def answer_ids(renderer: Renderer, example: Example, answer: str) -> list[int]:
    """Ids of an answer to this sample and of the end token behind it, as training sees them."""
    turns = (*example.turns[:-1], replace(example.turns[-1], text=answer))
    whole = renderer.training(replace(example, turns=turns))
    masked = max(place for place, label in enumerate(whole.labels) if label == IGNORED)
    return whole.input_ids[masked + 1 :]


def longest_answer(renderer: Renderer, example: Example, answers: Sequence[str]) -> int:
    """Tokens of the longest of the answers with its end token: the `reserve` of a renderer that compares them."""
    cutting = replace(renderer, overlong="truncate_source")
    return max(len(answer_ids(cutting, example, answer)) for answer in answers)


def prompt_of(rendered: Rendered) -> list[int]:
    """The ids of a sample before its last answer."""
    masked = max(place for place, label in enumerate(rendered.labels) if label == IGNORED)
    return rendered.input_ids[: masked + 1]


def training_batches(examples: Sequence[Example], renderer: Renderer, batch_size: int = 8) -> list[Batch]:
    """Padded batches of whole samples in their order, as `answer_losses` takes them."""
    data = RenderedDataset(examples, renderer)
    collate = Collator.of(renderer.tokenizer, sight=renderer.sight)
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
            loss, count = batch_losses(model, batch, device)
            losses.append(loss)
            counts.append(count)
    finally:
        model.train(training)
    return torch.cat(losses), torch.cat(counts)


def batch_losses(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Summed loss (n,) float64 and learnt tokens (n,) of the rows of one batch.

    Only the predictions of learnt tokens are made float32: a whole batch × length × vocabulary would not fit.
    """
    targets = batch["labels"][:, 1:].to(device)
    learnt = targets != IGNORED
    inputs = {name: value.to(device) for name, value in batch.items() if name not in BESIDE}
    logits = model(**inputs).logits[:, :-1][learnt]
    token_losses = F.cross_entropy(logits.float(), targets[learnt], reduction="none").double()
    rows = learnt.nonzero()[:, 0]
    sums = torch.zeros(len(targets), dtype=torch.float64, device=device).index_add(0, rows, token_losses)
    return sums.cpu(), learnt.sum(dim=1).cpu()
