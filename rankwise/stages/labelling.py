"""The part of `label` that asks a teacher: photos in an order that the seed decides → rows, quarantine, cost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from rankwise.config import LabelConfig, TeacherSection
from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.labelling.coco import ImageSet, Photo, select
from rankwise.data.labelling.label_task import LabelTask
from rankwise.data.labelling.labelled import LabelledRow, pixel_hash, store_image
from rankwise.data.teacher.answers import Verdict
from rankwise.data.teacher.asking import Asker, Picture, Question, collect
from rankwise.data.teacher.client import Teacher, TeacherSettings
from rankwise.data.teacher.ledger import NAME as LEDGER
from rankwise.data.teacher.ledger import AnswerLedger
from rankwise.data.teacher.loopback import MODEL as LOOPBACK
from rankwise.data.teacher.loopback import LoopbackTeacher
from rankwise.data.teacher.price import Prices, Spending, prices_of
from rankwise.data.teacher.votes import agreement
from rankwise.errors import Interrupted, ServiceError

NO_LIMIT = 600_000.0  # requests per minute of a teacher on this machine


@dataclass
class Gathering:
    """Photos on their way to rows: read as they are needed, stored once their label is kept."""

    config: LabelConfig
    task: LabelTask
    target: DeviceTarget
    reader: DeviceReader
    photos: tuple[Photo, ...]
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
                self.twins.append(photo.id)
                continue
            seen.add(digest)
            self._held[photo.id] = image
            yield Picture(photo.id, digest, self.target.jpeg(image))

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
        """Store the image of a verdict that is kept, and its row."""
        image = self._held.pop(verdict.image_id)
        if verdict.content is not None and self.keep(verdict):
            stored = store_image(Path(self.config.output_dir), verdict.image_id, image, self.target)
            self.rows.append(LabelledRow.of_answer(verdict.image_id, stored, verdict.content, self.task))


@dataclass(frozen=True)
class Labelled:
    """What asking has given. facts: for label.json; quarantine: rows of quarantine.jsonl."""

    rows: list[LabelledRow]
    facts: dict[str, Any]
    quarantine: list[dict[str, Any]]
    spending: Spending


def ask_teacher(config: LabelConfig, images: ImageSet, task: LabelTask, target: DeviceTarget) -> Labelled:
    """Ask until enough rows are kept. Raises ServiceError and Interrupted with the cost so far."""
    question = question_of(config.teacher, task, target)
    ledger = AnswerLedger(Path(config.output_dir) / LEDGER)
    spending = spending_of(config.teacher, question, ledger)
    photos = select(images.photos, None, config.seed)
    reader = DeviceReader(ImageReader(images.folder, config.allow_outside), target)
    gathering = Gathering(config, task, target, reader, photos)
    with serving(config.teacher) as section:
        settings = settings_of(section)
        try:
            verdicts = asyncio.run(asked(settings, spending, ledger, question, gathering))
        except (ServiceError, Interrupted) as error:
            raise explained(error, spending, gathering) from error
    unanswered = [verdict for verdict in verdicts if not verdict.answered]
    if unanswered and not gathering.rows:
        silence = ServiceError(f"{len(unanswered)} images got no answer: {unanswered[-1].problem}")
        raise explained(silence, spending, gathering)
    facts = {
        "teacher": teacher_facts(config.teacher, settings, question, ledger),
        "images": images_facts(images, gathering, verdicts),
        "cost": spending.as_dict(),
        "agreement": agreement_facts(verdicts, task, config.teacher.votes),
    }
    return Labelled(gathering.rows, facts, quarantine_rows(verdicts, ledger), spending)


async def asked(
    settings: TeacherSettings, spending: Spending, ledger: AnswerLedger, question: Question, gathering: Gathering
) -> list[Verdict]:
    """The verdicts, with a bar of the rows kept."""
    wanted, votes = gathering.config.num_images, gathering.config.teacher.votes
    async with Teacher(settings, spending) as teacher:
        with tqdm(total=wanted, unit="row", desc="label", disable=None) as bar:

            def seen(verdict: Verdict) -> None:
                gathering.take(verdict)
                bar.set_postfix_str("" if spending.usd is None else f"${spending.usd:.2f}", refresh=False)
                bar.update(gathering.keep(verdict))

            asker = Asker(teacher, ledger, question, votes)
            return await collect(asker, gathering.pictures(), wanted, gathering.keep, seen)


def explained(
    error: ServiceError | Interrupted, spending: Spending, gathering: Gathering
) -> ServiceError | Interrupted:
    """The same error with the cost so far and how to go on."""
    kept, wanted = len(gathering.rows), gathering.config.num_images
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


def settings_of(section: TeacherSection) -> TeacherSettings:
    return TeacherSettings(
        model=section.teacher_model,
        base_url=section.base_url,
        api_key=section.openai_api_key,
        concurrency=section.concurrency,
        requests_per_minute=section.requests_per_minute,
        timeout=section.timeout,
        max_retries=section.max_retries,
        max_wait=section.max_wait,
        max_tokens=section.max_tokens,
        temperature=section.temperature,
    )


def question_of(section: TeacherSection, task: LabelTask, target: DeviceTarget) -> Question:
    return Question(task, section.detail, section.response_format, section.temperature, target.jpeg_quality)


def spending_of(section: TeacherSection, question: Question, ledger: AnswerLedger | None = None) -> Spending:
    """What the data set has cost so far, and the limit. List prices are OpenAI's own: elsewhere they must be given."""
    listed = "" if section.base_url else section.teacher_model
    prices = prices_of(listed, section.usd_per_million_input, section.usd_per_million_output)
    prices = Prices(0.0, 0.0) if section.loopback_teacher else prices
    spending = Spending(prices, section.budget_usd, section.max_tokens, question.text_bytes)
    for entry in ledger.entries if ledger else ():
        spending.enter(entry.reply.input_tokens, entry.reply.output_tokens, entry.usd)
    return spending


# --- what is told of it -------------------------------------------------------------------------------------------


def teacher_facts(
    section: TeacherSection, settings: TeacherSettings, question: Question, ledger: AnswerLedger
) -> dict[str, Any]:
    served_by = {entry.reply.served_by for entry in ledger.entries if entry.key.model == settings.model}
    return {
        "model": settings.model,
        "served_by": sorted(name for name in served_by if name),
        "service": "loopback: labels by colours alone" if section.loopback_teacher else section.base_url or "OpenAI",
        "detail": section.detail,
        "response_format": section.response_format,
        "temperature": section.temperature,
        "votes": section.votes,
        "question_sha256": question.digest,
    }


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


def agreement_facts(verdicts: list[Verdict], task: LabelTask, votes: int) -> dict[str, Any] | None:
    """Over the images whose votes are all there; None for one vote."""
    whole = [verdict.votes for verdict in verdicts if len(verdict.votes) == votes]
    found = agreement(whole, task.labels)
    return found.as_dict() if found else None


def quarantine_rows(verdicts: list[Verdict], ledger: AnswerLedger) -> list[dict[str, Any]]:
    """The images without a label, with all that the teacher said of them."""
    said: dict[str, list[str]] = {}
    for entry in ledger.entries:
        said.setdefault(entry.image_id, []).append(entry.reply.refusal or entry.reply.text)
    return [
        {"image_id": verdict.image_id, "problem": verdict.problem, "answers": said.get(verdict.image_id, [])}
        for verdict in verdicts
        if verdict.content is None
    ]
