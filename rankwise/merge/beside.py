"""The files beside a merged model's weights: copied from base and adapter, and made to follow what training had.

base's, adapter's tokenizer, processor, contracts ── follow template, end tokens, device ──▶ beside the shards
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.input_record import read_input, sha256_of
from rankwise.data.template import NOW, with_date
from rankwise.files.adapter import CONFIG_NAME, DEVICE, INPUT, contracts
from rankwise.files.atomic import read_object, write_json, write_text
from rankwise.files.run_folder import CONFIG, MANIFEST
from rankwise.merge.config import TOKENIZER_CONFIG
from rankwise.models.depth.encoder import DEPTH
from rankwise.models.load import load_processor, load_tokenizer

GENERATION = "generation_config.json"
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
NOT_COPIED = (CONFIG, MANIFEST, CONFIG_NAME, "config.json", "sites.json", "trainer_state.json", DEPTH.name)
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"


@dataclass(frozen=True)
class Copied:
    """One file that was taken over: from where, and what was changed in it."""

    source: Path
    owner: str
    changed: str = ""

    def as_dict(self) -> dict[str, str]:
        found = {"from": self.owner, "path": str(self.source)}
        return found | ({"changed": self.changed} if self.changed else {})


def copy_beside(base: Path, adapter: Path, folder: Path, special: Mapping[str, int]) -> dict[str, Copied]:
    """File name → where it came from. The adapter's tokenizer, processor, device and task replace the base's, and its
    own special tokens those of the base's generation config."""
    files = dict(files_to_copy(base, adapter))
    for name, copied in files.items():
        shutil.copyfile(copied.source, folder / name)
    files |= dict(follow_template(adapter, folder, files))
    if special and GENERATION in files:
        files[GENERATION] = replace(files[GENERATION], changed=follow_generation(folder, special))
    target = read_target(folder)
    return files if target is None else files | dict(follow_device(folder, files, target))


def files_to_copy(base: Path, adapter: Path) -> Iterator[tuple[str, Copied]]:
    found = {file.name: Copied(file, "base") for file in sorted(base.iterdir()) if is_beside(file)}
    found.pop(INPUT, None)  # of an earlier training, and so is its device where this one saw pictures as well
    trained = read_input(adapter)
    if trained and trained[0].image_geometry is not None:
        found.pop(DEVICE, None)
    own = [file for file in sorted(adapter.iterdir()) if is_beside(file)]
    if any(file.name == TOKENIZER_CONFIG for file in own):
        found = {name: copied for name, copied in found.items() if not name.startswith(TOKENIZER)}
        found |= {file.name: Copied(file, "adapter") for file in tokenizer_files(adapter)}
    found |= {file.name: Copied(file, "adapter") for file in own if file.name in PROCESSOR}
    found |= {name: Copied(file, "adapter") for name, file in contracts(adapter).items()}
    yield from sorted(found.items())


def is_beside(file: Path) -> bool:
    return (
        file.is_file()
        and file.suffix in COPIED
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in NOT_COPIED
    )


def tokenizer_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if is_beside(file) and file.name.startswith(TOKENIZER)]


def own_files(adapter: Path) -> list[Path]:
    """What an adapter has of its own of the files that show it text and pictures: tokenizer and processor."""
    processors = [adapter / name for name in PROCESSOR if (adapter / name).is_file()]
    return tokenizer_files(adapter) + processors


def follow_template(adapter: Path, folder: Path, files: dict[str, Copied]) -> Iterator[tuple[str, Copied]]:
    """A template that training was given, and the date that one printed then, become the model's own, for whoever uses
    its tokenizer. Yields the changed files."""
    found = read_input(folder)
    if found is None or not (found[0].chat_template or NOW in found[0].chat_template_kwargs):
        return
    record = found[0]
    given = record.chat_template or own_template(folder, sees=record.image_geometry is not None)
    template, kwargs = with_date(given, record.chat_template_kwargs)
    if files.pop(OLDER_TEMPLATE, None):  # it would go before the other
        (folder / OLDER_TEMPLATE).unlink()
    write_text(folder / TEMPLATE, template)
    digest = sha256_of(template)
    replace(record, chat_template=None, chat_template_sha256=digest, chat_template_kwargs=kwargs).save(folder)
    yield TEMPLATE, Copied(adapter / INPUT, "adapter", "the template as training had it")
    yield INPUT, Copied(files[INPUT].source, "adapter", f"its chat_template is in {TEMPLATE}")
    config = read_object(folder / TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG, config)
        yield TOKENIZER_CONFIG, replace(files[TOKENIZER_CONFIG], changed=f"its chat_template is in {TEMPLATE}")


def own_template(folder: Path, *, sees: bool) -> str:
    tokenizer = load_processor(str(folder)).tokenizer if sees else load_tokenizer(str(folder))
    return str(tokenizer.get_chat_template())


def follow_generation(folder: Path, special: Mapping[str, int]) -> str:
    """Enter the special tokens in the copied generation config, whose own end tokens stay; returns what was changed."""
    file = folder / GENERATION
    content = read_object(file)
    for name, token in special.items():
        old = content.get(name)
        ends = [token, *(one for one in (old if isinstance(old, list) else [old]) if one not in (None, token))]
        content[name] = ends if name == "eos_token_id" and len(ends) > 1 else token
    write_json(file, content)
    return ", ".join(f"{name} {content[name]}" for name in special)


def follow_device(folder: Path, files: dict[str, Copied], target: DeviceTarget) -> Iterator[tuple[str, Copied]]:
    """What the device scales an image's longest side to, in the saved processor: the image encoder's converter reads it
    there. Yields the changed files."""
    for name in PROCESSOR[:2]:
        if name not in files:
            continue
        content = read_object(folder / name)
        pixels = set_longest_edge(content, target.longest_edge)
        if pixels:
            write_json(folder / name, content)
            yield name, Copied(files[name].source, files[name].owner, f"longest_edge {pixels}, as on the device")


def set_longest_edge(content: dict[str, Any], pixels: int | None) -> int | None:
    """Set `longest_edge` of a processor that cuts images into tiles, by default to one tile; what it was changed to."""
    settings = content.get("image_processor", content)
    if not isinstance(settings, dict) or not isinstance(settings.get("max_image_size"), dict):
        return None
    wanted = {"longest_edge": pixels or settings["max_image_size"].get("longest_edge")}
    if wanted["longest_edge"] is None or settings.get("size") == wanted:
        return None
    settings["size"] = wanted
    return wanted["longest_edge"]
