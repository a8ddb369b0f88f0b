"""rankwise card: a run → README.md, the model card of what it made; with --push_to_hub files and card go to the hub.

rankwise card runs/phone
rankwise card runs/phone --files export --push_to_hub org/name --private

    sources_of(run) ─ CardFacts ─ model_card ─▶ "---\\nbase_model: …\\n---\\n# Title …" ─ save_card, upload

What was not measured is said so; a number that nobody took does not appear. Exactly the files that are named go out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from rankwise.errors import UsageError, VerificationError
from rankwise.files.adapter import CONFIG_NAME, CONTRACTS
from rankwise.files.atomic import read_bytes, read_if_there, read_object, write_text
from rankwise.files.checkpoint import HUB_ID
from rankwise.files.lineage import EXPORT
from rankwise.options.commands import CardConfig
from rankwise.page.text import memory, plural
from rankwise.report import card_facts as facts
from rankwise.report.card_facts import Sources, choose_folder, sources_of
from rankwise.report.hub import CARD, Upload, check_repository, check_token, upload
from rankwise.report.metadata import Metric, WidgetExample, file_metrics, hub_dataset, license_of, metrics, widget

MARK = "<!-- written by rankwise card; running it again replaces this file -->"
LIBRARIES = {"adapter": "peft", "merged": "transformers", "export": "llama.cpp", "bundle": "llama.cpp"}
RELATIONS = {"adapter": "adapter", "merged": "finetune", "export": "quantized", "bundle": "quantized"}
TAGS = {"adapter": ("lora",), "merged": ("lora",), "export": ("gguf", "llama.cpp"), "bundle": ("gguf", "llama.cpp")}


@dataclass(frozen=True)
class CardFacts:
    """Content of a card. sections: title → Markdown lines, in order; empty ones are left out.

    kind: adapter, merged, export or bundle. base: a hub id or a folder's name. sees: whether the model takes images.
    datasets: hub ids. widget: real prompts with the model's own answers, of official files only.
    """

    title: str
    kind: str
    base: str | None = None
    sees: bool = False
    license: str | None = None
    task: str | None = None
    datasets: Sequence[str] = ()
    metrics: Sequence[Metric] = ()
    widget: Sequence[WidgetExample] = ()
    summary: str = ""
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The whole file. Only hub ids enter the metadata: the hub refuses paths, and they are nobody's business."""
    lines = [MARK, "", f"# {facts.title}", "", facts.summary]
    for title, content in facts.sections.items():
        lines += ["", f"## {title}", "", *content] if content else []
    card = ModelCard("---\n" + metadata(facts).to_yaml() + "\n---\n" + "\n".join(lines) + "\n")
    return str(card)


def metadata(facts: CardFacts) -> ModelCardData:
    base = facts.base if facts.base and HUB_ID.fullmatch(facts.base) else None
    pipeline = "image-text-to-text" if facts.sees else "text-generation"
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=one.data or one.task,
            dataset_name=one.task,
            metric_type=one.metric_id,
            metric_name=one.title,
            metric_value=round(one.value, 4),
            metric_args=one.measured,
        )
        for one in facts.metrics
    ]
    relation = {"base_model_relation": RELATIONS[facts.kind]} if base else {}
    return ModelCardData(
        base_model=base,
        library_name=LIBRARIES[facts.kind],
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(["rankwise", *TAGS[facts.kind], *filter(None, [facts.task])])),
        license=facts.license,
        datasets=[name for name in facts.datasets if HUB_ID.fullmatch(name)] or None,
        model_name=facts.title if results else None,
        eval_results=results or None,
        widget=[one.as_widget() for one in facts.widget] or None,
        **relation,
    )


def save_card(text: str, path: Path) -> Path:
    """Write the card atomically. UsageError where a README that somebody else wrote is in the place."""
    if path.exists() and MARK.encode() not in read_bytes(path):
        raise UsageError(f"{path}: is not one of `rankwise card`'s; name another file with --out")
    return write_text(path, text)


NEVER = (".*", "resolved_config*.json", "manifest.json", "predictions*", "*.log", CARD, "training_args.bin")
OF_AN_ADAPTER = ("adapter_model.*", "adapter_config.json", "sites.json", "depth.json", *CONTRACTS)
BESIDE = (
    *("tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.model", "*.jinja"),
    "*processor_config.json",
)
PUBLISHED = (*CONTRACTS, "LICENSE*")
WORDS = {
    "adapter": "A LoRA adapter for {base}, trained with Rankwise.",
    "merged": "{base} with a LoRA adapter merged in, trained with Rankwise.",
    "export": "GGUF files for llama.cpp of {base} with a LoRA adapter merged in, trained with Rankwise.",
    "bundle": "GGUF files for llama.cpp of {base} with a LoRA adapter merged in, trained with Rankwise.",
}


def run(config: CardConfig) -> Path:
    """Write the card; upload it and the files if asked to."""
    folder = check(config)
    kind, place = choose_folder(folder, config.files)
    sources = sources_of(folder)
    wrong = facts.failures(sources, kind)
    if config.push_to_hub and wrong and not config.allow_unverified:
        raise VerificationError(
            f"{place} is not uploaded: {'; '.join(wrong)}. Repair that, or pass --allow_unverified (the card says it)"
        )
    text = model_card(facts_of(config, sources, kind, place))
    card = save_card(text, out_path(config, folder))
    print(f"card of the {kind} in {place}: {card}")
    for line in wrong:
        print(f"warning: {line}")
    if config.push_to_hub:
        push(config, kind, place, text)
    return card


def check(config: CardConfig) -> Path:
    if not config.run:
        raise UsageError("card needs a run folder: rankwise card RUN [--push_to_hub ORG/NAME]")
    if config.push_to_hub:
        check_repository(config.push_to_hub)
        check_token()
    elif config.private or config.allow_unverified:
        raise UsageError("--private and --allow_unverified act on --push_to_hub ORG/NAME only")
    return Path(config.run)


def out_path(config: CardConfig, folder: Path) -> Path:
    return Path(config.out) if config.out else folder / CARD


def facts_of(config: CardConfig, sources: Sources, kind: str, place: Path) -> CardFacts:
    base = config.base_model or base_of(sources)
    shown, sees = facts.public(base), "vision_config" in model_config(place, base)
    title = config.title or (config.push_to_hub or "").rpartition("/")[2] or sources.roots[0].resolve().name
    wrong = [f"- **{line}**" for line in facts.failures(sources, kind)]
    of_files = kind in ("export", "bundle")
    own = facts.file_scores(sources) if of_files else []
    trained = sources.stage("train")
    return CardFacts(
        title=title,
        kind=kind,
        base=shown,
        sees=sees,
        license=config.license or base_license(base),
        task=trained.config.get("task") if trained else None,
        datasets=list(filter(None, [hub_dataset(trained)])),
        metrics=file_metrics(own) if of_files else metrics(sources),
        widget=[] if sees else widget(sources),
        summary=WORDS[kind].format(base=shown),
        sections={
            "How to use it": [*usage(kind, place, config.push_to_hub or title, sees=sees), *facts.prompts(place)],
            "How it was trained": facts.training(sources),
            "Scores": facts.file_table(own) if of_files else facts.scores(sources.scores),
            "Merge": facts.merge(sources) if kind != "adapter" else [],
            "Files": facts.export(sources) if of_files else [],
            "On the device": facts.device(sources) if of_files else [],
            "Scores before export, in transformers": facts.scores(sources.scores) if of_files else [],
            "Limitations": [*wrong, *facts.limitations(sources, kind)],
        },
    )


def base_of(sources: Sources) -> str | None:
    """The model that was trained on, as the records name it."""
    trained, merged = sources.stage("train"), sources.stage("merge")
    return (trained.input("model") if trained else None) or (merged.input("base") if merged else None)


def model_config(place: Path, base: str | None) -> dict[str, Any]:
    """config.json of the merged model, else of the base where it is on this machine."""
    for file in (place / "config.json", base_file(base, "config.json")):
        if file is not None and file.is_file():
            return read_object(file)
    return {}


def base_license(base: str | None) -> str | None:
    card = base_file(base, CARD)
    return license_of(card.parent) if card is not None else None


def base_file(base: str | None, name: str) -> Path | None:
    """A file of the base's folder, or of its copy in the hub's cache; nothing is fetched."""
    if not base:
        return None
    if Path(base).is_dir():
        return Path(base) / name
    cached = try_to_load_from_cache(base, name) if HUB_ID.fullmatch(base) else None
    return Path(cached) if isinstance(cached, str) else None


def usage(kind: str, place: Path, repository: str, *, sees: bool) -> list[str]:
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    if kind == "merged":
        load = f'model = {auto}.from_pretrained("{repository}")'
        return ["```python", f"from transformers import {auto}", load, "```"]
    if kind == "adapter":
        load = f'model = PeftModel.from_pretrained(base, "{repository}")  # base: {auto}.from_pretrained(…)'
        return ["```python", "from peft import PeftModel", load, "```"]
    exports = read_if_there(place / EXPORT).get("files", {})
    for files in reversed(list(exports.values())):
        more = f" --mmproj {files['mmproj']}" if files.get("mmproj") else ""
        return ["```bash", f"llama-server -m {files['text']}{more}", "```"]
    return []


def push(config: CardConfig, kind: str, place: Path, card: str) -> None:
    files = tuple(files_of(kind, place))
    instead = {} if kind == "bundle" else without_paths(place, files, config.base_model)
    what = Upload(str(config.push_to_hub), place, files, card, config.private, instead)
    print(f"uploading {plural(len(what.files), 'file')} ({memory(what.bytes)}) and the card to {what.repository}")
    if CONFIG_NAME in instead and not config.base_model:
        print(f"note: {CONFIG_NAME} names the base by a path of this machine; give --base_model ORG/NAME for others")
    print(f"uploaded: {upload(what)}")


# Where configs name the model that they were made from, which may be a path of this machine.
ORIGINS = {CONFIG_NAME: "base_model_name_or_path", "sites.json": "model_name", "config.json": "_name_or_path"}


def without_paths(place: Path, files: Sequence[str], base: str | None) -> dict[str, bytes]:
    """Name → content of the configs that go out with another name of their base: --base_model, else a path's last part.
    The files on this machine stay as they are."""
    changed = {}
    for name, key in ORIGINS.items():
        content = read_object(place / name) if name in files else {}
        origin = content.get(key)
        told = base or facts.public(str(origin))
        if origin and told != origin:
            content |= {key: told}
            changed[name] = (json.dumps(content, indent=2, sort_keys=name == CONFIG_NAME) + "\n").encode()
    return changed


def files_of(kind: str, place: Path) -> list[str]:
    """Files to upload, by name. Records with the paths of this machine, checkpoints and hidden files never do."""
    present = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    safe = [name for name in present if not any(fnmatch(part, rule) for part in Path(name).parts for rule in NEVER)]
    if kind == "bundle":
        return safe
    if kind == "adapter":
        return [name for name in safe if matches(name, (*OF_AN_ADAPTER, *BESIDE))]
    if kind == "export":
        recorded = read_object(place / EXPORT)["files"].values()
        wanted = {files[part] for files in recorded for part in ("text", "mmproj") if files.get(part)}
        return [name for name in safe if name in wanted or matches(name, PUBLISHED)]
    outputs = read_object(place / "manifest.json")["stages"]["merge"]["outputs"]
    return [name for name in safe if name in outputs]


def matches(name: str, rules: tuple[str, ...]) -> bool:
    return any(fnmatch(name, rule) for rule in rules)


def describe(config: CardConfig) -> list[str]:
    lines = [f"write the model card {out_path(config, Path(str(config.run)))}"]
    if config.push_to_hub:
        lines.append(f"upload the {config.files if config.files != 'auto' else 'files'} to {config.push_to_hub}")
    return lines
