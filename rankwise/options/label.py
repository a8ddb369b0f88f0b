"""What `rankwise label` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.options.field import Options, option, output, reads, reads_or_hub, reads_or_text, seeded
from rankwise.options.sections import OUTSIDE

COCO_SPLITS = ("val2017", "train2017")


@dataclass(frozen=True)
class TeacherSection(Options):
    """Who labels, how it is asked, and what it may cost."""

    teacher_model: str = option("gpt-4o", help="teacher model", aliases=("teacher",))
    base_url: str | None = option(
        address=True, help="OpenAI-compatible service, such as a local llama.cpp server [$OPENAI_BASE_URL, else OpenAI]"
    )
    openai_api_key: str | None = option(
        help="better: the variable OPENAI_API_KEY, since other users see command lines",
        aliases=("api_key",),
        secret=True,
    )
    loopback_teacher: bool = option(False, help="use a local server that labels by colours: no network, no key")
    detail: str = option("high", choices=("high", "low", "auto"), help="image detail for the teacher")
    response_format: str = option(
        "json_schema",
        choices=("json_schema", "json_object", "none"),
        help="structured output; fallbacks for services without it, with the schema in the prompt",
    )
    temperature: float | None = option(help="sampling temperature of the teacher [the service's default]")
    max_tokens: int = option(1000, least=1, help="maximum tokens per answer")
    concurrency: int = option(5, least=1, help="maximum requests in flight")
    requests_per_minute: float = option(60, above=0, help="requests per minute, retries included", aliases=("rpm",))
    timeout: float = option(60, above=0, help="seconds before an unanswered request is retried")
    max_retries: int = option(10, least=0, help="maximum retries on 429, 5xx, timeouts and lost connections")
    max_wait: float = option(600, above=0, help="maximum seconds per question, retries and waits included")
    votes: int = option(1, least=1, help="answers per image; majority is the label, agreement is measured")
    trial: int = option(3, least=0, help="images to label first, with a preview and their cost; 0: none")
    yes: bool = option(False, help="continue after the trial without confirmation; only terminals are asked")
    max_unusable: int = option(
        5, least=0, help="consecutive unusable answers before stopping, if none was usable before; 0: no limit"
    )
    ask_again: bool = option(False, help="ask again for answers of another address and for unusable ones in the ledger")
    budget_usd: float | None = option(above=0, help="maximum cost, earlier runs included [10 where prices are known]")
    usd_per_million_input: float | None = option(
        least=0, help="price per million input tokens [list price of OpenAI's gpt-4o and gpt-4o-mini]"
    )
    usd_per_million_output: float | None = option(least=0, help="price per million output tokens")


@dataclass(frozen=True)
class LabelConfig(Options):
    """Label images by a teacher, or by existing labels, as a data set to train on.

    rankwise label runs/tiny/photos --loopback_teacher -o runs/labelled
    """

    images: str | None = reads_or_hub(
        help="folder of images, or COCO in its official layout", aliases=("coco_dir",), group="data"
    )
    coco: str | None = option(choices=COCO_SPLITS, help="part of COCO [val2017 without a folder]", group="data")
    download: bool = option(False, help="download missing parts of COCO val2017 (1 GB; extra: data)", group="data")
    from_folders: bool = option(False, help="no teacher: take an image's subfolder as its label", group="data")
    labels_file: str | None = reads(help="no teacher: .csv, .jsonl or .json file with images and labels")
    image_column: str | None = option(help="image column of --labels_file [detected by name]", group="data")
    label_column: str | None = option(help="label column of --labels_file [detected by name]", group="data")
    output_dir: str = output("./dataset", help="data set folder")
    task_file: str | None = reads_or_text(
        help="task: elements, or a YAML file [elements; without a teacher: the labels]", group="method"
    )
    num_images: int = option(
        1000, least=1, help="number of images to keep; the teacher is asked until reached", group="data"
    )
    min_confidence: float = option(0.75, least=0, most=1, help="threshold below which answers are dropped")
    val_fraction: float = option(0.1, least=0, below=1, help="validation share of the images, per class")
    image_size: int = option(256, least=1, help="side of the square image for device and teacher, in pixels")
    skip_bad: bool = option(False, help="skip and count unreadable images and rows instead of stopping", group="data")
    allow_outside: bool = option(False, help=OUTSIDE, group="data")
    seed: int = seeded(42, help="random seed of image order and split")
    teacher: TeacherSection = field(default_factory=TeacherSection)
