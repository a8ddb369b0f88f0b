"""The model folder as the converter reads it: links to the files, with implicit defaults written out.

    merged/ ── changes_for(…) ──▶ Changes(files, notes) ── shown(…) ──▶ a folder of links + the changed JSON files

The converter reads files, not the loaded model. Where a file is silent it falls back on guesses, and llama.cpp on its
defaults; transformers knows, so the view says it. What a file says of this machine's folders it would write into the
GGUF, so the view does not. The model folder itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard

from rankwise.data.device import DeviceTarget, longest_edge, tiles
from rankwise.errors import UsageError
from rankwise.files.atomic import named, read_if_there, read_object, write_json, write_text
from rankwise.files.checkpoint import HUB_ID
from rankwise.gguf.converter import Converter
from rankwise.gguf.metadata import MODEL, Vocabulary, config_of, plain_in_model
from rankwise.gguf.mixture import IMPLIED, unlike_llama_cpp
from rankwise.models.load import load_config, load_processor

CONFIG, TOKENIZER, CARD = "config.json", "tokenizer_config.json", "README.md"
PLACE = "_name_or_path"  # where an older transformers had loaded the model from
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# What the converter wants a language tower to be called that its config does not name, by its model_type.
TOWERS = {"llama": "VLlama3ForCausalLM"}
# Numbers of a vision tower that the converter reads and, where a config leaves them to its class, guesses.
VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)
REFUSED = {"IsaacForConditionalGeneration": "llama.cpp has no Isaac"}


@dataclass(frozen=True)
class Changes:
    """files: by name, the content (of JSON, or text) that replaces the model's own. notes: what was added and why, for
    people."""

    files: Mapping[str, Mapping[str, Any] | str]
    notes: tuple[str, ...]


@contextmanager
def model_view(model: Path, changes: Changes, name: str) -> Iterator[Path]:
    """The view, gone afterwards. name: its folder's, from which the converter takes metadata."""
    with TemporaryDirectory(prefix="rankwise-view-") as folder:
        view = Path(folder) / Path(name).name
        view.mkdir()
        for entry in model.iterdir():
            if entry.name not in changes.files and not entry.name.startswith("."):
                (view / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
        for file, content in changes.files.items():
            if isinstance(content, str):
                write_text(view / file, content)
            else:
                write_json(view / file, content)
        with named(model, view):
            yield view


def changes_for(
    model: Path, converter: Converter, vocabulary: Vocabulary, target: DeviceTarget | None, mmproj: bool
) -> Changes:
    """UsageError, naming the architecture, for a model that the converter does not know."""
    files: dict[str, Mapping[str, Any] | str] = {}
    notes: list[str] = []
    for change in (
        card_change(model),
        config_change(model, converter, mmproj),
        tokenizer_change(model, vocabulary),
        processor_change(model, target) if mmproj else ({}, []),
    ):
        files |= change[0]
        notes += change[1]
    return Changes(files, tuple(notes))


Change = tuple[Mapping[str, Mapping[str, Any] | str], list[str]]


def card_change(model: Path) -> Change:
    """The card's metadata without bases and data sets that are folders: the converter makes addresses of them."""
    file = model / CARD
    if not file.is_file():
        return {}, []
    data = ModelCard(file.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data.to_dict()
    for key in ("base_model", "datasets"):
        given = data.get(key) or []
        data[key] = [one for one in ([given] if isinstance(given, str) else given) if HUB_ID.fullmatch(str(one))]
    return {CARD: f"---\n{yaml.safe_dump({name: value for name, value in data.items() if value})}---\n"}, []


def config_change(model: Path, converter: Converter, mmproj: bool) -> Change:
    config = read_object(model / CONFIG)
    where = config.pop(PLACE, None)
    completed, notes = with_tower_name(config, converter, model)
    completed, more = with_routing(completed, model)
    notes += more
    if mmproj:
        require_known(str(first(config)), converter, model, mmproj=True)
        completed, more = with_vision_defaults(completed, model)
        notes += more
    return ({CONFIG: completed}, notes) if notes or where else ({}, [])


def with_tower_name(config: dict[str, Any], converter: Converter, model: Path) -> tuple[dict[str, Any], list[str]]:
    """The config with `text_config.architectures`, which SmolVLM's converter goes by, where it is needed."""
    text = config.get("text_config") or {}
    name = first(text) or first(config)
    if name in REFUSED or first(config) in REFUSED:
        refuse(str(first(config)), model, REFUSED.get(str(first(config)), ""))
    if name is None:
        raise UsageError(f"{model}/{CONFIG}: names no architecture (`architectures`), so it cannot be converted")
    if first(text) or converter.knows(name) is not False or text.get("model_type") not in TOWERS:
        require_known(name, converter, model)
        return config, []
    tower = TOWERS[text["model_type"]]
    require_known(tower, converter, model)
    changed = config | {"text_config": text | {"architectures": [tower]}}
    return changed, [f"the language tower is a {tower}"]


def first(config: Mapping[str, Any]) -> str | None:
    names: list[str] = config.get("architectures") or []
    return names[0] if names else None


def require_known(name: str, converter: Converter, model: Path, mmproj: bool = False) -> None:
    if converter.knows(name, mmproj) is False:
        kind = "a vision tower of llama.cpp's" if mmproj else "a text model of llama.cpp's"
        refuse(name, model, f"llama.cpp's converter (version {converter.version}) does not know it as {kind}")


def refuse(name: str, model: Path, why: str) -> None:
    raise UsageError(
        f"{model}: {name} cannot be exported: {why}. Run it with transformers (`rankwise evaluate`), or give a newer "
        "llama.cpp with --llama_cpp_dir"
    )


def with_routing(config: dict[str, Any], model: Path) -> tuple[dict[str, Any], list[str]]:
    """How the experts are chosen, where only the model's class says it. UsageError where llama.cpp cannot."""
    loaded = config_of(model)
    if loaded is None:
        return config, []
    if why := unlike_llama_cpp(loaded):
        refuse(str(first(config)), model, why)
    missing = {key: value for key, value in IMPLIED.get(loaded.model_type, {}).items() if key not in config}
    notes = [f"{key} is {value}, which the config leaves to the class" for key, value in missing.items()]
    return config | missing, notes


def with_vision_defaults(config: dict[str, Any], model: Path) -> tuple[dict[str, Any], list[str]]:
    """Numbers of the vision tower that the file leaves to the class: the converter's own guesses differ (SmolVLM2)."""
    stated = config.get("vision_config")
    loaded = getattr(load_config(str(model)), "vision_config", None)
    if not isinstance(stated, dict) or loaded is None:
        return config, []
    known = loaded.to_dict()
    missing = {name: known[name] for name in VISION if name in known and name not in stated}
    if not missing:
        return config, []
    note = f"the vision tower's numbers that its config leaves to the class ({', '.join(sorted(missing))})"
    return config | {"vision_config": stated | missing}, [note]


def tokenizer_change(model: Path, vocabulary: Vocabulary) -> Change:
    """Whether a start token is added, which tokens are special, and the template, as transformers has them."""
    file = model / TOKENIZER
    stated = read_if_there(file)
    wanted: dict[str, Any] = {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos}
    notes = []
    if not vocabulary.add_bos and stated.get("add_bos_token") is not False:
        notes.append("no start token is added to a text (llama.cpp would add one)")
    decoder = dict(stated.get("added_tokens_decoder") or {})
    unmarked = [index for index in plain_in_model(model, vocabulary) if str(index) not in decoder]
    if unmarked:
        added = {str(i): {"content": vocabulary.added[i], "special": i in vocabulary.special} for i in unmarked}
        wanted["added_tokens_decoder"] = decoder | added
        notes.append(f"{len(unmarked)} added tokens are special, which {MODEL} does not say")
    if vocabulary.template is not None:
        wanted["chat_template"] = vocabulary.template
    return {TOKENIZER: stated | wanted}, notes


def processor_change(model: Path, target: DeviceTarget | None) -> Change:
    """The size that images are scaled to on the device, which the mmproj file carries."""
    processor = load_processor(str(model)) if target else None
    if target is None or not tiles(processor):
        return {}, []
    edge = longest_edge(processor, target)
    files: dict[str, Mapping[str, Any]] = {}
    for name in PROCESSORS:
        if not (model / name).is_file():
            continue
        content = read_object(model / name)
        holder = content.get("image_processor", content)
        if "size" not in holder or holder["size"].get("longest_edge") == edge:
            continue
        sized = holder | {"size": {"longest_edge": edge}}
        files[name] = content | {"image_processor": sized} if "image_processor" in content else sized
    return files, [f"images are scaled to {edge} pixels, as the device target has it ({name})" for name in files]
