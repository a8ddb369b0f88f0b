"""A merged checkpoint as GGUF files: converted by llama.cpp's own converter, then proven.

plan = plan_export(ExportConfig(model="merged_model"), find_converter())   # nothing is written yet
with atomic_folder("exported") as folder:
    content = write_export(plan, folder)        # GGUF files, verified, and export.json

    checkpoint ═(bit for bit, up to row order: provenance.py)═ f32 GGUF ═(within the type's rounding)═ f16, q8_0 GGUF

The proof compares every tensor of a GGUF with the same converter's float32 file, and looks for the tuning in it. A
number format says how far a value may be from its float32 original; an error beyond that is damage, not rounding.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import VerificationError
from rankwise.files.adapter import carry
from rankwise.files.atomic import fingerprint, sha256
from rankwise.files.checkpoint import Checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.files.run_folder import without_places
from rankwise.gguf.converter import Conversion
from rankwise.gguf.metadata import MODEL, check_numbers, check_tokenizer, silence, text_numbers, vision_numbers
from rankwise.gguf.plan import REFERENCE, ExportPlan
from rankwise.gguf.provenance import Origin, Origins, origins, require_complete
from rankwise.gguf.reading import EXPORT, MMPROJ, TEXT, first_few
from rankwise.gguf.splitting import check_texts, score
from rankwise.gguf.stacks import EXPERTS, label, stored
from rankwise.gguf.view import model_view
from rankwise.page.progress import progress

Files = Mapping[tuple[str, str], GGUFFile]  # by (outtype, kind)


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
        Conversion(place / plan.file(outtype, kind), outtype, kind == MMPROJ)
        for outtype, place in places.items()
        for kind in plan.kinds
    ]
    with model_view(plan.model, plan.changes, plan.name) as view:
        plan.converter.convert_all(view, jobs, plan.name)
    for job in jobs:
        if plan.silenced and not job.mmproj:
            silence(job.outfile)
        if not (job.mmproj or (plan.model / MODEL).is_file()):
            score(job.outfile, plan.vocabulary.scores)
    files = {
        (outtype, kind): GGUFFile(folder / plan.file(outtype, kind)) for outtype in plan.outtypes for kind in plan.kinds
    }
    proof = verification(plan, files, places[REFERENCE]) if plan.verify else None
    shutil.rmtree(reference, ignore_errors=True)
    content = description(plan, files, proof)
    EXPORT.write(folder, content)
    carry(plan.model, folder)
    if plan.target:
        plan.target.save(folder)
    return content


def verification(plan: ExportPlan, files: Files, place: Path) -> dict[str, Any]:
    """Run all proofs, as JSON; VerificationError at the first that fails. place: the folder of the float32 files."""
    references = {
        kind: files.get((REFERENCE, kind)) or GGUFFile(place / plan.file(REFERENCE, kind)) for kind in plan.kinds
    }
    found = {kind: origins(file, plan.checkpoint) for kind, file in references.items()}
    text_alone = references[TEXT] if plan.sees and not plan.mmproj else None
    left_out = require_complete(plan.checkpoint, list(found.values()), text_alone)
    tokenizer = check_tokenizer(references[TEXT], plan.vocabulary)
    texts, notes = check_texts(references[TEXT], plan.model, plan.vocabulary.template)
    numbers = {TEXT: text_numbers(references[TEXT], plan.model)}
    if MMPROJ in references:
        numbers[MMPROJ] = vision_numbers(references[MMPROJ], plan.model, plan.target)
    for kind, file in references.items():
        check_numbers(file, numbers[kind])
    tables: dict[str, dict[str, Any]] = {}
    tuned: dict[str, list[KeptTuning]] = {}
    changed = changed_keys(plan.base, plan.checkpoint) if plan.base else []
    for outtype in plan.outtypes:
        tables[outtype] = {}
        for kind in progress(plan.kinds, desc=f"verifying {outtype}", unit="file"):
            file = files[outtype, kind]
            if kind == TEXT:
                check_tokenizer(file, plan.vocabulary)
            check_numbers(file, numbers[kind])
            tables[outtype][kind] = summary(compare_tensors(file, references[kind], outtype))
            if plan.base:
                tuned[file.path.name] = tuning_kept(file, found[kind], plan.base, plan.checkpoint, changed)
    return {
        "checkpoint": {
            "tensors": {kind: len(one.found) for kind, one in found.items()},
            "how": {kind: one.counts() for kind, one in found.items()},
            "made_by_the_converter": [name for one in found.values() for name in one.made],
            "left_out": left_out,
        },
        "tokenizer": tokenizer | {"texts": texts, "notes": notes},
        "config": numbers,
        "errors": tables,
        "tuned": tuned_summary(tuned) if plan.base else None,
        "stored_otherwise_in_the_base": stored_otherwise(plan.base, plan.checkpoint) if plan.base else [],
        "base": without_places(str(plan.base.path)) if plan.base else None,
    }


def description(plan: ExportPlan, files: Files, proof: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": plan.name,
        "model": {"path": str(plan.model), "fingerprint": fingerprint(plan.model)},
        "converter": {"version": plan.converter.version, "sha256": plan.converter.sha256},
        "files": {outtype: files_of(plan, files, outtype) for outtype in plan.outtypes},
        "kept_wider": {file.path.name: kept_wider(file, outtype) for (outtype, _), file in files.items()},
        "notes": [*plan.changes.notes, *(proof["tokenizer"]["notes"] if proof else [])],
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


# --- within the rounding ---------------------------------------------------------------------------------------------

BLOCK = 32  # values that share a scale in Q8_0
SLACK = 1.001  # float32 arithmetic of the comparison itself
TINY = 1e-38  # 0 / 0
HALF_STEP = 2.0**-25  # half the spacing of float16's smallest numbers
ALLOWED = {
    "f32": ("F32",),
    "f16": ("F16", "F32"),
    "bf16": ("BF16", "F16", "F32"),
    "q8_0": ("Q8_0", "F16", "BF16", "F32"),
}
KEPT_LEAST = 0.5  # of the tuning, along its own direction; rounding leaves it near 1
SIGMAS = 6
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorError:
    """Error of a tensor against its float32 original. rms: relative to the original's rms.

    share: the largest error as a share of what the type's rounding can cause, entry by entry; above 1 is damage.
    """

    name: str
    type: str
    max_abs: float
    rms: float
    share: float


@dataclass(frozen=True)
class KeptTuning:
    """Kept share of a tuned tensor's change: ⟨written − base, merged − base⟩ / ‖merged − base‖², 1 if all of it.

    noise: standard deviation that rounding gives to this figure, ‖written − merged‖ / (√entries · ‖merged − base‖).
    """

    name: str
    kept: float
    noise: float

    @property
    def lost(self) -> bool:
        """Whether it is nearer to the base than to the tuned weights by more than rounding noise."""
        return not self.kept + SIGMAS * self.noise >= KEPT_LEAST


def compare_tensors(file: GGUFFile, reference: GGUFFile, outtype: str) -> list[TensorError]:
    """One row per tensor of `reference`.

    VerificationError, naming what differs, for a missing or additional tensor, another shape, a type that `outtype`
    doesn't write, and an error that the type's rounding does not explain.
    """
    require_same_tensors(file, reference, outtype)
    rows = [error_of(file, reference, name) for name in reference.tensors]
    damaged = [row for row in rows if not row.share <= 1]
    if damaged:
        worst = max(damaged, key=lambda row: row.max_abs)
        names = [one for row in damaged for one in damaged_parts(file, reference, row)]
        raise VerificationError(
            f"{file.path}: {first_few(names)}: not the values that were converted (the largest "
            f"error, {worst.max_abs:.3g} in {worst.name}, is more than rounding to {worst.type} makes)"
        )
    return rows


def require_same_tensors(file: GGUFFile, reference: GGUFFile, outtype: str) -> None:
    ours, theirs = file.tensors, reference.tensors
    missing, extra = [name for name in theirs if name not in ours], [name for name in ours if name not in theirs]
    shapes = [name for name in theirs if name in ours and ours[name].shape != theirs[name].shape]
    types = [name for name in ours if ours[name].type not in ALLOWED[outtype]]
    problems = {
        "missing": missing,
        "unknown": extra,
        "of another shape": shapes,
        f"of a type that {outtype} does not have": types,
    }
    found = [f"{what}: {first_few(names)}" for what, names in problems.items() if names]
    if found:
        raise VerificationError(
            f"{file.path}: {len(ours)} tensors where {reference.path.name} has {len(theirs)}; {'; '.join(found)}"
        )


def error_of(file: GGUFFile, reference: GGUFFile, name: str) -> TensorError:
    """Of a stack one matrix at a time: that of all experts can be larger than memory."""
    kind, largest, share, squares, off = file.tensors[name].type, 0.0, 0.0, 0.0, 0.0
    for original, found in zip(reference.parts(name), file.parts(name), strict=True):
        error = found.sub_(original).abs_()
        if error.numel():
            largest = max(largest, float(error.max()))
            share = max(share, damage(error, original, kind), key=lambda one: math.inf if math.isnan(one) else one)
        squares += float(torch.linalg.vector_norm(original, dtype=torch.float64)) ** 2
        off += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
    return TensorError(name, kind, largest, math.sqrt(off / squares if squares else off), share)


def damage(error: Tensor, original: Tensor, kind: str) -> float:
    """The largest error as a share of what rounding to a type can cause."""
    return float((error / rounding(original, kind).mul_(SLACK).add_(TINY)).max())


def damaged_parts(file: GGUFFile, reference: GGUFFile, row: TensorError) -> list[str]:
    """The tensor's name; of a stack its experts whose error rounding does not explain."""
    if len(file.tensors[row.name].shape) != 3:
        return [row.name]
    pairs = enumerate(zip(reference.parts(row.name), file.parts(row.name), strict=True))
    shares = {number: damage((found - original).abs(), original, row.type) for number, (original, found) in pairs}
    what = "matrix" if EXPERTS.isdisjoint(row.name.split(".")) else "expert"
    return [f"{row.name}, {what} {number}" for number, share in shares.items() if not share <= 1]


def rounding(original: Tensor, kind: str) -> Tensor:
    """Maximum error per entry from storing `original` (float32) in a type.

    Q8_0 stores d = max|block| / 127 in float16 and round(x / d): half a step, and d's own rounding 127 times over.
    """
    size = original.abs()
    if kind == "F32":
        return torch.zeros_like(size)
    if kind == "F16":
        return size * 2**-11 + HALF_STEP
    if kind == "BF16":
        return size * 2**-8
    blocks = size.reshape(-1, BLOCK)
    largest = blocks.amax(1, keepdim=True).expand_as(blocks).reshape(size.shape)
    return largest * (1 / 254 + 2**-11) + 127 * HALF_STEP


def kept_wider(file: GGUFFile, outtype: str) -> dict[str, str]:
    """Matrices that the converter left in a wider type than asked for (rows that no block of 32 divides, say)."""
    return {
        tensor.name: tensor.type
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1 and tensor.type != outtype.upper()
    }


def summary(rows: Sequence[TensorError]) -> dict[str, Any]:
    """The table as JSON, and its largest figures."""
    return {
        "tensors": len(rows),
        "largest_rms": max((row.rms for row in rows), default=0.0),
        "largest_error": max((row.max_abs for row in rows), default=0.0),
        "largest_share_of_rounding": max((row.share for row in rows), default=0.0),
        "rows": [asdict(row) for row in rows],
    }


# --- the tuned tensors are the tuned ones --------------------------------------------------------------------------


def changed_keys(base: Checkpoint, merged: Checkpoint) -> list[str]:
    """Keys of tensors that tuning changed by more than storing the base in another type does.

    VerificationError where there are none: the base itself was exported.
    """
    other = set(stored_otherwise(base, merged))
    changed = [key for key in merged if key not in other and not rounded_only(base.tensor(key), merged.tensor(key))]
    if not changed and not other:
        raise VerificationError(
            f"{merged.path}: no tensor differs from the base {base.path}: is this the merged model, and the right base?"
        )
    return changed


def stored_otherwise(base: Checkpoint, merged: Checkpoint) -> list[str]:
    """Keys that the base lacks or has in another shape: what it holds in MXFP4, say. Their tuning cannot be told."""
    return [key for key in merged if key not in base or base.shape(key) != merged.shape(key)]


def rounded_only(before: Tensor, after: Tensor) -> bool:
    """Whether `after` is `before` itself, or cast to a type that a merge computes or saves in."""
    return any(torch.equal(before.to(kind).float(), after.float()) for kind in dict.fromkeys((after.dtype, *HALVES)))


def tuning_kept(
    file: GGUFFile, sources: Origins, base: Checkpoint, merged: Checkpoint, changed: Sequence[str]
) -> list[KeptTuning]:
    """One row per tuned tensor of the file. VerificationError where the file has the base's tensor in its place."""
    wanted = set(changed)
    rows = [
        tuning_of(*one)
        for name, origin in sources.found.items()
        if name in file.tensors and not wanted.isdisjoint(origin.keys)
        for one in changes_of(file, name, origin, base, merged)
    ]
    lost = [row.name for row in rows if row.lost]
    if lost:
        raise VerificationError(f"{file.path}: {first_few(lost)}: nearer to the base's weights than to the tuned ones")
    return rows


def changes_of(
    file: GGUFFile, name: str, origin: Origin, base: Checkpoint, merged: Checkpoint
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, written, before, after) of a tuned tensor; of a stack of each matrix that tuning changed."""
    if not origin.cuts:
        before, after = (origin.apply(which.tensor(origin.key).float()) for which in (base, merged))
        if before is not None and after is not None:
            yield name, file.tensor(name).reshape(before.shape), before, after
    for cut in origin.cuts:
        if cut.key in base and base.shape(cut.key) == merged.shape(cut.key):
            old, new = (cut.take(which.tensor(cut.key)) for which in (base, merged))
            if not rounded_only(old, new):
                yield label(name, cut), stored(file, name, cut), old.float(), new.float()


def tuning_of(name: str, written: Tensor, before: Tensor, after: Tensor) -> KeptTuning:
    change, error = (after - before).double(), (written - after).double()
    size = float(change.norm())
    kept = 1 + float((error * change).sum()) / size**2
    return KeptTuning(name, kept, float(error.norm()) / (change.numel() ** 0.5 * size))


def tuned_summary(rows: Mapping[str, Sequence[KeptTuning]]) -> dict[str, Any]:
    """By file: how many tuned tensors it holds, and the least and the mean of their tuning that it keeps."""
    return {
        name: {
            "tensors": len(each),
            "least_kept": min(row.kept for row in each),
            "mean_kept": sum(row.kept for row in each) / len(each),
            "rows": [asdict(row) for row in each],
        }
        for name, each in rows.items()
        if each
    }
