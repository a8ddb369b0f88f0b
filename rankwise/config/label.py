"""What `rankwise label` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.options import option


@dataclass(frozen=True)
class TeacherSection:
    """Who labels, how it is asked, and what it may cost."""

    teacher_model: str = option("gpt-4o", help="model that labels", aliases=("teacher",))
    base_url: str | None = option(
        address=True,
        help="any service of the OpenAI protocol, a local llama.cpp server say [$OPENAI_BASE_URL, else OpenAI]",
    )
    openai_api_key: str | None = option(
        help="better: the variable OPENAI_API_KEY, since other users see command lines",
        aliases=("api_key",),
        secret=True,
    )
    loopback_teacher: bool = option(
        False, help="a small server on this machine that labels by colours: no network, no key"
    )
    detail: str = option("high", choices=("high", "low", "auto"), help="how closely the teacher looks at the image")
    response_format: str = option(
        "json_schema",
        choices=("json_schema", "json_object", "none"),
        help="structured output; the weaker ones for services that lack it: the schema then stands in the prompt",
    )
    temperature: float | None = option(help="of the teacher's answers [the service's own]")
    max_tokens: int = option(1000, help="longest answer, in tokens")
    concurrency: int = option(5, help="most requests in flight")
    requests_per_minute: float = option(60, help="most requests per minute, retries included", aliases=("rpm",))
    timeout: float = option(60, help="seconds to wait for an answer before it is asked for again")
    max_retries: int = option(10, help="attempts after the first on 429, 5xx, timeouts and lost connections")
    max_wait: float = option(600, help="seconds for one question, retries and the waits between them included")
    votes: int = option(1, help="answers per image; the majority is the label, and their agreement is measured")
    trial: int = option(3, help="images to label and show first, with their cost; 0: none")
    yes: bool = option(False, help="go on after the trial without a question; only a terminal is asked one")
    max_unusable: int = option(
        5, help="stop after so many images in a row without a usable answer, where none was usable before; 0: never"
    )
    ask_again: bool = option(
        False, help="ask again what another address has answered, and what has no usable answer in the ledger"
    )
    budget_usd: float | None = option(
        help="stop before the data set has cost more, earlier runs included [10 where prices are known]"
    )
    usd_per_million_input: float | None = option(
        help="price of input tokens [OpenAI's gpt-4o and gpt-4o-mini: list price]"
    )
    usd_per_million_output: float | None = option(help="price of output tokens")


@dataclass(frozen=True)
class LabelConfig:
    """Images → a teacher's labels, or labels that are there already → a data set to train on."""

    images: str | None = option(help="folder of images, or COCO in its official layout", aliases=("coco_dir",))
    coco: str | None = option(choices=("val2017", "train2017"), help="which part of COCO [val2017 without a folder]")
    download: bool = option(False, help="fetch the parts of COCO val2017 that the folder lacks (1 GB; extra: data)")
    from_folders: bool = option(False, help="no teacher: the subfolder of an image is its label")
    labels_file: str | None = option(help="no teacher: a .csv, .jsonl or .json file with images and labels")
    image_column: str | None = option(help="of --labels_file [the one with a usual name]")
    label_column: str | None = option(help="of --labels_file [the one with a usual name]")
    output_dir: str = option("./dataset", help="the data set's folder", short="-o")
    task_file: str | None = option(
        help="what is asked: elements, or a YAML file [elements; without a teacher: the labels]"
    )
    num_images: int = option(1000, help="images to keep; the teacher is asked until there are so many")
    min_confidence: float = option(0.75, help="answers less sure than this are not kept")
    val_fraction: float = option(0.1, help="share of the images for validation, per class")
    image_size: int = option(256, help="side of the square that the device and the teacher see, in pixels")
    skip_bad: bool = option(False, help="leave out images and rows that can't be read, counted, instead of stopping")
    allow_outside: bool = option(False, help="read images by absolute paths, `..` and links out of the folder")
    seed: int = option(42, help="order in which images are taken, and the split")
    teacher: TeacherSection = field(default_factory=TeacherSection)
