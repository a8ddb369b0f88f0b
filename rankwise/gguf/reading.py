"""What llama.cpp calls a checkpoint's tensors, and the files of an export folder.

gguf_names(keys, GGUFFile("model-q8_0.gguf"))    # "blk.0.attn_q.weight" → "model.layers.0.self_attn.q_proj.weight"
read_export("exported_model").text("q8_0")       # the files of an export folder, by type
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, UsageError, need
from rankwise.files.document import Document
from rankwise.files.gguf import GGUFFile
from rankwise.files.lineage import EXPORT as NAME

EXPORT = Document(NAME, "rankwise-export/1", "an export", "rankwise export", ("files",))
TEXT, MMPROJ = "text", "mmproj"
SHOWN = 4


def first_few(names: Sequence[str]) -> str:
    """For messages: a, b, c, d and 12 more."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- what llama.cpp calls a checkpoint's tensors: model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight --------
#
# The table is the gguf package's own. Where it is silent (a model newer than the package), contents decide instead.

SUFFIXES = (".weight", ".bias")
WITHIN = ("text_model.", "language_model.")  # what a vision-language model puts before its language tower's names
ENDINGS = {"e_score_correction_bias": "e_score_correction.bias", "sinks": "sinks.weight"}
BLOCKS = ("block_count", "vision.block_count")


def gguf_names(keys: Iterable[str], file: GGUFFile) -> dict[str, str]:
    """Name in `file` → key, for the keys that the table knows under a name that the file has."""
    table = name_table(file)
    if table is None:
        return {}
    found: dict[str, str] = {}
    for key in keys:
        name = next((name for form in forms(key) if (name := table.get_name(form, SUFFIXES)) in file.tensors), None)
        if name is not None:
            found.setdefault(name, key)
    return found


def forms(key: str) -> Iterator[str]:
    """The key, what it would be if the model were its language tower alone, and what converters write for parameters
    without an ending of their own."""
    yield key
    for part in WITHIN:
        if part in key:
            yield key.replace(part, "")
            yield "model." + key.split(part, 1)[1]
    yield from (key.replace(own, theirs) for own, theirs in ENDINGS.items() if key.endswith(own))


def name_table(file: GGUFFile, blocks: int | None = None) -> Any:
    """The package's table for the file's architecture and depth [as it states it]; None where it doesn't know it."""
    gguf = need("gguf", extra="device")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    stated = next((count for key in BLOCKS if (count := file.of_architecture(key)) is not None), blocks)
    if file.architecture not in kinds or stated is None:
        return None
    return gguf.get_tensor_name_map(kinds[file.architecture], int(stated))


# --- an export folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """An export folder: its files by type, and export.json."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def outtypes(self) -> tuple[str, ...]:
        return tuple(self.content["files"])

    def text(self, outtype: str) -> Path:
        """The text model's GGUF. UsageError for a type that was not exported."""
        return self.folder / str(self._files(outtype)[TEXT])

    def mmproj(self, outtype: str) -> Path | None:
        """The vision tower's and projector's GGUF; None for a text model."""
        name = self._files(outtype)[MMPROJ]
        return self.folder / name if name else None

    def _files(self, outtype: str) -> Mapping[str, Any]:
        if outtype not in self.content["files"]:
            raise UsageError(f"{self.folder}: has no {outtype} files; it has {', '.join(self.outtypes)}")
        files: Mapping[str, Any] = self.content["files"][outtype]
        return files


def read_export(folder: Path | str) -> Exported:
    """DataError for a folder that is no export, or lacks one of its files."""
    folder = Path(folder)
    content = EXPORT.read(folder)
    names = [files[kind] for files in content["files"].values() for kind in (TEXT, MMPROJ) if files.get(kind)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)}, which {NAME} lists; export again")
    return Exported(folder, content)
