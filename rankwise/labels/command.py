"""rankwise label: images → a teacher's labels, or labels that are there already → a data set to train on.

    export OPENAI_API_KEY=…
    rankwise label photos/ --num_images 1000 -o dataset
    rankwise label photos/ --from_folders -o dataset

dataset/ labels.jsonl train.jsonl val.jsonl images/ originals/ conversations/ task.json device.json
         label.json (counts, cost, agreement)  quarantine.jsonl  ledger.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rankwise.data.device import DeviceTarget
from rankwise.data.label_task import LabelTask, load_task
from rankwise.errors import UsageError, need
from rankwise.files.atomic import write_text
from rankwise.files.document import Document
from rankwise.files.run_folder import RunFolder
from rankwise.labels.ask import QUARANTINE, ask_teacher
from rankwise.labels.dataset import ALL, Labels, WrittenDataset, remove_orphans, write_dataset
from rankwise.labels.existing import label_rows, read_existing, task_for
from rankwise.labels.images import ImageIds, ImageSet, Originals, download_coco, find_images
from rankwise.labels.teacher.client import KEY_VARIABLE, address_of
from rankwise.labels.teacher.questions import question_of, spending_of
from rankwise.options.field import check_address
from rankwise.options.label import LabelConfig
from rankwise.page.text import command_line, plural

DOCUMENT = Document("label.json", "rankwise-label/1", "a summary of labels", "rankwise label")
SUMMARY = DOCUMENT.name
DEFAULT_TASK, COCO_FOLDER = "elements", "coco"


def run(config: LabelConfig) -> WrittenDataset:
    """The whole command; returns the rows in their two parts."""
    check(config)
    hide_key(config)
    target, out = DeviceTarget(image_size=config.image_size), RunFolder(config.output_dir)
    refuse_other_content(out)
    with out.lock(), out.recording("label", inputs(config)) as record:
        found = (from_existing if labels_given(config) else from_teacher)(config, target, out)
        task, drawn = found.task, (config.val_fraction, config.seed)
        written = write_dataset(out.path, found.rows, task, target, *drawn, found.originals)
        remove_orphans(out.path, found.ids, written.rows)
        summary = {
            "task": task.name,
            "field": task.field,
            **count_rows(written, task),
            **found.facts,
        }
        DOCUMENT.write(out, summary)
        names = (ALL, "train.jsonl", "val.jsonl", SUMMARY)
        record.outputs |= {name: out / name for name in names}
    print_report(config, summary)
    return written


def from_teacher(config: LabelConfig, target: DeviceTarget, out: RunFolder) -> Labels:
    task, images = load_task(config.task_file or DEFAULT_TASK), find(config)
    if config.num_images > len(images.photos):
        print(f"note: there are only {plural(len(images.photos), 'image')} in {images.folder}")
    out.save_config(config)
    return ask_teacher(config, images, task, target)


def from_existing(config: LabelConfig, target: DeviceTarget, out: RunFolder) -> Labels:
    given = read_existing(
        config.labels_file or str(config.images),
        image_folder=config.images if config.labels_file else None,
        image_column=config.image_column,
        label_column=config.label_column,
        skip_bad=config.skip_bad,
        allow_outside=config.allow_outside,
    )
    task = task_for(given, load_task(config.task_file) if config.task_file else None)
    out.save_config(config)
    ids = ImageIds.of_folder(out.path, target)
    found = label_rows(given, task, target, out.path, skip_bad=config.skip_bad, ids=ids)
    write_text(out / QUARANTINE, "")
    source = config.labels_file or f"the folders of {config.images}"
    facts = {"labels_from": source, "respelt": given.respelt, "unreadable": [*given.skipped, *found.skipped]}
    return Labels(task, list(found.rows), Originals(given.reader, found.references), facts, ids)


def find(config: LabelConfig) -> ImageSet:
    """The images; COCO's val2017 where no folder is given."""
    folder, part = Path(config.images or COCO_FOLDER), config.coco or (None if config.images else "val2017")
    if config.download:
        download_coco(folder)
    elif not config.images and not folder.is_dir():
        raise UsageError("label needs images: rankwise label FOLDER, or --download (COCO val2017 into ./coco, 1 GB)")
    return find_images(folder, part)


# --- checks -------------------------------------------------------------------------------------------------------


def labels_given(config: LabelConfig) -> bool:
    return config.from_folders or config.labels_file is not None


def check(config: LabelConfig) -> None:
    """Check the options before anything is read, asked or paid."""
    if config.from_folders and config.labels_file:
        raise UsageError("--from_folders and --labels_file exclude each other; give one of them")
    if config.from_folders and not config.images:
        raise UsageError("--from_folders needs the folder: rankwise label FOLDER --from_folders")
    if config.download and (config.coco == "train2017" or labels_given(config)):
        raise UsageError("--download fetches COCO val2017, to be labelled by a teacher")
    if (config.image_column or config.label_column) and not config.labels_file:
        raise UsageError("--image_column and --label_column need --labels_file")
    if not labels_given(config):
        check_teacher(config)


def check_teacher(config: LabelConfig) -> None:
    """The teacher's options, and the libraries that asking takes."""
    section = config.teacher
    if section.loopback_teacher and section.base_url:
        raise UsageError("--loopback_teacher starts a server of its own; leave --base_url out")
    check_address(address_of(section.base_url), "--base_url")
    task = load_task(config.task_file or DEFAULT_TASK)
    spending_of(section, question_of(section, task, DeviceTarget(image_size=config.image_size)))
    modules = ["openai", "aiolimiter"] + ["statsmodels.stats.inter_rater"] * (section.votes > 1)
    for module in modules:
        need(module, extra="label")


def hide_key(config: LabelConfig) -> None:
    """A key on the command line is taken out of what trackers and reports read the command from."""
    key = config.teacher.openai_api_key
    if key:
        sys.argv[:] = [word.replace(key, "***") for word in sys.argv]
        advice = f"a key on the command line is seen by every user of this machine; better: export {KEY_VARIABLE}=…"
        print(f"rankwise: {advice}", file=sys.stderr)


def refuse_other_content(out: RunFolder) -> None:
    """Refuse to overwrite tables of the same names that another program wrote."""
    if (out / ALL).exists() and "label" not in out.stages():
        raise UsageError(f"{out.path}: holds a {ALL} that `rankwise label` did not make; choose another --output_dir")


def inputs(config: LabelConfig) -> dict[str, str | None]:
    """What the manifest fingerprints: not the images themselves, which may be 19 GB; the rows have their hashes."""
    return {"labels_file": config.labels_file, "task": config.task_file or DEFAULT_TASK}


# --- what is told -------------------------------------------------------------------------------------------------


def count_rows(written: WrittenDataset, task: LabelTask) -> dict[str, Any]:
    parts = {"rows": written.rows, "train": written.train, "val": written.val}
    return {**{name: len(rows) for name, rows in parts.items()}, "classes": written.counts(task)}


def print_report(config: LabelConfig, summary: dict[str, Any]) -> None:
    print(f"{plural(summary['rows'], 'image')}: {summary['train']} for training, {summary['val']} for validation")
    for name, parts in summary["classes"].items():
        print(f"  {name:<12}{parts['train']:>6}{parts['val']:>6}")
    if "images" in summary:
        print_teacher(summary)
    for name, label in summary.get("respelt", {}).items():
        print(f"note: {name!r} is the class {label!r} in another spelling")
    if summary.get("unreadable"):
        print(f"left out: {plural(len(summary['unreadable']), 'unreadable row')} (listed in {SUMMARY})")
    print(f"data set in {config.output_dir}")
    print(f"next: {next_command(config)}")


def next_command(config: LabelConfig) -> str:
    return command_line("train", task="labels", data_path=config.output_dir, model_name="MODEL")


def print_teacher(summary: dict[str, Any]) -> None:
    images, cost, votes = summary["images"], summary["cost"], summary["agreement"]
    dropped = {
        "below --min_confidence": images["below_min_confidence"],
        f"in {QUARANTINE}": images["quarantined"],
        "unanswered": len(images["unanswered"]),
        "with duplicate pixels": len(images["twins_left_out"]),
        "unreadable": len(images["unreadable"]),
    }
    counted = ", ".join(f"{count} {name}" for name, count in dropped.items() if count) or "none"
    print(f"asked about {images['asked']} of {images['there']} images; dropped: {counted}")
    usd = "no price known" if cost["usd"] is None else f"${cost['usd']:.4f}"
    tokens = f"{cost['input_tokens']:,} + {cost['output_tokens']:,} tokens"
    print(f"cost so far: {cost['answers']} answers, {tokens}, {usd}")
    if votes:
        kappa = "not defined" if votes["kappa"] is None else f"{votes['kappa']:.2f}"
        pairs, ceiling = votes["pair_agreement"], votes["accuracy_ceiling"]
        print(f"{votes['votes']} votes per image: Fleiss' kappa {kappa}, pairwise agreement {pairs:.1%}", end="; ")
        print(f"accuracy ceiling on these labels {ceiling:.1%}")
    if images["kept"] < images["wanted"]:
        print(f"note: --num_images is {images['wanted']}; there are no more images to ask about")


def describe(config: LabelConfig) -> list[str]:
    if labels_given(config):
        return [f"take the labels of {config.labels_file or config.images}"]
    task, section = load_task(config.task_file or DEFAULT_TASK), config.teacher
    who = "the loopback teacher (colours only)" if section.loopback_teacher else section.teacher_model
    budget = spending_of(section, question_of(section, task, DeviceTarget(image_size=config.image_size))).budget_usd
    limit = "without a budget (no price known)" if budget is None else f"for at most ${budget:.2f} (--budget_usd)"
    lines = [
        f"show {who} images of {config.images or COCO_FOLDER} as the device sees them ({config.image_size} px, JPEG)",
        f"ask which of {', '.join(task.labels)} each one is, {plural(section.votes, 'vote')} per image, until "
        f"{config.num_images} answers with confidence {config.min_confidence} or more are there, {limit}",
    ]
    if section.trial and not section.loopback_teacher:
        lines.append(f"label {plural(section.trial, 'image')} first, and show answers and cost")
    return lines
