"""Examine a data set before a GPU is used: decode every picture, make tokens of every sample, name all that is bad.

    findings = examine(load("conversations", "train.json", how=DataSection(skip_bad=True)), reader, renderer)
    findings.problems      # sample, line, kind, reason: all of them, not the first

Training refuses the same samples by the same code; this finds them all at once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from rankwise.data.chat import TemplateRefused
from rankwise.data.check.comparison import Differs, Oracle, Sample
from rankwise.data.dataset import outcomes
from rankwise.data.example import IMAGE_SLOT, Example, Examples, NothingToLearn
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.render import Overlong, Rendered, Renderer
from rankwise.data.sources.slots import short_name
from rankwise.data.template import without_images
from rankwise.data.vision_inputs import IGNORED
from rankwise.errors import DataError
from rankwise.files.processes import default_workers
from rankwise.page.progress import progress

KINDS = ("row", "image", "overlong", "labels", "text", "template", "differs", "model")
COMPARED = 256  # samples compared with their chat template at once
TRIED = 4  # samples with as many images that are kept for the model to run


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used.

    kind: `row` (it is no sample), `image` (one that cannot be used), `overlong` (`needed` tokens are over the limit),
    `labels` (nothing to learn), `text` (the tokenizer or the chat template cannot say it), `template` (the chat
    template refuses it) `differs` (its ids, labels or pixels are not those of the chat template)
    or `model` (the model does not take it, or makes something else of it).
    """

    kind: str
    reason: str
    sample: str | None
    line: int | None
    needed: int | None = None

    @classmethod
    def of(cls, example: Example, error: Exception) -> Problem:
        kind = next(name for error_class, name in _KIND_OF.items() if isinstance(error, error_class))
        needed = error.needed if isinstance(error, Overlong) else None
        return cls(kind, str(error), example.id, example.line or None, needed)

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        known = self.sample is None or self.reason.startswith(f"sample {self.sample}")
        return f"{where}{self.reason}" if known else f"{where}sample {self.sample}: {self.reason}"

    def record(self) -> dict[str, Any]:
        """One line of the list of bad samples."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# A plain ValueError is what an image processor says of a picture's form (too long and thin, say).
_KIND_OF = {
    BadImage: "image",
    Overlong: "overlong",
    NothingToLearn: "labels",
    TemplateRefused: "template",
    Differs: "differs",
    DataError: "text",
    ValueError: "image",
}


@dataclass
class Findings:
    """What an examination found.

    samples: rows that are samples, good or bad. images: how often samples name one; pictures: how many different ones
    were decoded, None where none was looked at.
    lengths: tokens of each sample that could be rendered, of those over the limit too. The token counts are of the
    usable samples. truncated: samples whose source was cut to the limit. apart: samples that conversations became whose
    answers are learnt one by one. changes: rows by what was done to them.
    control, special: samples whose texts hold control tokens, which are text there, or other special tokens of the
    tokenizer, which are read as such, by token.
    compared: samples compared with the chat template; seen: those with ids and pixels.
    """

    samples: int = 0
    changes: Mapping[str, int] = field(default_factory=dict)
    control: Counter[str] = field(default_factory=Counter)
    special: Counter[str] = field(default_factory=Counter)
    images: int = 0
    pictures: int | None = None
    problems: list[Problem] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    usable: int = 0
    tokens: int = 0
    image_tokens: int = 0
    label_tokens: int = 0
    truncated: int = 0
    apart: int = 0
    compared: int = 0
    seen: int = 0
    shortest: dict[int, list[tuple[Example, Rendered]]] = field(default_factory=dict)
    tried: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, rendered: Rendered, placeholder_id: int | None) -> None:
        """Add a usable sample, or a part of one."""
        self.lengths.append(len(rendered.input_ids))
        self.tokens += len(rendered.input_ids)
        self.label_tokens += sum(label != IGNORED for label in rendered.labels)
        self.truncated += rendered.truncated
        if placeholder_id is not None:
            self.image_tokens += rendered.input_ids.count(placeholder_id)

    def keep(self, example: Example, rendered: Rendered) -> None:
        """Keep a usable sample for a trial of the model, where it is among the shortest with as many images."""
        kept = self.shortest.setdefault(len(rendered.images), [])
        kept.append((example, rendered))
        kept.sort(key=lambda row: len(row[1].input_ids))
        del kept[TRIED:]

    def bad(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


def examine(
    examples: Examples,
    reader: ImageReader | None,
    renderer: Renderer | None,
    workers: int | None = None,
    compare: int = 8,
) -> Findings:
    """Find every sample that training could not use.

    reader: where the images are; None leaves them alone, as a text model does. renderer: None leaves tokens out.
    workers: processes that decode; one per core by default, 8 at most, 0 for this one. compare: samples with images of
    which ids and pixels are compared with the processor's own.
    """
    problems = [Problem("row", row.reason, row.sample, row.line) for row in examples.skipped]
    findings = Findings(len(examples), examples.changes, problems=problems)
    unusable: dict[str, str] = {}
    if reader is not None and examples.with_images:
        places = _first_places(examples.items)
        findings.pictures = len(places)
        unusable = _undecodable(_Pictures(examples.items, places, reader), workers)
    comparison = _Comparison(findings, renderer, _spread(examples, compare))
    for example in progress(examples.items, desc="samples", unit="sample", leave=True):
        findings.images += len(example.images)
        named = dict.fromkeys(map(short_name, example.images))
        broken = [BadImage(unusable[name]) for name in named if name in unusable]
        findings.problems += [Problem.of(example, error) for error in broken]
        if not broken:
            _render(example, renderer, findings, comparison)
    comparison.finish()
    return findings


def _render(example: Example, renderer: Renderer | None, findings: Findings, comparison: _Comparison) -> None:
    found = [] if renderer is None else outcomes(example, renderer)
    if renderer is not None and isinstance(found[0][1], Rendered):
        _count_tokens(example, renderer, findings)
    token = renderer.sight.placeholder_id if renderer and renderer.sight else None
    bad = 0
    for sample, rendered in found:
        if isinstance(rendered, Rendered):
            findings.count(rendered, token)
            comparison.add(sample, rendered)
            if token is not None:
                findings.keep(sample, rendered)
        else:
            problem = Problem.of(sample, rendered)
            findings.problems.append(problem)
            findings.lengths.extend([problem.needed] if problem.needed is not None else [])
            bad += 1
    findings.usable += not found or bad < len(found)
    findings.apart += len(found) if len(found) > 1 else 0


def _count_tokens(example: Example, renderer: Renderer, findings: Findings) -> None:
    """Tokens that stand as letters in the texts of a usable sample."""
    text = "\n".join(turn.text.replace(IMAGE_SLOT, "") for turn in example.turns)
    control = set(renderer.encoder.control.findall(text))
    findings.control.update(control)
    findings.special.update(set(renderer.special.findall(text)) - control)


def _spread(examples: Examples, count: int) -> frozenset[str]:
    """Ids of this many samples with images, evenly from first to last."""
    seen = [example.id for example in examples.items if example.images] if count and examples.with_images else []
    places = range(min(count, len(seen)))
    return frozenset(seen[place * len(seen) // len(places)] for place in places)


class _Comparison:
    """Rendered samples compared with the chat template, many at once; nothing without one.

    looked_at: ids of the samples with images whose pixels are compared too.
    """

    def __init__(self, findings: Findings, renderer: Renderer | None, looked_at: frozenset[str]) -> None:
        self.findings, self.looked_at = findings, looked_at
        self.oracle = Oracle(renderer) if renderer and renderer.style == "chat" else None
        self.waiting: list[Sample] = []

    def add(self, example: Example, rendered: Rendered) -> None:
        if self.oracle is None:
            return
        renderer = self.oracle.renderer
        given = example if renderer.sight else without_images(example)
        self.waiting.append((given, rendered, renderer.prompt_ids(example)))
        if len(self.waiting) == COMPARED:
            self.finish()

    def finish(self) -> None:
        """Compare what has been added."""
        if self.oracle is None or not self.waiting:
            return
        different = dict(self._found(self.oracle))
        self.findings.problems += [Problem.of(*pair) for pair in different.values()]
        self.findings.compared += sum(not rendered.truncated for _, rendered, _ in self.waiting)
        self.waiting = []

    def _found(self, oracle: Oracle) -> Iterator[tuple[str, tuple[Example, Differs]]]:
        """By sample; of two reasons for one, the last."""
        for example, error in oracle.differences(self.waiting):
            yield example.id, (example, error)
        for example, rendered, prompt in self.waiting:
            if rendered.images and example.id.split("#")[0] in self.looked_at:
                self.findings.seen += 1
                if (seen := oracle.difference_seen(example, rendered, prompt)) is not None:
                    yield example.id, (example, seen)


def _first_places(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(sample, image of it) where each different picture is named first."""
    seen: set[str] = set()
    places = []
    for position, example in enumerate(examples):
        for number, reference in enumerate(example.images):
            name = short_name(reference)
            if name not in seen:
                seen.add(name)
                places.append((position, number))
    return places


class _Pictures(Dataset[tuple[str, str]]):
    """(short name, why it cannot be used or "") of each different picture, decoded when asked."""

    def __init__(self, examples: Sequence[Example], places: Sequence[tuple[int, int]], reader: ImageReader) -> None:
        self.examples, self.places, self.reader = examples, places, reader

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, str]:
        position, number = self.places[index]
        reference = self.examples[position].images[number]
        try:
            self.reader.open(reference)
        except BadImage as error:
            return short_name(reference), str(error)
        return short_name(reference), ""


def _undecodable(pictures: _Pictures, workers: int | None) -> dict[str, str]:
    """Short name → reason of every picture that cannot be used."""
    count = min(default_workers() if workers is None else workers, len(pictures))
    loaded = DataLoader(pictures, batch_size=None, num_workers=count)
    found = progress(loaded, desc="decode", total=len(pictures), unit="image")
    return {name: reason for name, reason in found if reason}


@dataclass(frozen=True)
class Bin:
    """Samples of low to high tokens, both included."""

    low: int
    high: int
    count: int


def histogram(lengths: Sequence[int], most: int = 12) -> list[Bin]:
    """Lengths in at most `most` bins of one round width (1, 2 or 5 times a power of ten); none for no lengths."""
    if not lengths:
        return []
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if max(lengths) // width - min(lengths) // width < most)
    first, last = min(lengths) // width, max(lengths) // width
    counts = [0] * (last - first + 1)
    for length in lengths:
        counts[length // width - first] += 1
    return [Bin((first + place) * width, (first + place + 1) * width - 1, count) for place, count in enumerate(counts)]
