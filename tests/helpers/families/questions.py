"""What every family is asked. A question returns "" for yes, else what differs; the table holds nothing else.

    QUESTIONS["batch"](subject) ── "" ── or "row 'two images': logits differ by 0.24"

Here: what goes into the model and comes out of it. `trials` has the questions that run commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from families.commands import command, one_row
from families.subject import Subject, Tensors
from families.talks import TALKS
from rankwise.data.render import IGNORED
from rankwise.evaluate.generate import GenerationSettings, HFGenerator

NEAR = 1e-3  # logits are of the order of ten
NEW = 6  # tokens generated
MIXED = ("one image", "text only", "two images", "image last")
Question = Callable[[Subject], str]
QUESTIONS: dict[str, Question] = {}


def question(name: str) -> Callable[[Question], Question]:
    def entered(ask: Question) -> Question:
        QUESTIONS[name] = ask
        return ask

    return entered


def asked_of(name: str) -> Question:
    """Prompt ids and pixel inputs of one kind of conversation: the family's own, or refused by both."""

    def ask(subject: Subject) -> str:
        theirs = subject.refusal(name)
        if theirs:
            return "" if refused_row(subject, name) else f"the product takes what the family refuses ({theirs})"
        expected = subject.family.inputs(TALKS[name])
        return differences(subject.product.batch([name], answered=False), expected)

    return ask


def refused_row(subject: Subject, name: str) -> bool:
    """Whether `check` names this row."""
    code, _ = command(f"check --model_name {subject.folder} --data_path {one_row(subject, name)}", subject.work / "row")
    return code == 3


def differences(ours: Tensors, theirs: Tensors) -> str:
    """Where our inputs of one row are not the family's."""
    ours = {name: value for name, value in ours.items() if name not in ("labels", "sample_index")}
    if ours["input_ids"].tolist() != theirs["input_ids"].tolist():
        return f"ids: {parted(ours['input_ids'][0], theirs['input_ids'][0])}"
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours or name not in theirs:
            return f"{name} is given by {'the family' if name in theirs else 'the product'} only"
        if ours[name].shape != theirs[name].shape:
            return f"{name}: shape {tuple(ours[name].shape)}, the family's {tuple(theirs[name].shape)}"
        if not torch.equal(ours[name].to(theirs[name].dtype), theirs[name]):
            return f"{name}: values are not the family's"
    return ""


def parted(ours: Tensor, theirs: Tensor) -> str:
    length = min(len(ours), len(theirs))
    same = int((ours[:length] == theirs[:length]).long().cumprod(0).sum())
    return f"{len(ours)} tokens for {len(theirs)}, equal up to {same}"


for each in ("one image", "image last", "two images", "text only", "turns", "system"):
    question(each)(asked_of(each))


@question("labels")
def labels(subject: Subject) -> str:
    """What is learnt, decoded, is the answers with an end token behind each, in the family's ids of the whole."""
    for name in subject.talks:
        batch = subject.product.batch([name])
        ids, learnt = batch["input_ids"][0], batch["labels"][0]
        theirs = subject.family.inputs(TALKS[name], answered=True)["input_ids"][0]
        length = min(len(ids), len(theirs))
        if not torch.equal(ids[: length - 1], theirs[: length - 1]):
            return f"row {name!r}: ids of the whole conversation: {parted(ids, theirs)}"
        if not set(learnt.tolist()) - {IGNORED} or not torch.equal(learnt[learnt != IGNORED], ids[learnt != IGNORED]):
            return f"row {name!r}: labels are not ids of the same places"
        texts = [subject.family.processor.tokenizer.decode(run) for run in runs(ids, learnt)]
        ends = ended(subject, runs(ids, learnt))
        found = [text.removesuffix(end).strip() for text, end in zip(texts, ends, strict=True)]
        if found != list(TALKS[name].answers) or not all(ends):
            return f"row {name!r}: learnt is {texts!r}"
    return ""


def runs(ids: Tensor, learnt: Tensor) -> list[list[int]]:
    """Ids of each stretch that is learnt."""
    found: list[list[int]] = [[]]
    for token, label in zip(ids.tolist(), learnt.tolist(), strict=True):
        if label != IGNORED:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def ended(subject: Subject, found: Iterable[list[int]]) -> list[str]:
    """The end token of each run, "" where its last token is no special one."""
    tokenizer = subject.family.processor.tokenizer
    special = tokenizer.added_tokens_decoder
    return [tokenizer.decode(run[-1:]) if run[-1] in special else "" for run in found]


@question("forward")
def forward(subject: Subject) -> str:
    """Logits of each row alone are those of the family's own inputs; and they depend on the picture."""
    return near(subject, [[name] for name in subject.talks]) or sighted(subject)


def sighted(subject: Subject) -> str:
    """The tiny model looks at its pictures, or nothing here would tell right from wrong ones."""
    family = subject.family
    other = family.seeing({**family.pictures, "wide": family.pictures["wide"].rotate(180)})
    apart = (family.logits(TALKS["one image"])[-1] - other.logits(TALKS["one image"])[-1]).abs().max().item()
    return "" if apart > 10 * NEAR else f"another picture moves the family's own logits by {apart:.2g} only"


@question("batch")
def batch(subject: Subject) -> str:
    """Rows with one picture, two, none, of several shapes in one batch: each as alone in the family's own call."""
    return near(subject, [[name for name in MIXED if name in subject.talks], subject.talks[::-1]])


def near(subject: Subject, batches: Iterable[list[str]]) -> str:
    for names in batches:
        for name, ours in zip(names, subject.product.logits(names), strict=True):
            theirs = subject.family.logits(TALKS[name])
            length = min(len(ours), len(theirs)) - 1  # what a template writes behind the last end token is not learnt
            apart = (ours[:length] - theirs[:length]).abs().max().item()
            if not apart < NEAR:
                return f"row {name!r} of {len(names)}: logits differ by {apart:.2g}"
    return ""


@question("generation")
def generation(subject: Subject) -> str:
    """Greedy answers alone and in a padded batch are what the family's model generates from its own call."""
    renderer = subject.product.renderer
    names = subject.talks
    rows = [subject.product.examples[name] for name in names]
    expected = [subject.family.generated(TALKS[name], NEW, renderer.end_ids) for name in names]
    texts = [renderer.answer(ids) for ids in expected]
    for size in (1, len(names)):
        generator = HFGenerator(subject.product.model, renderer, GenerationSettings(NEW, batch_size=size))
        found = {each.position: each.text for each in generator.generate(rows)}
        for place, (name, text) in enumerate(zip(names, texts, strict=True)):
            if found[place] != text:
                return f"row {name!r} in batches of {size}: {found[place]!r} for {text!r}"
    return ""
