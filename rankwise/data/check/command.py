"""rankwise check: examine a whole data set before a GPU is used; training refuses the same samples by the same code.

rankwise check --model_name MODEL --task conversations --data_path train.json --image_folder images
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from rankwise.data.check.examine import KINDS, Findings, Problem, examine, histogram
from rankwise.data.check.trial import try_rows
from rankwise.data.example import Examples
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import image_reader, renderer_for
from rankwise.data.sources.load import check_data, load, settle
from rankwise.errors import DataError
from rankwise.files.atomic import write_text
from rankwise.files.document import Document, lines_of
from rankwise.files.run_folder import RunFolder
from rankwise.models.cut_down import Untried, cut_down, headless, random_model
from rankwise.models.load import load_config, load_readable_structure, load_weights
from rankwise.options.commands import CheckConfig
from rankwise.page.text import plural
from rankwise.pipeline.idle import refuse_idle

DOCUMENT = Document("check.json", "rankwise-check/1", "a report on samples", "rankwise check")
REPORT, BAD = DOCUMENT.name, "bad_samples.jsonl"
BAR = 40  # characters of the longest bar
SHOWN = 10


def run(config: CheckConfig) -> Findings:
    """Print and write what was found. DataError (exit 3) where samples are bad, once the report is written."""
    config = check(config)
    folder = RunFolder(config.output_dir)
    given = {"model": config.model.model_name, "data": config.data.data_path}
    with folder.lock(), folder.recording("check", given) as record:
        renderer = renderer_of(config)
        seen = renderer is None or renderer.sight is not None
        examples = rows(config, sees_images=seen)
        reader = image_reader(config.data) if seen else None
        folder.save_config(config)
        findings = examine(examples, reader, renderer, config.workers, config.compare)
        if renderer is not None and any(findings.shortest):
            try_model(config, renderer, findings)
        limit = None if renderer is None else renderer.limit
        DOCUMENT.write(folder, report(findings, limit) | {"model": config.model.model_name})
        write_text(folder / BAD, lines_of(one.record() for one in bad(findings)))
        record.outputs |= {"report": folder / REPORT, "bad samples": folder / BAD}
        print("\n".join(in_words(findings, limit)))
        refuse(findings, config, renderer)
    return findings


def describe(config: CheckConfig) -> list[str]:
    config = settle(config)
    lines = [f"read every row as {config.data.task}, and decode every image it names"]
    if config.model.model_name:
        lines.append(f"make tokens of every sample as training does for {config.model.model_name}")
        lines.append("compare them with what the model's own chat template makes, where it is used")
        lines.append("run a few through the model" + ("" if config.run_model else ", cut down to two layers"))
    return lines


def check(config: CheckConfig) -> CheckConfig:
    config = settle(config)
    check_data(config.data, "check")
    refuse_idle(config)
    return config


def rows(config: CheckConfig, *, sees_images: bool) -> Examples:
    """All samples, with the bad rows beside them."""
    data = config.data
    assert data.task and data.data_path
    examples = load(data.task, data.data_path, config.split, replace(data, skip_bad=True), allow_empty=True)
    for note in replace(examples, skipped=()).notes(sees_images=sees_images):
        print(note)
    return examples


def renderer_of(config: CheckConfig) -> Renderer | None:
    """The one that training will use; None without a model."""
    name = config.model.model_name
    if name is None:
        return None
    return renderer_for(config.data, config.model, name, load_readable_structure(config.model, name).config)


def try_model(config: CheckConfig, renderer: Renderer, findings: Findings) -> None:
    """Run a few samples through the model: a cut-down copy, or with `--run_model` its own weights."""
    name = str(config.model.model_name)
    try:
        if config.run_model:
            model: Any = headless(load_weights(config.model, name, torch.float32)).eval()
        else:
            model = random_model(cut_down(load_config(name, config.model.revision, config.model.trust_remote_code)))
        trial = try_rows(model, renderer, findings.shortest, sure=config.run_model)
    except Untried as error:
        findings.notes.append(f"note: the model was not run: {error}; --run_model runs it with its own weights")
        return
    findings.tried = trial.samples
    findings.notes += [f"note: {trial.note}"] if trial.note else []
    findings.problems += [Problem("model", reason, one.id, one.line or None) for one, reason in trial.problems]


def bad(findings: Findings) -> list[Problem]:
    """Bad samples, in the order of the file."""
    return sorted(findings.problems, key=lambda problem: problem.line or 0)


def refuse(findings: Findings, config: CheckConfig, renderer: Renderer | None) -> None:
    """DataError where training would refuse a sample, or has none; what the flags let it leave out is no reason."""
    skipped = dict.fromkeys(("row", "text", "template"), config.data.skip_bad)
    accepted = {**skipped, "overlong": renderer is not None and renderer.overlong == "drop"}
    refused = [problem for problem in bad(findings) if not accepted.get(problem.kind)]
    place = Path(config.output_dir) / BAD
    if refused:
        samples = len({(problem.line, problem.sample) for problem in refused})
        raise DataError(f"{samples:,} bad samples in {config.data.data_path}; each is named with its reason in {place}")
    if not findings.usable:
        raise DataError(f"{config.data.data_path}: no usable samples; is it a {config.data.task} file?")
    print(f"nothing is in the way of training; report in {config.output_dir}")


# --- what was found, as check.json and in words -------------------------------------------------------------------


def report(findings: Findings, limit: int | None) -> dict[str, Any]:
    """Content of check.json. limit: most tokens of a sample; None where no tokens were made."""
    content: dict[str, Any] = {
        "samples": findings.samples,
        "usable": findings.usable,
        "changes": dict(findings.changes),
        "control_tokens_as_text": dict(findings.control),
        "special_tokens": dict(findings.special),
        "images": findings.images,
        "pictures": findings.pictures,
        "bad": {kind: findings.bad(kind) for kind in KINDS},
        "compared_with_chat_template": {"samples": findings.compared, "pixels": findings.seen},
        "samples_of_single_answers": findings.apart,
        "model_run": {"samples": findings.tried, "notes": findings.notes},
    }
    if limit is not None:
        content["tokens"] = {
            "limit": limit,
            "all": findings.tokens,
            "of_images": findings.image_tokens,
            "of_labels": findings.label_tokens,
            "truncated_samples": findings.truncated,
            **spread(findings),
            "histogram": [vars(each) for each in histogram(findings.lengths)],
        }
    return content


def spread(findings: Findings) -> dict[str, float | None]:
    """Shortest, median, mean and longest sample, in tokens; None where there is none."""
    lengths = findings.lengths
    if not lengths:
        return dict.fromkeys(("shortest", "median", "mean", "longest"))
    return {"shortest": min(lengths), "median": median(lengths), "mean": mean(lengths), "longest": max(lengths)}


def in_words(findings: Findings, limit: int | None) -> list[str]:
    """The same for the screen, the first bad samples with their reasons."""
    lines = [f"{plural(findings.samples, 'sample')}, {findings.usable:,} usable"]
    if findings.images:
        looked = "not looked at" if findings.pictures is None else f"{findings.pictures:,} different ones decoded"
        lines.append(f"{plural(findings.images, 'image')} in them, {looked}")
    if limit is not None and findings.lengths:
        lines += _tokens(findings, limit)
    if findings.apart:
        lines.append(
            f"conversations make {findings.apart:,} samples of one answer each: the chat template renders earlier "
            "answers otherwise than they were given"
        )
    for tokens, how in (
        (findings.control, "control tokens, read as text"),
        (findings.special, "special tokens, read as such"),
    ):
        named = ", ".join(f"{token} in {plural(count, 'sample')}" for token, count in tokens.most_common(SHOWN))
        lines += [f"their texts hold {how}: {named}"] if tokens else []
    if findings.compared:
        pixels = f", {findings.seen} of them with pixels" if findings.seen else ""
        lines.append(
            f"{plural(findings.compared, 'sample')} compared with apply_chat_template{pixels}: "
            f"{findings.bad('differs') or 'none'} different"
        )
    if findings.tried:
        lines.append(
            f"{plural(findings.tried, 'sample')} run through the model, alone and in a batch: "
            f"{findings.bad('model') or 'none'} bad"
        )
    lines += findings.notes
    if findings.problems:
        counts = ", ".join(f"{findings.bad(kind)} {kind}" for kind in KINDS if findings.bad(kind))
        lines.append(f"bad: {counts}")
        lines += [f"  {text[:299]}{'…' * (len(text) > 299)}" for text in map(str, findings.problems[:SHOWN])]
        if len(findings.problems) > SHOWN:
            lines.append(f"  … and {len(findings.problems) - SHOWN:,} more")
    return lines


def _tokens(findings: Findings, limit: int) -> list[str]:
    sizes = spread(findings)
    lines = [
        f"{findings.tokens:,} tokens in usable samples: {findings.image_tokens:,} of images, {findings.label_tokens:,} "
        "learnt",
        f"a sample has {sizes['shortest']:,} to {sizes['longest']:,} tokens, median {sizes['median']:,.0f}; "
        f"the limit is {limit:,}",
    ]
    if findings.truncated:
        lines.append(f"the source of {plural(findings.truncated, 'sample')} was cut to the limit")
    return lines + bars(findings)


def bars(findings: Findings) -> list[str]:
    """One line per bin: its bounds in tokens, a bar, how many samples."""
    bins = histogram(findings.lengths)
    most, wide = max(each.count for each in bins), len(f"{bins[-1].high:,}")
    return [
        f"  {each.low:>{wide},} – {each.high:>{wide},} {'█' * -(-BAR * each.count // most):<{BAR}} {each.count:,}"
        for each in bins
    ]
