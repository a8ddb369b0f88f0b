"""Rendered samples as a torch data set, and as batches: checked once, tokenized when asked for, padded or packed.

    Example* ── RenderedDataset ── (pack ──▶ PackedDataset) ── Collator ──▶ {input_ids, labels, attention_mask, …}

transformers' collators need a pad token and read the tokenizer's padding side; `Collator` needs neither. Its masks part
a packed row where position ids start again at 0, in every attention implementation without a cache. That is a property
of the model's code, so `unpacked_difference` measures it on the model at hand before anyone relies on it.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rankwise.data.chat import TurnsApart
from rankwise.data.example import Example, NothingToLearn, View, answers_apart, chosen
from rankwise.data.images import BadImage
from rankwise.data.render import Overlong, Rendered, Renderer
from rankwise.data.vision_inputs import IGNORED, Sight
from rankwise.errors import DataError, UsageError
from rankwise.page.progress import progress


@dataclass(frozen=True)
class Checked:
    """What a check of all samples found: positions of the usable ones with their lengths, ids of the others.

    answers: for each usable one, which of its answers it teaches, counted from 1, where each answer is a sample of its
    own; 0 for all of them. bad: why samples cannot be rendered, where the renderer skips them. digest: of all that is
    learnt, in order: ids, labels, and of pictures their names and sizes with a piece of each.
    """

    usable: tuple[int, ...]
    lengths: tuple[int, ...]
    dropped: tuple[str, ...]
    refused: tuple[str, ...]
    truncated: int
    answers: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()
    digest: str = ""

    def notes(self) -> list[str]:
        """Sentences for the user about samples that do not enter as they are; empty when all do."""
        lines = []
        if self.dropped:
            lines.append(f"warning: {len(self.dropped)} samples dropped, longer than the limit: {_some(self.dropped)}")
        if self.truncated:
            lines.append(f"warning: the source of {self.truncated} samples was cut to the limit")
        if self.refused:
            lines.append(f"warning: {len(self.refused)} samples refused, nothing to learn: {_some(self.refused)}")
        if self.bad:
            shown = "".join(f"\n    {reason}" for reason in self.bad[:5])
            lines.append(f"warning: {len(self.bad)} bad samples skipped:{shown}")
        if any(self.answers):
            rows = len({row for row, answer in zip(self.usable, self.answers, strict=True) if answer})
            lines.append(
                f"note: {rows} conversations become {sum(map(bool, self.answers))} samples, one for each answer: the "
                "chat template renders earlier answers otherwise than they were given"
            )
        return lines


def outcomes(
    example: Example, renderer: Renderer, *, prompts: bool = False
) -> list[tuple[Example, Rendered | ValueError]]:
    """The sample as training sees it (`prompts`: its prompt), rendered, or why it cannot be: one, or one for each of
    its answers where the chat template renders earlier answers otherwise than they were given."""
    try:
        return [(example, renderer.prompt(example) if prompts else renderer.training(example))]
    except TurnsApart:
        return [outcome for part in answers_apart(example) for outcome in outcomes(part, renderer)]
    except UsageError:
        raise
    except ValueError as error:  # a plain one is what an image processor says of a picture's form
        return [(example, error)]


def check_samples(examples: Sequence[Example], renderer: Renderer, *, prompts: bool = False) -> Checked:
    """Render every sample once, whole as for training, or with `prompts` up to the answer as for generation.

    Overlong ones raise, with their number and the longest, unless the renderer drops or cuts; samples that cannot be
    rendered raise unless it skips them; samples without a label are refused by id; DataError if no sample is left.
    """
    usable, lengths, answers, truncated = [], [], [], 0
    refused: list[str] = []
    bad: list[str] = []
    overlong: list[tuple[int, str]] = []
    digest = hashlib.sha256()
    for position, example in enumerate(progress(examples, desc="tokenize", unit="sample")):
        for number, (sample, rendered) in enumerate(outcomes(example, renderer, prompts=prompts), 1):
            if isinstance(rendered, Rendered):
                usable.append(position)
                lengths.append(len(rendered.input_ids))
                answers.append(number if sample is not example else 0)
                truncated += rendered.truncated
                for piece in () if prompts else pieces(rendered, renderer):
                    digest.update(piece)
            elif isinstance(rendered, NothingToLearn):
                refused.append(sample.id)
            elif isinstance(rendered, Overlong):
                overlong.append((rendered.needed, sample.id))
            elif renderer.skip_bad and not isinstance(rendered, BadImage):
                bad.append(str(rendered))
            elif isinstance(rendered, BadImage):
                raise rendered
            else:
                ways = "leave such samples out with --skip_bad; `rankwise check` lists all of them"
                raise DataError(f"{rendered}; {ways}") from rendered
    if overlong and renderer.overlong != "drop":
        raise _too_long(overlong, len(examples), renderer, renderer.limit - renderer.reserve * prompts)
    if not usable:
        raise DataError(
            f"none of {len(examples)} samples can be used: {len(overlong)} longer than {renderer.limit} tokens, "
            f"{len(refused)} with all labels masked ({_some(refused)}), {len(bad)} bad ({'; '.join(bad[:2])})"
        )
    dropped = tuple(sample for _, sample in overlong)
    rest = tuple(answers), tuple(bad), digest.hexdigest()
    return Checked(tuple(usable), tuple(lengths), dropped, tuple(refused), truncated, *rest)


def pieces(rendered: Rendered, renderer: Renderer) -> Iterator[bytes]:
    """Learnt tokens of a sample, as bytes."""
    yield array("q", rendered.input_ids).tobytes()
    yield array("q", rendered.labels).tobytes()
    if renderer.sight is not None:
        for reference in rendered.images:
            yield reference.encode()
            yield renderer.sight.reader.mark(reference)


@dataclass(frozen=True)
class AnswerRows(View):
    """Rows as samples: each whole, or one of its answers with what was said before it (see `Checked.answers`)."""

    rows: Sequence[Example]
    answers: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def made(self, index: int) -> Example:
        answer, row = self.answers[index], self.rows[index]
        return answers_apart(row)[answer - 1] if answer else row


class RenderedDataset(Dataset[dict[str, Any]]):
    """Samples as {input_ids, labels, sample_index, images}; `sample_index` is the position here, `sample_id` its name.

    With the Trainer pass `remove_unused_columns=False`, or the index is taken out before the collator sees it.
    """

    def __init__(self, examples: Sequence[Example], renderer: Renderer) -> None:
        self.renderer = renderer
        self.checked = check_samples(examples, renderer)
        rows = chosen(examples, self.checked.usable)
        self.examples = AnswerRows(rows, self.checked.answers) if any(self.checked.answers) else rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.checked.lengths

    def notes(self) -> list[str]:
        return self.checked.notes()

    def sample_id(self, index: int) -> str:
        return self.examples[index].id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rendered = self.renderer.training(self.examples[index])
        ids, labels = rendered.input_ids, rendered.labels
        return {"input_ids": ids, "labels": labels, "sample_index": index, "images": rendered.images}


def _too_long(overlong: Sequence[tuple[int, str]], total: int, renderer: Renderer, limit: int) -> DataError:
    needed, sample = max(overlong)
    cut = renderer.overlong == "truncate_source"
    longer = " without their sources (those with images are never cut)" if cut else ""
    ways = "--overlong drop" if cut else "--overlong drop or --overlong truncate_source"
    return DataError(
        f"{len(overlong)} of {total} samples are longer than {limit} tokens{longer}; the longest, "
        f"{sample}, needs {needed}. Raise --max_seq_length, or pass {ways}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class Collator:
    """Batch of samples {input_ids, labels, sample_index, images} → tensors (batch, length), `sample_index` (samples,).

    Rows of several samples carry `position_ids`, which part them, and get no attention mask. The images of all
    samples, in order, become what the model's family takes (`Sight.seen`); they are decoded here, in the workers of
    a data loader.

    pad_id may equal the end token: attention mask and labels come from lengths. multiple_of: pad lengths up to it
    (8 suits tensor cores).
    """

    pad_id: int
    multiple_of: int = 1
    sight: Sight | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, multiple_of: int = 1, sight: Sight | None = None) -> Collator:
        """The tokenizer's pad token; without one any id will do, since it is masked."""
        pad = tokenizer.pad_token_id
        return cls(0 if pad is None else pad, multiple_of, sight)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": pad([sample["input_ids"] for sample in samples], width, self.pad_id),
            "labels": pad([sample["labels"] for sample in samples], width, IGNORED),
        }
        if "position_ids" in samples[0]:
            batch["position_ids"] = pad([sample["position_ids"] for sample in samples], width, 0)
        else:
            batch["attention_mask"] = pad([[1] * length for length in lengths], width, 0)
        if "sample_index" in samples[0]:
            batch["sample_index"] = torch.cat([torch.tensor(sample["sample_index"]).view(-1) for sample in samples])
        images = [sample.get("images", ()) for sample in samples]
        return batch | seen(self.sight, batch["input_ids"], images, batch["labels"])


def seen(
    sight: Sight | None, ids: Tensor, images: Sequence[Sequence[str]], labels: Tensor | None = None
) -> dict[str, Tensor]:
    """`Sight.seen`; nothing for a model that takes no images."""
    return {} if sight is None else sight.seen(ids, images, labels)


def pad(rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False) -> Tensor:
    """Rows of ids as one tensor (rows, width), filled with `value` on the right, or on the left."""
    padded = torch.full((len(rows), width), value)
    for target, row in zip(padded, rows, strict=True):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        target[part] = torch.tensor(row, dtype=padded.dtype)
    return padded


def pack(lengths: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Positions of samples, binned so that no bin holds more than `limit` tokens.

    Longest first, each into the emptiest bin that has room for it (worst fit decreasing): near the least number of
    bins, in n log n, and bins alike in length.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (−free tokens, bin): the emptiest on top
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        if room and -room[0][0] >= lengths[position]:
            free, number = heapq.heappop(room)
            bins[number].append(position)
        else:
            free, number = -limit, len(bins)
            bins.append([position])
        heapq.heappush(room, (free + lengths[position], number))
    return [tuple(sorted(one)) for one in bins]


class PackedDataset(Dataset[dict[str, Any]]):
    """Bins of a RenderedDataset's samples; each item is one row of up to `limit` tokens."""

    def __init__(self, rows: RenderedDataset, limit: int) -> None:
        self.rows = rows
        self.bins = pack(rows.lengths, limit)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sum(self.rows.lengths[position] for position in one) for one in self.bins)

    def sample_id(self, index: int) -> str:
        """Name of a sample: `sample_index` holds positions of samples, not of bins."""
        return self.rows.sample_id(index)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = [self.rows[position] for position in self.bins[index]]
        return {
            "input_ids": [token for sample in samples for token in sample["input_ids"]],
            # The first token of a sample would be predicted from the sample before it.
            "labels": [label for sample in samples for label in (IGNORED, *sample["labels"][1:])],
            "position_ids": [place for sample in samples for place in range(len(sample["input_ids"]))],
            "sample_index": list(self.bins[index]),
        }


@torch.no_grad()
def unpacked_difference(model: nn.Module, packed: PackedDataset, collate: Collator) -> float:
    """Largest difference between the logits of samples packed into one row and of each alone, relative to the
    largest logit: about 1e-6 in float32 where the model keeps them apart, near 1 where it mixes them."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    together = packed[max(range(len(packed)), key=lambda index: len(packed.bins[index]))]
    batch = {name: value.to(device) for name, value in collate([together]).items() if name != "sample_index"}
    whole, start, worst = model(**batch, use_cache=False).logits[0].float(), 0, 0.0
    for position in together["sample_index"]:
        ids = torch.tensor([packed.rows[position]["input_ids"]], device=device)
        alone = model(input_ids=ids).logits[0].float()
        part = whole[start : start + len(alone)]
        worst = max(worst, float((part - alone).abs().max() / alone.abs().max()))
        start += len(alone)
    model.train(training)
    return worst
