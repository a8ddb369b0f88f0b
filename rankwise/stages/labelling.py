"""The part of `label` that asks a teacher: photos in an order that the seed decides → rows, quarantine, cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from rankwise.data.device import DeviceReader, DeviceTarget
from rankwise.data.images import BadImage, ImageReader
from rankwise.data.label_task import LabelTask
from rankwise.data.labelling.coco import ImageSet, Photo, select
from rankwise.data.labelling.image_ids import ImageIds
from rankwise.data.labelling.labelled import LabelledRow, pixel_hash, store_image
from rankwise.data.teacher.answers import Verdict
from rankwise.data.teacher.asking import Asker, Picture, Question, collect
from rankwise.data.teacher.client import OFFICIAL, Teacher, address_of
from rankwise.data.teacher.ledger import NAME as LEDGER
from rankwise.data.teacher.ledger import AnswerLedger, Key
from rankwise.data.teacher.loopback import MODEL as LOOPBACK
from rankwise.data.teacher.loopback import LoopbackTeacher
from rankwise.data.teacher.price import DEFAULT_BUDGET, Prices, Spending, prices_of
from rankwise.errors import Interrupted, ServiceError
from rankwise.options.label import LabelConfig, TeacherSection
from rankwise.stages.label_facts import agreement_facts, save_quarantine, teacher_facts, tell_of_ledger
from rankwise.stages.label_trial import Trial, ask_to_go_on, is_due, remaining

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
