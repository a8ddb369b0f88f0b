"""rankwise bundle: what an app needs to run the model, with golden vectors; and their replay on any runtime.

rankwise bundle exported_model --validation validation -o bundle
rankwise bundle --replay bundle --server http://192.168.1.20:8080
rankwise bundle --replay bundle --answers phone.jsonl

export, validation ── sound? ──▶ files, prompt, labels, threshold ─┐
trained model, float32 ── golden vectors ──────────────────────────┴─▶ bundle/ ── replayed here ──▶ named
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.input_record import InputRecord, announce_prompts, recorded
from rankwise.data.label_task import LabelTask, read_task
from rankwise.device.app_answers import TokenTexts, climbed, read_answers
from rankwise.device.bundle_files import (
    BUNDLE,
    GRAMMAR,
    Prompt,
    answers_spaced,
    check_prompt,
    copy_model,
    label_answers,
    prompt_of,
    read_bundle,
    read_labels,
    readme,
    spoken,
    write_manifest,
    write_parts,
)
from rankwise.device.clients import ClientInputs, client_files
from rankwise.device.golden import FOLDER, Golden, read_golden, write_golden
from rankwise.device.llama.builds import other_build
from rankwise.device.llama.client import ServerRuntime
from rankwise.device.llama.runtime import LlamaServer, RemoteServer
from rankwise.device.modelfile import MODELFILE, Template, end_texts, modelfile, template_of
from rankwise.device.parity.floor import K, measure_floor
from rankwise.device.parity.ladder import Ladder, climb
from rankwise.device.parity.pixels import AppPixels
from rankwise.device.scores import DOCUMENT, Abstention, abstention, latency
from rankwise.device.shapes import with_all_shapes
from rankwise.device.sides import LAST, ROOM, Shipment, Shipped, TrainedSide, context, trained_side
from rankwise.device.validation_page import ladder_blocks
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.adapter import TASK
from rankwise.files.atomic import about_to_write, atomic_folder, fingerprint, read_object, sha256, write_text
from rankwise.files.gguf import GGUFFile
from rankwise.files.lineage import altered
from rankwise.files.run_folder import CONFIG, RunFolder, called
from rankwise.gguf.reading import Exported, read_export
from rankwise.options.commands import BundleConfig, ValidateConfig
from rankwise.page.blocks import lines
from rankwise.page.text import command_line
from rankwise.pipeline.table import configured

STAGE = "bundle"
SHIPPED = "q8_0"
ITEMS = 200  # rows that golden vectors are chosen from
SCORES = ("task", "method", "n", "accuracy", "interval", "macro_f1", "metrics", "intervals_95")


@dataclass(frozen=True)
class ShippedForm:
    """The form to ship. validated: validation.json and how it was asked for; None without one. doubts: what was not
    proven, or found wrong; only with --allow_unverified may there be any."""

    exported: Exported
    form: str
    validated: Mapping[str, Any] | None
    asked: ValidateConfig | None
    doubts: tuple[str, ...]

    @property
    def text(self) -> Path:
        return self.exported.text(self.form)

    @property
    def mmproj(self) -> Path | None:
        return self.exported.mmproj(self.form)

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.text, self.mmproj) if file]

    @property
    def predictions(self) -> Sequence[Mapping[str, Any]]:
        """Items with confidences; those of this form only."""
        known = self.validated is not None and self.validated.get("outtype") == self.form
        return self.validated["predictions"] if known and self.validated else []

    @property
    def by_form(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = (self.validated or {}).get("by_outtype", {}).get(self.form, {})
        return found

    @property
    def build(self) -> str | None:
        return self.by_form.get("runtime")

    @property
    def scores(self) -> dict[str, Any] | None:
        return {name: self.by_form[name] for name in SCORES if name in self.by_form} or None

    def tolerance(self, config: BundleConfig) -> float:
        """As given; else the validation's, so that both apply one limit to the files."""
        return config.tolerance or float((self.validated or {}).get("tolerance", K))

    def trained(self, config: BundleConfig) -> TrainedSide:
        """The model that was converted, with the items of the validation, or those of --data_path."""
        shipment = Shipment((Shipped(self.form),), self.exported.folder, reference_of(config, self))
        return trained_side(self.as_validated(config), shipment)

    def as_validated(self, config: BundleConfig) -> ValidateConfig:
        asked = self.asked or ValidateConfig()
        data = config.data if config.data.data_path else asked.data
        if not (data.task and data.data_path):
            raise UsageError("golden vectors need items: --validation FOLDER, or --task TASK --data_path DATA")
        if config.data.device_target:  # the one that is named here counts
            data = dataclasses.replace(data, device_target=config.data.device_target)
        return dataclasses.replace(
            asked,
            export=str(self.exported.folder),
            data=data,
            split=config.split or asked.split,
            reference=reference_of(config, self),
            num_samples=min(asked.num_samples or ITEMS, ITEMS),
            parity_samples=config.num_golden,
            top=config.top,
            device="cpu",
        )


def reference_of(config: BundleConfig, source: ShippedForm) -> str:
    recorded = source.asked.reference if source.asked else None
    return config.reference or recorded or str(source.exported.content["model"]["path"])


def source_of(config: BundleConfig) -> ShippedForm:
    """VerificationError where the export or its validation is missing, broken or of other files, unless that is
    allowed; DataError for folders that are not what they should be."""
    exported = read_export(str(config.export))
    form = form_of(config, exported)
    validated, asked = validation_of(config)
    doubts = (*export_doubts(exported, form), *validation_doubts(config, exported, form, validated))
    source = ShippedForm(exported, form, validated, asked, doubts)
    if changed := altered(Path(reference_of(config, source)), "merge"):
        source = dataclasses.replace(source, doubts=(*doubts, changed))
    if source.doubts and not config.allow_unverified:
        raise VerificationError(f"{exported.folder}: {'; '.join(source.doubts)}. --allow_unverified bundles it anyway")
    return source


def form_of(config: BundleConfig, exported: Exported) -> str:
    """The quantization type to bundle: as given, else q8_0, else the smallest exported."""
    if config.outtype:
        assert exported.text(config.outtype)
        return config.outtype
    known = [form for form in LAST if form in exported.outtypes]
    if not (known or exported.outtypes):
        raise DataError(f"{exported.folder}: holds no GGUF model to bundle; export again")
    return SHIPPED if SHIPPED in exported.outtypes else (known or list(exported.outtypes))[-1]


def validation_of(config: BundleConfig) -> tuple[dict[str, Any] | None, ValidateConfig | None]:
    folder = Path(config.validation or "")
    if not config.validation or not (folder / DOCUMENT.name).is_file():
        return None, None
    content = DOCUMENT.read(folder)
    raw = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return content, configured("validate", raw, str(folder / CONFIG)) if raw is not None else None


def export_doubts(exported: Exported, form: str) -> list[str]:
    """The files as exported, and proven then."""
    found = [] if exported.content.get("verification") else ["the export was not verified (--no_verify)"]
    files = exported.content["files"][form]
    for kind, expected in files["sha256"].items():
        if sha256(exported.folder / files[kind]) != expected:
            found.append(f"{files[kind]} is not the file that was exported (its sha256 differs)")
    return found


def validation_doubts(
    config: BundleConfig, exported: Exported, form: str, validated: Mapping[str, Any] | None
) -> list[str]:
    if validated is None:
        place = f" in {Path(config.validation).name}" if config.validation else ""
        return [f"there is no validation{place} (rankwise validate EXPORT …)"]
    if form not in validated["by_outtype"]:
        return [f"{form} was not validated, only {', '.join(validated['by_outtype'])}"]
    if validated.get("adapters"):
        return ["the files were validated with an adapter on top (--adapter_gguf), which is not in them: merge it"]
    found = [f"validation found: {failure}" for failure in validated["failures"] if failure.startswith(f"{form}:")]
    if form not in validated["parity"]:
        found.append(f"{form} was never on the parity ladder (--parity_samples 0)")
    return [*found, *other_files(config, exported, form)]


def other_files(config: BundleConfig, exported: Exported, form: str) -> list[str]:
    """Files that changed since they were validated under these names."""
    entry = RunFolder(str(config.validation)).stages().get("validate", {}).get("inputs", {})
    files = [exported.text(form), *([exported.mmproj(form)] if exported.mmproj(form) else [])]
    return [
        f"{file.name} is not the file that was validated"
        for file in files
        if file and entry.get(file.name, {}).get("fingerprint") not in (None, fingerprint(file))
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def run(config: BundleConfig) -> dict[str, Any] | Ladder:
    """The whole command; returns bundle.json's content, or the ladder of a replay. VerificationError where a rung of
    the golden vectors differs: a bundle does not get its name then."""
    check(config)
    if config.replay:
        return replay(config, Path(config.replay))
    RunFolder(config.output_dir).refuse_other_content(STAGE)
    source = source_of(config)
    trained = source.trained(config)
    out = RunFolder(config.output_dir)
    with out.lock(), atomic_folder(out.path) as temporary:
        inside = RunFolder(temporary, portable=True)
        with inside.recording(STAGE, {"export": source.exported.folder, "model": trained.name}) as record:
            content = write_bundle(config, source, trained, temporary)
            record.outputs["golden"] = temporary / FOLDER
        inside.save_config(config)
        write_manifest(temporary, content)
        told = replayed(config, temporary)
        require(told.ladder, str(out.path))
        content |= {"replayed_on": told.build}
        BUNDLE.write(temporary, BUNDLE.read(temporary) | content)
    report(config, content, told)
    return content


def check(config: BundleConfig) -> None:
    """Check the options before anything is read."""
    if not config.replay and not config.export:
        raise UsageError("bundle needs an export: rankwise bundle EXPORT_FOLDER -o bundle, or --replay BUNDLE")
    if config.server and not config.replay:
        raise UsageError("--server runs the golden vectors of an existing bundle: add --replay BUNDLE")
    if config.answers and not config.replay:
        raise UsageError("--answers are an app's to the golden vectors of an existing bundle: add --replay BUNDLE")
    if config.answers and (config.server or config.app_pixels):
        other = "--server" if config.server else "--app_pixels"
        raise UsageError(f"--answers say what the app sent and got, so nobody is asked: leave {other} out")
    if config.app_pixels and not config.replay:
        raise UsageError("--app_pixels is compared with the golden vectors of an existing bundle: add --replay BUNDLE")
    if config.app_pixels and not Path(config.app_pixels).is_dir():
        raise UsageError(f"--app_pixels: {config.app_pixels} is not a folder")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_bundle(config: BundleConfig, source: ShippedForm, trained: TrainedSide, folder: Path) -> dict[str, Any]:
    """All files of the bundle; returns what bundle.json says beside them."""
    task = task_of(source.exported, trained)
    target = shipped_target(source, trained)
    answers = label_answers(task, trained.items[0], trained.renderer) if task else []
    unsure = abstention(source.predictions, config.min_precision)
    prompt = prompt_of(trained.items, trained.renderer, GGUFFile(source.text))
    copy_model(folder, source.files)
    found = recorded([source.exported.folder, Path(trained.name)])
    if found.record:
        found.record.save(folder)
    write_parts(folder, prompt, target, task, answers, trained.renderer.end_ids, unsure.as_dict())
    cases = with_all_shapes(trained.cases, trained.renderer)
    floor = measure_floor(trained.reference, cases, config.top)
    limits = floor.thresholds(source.form, source.tolerance(config))
    write_golden(folder, cases, trained.reference, limits, source.form, config.top)
    facts = described(source, trained, unsure)
    template = write_clients(folder, trained, prompt, facts, found.record)
    spaced = answers_spaced(trained.items[0], trained.renderer)
    names = [one.name for one in answers]
    write_text(folder / "README.md", readme(facts, prompt.as_dict(), names, target, unsure, spaced, template.use))
    return facts


def write_clients(
    folder: Path, trained: TrainedSide, prompt: Prompt, facts: Mapping[str, Any], record: InputRecord | None
) -> Template:
    """Write the client files: Ollama's Modelfile, and code for three runtimes."""
    template, ends = template_of(trained.items[0], trained.renderer, prompt), end_texts(trained.renderer)
    system = record.system_prompt if record else None
    write_text(folder / MODELFILE, modelfile(template, prompt, facts, ends, system))
    for name, content in client_files(ClientInputs(prompt, ends, facts, (folder / GRAMMAR).is_file())).items():
        write_text(folder / name, content)
    return template


def task_of(exported: Exported, trained: TrainedSide) -> LabelTask | None:
    """The classes that travelled with the model, else those of the labelled data; None for a task without classes."""
    places = [exported.folder, Path(str(trained.config.data.data_path))] if trained.task.name == "labels" else []
    return next((read_task(place) for place in places if (place / TASK).is_file()), None)


def shipped_target(source: ShippedForm, trained: TrainedSide) -> DeviceTarget | None:
    """The contract, with the runtime that the answers were validated on."""
    target = read_target(source.exported.folder) or trained.target
    return dataclasses.replace(target, runtime_build=source.build or target.runtime_build) if target else None


def described(source: ShippedForm, trained: TrainedSide, unsure: Abstention) -> dict[str, Any]:
    """bundle.json without its list of files."""
    return {
        "outtype": source.form,
        "model": source.text.name,
        "mmproj": source.mmproj.name if source.mmproj else None,
        "made_from": called(source.exported.content["model"]),
        "max_new_tokens": trained.max_new_tokens,
        "context": context(trained.renderer),
        "validation": source.scores,
        "threshold": unsure.threshold,
        "not_verified": list(source.doubts),
        "validated_on": source.build,
        "replayed_on": None,  # known once it was
    }


# --- replaying -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """The ladder of the golden vectors, the build that answered and the validated one; what an app's answers took."""

    ladder: Ladder
    build: str | None
    validated: str | None
    times: Mapping[str, float] | None = None

    def told(self) -> list[str]:
        lines = [note] if (note := other_build(self.validated, self.build)) else []
        if self.times:
            lines.append("latency in the app: median {median:.3f} s, 95th percentile {p95:.3f} s".format(**self.times))
        return lines


def replay(config: BundleConfig, folder: Path) -> Ladder:
    """The ladder of a bundle's golden vectors. VerificationError where a rung differs."""
    told = replayed(config, folder)
    print("\n".join([*lines(ladder_blocks({"golden vectors": told.ladder.as_dict()})), *told.told()]))
    require(told.ladder, str(folder))
    print(f"{folder}: {config.answers or config.server or 'llama.cpp here'} agrees with the trained model")
    return told.ladder


def replayed(config: BundleConfig, folder: Path) -> Replayed:
    content = read_bundle(folder)
    if config.replay:
        found = recorded([folder])
        announce_prompts(found.record, found)
    target = read_target(folder)
    golden, validated = read_golden(folder, target), content.get("validated_on")
    validated = validated or (target.runtime_build if target else None)  # bundles of before
    if config.answers:
        return replayed_by_app(config.answers, golden, GGUFFile(folder / content["model"]), validated)
    app = AppPixels.read(config.app_pixels, golden.cases) if config.app_pixels else None
    about_to_write()
    with runtime_for(config, folder, content, golden) as runtime:
        ladder = climb(golden, runtime, golden.cases, golden.thresholds, golden.top, app=app)
        if ladder.holds:
            check_parts(folder, runtime, golden)
        return Replayed(ladder, runtime.info.build, validated)


def replayed_by_app(file: str, golden: Golden, model: GGUFFile, validated: str | None) -> Replayed:
    """The ladder of what an app has written down. DataError for lines that are not one of each case."""
    answers = read_answers(file, golden.cases)
    about_to_write()
    builds = sorted({answer.build for answer in answers.values() if answer.build})
    ladder = climbed(golden, answers, TokenTexts.of(model))
    times = latency([answer.ms / 1000 for answer in answers.values() if answer.ms is not None])
    return Replayed(ladder, " and ".join(builds) or None, validated, times)


def runtime_for(
    config: BundleConfig, folder: Path, content: Mapping[str, Any], golden: Golden
) -> AbstractContextManager[ServerRuntime]:
    if config.server:
        return RemoteServer(config.server)
    needed = max(len(golden.known[case.id].ids) for case in golden.cases) + ROOM
    mmproj = folder / content["mmproj"] if content["mmproj"] else None
    held = config.context or min(needed, int(content["context"]))
    return LlamaServer(folder / content["model"], mmproj, held, config.threads)


def check_parts(folder: Path, runtime: ServerRuntime, golden: Golden) -> None:
    """What an app builds its requests from is what the golden vectors were asked with. VerificationError where it is
    not."""
    check_prompt(folder, runtime.info.begin_text, golden.cases)
    if not (folder / GRAMMAR).is_file():
        return
    labels, rules = read_labels(folder, golden.known.values()), (folder / GRAMMAR).read_text(encoding="utf-8")
    for case in golden.cases:
        expected = golden.expected(case)
        said = spoken(expected.answer, expected.end_ids)
        found = runtime.complete(case.prompt, case.images, max_new_tokens=len(expected.answer) + 8, grammar=rules)
        words = found.tokens[:-1] if found.ended else found.tokens
        if words not in labels or (said in labels and golden_sure(golden, case.id) and words != said):
            raise VerificationError(f"{folder / GRAMMAR}: the runtime answers {found.text!r} to {case.id}")


def golden_sure(golden: Golden, name: str) -> bool:
    """Whether the trained model's answer has no near tie at any token."""
    rows = golden.known[name].log_probs.nan_to_num(nan=-1e9).topk(2).values
    return bool((rows[:, 0] - rows[:, 1] > golden.thresholds.margin).all())


def require(ladder: Ladder, where: str) -> None:
    broken = ladder.first_broken
    if broken:
        raise VerificationError(f"{where}: golden vectors: the rung `{broken.name}` differs: {broken.why}")


# --- what people read ------------------------------------------------------------------------------------------------


def report(config: BundleConfig, content: Mapping[str, Any], told: Replayed) -> None:
    for doubt in content["not_verified"]:
        print(f"warning: bundled though {doubt}")
    print("\n".join([*lines(ladder_blocks({"golden vectors": told.ladder.as_dict()})), *told.told()]))
    sure = content["threshold"]
    print("no confidence threshold; see abstain.json" if sure is None else f"abstain below a confidence of {sure:.3f}")
    print(f"bundle in {config.output_dir}")
    print(f"next: {next_command(config)}")


def next_command(config: BundleConfig) -> str:
    return command_line("bundle", replay=config.output_dir, server="http://PHONE:8080")


def describe(config: BundleConfig) -> list[str]:
    if config.replay:
        asked = config.server or "a llama.cpp of our own"
        what = f"put the golden vectors of {config.replay} to {asked}"
        if config.answers:
            what = f"compare an app's answers, {config.answers}, with the golden vectors of {config.replay}"
        return [f"{what}; exit 6 where a rung differs"]
    return [
        f"check that the export {config.export} and its validation {config.validation} found nothing wrong",
        f"bundle files, prompt, labels, threshold and {config.num_golden} golden vectors",
        "replay the golden vectors in llama.cpp; the folder gets its name if no rung differs",
    ]
