"""rankwise validate: scores under the device's conditions, and the proof that what runs there is what was trained.

rankwise validate exported_model --task labels --data_path dataset -o validation

GGUF files ── LlamaServer ──┬── answers to every item ──▶ accuracy, confusion matrix, latency
merged model ── HFReference ┴── parity ladder on some ──▶ the first rung that breaks, if one does

Any other server, and any trainer's model: `handoff/command.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.data.sources.load import settle
from rankwise.device.lora.page import lora_failures, lora_verdict, untold
from rankwise.device.parity.ladder import verdict
from rankwise.device.scores import DOCUMENT, change, gain_kept, items, scores
from rankwise.device.sides import (
    RECORDED,
    ScoredAnswers,
    Shipment,
    TrainedSide,
    Validated,
    answers_of,
    lora_ladders,
    shipment,
    trained_side,
    validated,
)
from rankwise.device.sweep import SWEEP, WITH_MATRIX, planned, sweep_forms
from rankwise.device.validation_page import draw, summary
from rankwise.errors import UndecidedError, UsageError, VerificationError
from rankwise.evaluate.predictions import earlier_answers
from rankwise.evaluate.tasks import TASKS
from rankwise.evaluate.tasks import task as task_named
from rankwise.files.processes import announce
from rankwise.files.run_folder import RunFolder
from rankwise.gguf.quantize import CONVERTED, check_form
from rankwise.options.commands import ValidateConfig
from rankwise.pipeline.idle import refuse_idle
from rankwise.pipeline.table import imported

HANDOFF = "rankwise.device.handoff.command"  # imported only where it is asked for

TRAINED, BEFORE = "trained", "before"  # folders of the model's own answers, and of its base's


def run(config: ValidateConfig) -> dict[str, Any]:
    """Run the command. Returns the content of validation.json. After everything is written: VerificationError where a
    rung is broken or a limit is missed, UndecidedError where an adapter cannot be told from its base."""
    config = check(config)
    if config.by_reference:
        return imported(HANDOFF).run(config)  # type: ignore[no-any-return]
    shipped = shipment(config)
    out = RunFolder(config.output_dir)
    with out.lock(), out.recording("validate", inputs(config, shipped)) as record:
        trained = trained_side(config, shipped)
        app = trained.app  # a folder without its pictures is refused before anything is answered
        plan = planned(config, trained, shipped) if config.sweep else None
        tuned = answers_of(trained, out / TRAINED)
        base = answers_of(trained.on(config.base_model), out / BEFORE) if config.base_model else None
        floor = trained.floor()
        loras = lora_ladders(trained, shipped, floor)
        found = {one.form: validated(config, trained, one, floor, app, out.path, loras) for one in shipped.forms}
        content = described(config, trained, found, tuned, base) | {"floor": floor.as_dict() if floor else None}
        if loras:
            content["adapters"] = loras.as_dict({form: one.climbed for form, one in found.items()}, config.tolerance)
            content["verdict"] = lora_verdict(content["adapters"], content["parity"])
            content["failures"] += lora_failures(content["adapters"], content["parity"])
        if plan:
            content["sweep"] = SWEEP.stamped(sweep_forms(config, trained, shipped, plan, out.path).as_dict())
            record.outputs["sweep"] = out / SWEEP.name
        record.outputs["validation"] = DOCUMENT.write(out, content)
        record.outputs |= draw(content, out.path)
        out.save_config(config)
    for line in summary(content):
        announce(line)
    announce(f"results in {out.path}")
    if content["failures"]:
        raise VerificationError("; ".join(content["failures"]))
    if loras and (line := untold(content["adapters"])):
        raise UndecidedError(line)
    return content


def check(config: ValidateConfig) -> ValidateConfig:
    """The config with its data's task; the options are checked before anything is read."""
    if config.by_reference:
        return imported(HANDOFF).check(config)  # type: ignore[no-any-return]
    config = settle(config)
    if not config.data.task or not config.data.data_path:
        raise UsageError("validate needs the items to answer: --task labels --data_path DATASET")
    if config.data.task not in TASKS:
        raise UsageError(f"--task: {', '.join(TASKS)} can be validated; got {config.data.task}")
    if config.min_agreement and not config.parity_samples:
        raise UsageError("--min_agreement is measured on the parity ladder, which --parity_samples 0 leaves out")
    if config.app_pixels and not config.parity_samples:
        raise UsageError("--app_pixels is compared on the parity ladder, which --parity_samples 0 leaves out")
    if config.app_pixels and not Path(config.app_pixels).is_dir():
        raise UsageError(f"--app_pixels: {config.app_pixels} is not a folder")
    if config.sweep and config.server:
        raise UsageError("--sweep runs files on this machine; leave --server out")
    if config.imatrix and config.calibration_samples:
        raise UsageError("--imatrix is a matrix and --calibration_samples makes one; give one of them")
    refuse_idle(config)
    for form in config.sweep:
        if form not in CONVERTED:  # those are taken as they were exported
            check_form(form, weighed=bool(config.imatrix or config.calibration_samples))
    task_named(config.data.task).check()
    return config


def earlier(config: ValidateConfig) -> list[Path]:
    """The answers of an earlier validation where this one writes its own; a hand-off asks for all of them anew."""
    if config.by_reference:
        return []
    out, forms = Path(config.output_dir), [one.form for one in shipment(config).forms]
    marks = ("", WITH_MATRIX) if config.sweep else ()
    swept = [f"sweep/{mark}{form}" for mark in marks for form in {*forms, *config.sweep}]
    places = [out / name for name in (TRAINED, BEFORE, *forms, *swept)]
    return [file for place in places for file in (*earlier_answers(place), place / RECORDED) if file.is_file()]


def going_on(config: ValidateConfig, *, unchanged: bool) -> ValidateConfig:
    """The config of a recipe's stage that finds answers in its folder: those of another model, or to other items, are
    deleted, once it is sure that this validation can begin."""
    if not unchanged:
        check(config)
        for file in earlier(config):
            file.unlink()
    return config


def inputs(config: ValidateConfig, shipped: Shipment) -> dict[str, str | None]:
    named = {"data": config.data.data_path, "reference": shipped.reference, "base": config.base_model}
    named |= {f"adapter {one.name}": one.reference for one in shipped.loras}
    files = {file.name: str(file) for one in shipped.forms for file in one.files}
    return {**named, **files}


def described(
    config: ValidateConfig,
    trained: TrainedSide,
    found: Mapping[str, Validated],
    tuned: ScoredAnswers,
    base: ScoredAnswers | None,
) -> dict[str, Any]:
    """The content of validation.json: the scores of the form to ship, then the comparisons."""
    form, shipped = list(found.items())[-1]
    ladders = {name: one.ladder for name, one in found.items() if one.ladder}
    content = {
        "outtype": form,
        "tolerance": config.tolerance,
        **shipped.facts(trained.items),
        "target": vars(trained.target) if trained.target else None,
        "reference": scores(tuned.result, tuned.predictions, trained.items),
        "base": scores(base.result, base.predictions, trained.items) if base else None,
        "by_outtype": {name: one.facts(trained.items) for name, one in found.items()},
        "against_reference": compared(tuned, found, trained),
        "gain": gains(tuned, base, found, trained),
        "parity": {name: ladder.as_dict() for name, ladder in ladders.items()},
        "verdict": verdict(ladders) if ladders else ["The parity ladder was left out (--parity_samples 0)."],
        "predictions": items(shipped.answers.result.task, shipped.answers.predictions, trained.items, shipped.records),
    }
    return content | {"failures": failures(config, found)}


def compared(tuned: ScoredAnswers, found: Mapping[str, Validated], trained: TrainedSide) -> dict[str, Any] | None:
    """McNemar of each form against the trained model, on right and wrong; None for texts without either."""
    before = tuned.rights(trained.items)
    if before is None:
        return None
    return {name: asdict(change(before, one.answers.rights(trained.items) or [])) for name, one in found.items()}


def gains(
    tuned: ScoredAnswers, base: ScoredAnswers | None, found: Mapping[str, Validated], trained: TrainedSide
) -> dict[str, Any] | None:
    """How much of training's gain each form keeps; None without --base_model, or where no answer is right or wrong."""
    before, after = (one.rights(trained.items) if one else None for one in (base, tuned))
    if before is None or after is None:
        return None
    rows: Mapping[str, Sequence[bool]] = {name: one.answers.rights(trained.items) or [] for name, one in found.items()}
    return {name: asdict(gain_kept(before, after, right)) for name, right in rows.items()}


def failures(config: ValidateConfig, found: Mapping[str, Validated]) -> list[str]:
    """Reasons for exit code 6; empty where all checks pass."""
    lines = []
    for form, one in found.items():
        rung = one.ladder.first_broken if one.ladder else None
        if rung:
            lines.append(f"{form}: the rung `{rung.name}` is broken: {rung.why}")
        accuracy = one.accuracy
        if config.min_accuracy is not None and accuracy is not None and accuracy < config.min_accuracy:
            lines.append(f"{form}: accuracy {accuracy:.3f} is below --min_accuracy {config.min_accuracy:g}")
    return lines


def describe(config: ValidateConfig) -> list[str]:
    if config.by_reference:
        return imported(HANDOFF).describe(config)  # type: ignore[no-any-return]
    what = " with ".join([str(config.server or config.export), *(config.adapter_gguf and ["the adapter"])])
    lines = [f"answer the items of {config.data.data_path} with {what}, in llama.cpp, greedily"]
    if config.parity_samples:
        against = "adapter in transformers" if config.adapter_gguf else "merged model"
        lines.append(
            f"climb the parity ladder on up to {config.parity_samples} items for each form, against the {against} "
            "in float32; floors are measured on that model"
        )
    if config.adapter_gguf and config.parity_samples:
        lines.append("switch the adapters while the server runs (scale 0, 1 again, by request), with a ladder for each")
    if config.sweep:
        lines.append(f"make and compare the forms {', '.join(config.sweep)}")
    if config.calibration_samples:
        lines.append(f"compute an importance matrix on up to {config.calibration_samples} rows of the training part")
    return [*lines, "exit with 6 where a rung is broken"]
