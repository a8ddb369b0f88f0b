"""rankwise check: a whole data set gone over before a GPU is touched.

rankwise check --model_name MODEL --task conversations --data_path train.json --image_folder images
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankwise.data.check import Findings, Problem, examined
from rankwise.data.example import Examples
from rankwise.data.reading import check_data, reading, settle
from rankwise.data.render import Renderer
from rankwise.data.sources import load
from rankwise.errors import DataError
from rankwise.files.atomic import write_json, write_text
from rankwise.files.run_folder import RunFolder
from rankwise.nets.cut_down import Untried, cut_down, headless, random_model
from rankwise.nets.load import load_config, loadable, loaded
from rankwise.options.commands import CheckConfig
from rankwise.pipeline.idle import refuse_idle
from rankwise.show.check import in_words, report
from rankwise.stages.rendering import image_reader, renderer_for
from rankwise.stages.trial import tried

REPORT, BAD = "check.json", "bad_samples.jsonl"


def run(config: CheckConfig) -> Findings:
    """Print and write what was found. DataError (exit 3) where samples are bad, once the report is written."""
    config = settle(config)
    check(config)
    folder = RunFolder(config.output_dir)
    with folder.lock(), folder.recording("check", inputs(config)) as record:
        folder.save_config(config)
        renderer = renderer_of(config)
        seen = renderer is None or renderer.sight is not None
        examples = rows(config, sees_images=seen)
        reader = image_reader(config.data) if seen else None
        findings = examined(examples, reader, renderer, config.workers, config.compare)
        if renderer is not None and any(findings.shortest):
            try_model(config, renderer, findings)
        limit = None if renderer is None else renderer.limit
        write_json(folder / REPORT, report(findings, limit) | {"model": config.model.model_name})
        write_text(folder / BAD, "".join(f"{json.dumps(one.record(), ensure_ascii=False)}\n" for one in bad(findings)))
        record.outputs |= {"report": folder / REPORT, "bad samples": folder / BAD}
        print("\n".join(in_words(findings, limit)))
        refuse(findings, config, renderer)
    return findings


def check(config: CheckConfig) -> None:
    check_data(config.data, "check")
    refuse_idle(config)


def inputs(config: CheckConfig) -> dict[str, Path | str]:
    found = {"model": config.model.model_name, "data": config.data.data_path}
    return {name: value for name, value in found.items() if value}


def rows(config: CheckConfig, *, sees_images: bool) -> Examples:
    """All samples, with the bad rows beside them."""
    data = config.data
    assert data.task and data.data_path
    examples = load(
        data.task,
        data.data_path,
        config.split,
        download=data.download,
        allow_empty=True,
        **(reading(data) | {"skip_bad": True}),
    )
    for note in replace(examples, skipped=()).notes(sees_images=sees_images):
        print(note)
    return examples


def renderer_of(config: CheckConfig) -> Renderer | None:
    """The one that training will use; None without a model."""
    name = config.model.model_name
    if name is None:
        return None
    return renderer_for(config.data, config.model, name, loadable(config.model, name).config)


def try_model(config: CheckConfig, renderer: Renderer, findings: Findings) -> None:
    """Run a few samples through the model: a cut-down copy, or with `--run_model` its own weights."""
    name = str(config.model.model_name)
    try:
        if config.run_model:
            model: Any = headless(loaded(config.model, name, torch.float32)).eval()
        else:
            model = random_model(cut_down(load_config(name, config.model.revision, config.model.trust_remote_code)))
        trial = tried(model, renderer, findings.shortest, sure=config.run_model)
    except Untried as error:
        findings.notes.append(f"note: the model was not run: {error}; --run_model runs it with its own weights")
        return
    findings.tried = trial.samples
    findings.notes += [f"note: {trial.note}"] if trial.note else []
    findings.problems += [Problem("model", reason, one.id, one.line or None) for one, reason in trial.problems]


def bad(findings: Findings) -> list[Problem]:
    """In the order of the file."""
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


def describe(config: CheckConfig) -> list[str]:
    config = settle(config)
    check(config)
    lines = [f"read every row of {config.data.data_path} as {config.data.task}", "decode every image it names"]
    if config.model.model_name:
        lines.append(f"make tokens of every sample as training does for {config.model.model_name}")
        lines.append("compare them with what the model's own chat template makes, where it is used")
        lines.append(
            "run a few with images through the model" + ("" if config.run_model else ", cut down to two layers")
        )
    return [*lines, f"write {REPORT} and {BAD} to {config.output_dir}"]
