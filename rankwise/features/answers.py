"""Effect on a model's answers of replacing its image features by approximations.

rows ── model ──────────────────────▶ p(answer)  ─┐
     └─ model, features X → X̂ ──────▶ p̂(answer)  ─┴─▶ loss of the right answer, KL(p ‖ p̂), agreement, accuracy

Everything is teacher-forced: at each token of the right answer, its end token included, what would the model say next?
Two controls give the scale: all ranks (what rounding alone costs) and rank 0 (what having no picture costs).

data file ── questions ──▶ Questions ── batches(rows) ──▶ padded batches, pixels included, made as they are asked for
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.example import Example, Examples, chosen
from rankwise.data.vision_inputs import IGNORED, Sight
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.engines import Subject
from rankwise.evaluate.likelihood import BESIDE, Batch
from rankwise.features.approximation import by_basis, by_gram, by_randomized, normalised, restored
from rankwise.features.encoder import Preparation, picture_digest
from rankwise.features.measures import PCA, RANDOMIZED, SVD, Method, relative_error
from rankwise.models.vision_features import approximate_features, image_features, seeing_part
from rankwise.page.progress import progress
from rankwise.page.text import plural
from rankwise.study import evidence

ORIGINAL, WHOLE, NOTHING = "original", "all ranks", "no picture"
METRICS = ("loss", "loss_change", "kl", "agreement", "accuracy", "accuracy_change")
POSITIONS = 64  # answer positions whose probabilities over the whole vocabulary are float64 at a time
Shape = tuple[int, int]


@dataclass(frozen=True)
class Replacement:
    """A replacement for features. approximate: normalised X (N, T, D) → X̂ of the same shape."""

    method: str
    rank: int
    approximate: Callable[[Tensor], Tensor]
    network: bool = False


@dataclass(frozen=True)
class Answers:
    """Of n rows, float64 (n,): answer tokens; summed loss of the right answer and KL from the original, nats; tokens
    at which the likeliest one is the original's; 1 where all of the likeliest ones are the right answer's. And the
    relative error of every matrix that was replaced, in the order of the rows."""

    tokens: Tensor
    loss: Tensor
    kl: Tensor
    agreeing: Tensor
    right: Tensor
    errors: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


def controls(tokens: int, channels: int) -> list[Replacement]:
    """The two ends of the scale. Rank 0 leaves each token its mean over the channels and nothing else."""

    def whole(features: Tensor) -> Tensor:
        return by_gram(features, min(features.shape[-2:])).product()

    return [Replacement(WHOLE, min(tokens, channels), whole), Replacement(NOTHING, 0, torch.zeros_like)]


def baselines(rank: int, basis: Tensor | None, seed: int) -> list[Replacement]:
    """What a network has to be compared with at this rank: the optimum, the randomized SVD and, given a basis of at
    least so many rows, the shared PCA."""

    def randomized(features: Tensor) -> Tensor:
        generator = torch.Generator(features.device).manual_seed(seed)  # the same however rows are batched
        return by_randomized(features, rank, generator=generator).product()

    found = [
        Replacement(SVD, rank, lambda features: by_gram(features, rank).product()),
        Replacement(RANDOMIZED, rank, randomized),
    ]
    if basis is not None:
        leading = basis[:rank]
        found.append(Replacement(PCA, rank, lambda features: by_basis(features, leading).product()))
    return found


def of_method(method: Method, rank: int) -> list[Replacement]:
    """A network's product, and its refined output where it has one: that one's rank may be higher."""
    product = Replacement(method.name, rank, lambda features: method.factorize(features).product(), network=True)
    refined = Replacement(f"{method.name}, refined", rank, method.refine, network=True) if method.refine else None
    return [product, refined] if refined else [product]


@torch.inference_mode()
def compare_answers(
    model: nn.Module, batches: Iterable[Batch], replacements: Sequence[Replacement]
) -> tuple[Answers, list[Answers]]:
    """(as the model is, with each replacement). The model is in eval mode meanwhile and runs once as it is."""
    assert "get_image_features" not in vars(seeing_part(model)), "features are replaced here, one method at a time"
    training = model.training
    model.eval()
    parts: list[list[Answers]] = [[] for _ in range(1 + len(replacements))]
    try:
        for batch in progress(batches, desc="answers", unit="batch", leave=True):
            with seen_once(model):
                original = Predictions.of(model, batch)
                parts[0].append(original.against(original, []))
                for found, replacement in zip(parts[1:], replacements, strict=True):
                    found.append(replaced(model, batch, replacement, original))
    finally:
        model.train(training)
    first, *rest = (Answers.joined(each) for each in parts)
    return first, rest


@contextmanager
def seen_once(model: nn.Module) -> Iterator[None]:
    """Inside the block the vision tower runs for the first forward pass only: all of them have the same images. It can
    be half of the work."""
    inner = seeing_part(model)
    original = inner.get_image_features
    kept: list[ModelOutput] = []

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(original(*args, **{**kwargs, "return_dict": True}))
        return type(kept[0])(**kept[0])  # a new one each time: who replaces features writes into it

    inner.get_image_features = get_image_features
    try:
        yield
    finally:
        del inner.get_image_features


def replaced(model: nn.Module, batch: Batch, replacement: Replacement, original: Predictions) -> Answers:
    errors: list[Tensor] = []

    def stand_in(features: Tensor) -> Tensor:
        wanted = normalised(features)
        found = replacement.approximate(wanted)
        errors.append(relative_error(wanted, found).double().flatten().cpu())
        return restored(found, features)

    with approximate_features(model, stand_in):
        return Predictions.of(model, batch).against(original, errors)


@dataclass(frozen=True)
class Predictions:
    """Predictions at the answer tokens of a batch of n rows: logits (positions, vocabulary) in its own precision,
    targets and row of each position."""

    logits: Tensor
    targets: Tensor
    rows: Tensor
    n: int

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> Predictions:
        device = next(model.parameters()).device
        targets = batch["labels"][:, 1:].to(device)
        learnt = targets != IGNORED
        inputs = {name: value.to(device) for name, value in batch.items() if name not in BESIDE}
        logits = model(**inputs).logits[:, :-1][learnt]
        return cls(logits, targets[learnt], learnt.nonzero()[:, 0], len(targets))

    def against(self, original: Predictions, errors: Sequence[Tensor]) -> Answers:
        pieces = (part.split(POSITIONS) for part in (original.logits, self.logits, self.targets))
        values = torch.cat([_addends(*piece) for piece in zip(*pieces, strict=True)])
        sums = torch.zeros(self.n, values.shape[1], dtype=torch.float64, device=values.device)
        tokens, loss, kl, agreeing, right = sums.index_add_(0, self.rows, values).cpu().T
        return Answers(tokens, loss, kl, agreeing, (right == tokens).double(), torch.cat([torch.zeros(0), *errors]))


def _addends(original: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """(positions, 5): 1, loss, KL, same likeliest token, right likeliest token.

    In float64: float32's rounding of the normaliser alone would be a KL of 1e-7. What is still below 0 is rounding.
    """
    before, after = (F.log_softmax(each.double(), dim=-1) for each in (original, logits))
    loss = F.nll_loss(after, targets, reduction="none")
    kl = (before.exp() * (before - after)).sum(-1).clamp(min=0)
    likeliest = after.argmax(-1)
    columns = (torch.ones_like(loss), loss, kl, likeliest == before.argmax(-1), likeliest == targets)
    return torch.stack([column.double() for column in columns], dim=-1)


@dataclass(frozen=True)
class ReplacementScores:
    """Metrics of a replacement (METRICS; per answer token, accuracy per row), and their 95 % intervals over pictures.
    relative_error: of the features, mean over matrices; None for the model as it is."""

    method: str
    rank: int | None
    network: bool
    relative_error: float | None
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def record(self) -> dict[str, Any]:
        """A row of downstream.json."""
        facts = {"method": self.method, "rank": self.rank, "network": self.network}
        return {**facts, "relative_error": self.relative_error, **self.metrics, "intervals": self.intervals}


def measured(
    original: Answers, found: Answers, groups: Sequence[str], replacement: Replacement | None = None, *, seed: int = 42
) -> ReplacementScores:
    """The means, and paired bootstrap intervals over groups of rows (those of one picture).

    The same groups are drawn for every replacement, so that two of them can be set side by side.
    """
    sums = group_sums(original, found, groups)
    values = _metrics(sums.sum(0)[None])[:, 0]
    spread = bootstrap.intervals(lambda positions: _metrics(sums[positions].sum(1)), len(sums), seed=seed)
    return ReplacementScores(
        method=replacement.method if replacement else ORIGINAL,
        rank=replacement.rank if replacement else None,
        network=bool(replacement and replacement.network),
        relative_error=float(found.errors.mean()) if replacement else None,
        metrics=dict(zip(METRICS, map(float, values), strict=True)),
        intervals=bootstrap.named(METRICS, spread),
    )


def paired(first: Answers, second: Answers, groups: Sequence[str], *, seed: int = 42) -> dict[str, Any]:
    """KL of the first minus that of the second, nats per answer token, of the same rows, with its 95 % interval."""
    tokens = evidence.by_group(first.tokens.numpy(), groups)
    change = evidence.by_group((first.kl - second.kl).numpy(), groups)
    spread = bootstrap.intervals(
        lambda positions: (change[positions].sum(1) / tokens[positions].sum(1))[None], len(tokens), seed=seed
    )
    return {"kl_difference": float(change.sum() / tokens.sum()), "interval": spread[0] if spread else None}


def group_sums(original: Answers, found: Answers, groups: Sequence[str]) -> bootstrap.Array:
    """(groups, 8): rows, tokens, losses before and after, KL, agreeing, right before and after."""
    columns = (found.tokens, original.loss, found.loss, found.kl, found.agreeing, original.right, found.right)
    values = np.stack([np.ones(len(groups)), *(column.numpy() for column in columns)])
    return evidence.by_group(values, groups).T


def _metrics(sums: bootstrap.Array) -> bootstrap.Array:
    """(…, 8) sums → (METRICS, …)."""
    rows, tokens, before, after, kl, agreeing, right_before, right = np.moveaxis(sums, -1, 0)
    change = (after - before) / tokens
    accuracy = (right / rows, (right - right_before) / rows)
    return np.stack([after / tokens, change, kl / tokens, agreeing / tokens, *accuracy])


@dataclass(frozen=True)
class Questions:
    """Samples with images to evaluate a model on.

    pictures: of each sample, SHA-256 of its pictures as the processor gets them, which is how a feature cache names
    them. groups: one name per sample; samples that share a picture, directly or over others, have the same.
    """

    tested: Subject
    rows: RenderedDataset
    pictures: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, places: Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches of the samples at these places, in this order; all of them by default."""
        wanted = range(len(self)) if places is None else places
        collate = Collator.of(self.rows.renderer.tokenizer, sight=self.rows.renderer.sight)
        for start in range(0, len(wanted), self.batch_size):
            yield collate([self.rows[place] for place in wanted[start : start + self.batch_size]])

    @torch.inference_mode()
    def features(self, places: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Normalised features (1, T, D) of every matrix of these samples' pictures, in order."""
        device = self.tested.device
        for batch in self.batches(places):
            inputs = {name: value.to(device) for name, value in batch.items()}
            for matrix in image_features(self.tested.model, inputs):
                yield normalised(matrix)[None]

    def halves(self, seed: int) -> list[list[int]]:
        """Places of two halves without a common picture; one of the whole where there is only one picture."""
        names = sorted(set(self.groups))
        random.Random(seed).shuffle(names)
        first = set(names[: (len(names) + 1) // 2])
        parts: list[list[int]] = [[], []]
        for place, name in enumerate(self.groups):
            parts[name not in first].append(place)
        return [part for part in parts if part]


def with_pictures(examples: Examples, most: int | None, path: str) -> tuple[Sequence[Example], list[str]]:
    """The first samples, without those that show nothing, which are counted in a note. DataError where none is left."""
    first = examples.items[:most] if most else examples.items
    seeing = [place for place in range(len(first)) if first[place].images]
    if not seeing:
        raise DataError(f"{path}: none of {plural(len(first), 'row')} has an image, so there is nothing to replace")
    left_out = len(first) - len(seeing)
    notes = [f"{plural(left_out, 'row')} of {len(first)} left out: without a picture"] if left_out else []
    return chosen(first, seeing), notes


def questions(tested: Subject, examples: Sequence[Example], batch_size: int) -> Questions:
    """UsageError for a model that sees nothing."""
    rows, reader = RenderedDataset(examples, tested.renderer), require_sight(tested).reader
    shown = [example.images for example in rows.examples]
    digests = {reference: picture_digest(reader.open(reference)) for row in shown for reference in dict.fromkeys(row)}
    pictures = tuple(tuple(digests[reference] for reference in row) for row in shown)
    return Questions(tested, rows, pictures, connected(pictures), batch_size)


def require_sight(tested: Subject) -> Sight:
    """UsageError for a model that sees nothing."""
    if tested.renderer.sight is None:
        raise UsageError(f"{tested.base} takes no images, so it has no visual features to replace")
    return tested.renderer.sight


def connected(pictures: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A name for each row of pictures, the same for rows that are connected by any."""
    leader = {name: name for row in pictures for name in row}

    def first(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for row in pictures:
        leaders = [first(name) for name in row]
        leader.update(dict.fromkeys(leaders, min(leaders)))
    return tuple(first(row[0]) for row in pictures)


@dataclass(frozen=True)
class StretchedReader:
    """An ImageReader whose pictures are stretched to a square, as `features capture` does. Raises BadImage as it
    does."""

    reader: Any
    side: int

    @property
    def folder(self) -> Path:
        folder: Path = self.reader.folder
        return folder

    def open(self, reference: str) -> Image.Image:
        return Preparation(self.side).picture(self.reader.open(reference))

    def size(self, reference: str) -> tuple[int, int]:
        self.reader.size(reference)  # a picture that is not there has no size
        return self.side, self.side

    def digest(self, reference: str) -> str:
        digest: str = self.reader.digest(reference)
        return digest

    def mark(self, reference: str) -> bytes:
        mark: bytes = self.reader.mark(reference)
        return mark


def stretched(tested: Subject, side: int | None, default: int | None = None) -> Subject:
    """The subject that sees its pictures as squares of this side, or of the default; as it is where there is neither,
    or, without a side, where a device makes its pictures. UsageError for a side where a device does."""
    sight = require_sight(tested)
    if side is None and (default is None or sight.target):
        return tested
    if sight.target:
        raise UsageError(
            f"--image_size {side}: this model's images are prepared for its device ({sight.target.image_size} "
            "pixels, device.json); leave --image_size out"
        )
    seeing: Any = StretchedReader(sight.reader, side or default or 0)
    return replace(tested, renderer=replace(tested.renderer, sight=replace(sight, reader=seeing)))
