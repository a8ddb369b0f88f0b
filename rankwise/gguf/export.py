"""A merged checkpoint as GGUF files: converted by llama.cpp's own converter, then proven; and the folder read back.

plan = plan_export("merged_model", outtypes=["f16", "q8_0"], converter=find_converter())   # nothing is written yet
with atomic_folder("exported") as folder:
    content = write_export(plan, folder)        # GGUF files, verified, and export.json
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankwise.data.recorded import carry
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.atomic import atomic_write, fingerprint, read_document, sha256, write_json
from rankwise.files.lineage import EXPORT
from rankwise.gguf.converter import Job
from rankwise.gguf.metadata import check_numbers, text_numbers, vision_numbers
from rankwise.gguf.plan import MMPROJ, REFERENCE, TEXT, ExportPlan
from rankwise.gguf.provenance import Origins, origins, require_complete
from rankwise.gguf.reading import GGUFFile
from rankwise.gguf.verify import Tuned, changed_keys, compare_tensors, kept_wider, summary, tuned_summary, tuning_kept
from rankwise.gguf.view import shown
from rankwise.gguf.vocabulary import check_metadata, silence

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


# What needs no importance matrix; smaller i-quants do, and their makers say so.
FORMS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
CONVERTED = ("f32", "f16", "bf16")
FULL = {0: "f32", 1: "f16", 32: "bf16"}  # llama.cpp's general.file_type of what may be quantized
BINARY = "llama-quantize"
PLACES = ("", "bin", "build/bin")
LAST_LINES = 15
# The package's own call; a broken source may end the process that makes it.
DRIVER = """
import ctypes, sys
import llama_cpp
source, out, kind, threads = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, kind)
settings.nthread = int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)))
"""


@dataclass(frozen=True)
class Quantized:
    """A file that was made. types: bytes of its tensors by type; a tensor whose rows don't divide into the form's
    blocks (256 values for K-quants) gets a larger type, and small models have many such."""

    path: Path
    form: str
    bytes: int
    types: Mapping[str, int]


def quantize(
    source: Path | str, out: Path | str, form: str, llama_cpp_dir: Path | str | None = None, threads: int = 0
) -> Quantized:
    """Write `source` (f32, f16 or bf16) in a form of `FORMS`; threads: 0 for as many as there are cores.

    UsageError for another form or source, or where no quantizer is found; VerificationError, with the end of its
    output, where it fails. A file that is cut off never has the final name.
    """
    source, out = Path(source), Path(out)
    check_form(form)
    whole = GGUFFile(source)
    kind = whole.metadata.get("general.file_type")
    if kind not in FULL:
        raise UsageError(f"{source} is quantized already (file type {kind}); give its f16 or f32 form")
    command = quantizer(llama_cpp_dir)
    with atomic_write(out) as temporary:
        _run([*command, *_arguments(command, source, temporary, form, threads)], source, form)
        made = GGUFFile(temporary)
        if {one.name: one.shape for one in made.tensors.values()} != {
            one.name: one.shape for one in whole.tensors.values()
        }:
            raise VerificationError(f"{source} as {form}: its tensors are not those of the source; it was not written")
        types: Counter[str] = Counter()
        for tensor in made.tensors.values():
            types[tensor.type] += tensor.bytes
    return Quantized(out, form, out.stat().st_size, dict(types))


def check_form(form: str) -> None:
    """UsageError with the forms there are."""
    if form in CONVERTED:
        raise UsageError(f"{form} comes from the converter: rankwise export --outtype {form}")
    if form not in FORMS:
        raise UsageError(f"{form!r} is none of {', '.join(FORMS)}")


def quantizer(llama_cpp_dir: Path | str | None = None) -> list[str]:
    """The command that quantizes, without its arguments; UsageError that names both ways to get one."""
    if llama_cpp_dir is not None:
        found = [Path(llama_cpp_dir) / place / BINARY for place in PLACES]
        for binary in found:
            if binary.is_file():
                return [str(binary)]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", DRIVER]
    on_path = shutil.which(BINARY)
    if on_path is not None:
        return [on_path]
    raise UsageError(
        "no quantizer is here: pip install llama-cpp-python (it is built from source, which takes some minutes), or "
        f"build llama.cpp and name its folder with --llama_cpp_dir (or put {BINARY} on the PATH)"
    )


def _arguments(command: Sequence[str], source: Path, out: Path, form: str, threads: int) -> list[str]:
    if len(command) > 1:
        return [str(source), str(out), f"LLAMA_FTYPE_MOSTLY_{form.upper()}", str(threads)]
    return [str(source), str(out), form.upper(), *([str(threads)] if threads else [])]


def _run(command: Sequence[str], source: Path, form: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
        raise VerificationError(
            f"{source} could not be made {form}: the quantizer ended with {done.returncode}\n{said}"
        )
