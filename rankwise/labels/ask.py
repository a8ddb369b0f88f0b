"""The part of `label` that asks a teacher: photos in an order that the seed decides → rows, quarantine, cost."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.label_task import LabelTask
from rankwise.errors import Interrupted, ServiceError
from rankwise.files.atomic import write_text
from rankwise.labels.coco import ImageSet, Photo, select
from rankwise.labels.dataset import LabelledRow, pixel_hash, store_image
from rankwise.labels.image_ids import ImageIds
from rankwise.labels.teacher.answers import Verdict, agreement
from rankwise.labels.teacher.client import OFFICIAL, Teacher, address_of
from rankwise.labels.teacher.ledger import DEFAULT_BUDGET, AnswerLedger, Entry, Key, Prices, Spending, prices_of
from rankwise.labels.teacher.ledger import NAME as LEDGER
from rankwise.labels.teacher.loopback import MODEL as LOOPBACK
from rankwise.labels.teacher.loopback import LoopbackTeacher
from rankwise.labels.teacher.questions import Asker, Picture, Question, collect
from rankwise.options.label import LabelConfig, TeacherSection
from rankwise.page.text import plural

QUARANTINE = "quarantine.jsonl"
MENTIONED = 3


def teacher_facts(
    section: TeacherSection, model: str, question: Question, ledger: AnswerLedger, address: str
) -> dict[str, Any]:
    served_by = {entry.reply.served_by for entry in ledger.entries if entry.key.model == model}
    return {
        "model": model,
        "served_by": sorted(name for name in served_by if name),
        "service": "loopback: labels by colours alone" if section.loopback_teacher else address,
        "detail": section.detail,
        "response_format": section.response_format,
        "temperature": section.temperature,
        "votes": section.votes,
        "question_sha256": question.digest,
        "bad_ledger_lines": ledger.bad,
    }


def agreement_facts(verdicts: Iterable[Verdict], task: LabelTask, votes: int) -> dict[str, Any] | None:
    """Over the images whose votes are all there; None for one vote."""
    whole = [verdict.votes for verdict in verdicts if len(verdict.votes) == votes]
    found = agreement(whole, task.labels)
    return found.as_dict() if found else None


def save_quarantine(
    folder: Path, verdicts: Iterable[Verdict], digests: dict[str, str], ledger: AnswerLedger, question: Question
) -> Path:
    """The images without a label, with all that was answered to this question. digests: of the pixels, by image id."""
    said: dict[str, list[str]] = {}
    for entry in ledger.entries:
        if entry.key.task == question.digest:
            said.setdefault(entry.key.image, []).append(entry.reply.refusal or entry.reply.text)
    rows = [
        {"image_id": verdict.image_id, "problem": verdict.problem, "answers": said.get(digests[verdict.image_id], [])}
        for verdict in verdicts
        if verdict.content is None
    ]
    return write_text(folder / QUARANTINE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tell_of_ledger(ledger: AnswerLedger, question: Question, model: str, address: str, again: bool) -> None:
    """What stands in the ledger and is not what it seems, before anything is asked."""
    for line in ledger.bad[:MENTIONED]:
        _warn(f"{ledger.path}, {line}: not an answer of a teacher; it stays there, and is not used")
    if len(ledger.bad) > MENTIONED:
        _warn(f"{ledger.path}: {len(ledger.bad) - MENTIONED} more lines are no answers")
    if ledger.faults:
        _warn(f"{ledger.path}: {ledger.faults} error pages, stored as answers by an earlier version, are asked again")
    asked = [entry for entry in ledger.entries if (entry.key.task, entry.key.model) == (question.digest, model)]
    for other, count in Counter(entry.address for entry in asked).items():
        if other not in (None, address) and not again:
            advice = "--ask_again asks for them anew"
            _warn(f"{ledger.path}: {count} answers of {model} are of {other}, and count for {address}; {advice}")


def reason_for_nothing(verdicts: Sequence[Verdict], min_confidence: float) -> str:
    """Why no image of those asked about was kept."""
    unusable = [verdict for verdict in verdicts if not verdict.votes]
    tied = [verdict for verdict in verdicts if verdict.votes and verdict.content is None]
    unsure = [verdict.confidence for verdict in verdicts if verdict.content is not None]
    reasons = []
    if unusable:
        last = unusable[-1]
        reasons.append(f"{len(unusable)} got no usable answer (the last, {last.image_id}: {last.problem})")
    if tied:
        reasons.append(f"{len(tied)} got votes that tie")
    if unsure:
        reasons.append(
            f"{len(unsure)} got a confidence below --min_confidence {min_confidence} (the highest: {max(unsure):.2f})"
        )
    return "; ".join(reasons)


def _warn(text: str) -> None:
    print(f"rankwise: {text}", file=sys.stderr)


@dataclass(frozen=True)
class Trial:
    """Verdicts on a few images with the answers behind them; rest: how many images are left to ask about, about."""

    verdicts: Sequence[Verdict]
    entries: dict[str, list[Entry]]
    rest: int
    budget: float | None

    def lines(self) -> list[str]:
        """The trial for people: image, answer, tokens, price; then what the rest will cost at that price."""
        lines = [f"trial: {plural(len(self.verdicts), 'image')}"]
        width = max(len(verdict.image_id) for verdict in self.verdicts)
        for verdict in self.verdicts:
            entries = self.entries[verdict.image_id]
            lines.append(f"  {verdict.image_id:<{width}}  {said(verdict)}  ({cost(entries)})")
        everything = [entry for entries in self.entries.values() for entry in entries]
        usd = [entry.usd for entry in everything if entry.usd is not None]
        left = f"the rest: about {plural(self.rest, 'image')}"
        if usd and len(usd) == len(everything):
            left += f", ${sum(usd) / len(self.verdicts) * self.rest:.2f} at this price"
        limit = "no budget: no prices are known" if self.budget is None else f"--budget_usd {self.budget:.2f}"
        return [*lines, f"{left} ({limit})"]


def said(verdict: Verdict) -> str:
    if verdict.content is None:
        return f"no label: {verdict.problem}"
    return f"{max(set(verdict.votes), key=verdict.votes.count)} {verdict.confidence:.2f}"


def cost(entries: Sequence[Entry]) -> str:
    """Tokens and dollars of the answers to one image."""
    if not entries:
        return "no answer"
    counts = [(entry.reply.input_tokens, entry.reply.output_tokens) for entry in entries]
    if any(None in pair for pair in counts):
        tokens = "tokens not told"
    else:
        tokens = f"{sum(pair[0] or 0 for pair in counts)} + {sum(pair[1] or 0 for pair in counts)} tokens"
    usd = [entry.usd for entry in entries]
    return tokens if None in usd else f"{tokens}, ${sum(each or 0 for each in usd):.4f}"


def remaining(verdicts: Sequence[Verdict], kept: int, wanted: int, there: int) -> int:
    """How many more images will be asked about, if as large a share of them is kept."""
    share = kept / len(verdicts) if kept else 1 / len(verdicts)
    return min(there - len(verdicts), math.ceil((wanted - kept) / share))


def is_due(size: int, wanted: int, there: int, ledger: AnswerLedger, asker_key: tuple[str, str]) -> bool:
    """Whether a trial of this size comes first: not where no more is wanted, and not where a run went past it."""
    asked = {entry.key.image for entry in ledger.entries if (entry.key.task, entry.key.model) == asker_key}
    return 0 < size < min(wanted, there) and len(asked) <= size


def ask_to_go_on(yes: bool) -> None:
    """A question at a terminal; scripts and runs in the background go on. Interrupted where the answer is no."""
    if yes or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        answer = input("ask about the rest? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().casefold() not in ("y", "yes"):
        raise Interrupted("stopped after the trial", signal.SIGINT)


NO_LIMIT = 600_000.0  # requests per minute of a teacher on this machine


@dataclass
class Gathering:
    """Photos on their way to rows: read as they are needed, stored once their label is kept."""

    config: LabelConfig
    task: LabelTask
    target: DeviceTarget
    reader: DeviceReader
    photos: tuple[Photo, ...]
    ids: ImageIds
    verdicts: list[Verdict] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    rows: list[LabelledRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)
    _held: dict[str, Image.Image] = field(default_factory=dict)

    def pictures(self) -> Iterator[Picture]:
        """What the teacher is to see, one by one. Pixels that came before would get the same answer: left out."""
        seen: set[str] = set()
        for photo in self.photos:
            image = self._seen_by_device(photo)
            if image is None:
                continue
            digest = pixel_hash(image)
            if digest in seen:
                self.twins.append(photo.reference)
                continue
            seen.add(digest)
            name = self.ids.claim(photo, digest)
            self._held[name], self.digests[name], self.references[name] = image, digest, photo.reference
            yield Picture(name, digest, self.target.jpeg(image))

    def _seen_by_device(self, photo: Photo) -> Image.Image | None:
        try:
            return self.reader.open(photo.reference)
        except BadImage as error:
            if not self.config.skip_bad:
                raise BadImage(f"{error}; or leave such images out with --skip_bad true") from error
            self.skipped.append(str(error))
            return None

    def keep(self, verdict: Verdict) -> bool:
        return verdict.content is not None and verdict.confidence >= self.config.min_confidence

    def take(self, verdict: Verdict) -> None:
        """Enter a verdict; store the image of one that is kept, and its row."""
        image = self._held.pop(verdict.image_id)
        self.verdicts.append(verdict)
        if verdict.content is not None and self.keep(verdict):
            stored = store_image(Path(self.config.output_dir), verdict.image_id, image, self.target)
            self.rows.append(LabelledRow.of_answer(verdict.image_id, stored, verdict.content, self.task))


@dataclass(frozen=True)
class Labelled:
    """What asking has given. facts: for label.json; references: of the images, by id."""

    rows: list[LabelledRow]
    facts: dict[str, Any]
    verdicts: list[Verdict]
    references: dict[str, str]
    spending: Spending


@dataclass(frozen=True)
class Asking:
    """A teacher, where it is, and what was asked of it before. settings: of the one that answers, the loopback say."""

    settings: TeacherSection
    section: TeacherSection
    address: str
    question: Question
    ledger: AnswerLedger

    def spending(self, before: Spending | None = None) -> Spending:
        """What the data set has cost so far."""
        found = spending_of(self.section, self.question, self.ledger)
        found.may_be_charged = before.may_be_charged if before else 0
        return found

    def verdicts(
        self,
        pictures: Iterable[Picture],
        wanted: int,
        keep: Callable[[Verdict], bool],
        seen: Callable[[Verdict], None],
        spending: Spending,
    ) -> list[Verdict]:
        """What the teacher says of the first pictures of which so many are kept."""
        section = self.section

        async def work() -> list[Verdict]:
            async with Teacher(self.settings, spending) as teacher:
                asker = Asker(
                    teacher,
                    self.ledger,
                    self.question,
                    section.votes,
                    address=self.address,
                    again=section.ask_again,
                    max_unusable=section.max_unusable,
                )
                return await collect(asker, pictures, wanted, keep, seen)

        return asyncio.run(work())


def ask_teacher(
    config: LabelConfig, images: ImageSet, task: LabelTask, target: DeviceTarget, ledger: AnswerLedger, ids: ImageIds
) -> Labelled:
    """Ask until enough rows are kept. Raises ServiceError and Interrupted with the cost so far. However it ends, the
    images without a label are in quarantine.jsonl."""
    section, question = config.teacher, question_of(config.teacher, task, target)
    photos, address = select(images.photos, None, config.seed), where(section)
    reader = DeviceReader(ImageReader(images.folder, config.allow_outside), target)
    tried, gathering = (Gathering(config, task, target, reader, photos, ids) for _ in range(2))
    with serving(section) as served:
        asking = Asking(served, section, address, question, ledger)
        tell_of_ledger(ledger, question, asking.settings.teacher_model, address, section.ask_again)
        spending = asking.spending()
        if section.budget_usd is None and spending.budget_usd is not None:
            print(f"budget: ${spending.budget_usd:.2f}, the default; another one: --budget_usd")
        try:
            if trial_is_due(asking, gathering):
                try_out(asking, tried, spending)
            spending = asking.spending(spending)
            verdicts = asked(asking, gathering, spending)
        except (ServiceError, Interrupted) as error:
            raise explained(error, spending, gathering if gathering.verdicts else tried) from error
        finally:
            seen = {verdict.image_id: verdict for verdict in (*tried.verdicts, *gathering.verdicts)}
            save_quarantine(Path(config.output_dir), seen.values(), tried.digests | gathering.digests, ledger, question)
    unanswered = [verdict for verdict in verdicts if not verdict.answered]
    if unanswered and not gathering.rows:
        silence = ServiceError(f"{len(unanswered)} images got no answer: {unanswered[-1].problem}")
        raise explained(silence, spending, gathering)
    facts = {
        "teacher": teacher_facts(section, asking.settings.teacher_model, question, ledger, address),
        "images": images_facts(images, gathering, verdicts),
        "cost": spending.as_dict(),
        "agreement": agreement_facts(verdicts, task, section.votes),
    }
    return Labelled(gathering.rows, facts, verdicts, gathering.references, spending)


def asked(asking: Asking, gathering: Gathering, spending: Spending) -> list[Verdict]:
    """The verdicts, with a bar of the rows kept."""
    wanted = gathering.config.num_images
    with tqdm(total=wanted, unit="row", desc="label", disable=None) as bar:

        def seen(verdict: Verdict) -> None:
            gathering.take(verdict)
            bar.set_postfix_str("" if spending.usd is None else f"${spending.usd:.2f}", refresh=False)
            bar.update(gathering.keep(verdict))

        return asking.verdicts(gathering.pictures(), wanted, gathering.keep, seen, spending)


# --- the trial ----------------------------------------------------------------------------------------------------


def trial_is_due(asking: Asking, gathering: Gathering) -> bool:
    section, wanted, there = asking.section, gathering.config.num_images, len(gathering.photos)
    key = (asking.question.digest, asking.settings.teacher_model)
    return not section.loopback_teacher and is_due(section.trial, wanted, there, asking.ledger, key)


def try_out(asking: Asking, gathering: Gathering, spending: Spending) -> None:
    """Ask about a few images, show what came, and at a terminal whether to go on. Interrupted where it is not."""
    section, config = asking.section, gathering.config
    verdicts = asking.verdicts(
        gathering.pictures(), section.trial, lambda verdict: True, gathering.verdicts.append, spending
    )
    entries = {
        verdict.image_id: [
            entry
            for vote in range(section.votes)
            for entry in asking.ledger.of(
                Key(gathering.digests[verdict.image_id], asking.question.digest, asking.settings.teacher_model, vote)
            )
        ]
        for verdict in verdicts
    }
    rest = remaining(verdicts, sum(map(gathering.keep, verdicts)), config.num_images, len(gathering.photos))
    print("\n".join(Trial(verdicts, entries, rest, spending.budget_usd).lines()), flush=True)
    ask_to_go_on(section.yes)


def explained(
    error: ServiceError | Interrupted, spending: Spending, gathering: Gathering
) -> ServiceError | Interrupted:
    """The same error with the cost so far and how to go on."""
    kept, wanted = sum(map(gathering.keep, gathering.verdicts)), gathering.config.num_images
    text = (
        f"{str(error).rstrip('.')}. So far: {spending.words()}; {kept} of {wanted} rows kept. All answers are in "
        f"{gathering.config.output_dir}/{LEDGER}: the same command goes on from there and pays for none of them again"
    )
    if kept:
        text += f"; with --num_images {kept} it makes a data set of what there is"
    return Interrupted(text, error.exit_code - 128) if isinstance(error, Interrupted) else ServiceError(text)


# --- from the command's options to the teacher's own settings -----------------------------------------------------


@contextmanager
def serving(section: TeacherSection) -> Iterator[TeacherSection]:
    """The options with a service that is there: `--loopback_teacher` starts its own."""
    with LoopbackTeacher() if section.loopback_teacher else nullcontext() as loopback:
        if loopback is None:
            yield section
        else:
            yield replace(
                section,
                base_url=loopback.url,
                teacher_model=LOOPBACK,
                openai_api_key="none",  # whatever key is in the environment is nobody's business here
                requests_per_minute=max(section.requests_per_minute, NO_LIMIT),
            )


def where(section: TeacherSection) -> str:
    """The address of the teacher, as it is recorded."""
    return LOOPBACK if section.loopback_teacher else address_of(section.base_url)


def question_of(section: TeacherSection, task: LabelTask, target: DeviceTarget) -> Question:
    return Question(task, section.detail, section.response_format, section.temperature, target.jpeg_quality)


def spending_of(section: TeacherSection, question: Question, ledger: AnswerLedger | None = None) -> Spending:
    """What the data set has cost so far, and the limit. List prices are OpenAI's own: elsewhere they must be given."""
    listed = section.teacher_model if where(section) == OFFICIAL else ""
    prices = prices_of(listed, section.usd_per_million_input, section.usd_per_million_output)
    prices = Prices(0.0, 0.0) if section.loopback_teacher else prices
    budget = section.budget_usd
    if budget is None and prices and not section.loopback_teacher:
        budget = DEFAULT_BUDGET
    spending = Spending(prices, budget, section.max_tokens, question.text_bytes)
    for entry in ledger.entries if ledger else ():
        spending.enter(entry.reply.input_tokens, entry.reply.output_tokens, entry.usd)
    return spending


# --- what is told of it -------------------------------------------------------------------------------------------


def images_facts(images: ImageSet, gathering: Gathering, verdicts: list[Verdict]) -> dict[str, Any]:
    labelled = [verdict for verdict in verdicts if verdict.content is not None]
    return {
        "folder": str(images.folder),
        "annotations": str(images.annotations) if images.annotations else None,
        "there": len(images.photos),
        "asked": len(verdicts),
        "kept": len(gathering.rows),
        "wanted": gathering.config.num_images,
        "min_confidence": gathering.config.min_confidence,
        "below_min_confidence": len(labelled) - len(gathering.rows),
        "quarantined": sum(verdict.content is None and verdict.answered for verdict in verdicts),
        "unanswered": [verdict.image_id for verdict in verdicts if not verdict.answered],
        "twins_left_out": gathering.twins,
        "unreadable": gathering.skipped,
    }
