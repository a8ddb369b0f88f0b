"""The two sides of `rankwise validate`: the trained model in transformers, and one GGUF file in llama.cpp.

EXPORT or --server ── shipment ──▶ Shipped*: GGUF files by form, or a server that runs one; what they were made from
config ── trained_side ──▶ Trained ── answers_of ──▶ Answers (of the reference, of the base)
                              └── floor ── validated(form) ──▶ Validated (answers, ladder, memory)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.example import Example
from rankwise.data.input_record import recorded, require_same, system_warning
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.device.llama.builds import other_build
from rankwise.device.llama.client import ServerRuntime
from rankwise.device.llama.generator import Answered, GGUFGenerator
from rankwise.device.llama.runtime import LlamaServer, RemoteServer, Runtime
from rankwise.device.parity.cases import Case, blind, case_of, pick
from rankwise.device.parity.floor import Floor, Thresholds, measure_floor
from rankwise.device.parity.ladder import Embedder, Ladder, observe
from rankwise.device.parity.pixels import AppPixels
from rankwise.device.parity.reference import HFReference, Observed
from rankwise.device.scores import latency, rights, scores
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.generate import GenerationSettings, HFGenerator, fitting, pick_device
from rankwise.evaluate.predictions import EvaluationResult, Prediction, predict
from rankwise.evaluate.tasks import Task, evaluate, task
from rankwise.files.adapter import adapter_files, base_and_adapter
from rankwise.files.atomic import fingerprint, fingerprints
from rankwise.files.checkpoint import base_files, resolve
from rankwise.files.gguf import GGUFFile
from rankwise.files.lineage import require_unaltered
from rankwise.files.processes import announce
from rankwise.files.run_folder import without_places
from rankwise.gguf.reading import read_export
from rankwise.models.load import load_config, load_model
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import DataSection, ModelSection
from rankwise.page.text import plural
from rankwise.pipeline.table import imported

FORMS = {0: "f32", 1: "f16", 7: "q8_0", 32: "bf16"}  # llama.cpp's general.file_type
LAST = ("f32", "bf16", "f16", "q8_0")  # the form to ship is the smallest of these
# Tokens of llama.cpp's context beyond the longest sample: a picture cut into more tiles shall show, not fail.
ROOM = 1024
LONGEST = 128  # tokens of an answer, where neither the command nor the device says
RECORDED = "answers.jsonl"  # seconds and confidence of each of llama.cpp's answers
BLIND = 4  # prompts without their pictures on the ladder


@dataclass(frozen=True)
class Shipped:
    """One quantization type of the model, and how it is run."""

    form: str
    text: Path | None = None
    mmproj: Path | None = None
    url: str | None = None
    loras: tuple[Path, ...] = ()

    def start(self, context: int | None, threads: int | None) -> AbstractContextManager[ServerRuntime]:
        if self.url:
            return RemoteServer(self.url)
        assert self.text
        return LlamaServer(self.text, self.mmproj, context, threads, loras=self.loras)

    @property
    def files(self) -> list[Path]:
        return [*(file for file in (self.text, self.mmproj) if file), *self.loras]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as GGUF. reference: the adapter in transformers that it should be; None where nothing says."""

    path: Path
    reference: str | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def adapter(self) -> str | None:
        """What the adapter is called, for files that travel."""
        return str(without_places(self.reference)) if self.reference else None


@dataclass(frozen=True)
class Shipment:
    """All quantization types, the one to ship last. folder: of the export; reference: what it says it was made from.

    loras: adapters on top of it, the first one applied; the reference is then that adapter.
    """

    forms: tuple[Shipped, ...]
    folder: Path | None = None
    reference: str | None = None
    loras: tuple[LoraFile, ...] = ()


def shipment(config: ValidateConfig) -> Shipment:
    """UsageError where it is not clear what to run; DataError for files that are missing or broken; VerificationError
    for an export, or a merged model that it is compared with, whose files have been changed since."""
    path = Path(config.export) if config.export else None
    exported = read_export(path) if path and path.is_dir() else None
    reference = str(exported.content["model"]["path"]) if exported else None
    if config.server:
        if len(config.outtype) != 1:
            raise UsageError("--server runs one file: give its quantization type with --outtype (f16, q8_0 …)")
        forms = [Shipped(config.outtype[0], url=config.server)]
    elif exported:
        known = [form for form in LAST if form in exported.outtypes]  # largest first
        wanted = config.outtype or [*known, *(form for form in exported.outtypes if form not in known)]
        forms = [Shipped(form, exported.text(form), exported.mmproj(form)) for form in wanted]
    elif path:
        form = config.outtype[0] if config.outtype else form_of(path)
        forms = [Shipped(form, path, Path(config.mmproj) if config.mmproj else None)]
    else:
        raise UsageError("validate needs what was exported: rankwise validate EXPORT_FOLDER, or --server URL")
    loras: tuple[LoraFile, ...] = lora("files").lora_files(config) if config.adapter_gguf else ()
    reference = loras[0].reference if loras else config.reference or reference
    if exported:
        require_unaltered(exported.folder, "export")
    if reference:
        require_unaltered(Path(reference), "merge")
    forms = [replace(form, loras=tuple(one.path for one in loras)) for form in forms]
    return Shipment(tuple(forms), path if exported else None, reference, loras)


def form_of(path: Path) -> str:
    """The quantization type stated in a GGUF, else the suffix of its name."""
    return FORMS.get(GGUFFile(path).metadata.get("general.file_type", -1), path.stem.rpartition("-")[2])


@dataclass(frozen=True)
class ScoredAnswers:
    """A model's answers to all items, and what they are worth."""

    result: EvaluationResult
    predictions: Sequence[Prediction]

    def rights(self, items: Sequence[Example]) -> list[bool] | None:
        return rights(self.result.task, self.predictions, items)


@dataclass(frozen=True)
class TrainedSide:
    """The trained model with the items. renderer: as training had it, with room for an answer. read: the files that
    the items came from. adapter: the folder of the one that the model `name` has, if any."""

    config: ValidateConfig
    name: str
    task: Task
    renderer: Renderer
    items: Sequence[Example]
    max_new_tokens: int
    model: Any
    read: tuple[Path, ...] = ()
    adapter: Path | None = None

    @property
    def target(self) -> DeviceTarget | None:
        return self.renderer.sight.target if self.renderer.sight else None

    @property
    def decoding(self) -> GenerationSettings:
        return GenerationSettings(self.max_new_tokens, batch_size=self.config.batch_size, seed=self.config.seed)

    def on(self, base: str) -> TrainedSide:
        """The same items for another model, the base."""
        return replace(self, name=base, model=loaded(self.config, base), adapter=None)

    @cached_property
    def reference(self) -> HFReference:
        return HFReference(self.model, self.renderer, self.max_new_tokens, embeds=Embedder.available())

    @cached_property
    def cases(self) -> list[Case]:
        """The items of the ladder, and a few of them without their pictures."""
        folder = self.renderer.sight.reader.folder if self.renderer.sight else None
        chosen = pick(self.items, self.config.parity_samples, folder)
        seeing = [example for example in chosen if example.images and self.renderer.sight][:BLIND]
        return [case_of(one, self.renderer) for one in chosen] + [blind(one, self.renderer) for one in seeing]

    @property
    def app(self) -> AppPixels | None:
        return AppPixels.read(self.config.app_pixels, self.cases) if self.config.app_pixels else None

    def floor(self) -> Floor | None:
        return measure_floor(self.reference, self.cases, self.config.top) if self.config.parity_samples else None

    def made_from(self, *files: Path | str) -> dict[str, Any]:
        return {"data": fingerprints(self.read), **{Path(file).name: fingerprint(file) for file in files}}


@dataclass(frozen=True)
class Validated:
    """One quantization type under the device's conditions. records: seconds and confidence by item. climbed: the other
    settings of its LoRAs."""

    form: str
    build: str
    answers: ScoredAnswers
    records: Mapping[str, Answered]
    memory: int | None
    ladder: Ladder | None
    unlike: int
    climbed: Sequence[Mapping[str, Any]] = ()

    @property
    def accuracy(self) -> float | None:
        found = self.answers.result.metrics
        name = "accuracy" if "accuracy" in found else "exact_match" if "exact_match" in found else ""
        return found[name] / 100 if name else None

    def facts(self, items: Sequence[Example]) -> dict[str, Any]:
        return {
            **scores(self.answers.result, self.answers.predictions, items),
            "latency": latency([answer.seconds for answer in self.records.values()]),
            "memory": self.memory,
            "runtime": self.build,
            "prompts_of_another_length": self.unlike,
        }


def trained_side(config: ValidateConfig, shipped: Shipment) -> TrainedSide:
    """DataError where model, data and export are for different devices; UsageError where no reference is known."""
    given = shipped.reference
    if not given:
        raise UsageError("the model that was exported is not recorded; give the merged model with --reference MERGED")
    if not Path(given).exists() and not config.reference:
        raise DataError(f"{given}, the model that was exported, is missing; give it with --reference MERGED")
    chosen = task(str(config.data.task))
    name, adapter = base_and_adapter(given, config.base_model)
    places = [adapter] if adapter else [shipped.folder] if shipped.folder else []
    if shipped.folder and not shipped.loras:
        require_same(shipped.folder, resolve(given))
    renderer = renderer_of(config, shipped, name, places)
    target = renderer.sight.target if renderer.sight else None
    longest = config.max_new_tokens or (target.max_new_tokens if target else LONGEST)
    renderer = renderer.leaving(longest)
    items = chosen.examples(str(config.data.data_path), config.split, replace(config.data, download=False))
    for note in items.notes(sees_images=renderer.sight is not None):
        announce(note)
    usable = fitting(items.items[: config.num_samples], renderer)
    system_warning(recorded([*places, resolve(name)]), usable)
    if not usable:
        raise DataError(f"{config.data.data_path}: no items to evaluate")
    trained = loaded(config, name, adapter)
    return TrainedSide(config, name, chosen, renderer, usable, longest, trained, items.files, adapter)


def renderer_of(config: ValidateConfig, shipped: Shipment, name: str, places: Sequence[Path]) -> Renderer:
    """How the trained model is asked the rows of `config.data`, pictures as the export's device has them."""
    data, model = as_exported(config, shipped), ModelSection(model_name=name)
    return renderer_for(data, model, name, load_config(name), places, strict=True)


def loaded(config: ValidateConfig, name: str, adapter: Path | None = None) -> Any:
    model = load_model(name, torch.float32).to(pick_device(config.device)).eval()
    return lora("held").adapted(model, adapter) if adapter else model


def lora(name: str) -> Any:
    """A file of lora/ that only adapters on a base's GGUF need, imported where they are given."""
    return imported(f"rankwise.device.lora.{name}")


class LoraLadders(Protocol):
    """`lora.settings.LoraSide`: what LoRAs are held to."""

    def named(self, ladder: Ladder, seen: Sequence[Observed], limits: Thresholds) -> Ladder: ...

    def climb(self, runtime: ServerRuntime, form: str, tolerance: float) -> list[dict[str, Any]]: ...

    def as_dict(self, climbed: Mapping[str, Sequence[Mapping[str, Any]]], tolerance: float) -> dict[str, Any]: ...


def lora_ladders(trained: TrainedSide, shipped: Shipment, floor: Floor | None) -> LoraLadders | None:
    """None without LoRAs, or where nothing is on the ladder."""
    if not shipped.loras or floor is None:
        return None
    forms, top = [one.form for one in shipped.forms], trained.config.top
    load = partial(loaded, trained.config, trained.name)
    found: LoraLadders = lora("settings").lora_side(
        shipped.loras, trained.name, trained.reference, floor, trained.cases, top, forms, load
    )
    return found


def as_exported(config: ValidateConfig, shipped: Shipment) -> DataSection:
    """The data options, with the export's device where nothing else says which; DataError where they disagree."""
    own = read_target(shipped.folder) if shipped.folder else None
    if own is None or config.data.device_target or shipped.folder is None:
        return config.data
    places = [Path(str(config.data.data_path)), resolve(str(shipped.reference))]
    for place in places:
        other = read_target(place if place.is_dir() else place.parent)
        if other and other.geometry != own.geometry:
            raise DataError(
                f"{shipped.folder} and {place} are for different devices ({own.geometry} against {other.geometry}): "
                "export again, or say which one with --device_target"
            )
    return replace(config.data, device_target=str(shipped.folder))


def answers_of(trained: TrainedSide, folder: Path) -> ScoredAnswers:
    """The transformers model's own greedy answers to all items."""
    engine = HFGenerator(trained.model, trained.renderer, trained.decoding)
    made_from = trained.made_from() | {"model": fingerprints(base_files(resolve(trained.name)))}
    if trained.adapter:
        made_from |= {"adapter": fingerprints([file for file in adapter_files(trained.adapter) if file])}
    return answered(trained, engine, folder, made_from)


def answered(trained: TrainedSide, engine: Any, folder: Path, made_from: Mapping[str, Any]) -> ScoredAnswers:
    result = evaluate(trained.task, engine, trained.items, folder, made_from, by="generation")
    assert result
    return ScoredAnswers(result, predict(engine, trained.items, folder / "predictions.jsonl", made_from))


def validated(
    config: ValidateConfig,
    trained: TrainedSide,
    one: Shipped,
    floor: Floor | None,
    app: AppPixels | None,
    out: Path,
    loras: LoraLadders | None = None,
) -> Validated:
    """Validate one quantization type: answer all items, run some of them on the ladder."""
    folder = out / one.form
    with one.start(config.context or context(trained.renderer), config.threads) as runtime:
        ladder, climbed = None, list[dict[str, Any]]()
        if floor:
            limits = floor.thresholds(one.form, config.tolerance, config.min_agreement)
            # llama-cpp-python on the same files, where it is installed and they are on this machine
            embedder = (
                Embedder(one.text, one.mmproj, config.threads)
                if one.text and one.mmproj and Embedder.available()
                else None
            )
            seen = observe(trained.reference, runtime, trained.cases, config.top, embedder, app)
            ladder = Ladder.of(seen, runtime, limits)
            if loras:
                ladder = loras.named(ladder, seen, limits)
                climbed = loras.climb(runtime, one.form, config.tolerance)
        engine, answers = answers_in(trained, one, runtime, folder)
        if engine.unlike:
            other = f"{plural(len(engine.unlike), 'prompt')} of another length in llama.cpp than in training"
            announce(f"warning: {one.form}: {other}")
        build, memory, records = runtime.info.build, runtime.memory(), engine.answers()
        pinned = trained.target.runtime_build if trained.target else None
        if pinned and (note := other_build(pinned, build)):
            announce(f"note: {one.form}: {note}")
        return Validated(one.form, build, answers, records, memory, ladder, len(engine.unlike), climbed)


def answers_in(
    trained: TrainedSide, one: Shipped, runtime: Runtime, folder: Path
) -> tuple[GGUFGenerator, ScoredAnswers]:
    """llama.cpp's answers to all items, recorded in the folder one by one; the engine knows their seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = GGUFGenerator(runtime, trained.renderer, trained.decoding, record=folder / RECORDED)
    return engine, answered(trained, engine, folder, trained.made_from(*one.files))


def context(renderer: Renderer) -> int:
    """Tokens that llama.cpp is asked to hold."""
    return min(renderer.limit + ROOM, renderer.positions or renderer.limit + ROOM)
