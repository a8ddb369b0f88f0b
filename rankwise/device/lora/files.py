"""The LoRAs of a validation as files, and the adapters in transformers that they should be.

--adapter_gguf A.gguf,B.gguf, --reference or export.json beside them ── lora_files ──▶ LoraFile*
LoraFile ── compared ──▶ Rung `adapter file`: sites, factors and scales, whichever converter wrote it
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from rankwise.data.input_record import require_same
from rankwise.device.sides import LoraFile
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import is_adapter
from rankwise.files.checkpoint import resolve
from rankwise.gguf.lora import refuse_experts
from rankwise.gguf.reading import EXPORT
from rankwise.options.commands import ValidateConfig
from rankwise.page.text import plural


def lora_files(config: ValidateConfig) -> tuple[LoraFile, ...]:
    """UsageError where it is not known which adapter the first file is; DataError for a file or a folder that is
    missing."""
    paths = [file_at(Path(name)) for name in config.adapter_gguf]
    given = config.reference.split(",") if config.reference and paths else []
    if len(given) > len(paths):
        raise UsageError(f"--reference names {len(given)} adapters for {plural(len(paths), 'file')} of --adapter_gguf")
    if len(given) > 1 and len(given) != len(paths):
        raise UsageError(f"--reference names {len(given)} of {len(paths)} adapters; name all of --adapter_gguf, or one")
    if len(set(paths)) != len(paths):
        raise UsageError("--adapter_gguf names a file twice: llama.cpp would add the adapter to itself")
    found = tuple(LoraFile(path, name or recorded_adapter(path)) for path, name in zip_longest(paths, given))
    if found and not found[0].reference:
        raise UsageError(f"{found[0].path}: which adapter it was made from is not recorded; give it with --reference")
    for one in found:
        require_adapter(one)
    return found


def file_at(path: Path) -> Path:
    """The GGUF itself, or that of an export folder."""
    if not path.is_dir():
        return path
    content = EXPORT.read(path)
    if "adapter_file" not in content:
        raise UsageError(f"{path}: a model's export, not an adapter's: rankwise export --adapter_gguf ADAPTER")
    return path / str(content["adapter_file"]["name"])


def recorded_adapter(path: Path) -> str | None:
    """What `rankwise export --adapter_gguf` recorded beside its file. DataError where that has moved."""
    content = EXPORT.read(path.parent) if (path.parent / EXPORT.name).is_file() else {}
    if content.get("adapter_file", {}).get("name") != path.name:
        return None
    found = str(content["adapter"]["path"])
    if not Path(found).exists():
        raise DataError(f"{found}, the adapter that {path.name} was made from, is missing; give it with --reference")
    return found


def require_adapter(one: LoraFile) -> None:
    if not one.path.is_file():
        raise DataError(f"no file {one.path}; `rankwise export --adapter_gguf ADAPTER` makes it")
    if one.reference is None:
        return
    folder = resolve(one.reference)
    if not is_adapter(folder):
        raise UsageError(f"--reference {one.reference}: not an adapter, with which {one.name} could be compared")
    refuse_experts(folder)
    require_same(one.path.parent, folder)
