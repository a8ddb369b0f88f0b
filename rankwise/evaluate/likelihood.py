"""Teacher-forced loss of given answers, per sample, without generating anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.data.dataset import Collator, RenderedDataset, pad, seen
from rankwise.data.example import Example
from rankwise.data.render import Rendered, Renderer
from rankwise.data.vision_inputs import IGNORED, Sight
from rankwise.page.progress import progress

Batch = Mapping[str, Tensor]
BESIDE = ("labels", "sample_index")  # what a batch holds for the loss and for messages, not for the model


def render_answers(renderer: Renderer, examples: Sequence[Example], answers: Sequence[str]) -> list[list[Rendered]]:
    """Each sample with each of the answers in place of its own, all of a sample over one and the same prompt.

    The ids are those of training: `renderer.prompt_ids`, then the answer and its end token as `renderer.training`
    ends with them. All prompts end alike, so the answers' ids are the same behind every one. Where the source
    was cut to the limit, training may have cut it elsewhere.
    """
    prompts = [renderer.prompt(example) for example in examples]
    ends = [answer_ids(renderer, examples[0], answer) for answer in answers]
    return [[append_ids(prompt, end) for end in ends] for prompt in prompts]


def append_ids(prompt: Rendered, end: Sequence[int]) -> Rendered:
    """A prompt with an answer's ids behind it, which alone are learnt."""
    return Rendered([*prompt.input_ids, *end], [*prompt.labels, *end], images=prompt.images)


def answer_ids(renderer: Renderer, example: Example, answer: str) -> list[int]:
    """Ids of an answer to this sample and of the end token behind it, as training sees them."""
    given = [replace(turn, trained=turn.role != "assistant") for turn in example.turns[:-1]]
    last = replace(example.turns[-1], text=answer, reasoning="")
    whole = renderer.training(replace(example, turns=(*given, last)))
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
        for batch in progress(batches, desc="loss", unit="batch"):
            loss, count = batch_losses(model, batch, device)
            losses.append(loss)
            counts.append(count)
    finally:
        model.train(training)
    return torch.cat(losses), torch.cat(counts)


def batch_losses(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Summed loss (n,) float64 and learnt tokens (n,) of the rows of one batch."""
    learnt = Learnt.of(batch["labels"])
    inputs = {name: value.to(device) for name, value in batch.items() if name not in BESIDE}
    losses = token_losses(model, inputs, learnt.to(device)).cpu().double()
    count = len(batch["labels"])
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, learnt.rows, losses)
    return sums, torch.bincount(learnt.rows, minlength=count)


@dataclass(frozen=True)
class Learnt:
    """The K positions of a batch (rows, T) whose next token is learnt, by row.

    positions: row·T + place of what predicts. targets: the token there. rows: the row of each.
    """

    positions: Tensor
    targets: Tensor
    rows: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Learnt:
        """Found where the labels are: on the host, so that the device is not waited for."""
        targets = labels[:, 1:]
        rows, places = (targets != IGNORED).nonzero(as_tuple=True)
        return cls(rows * labels.shape[1] + places, targets[rows, places], rows)

    def to(self, device: torch.device) -> Learnt:
        return Learnt(*(part.to(device, non_blocking=True) for part in (self.positions, self.targets, self.rows)))


def token_losses(model: nn.Module, inputs: Mapping[str, Any], learnt: Learnt) -> Tensor:
    """Negative log-likelihood (K,) in nats, float32: plain cross-entropy, whatever the model trains by besides.

    Only the learnt positions reach the output head: batch × length × vocabulary would not fit.
    """
    return F.cross_entropy(logits_at(model, inputs, learnt.positions), learnt.targets, reduction="none")


@torch.inference_mode()
def forced_log_probs(
    model: Any,
    sight: Sight | None,
    rows: Sequence[Rendered],
    places: Sequence[Sequence[int]] | None = None,
    fill: int = 0,
) -> list[Tensor]:
    """For every row, a prompt with its answer: (places, vocabulary) float32, log p of the token behind each place.

    All rows in one batch, padded on the right with `fill` and masked. places: in each row [those in front of its learnt
    tokens].
    """
    if places is None:
        places = [[at - 1 for at, label in enumerate(row.labels) if label != IGNORED] for row in rows]
    width, device = max(len(row.input_ids) for row in rows), next(model.parameters()).device
    ids, labels = (
        pad([getattr(row, name) for row in rows], width, value)
        for name, value in (("input_ids", fill), ("labels", IGNORED))
    )
    mask = pad([[1] * len(row.input_ids) for row in rows], width, 0)
    inputs = {"input_ids": ids, "attention_mask": mask} | seen(sight, ids, [row.images for row in rows], labels)
    positions = [row * width + place for row, within in enumerate(places) for place in within]
    on_device: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
    logits = logits_at(model, on_device | {"use_cache": False}, torch.tensor(positions, device=device))
    return list(logits.log_softmax(-1).cpu().split([len(within) for within in places]))


def logits_at(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """(K, vocabulary) float32 at these positions (row·T + place)."""
    with head_at(model, positions) as head:
        logits: Tensor = model(**inputs).logits
    logits = logits.reshape(-1, logits.shape[-1])
    return (logits if head.ran else logits.index_select(0, positions)).float()


def output_head(model: nn.Module) -> nn.Module | None:
    """Of a model that may be wrapped for several processes; None for a compiled one, whose graph no hook may enter."""
    if hasattr(model, "_orig_mod"):
        return None
    plain = getattr(model, "module", model)
    find: Callable[[], nn.Module | None] | None = getattr(plain, "get_output_embeddings", None)
    return find() if find else None


@dataclass
class Head:
    """State of the output head: whether it was called with the learnt positions only."""

    ran: bool = False


@contextmanager
def head_at(model: nn.Module, positions: Tensor) -> Iterator[Head]:
    """The model with an output head that gets these positions (row·T + place) of its input only, as one row.

    A head that is no module of its own gets all of them; `Head.ran` says so.
    """
    head = Head()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        head.ran = True
        return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions)[None],)

    module = output_head(model)
    handle = None if module is None else module.register_forward_pre_hook(keep)
    try:
        yield head
    finally:
        if handle is not None:
            handle.remove()
