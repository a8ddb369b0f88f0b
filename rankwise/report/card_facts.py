"""Sections of `rankwise card`, each from the records of one stage; a stage without records gives no lines.

RUN ── export.json: model ──▶ merged folder ── manifest: adapter ──▶ training run ── manifest: model ──▶ base

Folders are named by their last part only: where they lie on whose machine is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.input_record import read_input
from rankwise.device.bundle_files import BUNDLE
from rankwise.device.validation_page import VALIDATION
from rankwise.errors import DataError
from rankwise.files.adapter import CONFIG_NAME, INPUT, is_adapter
from rankwise.files.atomic import read_if_there, read_object
from rankwise.files.checkpoint import HUB_ID
from rankwise.files.lineage import EXPORT, adapters_of, chain, named, walk
from rankwise.files.run_folder import CONFIG, MANIFEST
from rankwise.merge.verify import proof_words
from rankwise.page.blocks import Table
from rankwise.page.template import markdown_table
from rankwise.page.text import amount, duration, memory, metric_name, number, percent, score
from rankwise.report.contents import Contents, Scored, read_run

KINDS = ("bundle", "export", "merged", "adapter")  # the furthest along first


@dataclass(frozen=True)
class ManifestEntry:
    """A stage's entry in a manifest, and the folder that it stands in."""

    folder: Path
    entry: Mapping[str, Any]

    def input(self, name: str) -> str | None:
        """The path or name of something the stage started from."""
        row = self.entry.get("inputs", {}).get(name, {})
        found: str | None = row.get("path") or row.get("name")
        return found

    @property
    def config(self) -> dict[str, Any]:
        return read_if_there(self.folder / CONFIG)


@dataclass(frozen=True)
class Sources:
    """All that is known of a model. `roots`: the run first, then the folders that its records name."""

    roots: tuple[Path, ...]
    contents: tuple[Contents, ...]

    def files(self, name: str) -> list[Path]:
        return [path for root in self.roots for path in named(list(walk(root)), name)]

    def stage(self, name: str) -> ManifestEntry | None:
        """The newest entry of a stage."""
        found = [
            ManifestEntry(one.run / stage.folder, stage.entry)
            for one in self.contents
            for stage in one.stages
            if stage.name == name
        ]
        return max(found, key=lambda one: str(one.entry.get("started", "")), default=None)

    @property
    def scores(self) -> list[Scored]:
        return [scored for one in self.contents for scored in one.scores]

    @property
    def phases(self) -> list[str]:
        return [name for one in self.contents for _, table in one.phases for _, name in table]

    def json(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        return [(path.parent, read_object(path)) for path in self.files(name)]


def sources_of(run: Path) -> Sources:
    """DataError where there is no such folder, or nothing in it that a card could say."""
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; `rankwise card` takes a run folder, an adapter, a model or an export")
    roots: list[Path] = []
    for root in chain(run):
        if not any(root.resolve().is_relative_to(other.resolve()) for other in roots):
            roots.append(root)
    contents = tuple(read_run(root) if named(list(walk(root)), MANIFEST) else Contents(root) for root in roots)
    return Sources(tuple(roots), contents)


def folders_of(run: Path, kind: str) -> list[Path]:
    """Folders of that kind in the run, the newest first."""
    files = list(walk(run))
    if kind in ("export", "bundle"):
        found = [path.parent for path in named(files, EXPORT if kind == "export" else BUNDLE.name)]
    elif kind == "merged":
        found = [path.parent for path in named(files, MANIFEST) if adapters_of(path, ["merge"])]
    else:
        found = [path.parent for path in named(files, CONFIG_NAME) if is_adapter(path.parent)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def choose_folder(run: Path, asked: str) -> tuple[str, Path]:
    """(kind, folder) that the card is for. DataError where the run has none."""
    for kind in KINDS if asked == "auto" else (asked,):
        for folder in folders_of(run, kind):
            return kind, folder
    wanted = "adapter, merged model or export" if asked == "auto" else asked
    raise DataError(f"{run}: holds no {wanted} to write a card for")


# Settings worth a line, where the run has them: name in the config → as a card says it.
SETTINGS = {
    "task": "task",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warm-up, share of the steps",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "gradient accumulation",
    "num_train_epochs": "epochs",
    "weight_decay": "weight decay",
    "lora_dropout": "LoRA dropout",
    "init_lora_weights": "LoRA initialisation",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "load_in_4bit": "base in 4 bits while training",
    "load_in_8bit": "base in 8 bits while training",
    "use_depth": "depth",
    "balance": "classes balanced",
    "packing": "packing",
    "seed": "seed",
}
NOT_WORTH_SAYING = (None, False, "", "default", "none")


def public(name: str | None) -> str:
    """A hub id as it is, of a path its last part."""
    if not name:
        return "not recorded"
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).name


def training(sources: Sources) -> list[str]:
    trained = sources.stage("train")
    if trained is None:
        return []
    settings = trained.config
    rows = [("data", data_of(trained)), *ranks_of(sources, trained)]
    rows += [("phases", " → ".join(sources.phases))] if sources.phases else []
    rows += [(label, shown(settings[name])) for name, label in SETTINGS.items() if said(settings.get(name))]
    entry = trained.entry
    if "steps" in entry:
        rows.append(("optimizer steps", f"{entry['steps']:,} in {duration(float(entry.get('training_seconds', 0)))}"))
    return markdown_table(Table((), rows)) + versions_of(trained)


def prompts(place: Path) -> list[str]:
    """The prompt format that the model was trained with."""
    found = read_input(place)
    return ["", f"Trained with these prompts ({INPUT}): {found[0].words()}."] if found else []


def said(value: Any) -> bool:
    return not any(value is other or value == other for other in NOT_WORTH_SAYING) or (
        value == 0 and value is not False
    )


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes"
    return number(value) if isinstance(value, (int, float)) and abs(value) >= 1e-3 else f"{value}"


def data_of(trained: ManifestEntry) -> str:
    mark = trained.entry.get("inputs", {}).get("data", {}).get("fingerprint")
    return public(trained.input("data")) + (f" (fingerprint {mark[:12]})" if mark else "")


def ranks_of(sources: Sources, trained: ManifestEntry) -> Iterator[tuple[str, str]]:
    adapted = next((one for content in sources.contents for _, one in content.sites), None)
    plan = "a rank plan" if trained.input("plan") else "one rank"
    if adapted and adapted.ranks:
        yield "adapted", f"{len(adapted.ranks)} matrices by {plan}: {adapted.span()}"
    entry = trained.entry
    if "trainable_parameters" in entry and entry.get("total_parameters"):
        trainable, total = entry["trainable_parameters"], entry["total_parameters"]
        yield "trained parameters", f"{amount(trainable)} of {amount(total)} ({percent(trainable / total)})"
    if entry.get("trained_in_full"):
        yield "trained in full", f"{len(entry['trained_in_full'])} modules"


def versions_of(trained: ManifestEntry) -> list[str]:
    found = {"python": trained.entry.get("python"), **trained.entry.get("versions", {})}
    words = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return ["", f"Made with {words}."] if words else []


def scores(found: Iterable[Scored]) -> list[str]:
    rows = [
        (one.label, one.result.title, name, value, one.result.intervals.get(name), one.result.n)
        for one in found
        for name, value in one.result.metrics.items()
    ]
    return score_table("model", rows)


def score_table(what: str, rows: Iterable[tuple[str, str, str, float, Sequence[float] | None, int]]) -> list[str]:
    """(what was scored, task, metric, value, interval, items) in each row."""
    shown = [
        (scored, task, metric_name(name), score(value), span(interval), f"{n:,}")
        for scored, task, name, value, interval, n in rows
    ]
    return markdown_table(Table((what, "task", "metric", "score", "95 % interval", "n"), shown, first_number=3))


def span(found: Sequence[float] | None) -> str:
    return f"{score(found[0])} to {score(found[1])}" if found else "not measured"


# --- the files' own scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileScore:
    """A score of one GGUF file in llama.cpp, 0 to 100. ships: it is the form that the validation was for."""

    form: str
    task: str
    method: str
    name: str
    value: float
    interval: Sequence[float] | None
    n: int
    ships: bool


def file_scores(sources: Sources) -> list[FileScore]:
    """From the validations; without one, from what a bundle keeps of its own."""
    found = [
        (form, facts, form == content.get("outtype"))
        for _, content in sources.json(VALIDATION.file)
        for form, facts in (content.get("by_outtype") or {}).items()
    ]
    if not found:
        bundles = [content for _, content in sources.json(BUNDLE.name) if content.get("validation")]
        found = [(str(content.get("outtype")), content["validation"], True) for content in bundles]
    return [row for form, facts, ships in found for row in scores_of(form, facts, ships)]


def scores_of(form: str, facts: Mapping[str, Any], ships: bool) -> Iterator[FileScore]:
    """Of one form, as validation.json has it: accuracy and macro F1 as shares of 1, metrics on 0 to 100."""
    task, method, n = str(facts.get("task", "")), str(facts.get("method", "generation")), int(facts.get("n", 0))
    for name, key in (("accuracy", "interval"), ("macro_f1", "")):
        if facts.get(name) is not None:
            spread = [100 * end for end in facts[key]] if facts.get(key) else None
            yield FileScore(form, task, method, name, 100 * facts[name], spread, n, ships)
    for name, value in (facts.get("metrics") or {}).items():
        if name != "exact_match" or facts.get("accuracy") is None:
            yield FileScore(form, task, method, name, value, facts.get("intervals_95", {}).get(name), n, ships)


def file_table(found: Sequence[FileScore]) -> list[str]:
    rows = [(one.form, f"{one.task} by {one.method}", one.name, one.value, one.interval, one.n) for one in found]
    return score_table("file, in llama.cpp", rows)


def merge(sources: Sources) -> list[str]:
    merged = sources.stage("merge")
    if merged is None:
        return []
    proof = merged.entry.get("verification")
    if not proof:
        return ["The merged weights were not verified (`--no_verify`)."]
    how = ", layer by layer" if proof.get("layer_by_layer") else ""
    lines = [
        f"The merged model was compared with base + adapter on {on_what(proof)}{how}, in float32: {proof_words(proof)}."
    ]
    lost = merged.entry.get("rounding", {}).get("share_of_change_lost", {})
    dtype = merged.config.get("dtype")
    if dtype in lost:
        lines.append(f"Rounding to {dtype} changes the weights by {lost[dtype]:.1%} of what the adapter changes.")
    return lines


def on_what(proof: Mapping[str, Any]) -> str:
    words = str(proof.get("on", "random tokens"))
    head, of, path = words.partition(" of ")
    return f"{head} of {public(path)}" if of else words


def export(sources: Sources) -> list[str]:
    lines: list[str] = []
    for _, content in sources.json(EXPORT):
        rows = [
            (files[kind], outtype, memory(files["bytes"][kind]), files["sha256"][kind][:12])
            for outtype, files in content.get("files", {}).items()
            for kind in ("text", "mmproj")
            if files.get(kind)
        ]
        lines += markdown_table(Table(("file", "type", "size", "sha256"), rows, first_number=2))
        converter = content.get("converter", {})
        compared = "every tensor was compared with the merged checkpoint"
        proven = compared if content.get("verification") else "not verified"
        version = converter.get("version", "unknown version")
        lines += ["", f"Converted by llama.cpp's own converter ({version}); {proven}."]
    return lines


def device(sources: Sources) -> list[str]:
    """How far up the parity ladder the files agree with the trained model."""
    return [
        f"- {name}: {ladder_words(ladder)}"
        for _, content in sources.json(VALIDATION.file)
        for name, ladder in (content.get("parity") or {}).items()
    ]


def ladder_words(ladder: Mapping[str, Any]) -> str:
    """The parity ladder in one line: which rungs agree, which one breaks first, which were not measured."""
    by_status: dict[str, list[str]] = {}
    for rung in ladder.get("rungs", ()):
        note = f" ({rung['note']})" if rung.get("note") else ""
        by_status.setdefault(rung["status"], []).append(rung["name"] + note)
    words = [f"{', '.join(names)} {meaning}" for status, meaning in STATUS.items() if (names := by_status.get(status))]
    return "; ".join(words) or "the parity ladder was not climbed"


STATUS = {"ok": "agree with the trained model", "broken": "**broken**", "not measured": "not measured"}


def limitations(sources: Sources, kind: str) -> list[str]:
    """Limitations: missing measurements, and what the measurements do not cover."""
    found = sources.scores
    rows = [
        (not found, "No score was measured, neither before nor after training."),
        (bool(found) and not any(one.is_before for one in found), "The model before training was not scored."),
        (bool(found) and all(one.is_before for one in found), "The model after training was not scored."),
        (kind != "adapter" and not merge(sources), "The merge left no record."),
        (kind in ("export", "bundle") and not file_scores(sources), "Not validated in llama.cpp."),
        (True, "Safety, bias and other languages or domains than those of the training data were not measured."),
    ]
    return [f"- {text}" for applies, text in rows if applies]


def failures(sources: Sources, kind: str) -> list[str]:
    """Reasons not to upload: verifications that failed or were skipped."""
    lines = []
    merged = sources.stage("merge")
    if kind != "adapter" and merged is not None and not merged.entry.get("verification"):
        lines.append("the merge was not verified (--no_verify)")
    if kind not in ("export", "bundle"):
        return lines
    for folder, content in sources.json(EXPORT):
        lines += [] if content.get("verification") else [f"{folder.name}/{EXPORT}: the export was not verified"]
    for folder, content in sources.json(VALIDATION.file):
        where = f"{folder.name}/{VALIDATION.file}"
        lines += [f"{where}: {failure}" for failure in content.get("failures") or ()]
        broken = {name: ladder.get("first_broken") for name, ladder in (content.get("parity") or {}).items()}
        lines += [
            f"{where}: {name}: the rung `{rung}` is broken"
            for name, rung in broken.items()
            if rung and not content.get("failures")
        ]
    return lines
