"""What `rankwise validate` is given: GGUF files by form, or a server that runs one, and what they were made from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UsageError
from rankwise.gguf.export import Exported, read_export
from rankwise.gguf.reading import GGUFFile
from rankwise.options.commands import ValidateConfig
from rankwise.ship.llama.runtime import LlamaServer, RemoteServer
from rankwise.ship.llama.server_api import ServerRuntime

FORMS = {0: "f32", 1: "f16", 7: "q8_0", 32: "bf16"}  # llama.cpp's general.file_type
LAST = ("f32", "bf16", "f16", "q8_0")  # the form to ship is the smallest of these


@dataclass(frozen=True)
class Shipped:
    """One form of the model, and how it is run."""

    form: str
    text: Path | None = None
    mmproj: Path | None = None
    url: str | None = None

    def start(self, context: int | None, threads: int | None) -> AbstractContextManager[ServerRuntime]:
        if self.url:
            return RemoteServer(self.url)
        assert self.text
        return LlamaServer(self.text, self.mmproj, context, threads)

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.text, self.mmproj) if file]


@dataclass(frozen=True)
class Shipment:
    """All forms, the one to ship last. folder: of the export; reference: what it says it was made from."""

    forms: tuple[Shipped, ...]
    folder: Path | None = None
    reference: str | None = None


def shipment(config: ValidateConfig) -> Shipment:
    """UsageError where it is not clear what to run; DataError for files that are missing or broken."""
    path = Path(config.export) if config.export else None
    exported = read_export(path) if path and path.is_dir() else None
    reference = str(exported.content["model"]["path"]) if exported else None
    if config.server:
        forms = [Shipped(one_form(config), url=config.server)]
    elif exported:
        forms = [Shipped(form, exported.text(form), exported.mmproj(form)) for form in wanted(config, exported)]
    elif path:
        form = config.outtype[0] if config.outtype else form_of(path)
        forms = [Shipped(form, path, Path(config.mmproj) if config.mmproj else None)]
    else:
        raise UsageError("validate needs what was exported: rankwise validate EXPORT_FOLDER, or --server URL")
    return Shipment(tuple(forms), path if exported else None, config.reference or reference)


def wanted(config: ValidateConfig, exported: Exported) -> list[str]:
    """As asked for; else all, largest first."""
    if config.outtype:
        return list(config.outtype)
    known = [form for form in LAST if form in exported.outtypes]
    return [*known, *(form for form in exported.outtypes if form not in known)]


def one_form(config: ValidateConfig) -> str:
    if len(config.outtype) != 1:
        raise UsageError("--server runs one file: say which form it is with --outtype (f16, q8_0 …)")
    return config.outtype[0]


def form_of(path: Path) -> str:
    """The form that a GGUF says it has, else the end of its name."""
    kind = GGUFFile(path).metadata.get("general.file_type")
    return FORMS.get(kind, path.stem.rpartition("-")[2]) if isinstance(kind, int) else path.stem.rpartition("-")[2]
