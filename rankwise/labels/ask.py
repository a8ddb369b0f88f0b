"""Ask a teacher: photos in an order that the seed decides → labelled rows, quarantine, cost.

    photos ── Gathering.pictures ──▶ Asking.verdicts ──▶ Gathering.take ──▶ rows, images
                                        └─ nothing in the ledger is asked again; every answer is there before it is used

The first images are a trial (`try_out`): what the teacher says of them and what that costs, before it is asked about
the rest.
"""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.label_task import LabelTask
from rankwise.errors import DataError, Interrupted, ServiceError
from rankwise.files.atomic import write_text
from rankwise.files.document import lines_of
from rankwise.labels.dataset import LabelledRow, Labels, pixel_hash, store_image
from rankwise.labels.images import ImageIds, ImageSet, Originals, Photo, select
from rankwise.labels.teacher.answers import VoteResult, agreement
from rankwise.labels.teacher.client import Teacher
from rankwise.labels.teacher.ledger import NAME as LEDGER
from rankwise.labels.teacher.ledger import AnswerLedger, Key, LedgerEntry, Spending
from rankwise.labels.teacher.loopback import serving
from rankwise.labels.teacher.questions import Asker, ImageToLabel, Question, collect, question_of, spending_of, where
from rankwise.options.label import LabelConfig, TeacherSection
from rankwise.page.progress import progress
from rankwise.page.text import plural

QUARANTINE = "quarantine.jsonl"
MENTIONED = 3


@dataclass(frozen=True)
class Asking:
    """Teacher, its address, and its earlier answers. settings: of the one that answers, the loopback say."""

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
        pictures: Iterable[ImageToLabel],
        wanted: int,
        keep: Callable[[VoteResult], bool],
        seen: Callable[[VoteResult], None],
        spending: Spending,
    ) -> list[VoteResult]:
        """What the teacher says of the first pictures of which so many are kept."""
        section = self.section
        how: dict[str, Any] = {
            "address": self.address,
            "again": section.ask_again,
            "max_unusable": section.max_unusable,
        }

        async def work() -> list[VoteResult]:
            async with Teacher(self.settings, spending) as teacher:
                asker = Asker(teacher, self.ledger, self.question, section.votes, **how)
                return await collect(asker, pictures, wanted, keep, seen)

        return asyncio.run(work())

    def facts(self) -> dict[str, Any]:
        """For label.json."""
        model, section = self.settings.teacher_model, self.section
        served_by = {entry.reply.served_by for entry in self.ledger.entries if entry.key.model == model}
        return {
            "model": model,
            "served_by": sorted(name for name in served_by if name),
            "service": "loopback: labels by colours alone" if section.loopback_teacher else self.address,
            **{name: getattr(section, name) for name in ("detail", "response_format", "temperature", "votes")},
            "question_sha256": self.question.digest,
            "bad_ledger_lines": self.ledger.bad,
        }


@dataclass
class Gathering:
    """Photos on their way to rows: read as they are needed, stored once their label is kept."""

    config: LabelConfig
    task: LabelTask
    target: DeviceTarget
    reader: DeviceReader
    photos: tuple[Photo, ...]
    ids: ImageIds
    verdicts: list[VoteResult] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    rows: list[LabelledRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)
    _held: dict[str, Image.Image] = field(default_factory=dict)

    def pictures(self) -> Iterator[ImageToLabel]:
        """Images for the teacher, one by one. Pixels that came before would get the same answer: left out."""
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
            yield ImageToLabel(name, digest, self.target.jpeg(image))

    def _seen_by_device(self, photo: Photo) -> Image.Image | None:
        try:
            return self.reader.open(photo.reference)
        except BadImage as error:
            if not self.config.skip_bad:
                raise BadImage(f"{error}; or leave such images out with --skip_bad true") from error
            self.skipped.append(str(error))
            return None

    def keep(self, verdict: VoteResult) -> bool:
        return verdict.content is not None and verdict.confidence >= self.config.min_confidence

    def take(self, verdict: VoteResult) -> None:
        """Enter a verdict; store the image of one that is kept, and its row."""
        image = self._held.pop(verdict.image_id)
        self.verdicts.append(verdict)
        if verdict.content is not None and self.keep(verdict):
            stored = store_image(Path(self.config.output_dir), verdict.image_id, image, self.target)
            self.rows.append(LabelledRow.of_answer(verdict.image_id, stored, verdict.content, self.task))

    def facts(self, images: ImageSet, verdicts: Sequence[VoteResult]) -> dict[str, Any]:
        """For label.json."""
        labelled = [verdict for verdict in verdicts if verdict.content is not None]
        return {
            "folder": str(images.folder),
            "annotations": str(images.annotations) if images.annotations else None,
            "there": len(images.photos),
            "asked": len(verdicts),
            "kept": len(self.rows),
            "wanted": self.config.num_images,
            "min_confidence": self.config.min_confidence,
            "below_min_confidence": len(labelled) - len(self.rows),
            "quarantined": sum(verdict.content is None and verdict.answered for verdict in verdicts),
            "unanswered": [verdict.image_id for verdict in verdicts if not verdict.answered],
            "twins_left_out": self.twins,
            "unreadable": self.skipped,
        }


def ask_teacher(config: LabelConfig, images: ImageSet, task: LabelTask, target: DeviceTarget) -> Labels:
    """Ask until enough rows are kept. Raises ServiceError and Interrupted with the cost so far, DataError where no row
    is kept. However it ends, the images without a label are in quarantine.jsonl."""
    out, section = Path(config.output_dir), config.teacher
    ledger, question, address = AnswerLedger(out / LEDGER), question_of(section, task, target), where(section)
    ids = ImageIds.of_folder(out, target, [(entry.image_id, entry.key.image) for entry in ledger.entries])
    images_of, photos = ImageReader(images.folder, config.allow_outside), select(images.photos, None, config.seed)
    reader = DeviceReader(images_of, target)
    tried, gathering = (Gathering(config, task, target, reader, photos, ids) for _ in range(2))
    with serving(section) as served:
        asking = Asking(served, section, address, question, ledger)
        warn_of_ledger(asking)
        spending = asking.spending()
        if section.budget_usd is None and spending.budget_usd is not None:
            print(f"budget: ${spending.budget_usd:.2f}, the default; change it with --budget_usd")
        try:
            if trial_is_due(asking, gathering):
                try_out(asking, tried, spending)
            spending = asking.spending(spending)
            verdicts = ask_about_all(asking, gathering, spending)
        except (ServiceError, Interrupted) as error:
            raise with_cost(error, spending, gathering if gathering.verdicts else tried) from error
        finally:
            seen = {verdict.image_id: verdict for verdict in (*tried.verdicts, *gathering.verdicts)}
            save_quarantine(out, seen.values(), tried.digests | gathering.digests, ledger, question)
    unanswered = [verdict for verdict in verdicts if not verdict.answered]
    if unanswered and not gathering.rows:
        silence = ServiceError(f"{len(unanswered)} images got no answer: {unanswered[-1].problem}")
        raise with_cost(silence, spending, gathering)
    if not gathering.rows:
        raise DataError(
            f"{images.folder}: of {plural(len(verdicts), 'image')} none was kept: "
            f"{reason_for_nothing(verdicts, config.min_confidence)}. So far: {spending.words()}; the answers are in "
            f"{out}/{LEDGER}, and what got no label is in {QUARANTINE}"
        )
    agreed = agreement([one.votes for one in verdicts if len(one.votes) == section.votes], task.labels)
    facts = {
        "teacher": asking.facts(),
        "images": gathering.facts(images, verdicts),
        "cost": spending.as_dict(),
        "agreement": agreed.as_dict() if agreed else None,
    }
    return Labels(task, gathering.rows, Originals(images_of, gathering.references), facts, ids)


def ask_about_all(asking: Asking, gathering: Gathering, spending: Spending) -> list[VoteResult]:
    """The verdicts, with a bar of the rows kept."""
    wanted = gathering.config.num_images
    with progress(total=wanted, unit="row", desc="label", leave=True) as bar:

        def seen(verdict: VoteResult) -> None:
            gathering.take(verdict)
            bar.set_postfix_str("" if spending.usd is None else f"${spending.usd:.2f}", refresh=False)
            bar.update(gathering.keep(verdict))

        return asking.verdicts(gathering.pictures(), wanted, gathering.keep, seen, spending)


def with_cost(
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


def reason_for_nothing(verdicts: Sequence[VoteResult], min_confidence: float) -> str:
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
        highest = f"the highest: {max(unsure):.2f}"
        reasons.append(f"{len(unsure)} got a confidence below --min_confidence {min_confidence} ({highest})")
    return "; ".join(reasons)


def save_quarantine(
    folder: Path, verdicts: Iterable[VoteResult], digests: dict[str, str], ledger: AnswerLedger, question: Question
) -> Path:
    """The images without a label, with all that was answered to this question. digests: of the pixels, by image id."""
    answers: dict[str, list[str]] = {}
    for entry in ledger.entries:
        if entry.key.task == question.digest:
            answers.setdefault(entry.key.image, []).append(entry.reply.refusal or entry.reply.text)
    rows = [
        {"image_id": one.image_id, "problem": one.problem, "answers": answers.get(digests[one.image_id], [])}
        for one in verdicts
        if one.content is None
    ]
    return write_text(folder / QUARANTINE, lines_of(rows))


def warn_of_ledger(asking: Asking) -> None:
    """Warn about unusable ledger lines before anything is asked."""
    ledger, model, address = asking.ledger, asking.settings.teacher_model, asking.address
    for line in ledger.bad[:MENTIONED]:
        warn(f"{ledger.path}, {line}: not a teacher's answer; the line is kept but ignored")
    if len(ledger.bad) > MENTIONED:
        warn(f"{ledger.path}: {len(ledger.bad) - MENTIONED} more lines are not answers")
    if ledger.faults:
        warn(f"{ledger.path}: {ledger.faults} error pages, stored as answers by an earlier version, are asked again")
    asked = [one for one in ledger.entries if (one.key.task, one.key.model) == (asking.question.digest, model)]
    for other, count in Counter(entry.address for entry in asked).items():
        if other not in (None, address) and not asking.section.ask_again:
            advice = "--ask_again asks for them anew"
            warn(f"{ledger.path}: {count} answers of {model} are of {other}, and count for {address}; {advice}")


def warn(text: str) -> None:
    print(f"rankwise: {text}", file=sys.stderr)


# --- the trial ----------------------------------------------------------------------------------------------------


def trial_is_due(asking: Asking, gathering: Gathering) -> bool:
    """Whether a trial comes first: not where no more images are wanted, and not where a run went past it."""
    section, size = asking.section, asking.section.trial
    key = (asking.question.digest, asking.settings.teacher_model)
    asked = {entry.key.image for entry in asking.ledger.entries if (entry.key.task, entry.key.model) == key}
    enough = min(gathering.config.num_images, len(gathering.photos))
    return not section.loopback_teacher and 0 < size < enough and len(asked) <= size


def try_out(asking: Asking, gathering: Gathering, spending: Spending) -> None:
    """Ask about a few images, show what came, and at a terminal whether to go on. Interrupted where it is not."""
    section, wanted = asking.section, gathering.config.num_images
    verdicts = asking.verdicts(
        gathering.pictures(), section.trial, lambda verdict: True, gathering.verdicts.append, spending
    )
    entries = {}
    for verdict in verdicts:
        question = (gathering.digests[verdict.image_id], asking.question.digest, asking.settings.teacher_model)
        votes = [asking.ledger.of(Key(*question, vote)) for vote in range(section.votes)]
        entries[verdict.image_id] = [entry for vote in votes for entry in vote]
    rest = remaining(verdicts, sum(map(gathering.keep, verdicts)), wanted, len(gathering.photos))
    print("\n".join(trial_lines(verdicts, entries, rest, spending.budget_usd)), flush=True)
    ask_to_go_on(section.yes)


def remaining(verdicts: Sequence[VoteResult], kept: int, wanted: int, there: int) -> int:
    """Number of images still to ask about, at the same share of kept ones."""
    share = kept / len(verdicts) if kept else 1 / len(verdicts)
    return min(there - len(verdicts), math.ceil((wanted - kept) / share))


def trial_lines(
    verdicts: Sequence[VoteResult], entries: dict[str, list[LedgerEntry]], rest: int, budget: float | None
) -> list[str]:
    """The trial for people: image, answer, tokens, price; then what about the `rest` images will cost at that price."""
    lines = [f"trial: {plural(len(verdicts), 'image')}"]
    width = max(len(verdict.image_id) for verdict in verdicts)
    for verdict in verdicts:
        lines.append(
            f"  {verdict.image_id:<{width}}  {verdict_text(verdict)}  ({cost_text(entries[verdict.image_id])})"
        )
    everything = [entry for each in entries.values() for entry in each]
    usd = [entry.usd for entry in everything if entry.usd is not None]
    left = f"the rest: about {plural(rest, 'image')}"
    if usd and len(usd) == len(everything):
        left += f", ${sum(usd) / len(verdicts) * rest:.2f} at this price"
    limit = "no budget: no prices are known" if budget is None else f"--budget_usd {budget:.2f}"
    return [*lines, f"{left} ({limit})"]


def verdict_text(verdict: VoteResult) -> str:
    if verdict.content is None:
        return f"no label: {verdict.problem}"
    return f"{max(set(verdict.votes), key=verdict.votes.count)} {verdict.confidence:.2f}"


def cost_text(entries: Sequence[LedgerEntry]) -> str:
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
