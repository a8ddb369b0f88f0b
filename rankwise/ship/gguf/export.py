"""A merged checkpoint as GGUF files: converted by llama.cpp's own converter, then proven; and the folder read back.

plan = plan_export("merged_model", outtypes=["f16", "q8_0"], converter=find_converter())   # nothing is written yet
with atomic_folder("exported") as folder:
    content = write_export(plan, folder)        # GGUF files, verified, and export.json
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankwise.data.recorded import carry
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import fingerprint, read_document, sha256, write_json
from rankwise.files.lineage import EXPORT
from rankwise.ship.gguf.converter import Job
from rankwise.ship.gguf.export_plan import MMPROJ, REFERENCE, TEXT, ExportPlan
from rankwise.ship.gguf.metadata import check_numbers, text_numbers, vision_numbers
from rankwise.ship.gguf.origin import Origins, origins, require_complete
from rankwise.ship.gguf.reading import GGUFFile
from rankwise.ship.gguf.verify_export import (
    Tuned,
    changed_keys,
    compare_tensors,
    kept_wider,
    summary,
    tuned_summary,
    tuning_kept,
)
from rankwise.ship.gguf.view import shown
from rankwise.ship.gguf.vocabulary import check_metadata, silence

FILE, FORMAT = EXPORT, "rankwise-export/1"
Files = Mapping[tuple[str, str], GGUFFile]  # by (outtype, kind)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_export(plan: ExportPlan, folder: Path) -> dict[str, Any]:
    """Convert into `folder`, verify, and write export.json there; returns its content.

    VerificationError where the converter fails or a file is not what it should be: the caller's folder must not
    bear its final name then (`atomic_folder`).
    """
    reference = folder / f".{REFERENCE}"
    places = dict.fromkeys(plan.outtypes, folder)
    if plan.verify:
        places.setdefault(REFERENCE, reference)
    jobs = [
        Job(place / plan.file(outtype, kind), outtype, kind == MMPROJ)
        for outtype, place in places.items()
        for kind in plan.kinds
    ]
    with shown(plan.model, plan.changes, plan.name) as view:
        plan.converter.convert_all(view, jobs, plan.name)
    if plan.silenced:
        for job in jobs:
            if not job.mmproj:
                silence(job.outfile)
    files = {
        (outtype, kind): GGUFFile(folder / plan.file(outtype, kind)) for outtype in plan.outtypes for kind in plan.kinds
    }
    proof = verification(plan, files, places[REFERENCE]) if plan.verify else None
    shutil.rmtree(reference, ignore_errors=True)
    content = description(plan, files, proof)
    write_json(folder / FILE, content)
    copy_contracts(plan, folder)
    return content


def verification(plan: ExportPlan, files: Files, place: Path) -> dict[str, Any]:
    """All proofs as JSON; VerificationError at the first that fails. place: the folder of the float32 files."""
    references = {
        kind: files.get((REFERENCE, kind)) or GGUFFile(place / plan.file(REFERENCE, kind)) for kind in plan.kinds
    }
    found = {kind: origins(file, plan.checkpoint) for kind, file in references.items()}
    text_alone = references[TEXT] if plan.sees and not plan.mmproj else None
    left_out = require_complete(plan.checkpoint, list(found.values()), text_alone)
    metadata = check_metadata(references[TEXT], plan.vocabulary)
    numbers = {kind: numbers_of(plan, file, kind) for kind, file in references.items()}
    for kind, file in references.items():
        check_numbers(file, numbers[kind])
    tables: dict[str, dict[str, Any]] = {}
    tuned: dict[str, list[Tuned]] = {}
    changed = changed_keys(plan.base, plan.checkpoint) if plan.base else []
    for outtype in plan.outtypes:
        tables[outtype] = {}
        for kind in tqdm(plan.kinds, desc=f"verifying {outtype}", disable=None, leave=False):
            file = files[outtype, kind]
            if kind == TEXT:
                check_metadata(file, plan.vocabulary)
            check_numbers(file, numbers[kind])
            tables[outtype][kind] = summary(compare_tensors(file, references[kind], outtype))
            tuned[file.path.name] = tuning(plan, file, found[kind], changed)
    return {
        "checkpoint": {
            "tensors": {kind: len(one.found) for kind, one in found.items()},
            "how": {kind: one.counts() for kind, one in found.items()},
            "made_by_the_converter": [name for one in found.values() for name in one.made],
            "left_out": left_out,
        },
        "tokenizer": metadata,
        "config": numbers,
        "errors": tables,
        "tuned": tuned_summary(tuned) if plan.base else None,
        "base": str(plan.base.path) if plan.base else None,
    }


def tuning(plan: ExportPlan, file: GGUFFile, sources: Origins, changed: Sequence[str]) -> list[Tuned]:
    return tuning_kept(file, sources, plan.base, plan.checkpoint, changed) if plan.base else []


def numbers_of(plan: ExportPlan, file: GGUFFile, kind: str) -> dict[str, Any]:
    """What a file must state about the model."""
    return text_numbers(file, plan.model) if kind == TEXT else vision_numbers(file, plan.model, plan.target)


def description(plan: ExportPlan, files: Files, proof: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": plan.name,
        "model": {"path": str(plan.model), "fingerprint": fingerprint(plan.model)},
        "converter": {"version": plan.converter.version, "sha256": plan.converter.sha256},
        "files": {outtype: files_of(plan, files, outtype) for outtype in plan.outtypes},
        "kept_wider": {file.path.name: kept_wider(file, outtype) for (outtype, _), file in files.items()},
        "notes": list(plan.changes.notes),
        "verification": proof,
    }


def files_of(plan: ExportPlan, files: Files, outtype: str) -> dict[str, Any]:
    paths = {kind: files[outtype, kind].path for kind in plan.kinds}
    return {
        TEXT: paths[TEXT].name,
        MMPROJ: paths[MMPROJ].name if MMPROJ in paths else None,
        "bytes": {kind: path.stat().st_size for kind, path in paths.items()},
        "sha256": {kind: sha256(path) for kind, path in paths.items()},
    }


def copy_contracts(plan: ExportPlan, folder: Path) -> None:
    """How prompts are made, what the device does to an image, and the task's classes, beside the files that answer."""
    carry(plan.model, folder)
    if plan.target:
        plan.target.save(folder)


# --- reading ---------------------------------------------------------------------------------------------------------


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
    if not (folder / FILE).is_file():
        raise DataError(f"{folder}: no {FILE}; `rankwise export MODEL -o {folder}` makes one")
    content = read_document(folder / FILE, FORMAT, "an export")
    if not isinstance(content.get("files"), dict):
        raise DataError(f"{folder / FILE}: lists no files; export again")
    names = [files[kind] for files in content["files"].values() for kind in (TEXT, MMPROJ) if files.get(kind)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: lacks {', '.join(missing)}, which {FILE} lists; export again")
    return Exported(folder, content)
