"""The plan of an export, checked before anything is written.

merged_model/ ── plan_export(config, converter) ──▶ ExportPlan: types, files, what the converter must be told, its space
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from rankwise.data.device import DeviceTarget, read_target
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import is_adapter
from rankwise.files.atomic import free_space, read_if_there, read_object
from rankwise.files.checkpoint import Checkpoint, open_checkpoint, resolve
from rankwise.files.lineage import require_unaltered
from rankwise.gguf.converter import Converter
from rankwise.gguf.metadata import Vocabulary, check_forms, config_of
from rankwise.gguf.reading import MMPROJ, TEXT
from rankwise.gguf.stacks import require_every_expert
from rankwise.gguf.view import Changes, changes_for
from rankwise.models.depth.encoder import DEPTH
from rankwise.models.load import embedding_paths, meta_model
from rankwise.models.sites import weight_table
from rankwise.options.commands import ExportConfig

BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # of one weight
REFERENCE = "f32"
MARGIN, FIXED = 1.05, 32 * 2**20  # tensors that stay wider; vocabulary and metadata


@dataclass(frozen=True)
class ExportPlan:
    """A checked export.

    base: the model before tuning, where it is at hand. silenced: the tokenizer adds a start token to a text, and the
    prompts of training had none: the GGUF states `vocabulary.add_bos`, false.
    """

    model: Path
    name: str
    outtypes: tuple[str, ...]
    mmproj: bool
    converter: Converter
    checkpoint: Checkpoint
    vocabulary: Vocabulary
    changes: Changes
    target: DeviceTarget | None
    base: Checkpoint | None
    verify: bool = True
    silenced: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return (TEXT, MMPROJ) if self.mmproj else (TEXT,)

    @property
    def sees(self) -> bool:
        return sees(self.checkpoint.config or {})

    @property
    def bytes(self) -> int:
        """Disk space that the files take, with the float32 ones that verification needs for a while."""
        elements = sum(prod(self.checkpoint.shape(key)) for key in self.checkpoint)
        kinds = {*self.outtypes, *([REFERENCE] if self.verify else [])}
        return int(elements * sum(BYTES[kind] for kind in kinds) * MARGIN) + FIXED

    def file(self, outtype: str, kind: str = TEXT) -> str:
        return f"{'mmproj-' if kind == MMPROJ else ''}{self.name}-{outtype}.gguf"


def plan_export(
    config: ExportConfig, converter: Converter, *, target: DeviceTarget | None = None, begins: bool = True
) -> ExportPlan:
    """Check all that can be known before converting.

    target: what the device does to an image [the model folder's]. begins: whether the prompts of training open with a
    start token; where not, the GGUF adds none to a text, though the tokenizer does.
    UsageError for what llama.cpp can't run; DataError for broken files, and for a tokenizer that is longer than the
    embeddings; VerificationError where the model's two forms of the tokenizer disagree, and for a merged model that is
    no longer what the merge wrote.
    """
    folder = resolve(str(config.model))
    looks = sees(require_model(folder))
    if config.mmproj and not looks:
        raise UsageError(f"{config.model}: --mmproj is for vision-language models, and this one has no vision_config")
    projector = looks if config.mmproj is None else config.mmproj
    require_unaltered(folder, "merge")
    checkpoint, vocabulary = open_checkpoint(folder), Vocabulary.of(folder, looks)
    check_forms(folder)
    require_every_expert(checkpoint)
    silenced = vocabulary.add_bos and not begins
    vocabulary = replace(vocabulary, add_bos=vocabulary.add_bos and begins)
    target = target or read_target(folder)
    changes = changes_for(folder, converter, vocabulary, target, projector)
    check_lengths(folder, checkpoint, len(vocabulary.tokens))
    return ExportPlan(
        model=folder,
        name=config.name or folder.resolve().name,
        outtypes=tuple(dict.fromkeys(config.outtype)),
        mmproj=projector,
        converter=converter,
        checkpoint=checkpoint,
        vocabulary=vocabulary,
        changes=Changes(changes.files, tuple(f"the converter was told: {note}" for note in changes.notes)),
        target=target,
        base=base_checkpoint(folder, config.base_model),
        verify=not config.no_verify,
        silenced=silenced,
    )


def sees(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("vision_config"), dict)


def require_model(folder: Path) -> dict[str, Any]:
    """The config of a model that can be converted at all."""
    if is_adapter(folder):
        raise UsageError(
            f"{folder}: an adapter, not a model; merge it first (rankwise merge {folder} -o merged_model), or write it "
            f"as a LoRA for llama.cpp: rankwise export --adapter_gguf {folder}"
        )
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so this is not a Hugging Face model folder")
    if (folder / DEPTH.name).is_file():
        raise UsageError(
            f"{folder}: this model uses depth ({DEPTH.name}), which llama.cpp does not support; evaluate it with "
            "`rankwise evaluate`, or train without --use_depth for the device"
        )
    config = read_object(folder / "config.json")
    if config.get("quantization_config"):
        raise UsageError(f"{folder}: quantized weights cannot be exported; merge into the base in full precision")
    return config


def base_checkpoint(folder: Path, given: str | None) -> Checkpoint | None:
    """The base that was named, else the one that the merge recorded and that is still on this machine."""
    if given:
        return open_checkpoint(resolve(given))
    manifest = folder / "manifest.json"
    entry = read_if_there(manifest).get("stages", {}).get("merge", {})
    recorded = Path(entry.get("inputs", {}).get("base", {}).get("path") or "")
    return open_checkpoint(recorded) if recorded.parts and (recorded / "config.json").is_file() else None


def require_space(plan: ExportPlan, out: Path) -> None:
    """DataError where the disk of `out` lacks what the export needs."""
    free = free_space(out)
    if plan.bytes > free:
        f32 = " (the float32 files that verification needs are in it: --no_verify leaves them out)"
        raise DataError(
            f"{out}: the export needs about {plan.bytes / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
            f"{f32 if plan.verify and REFERENCE not in plan.outtypes else ''}; nothing was written"
        )


def check_lengths(folder: Path, checkpoint: Checkpoint, tokens: int) -> None:
    """Check that tokenizer, config and weights agree on the vocabulary size, before the converter asserts it.

    DataError with both numbers where the tokenizer has more tokens (`tokens`: its highest id + 1) than the model, or
    where config and weights are of different lengths. Nothing is known of a class that transformers does not have."""
    config = config_of(folder)
    if config is None:
        return
    rows = stored_rows(folder, checkpoint)
    wrong = [f"{key} has {stored:,} rows and the config is of {stated:,}" for key, stored, stated in rows]
    wrong = [line for line, (_, stored, stated) in zip(wrong, rows, strict=True) if stored != stated]
    if wrong:
        raise DataError(
            f"{folder}: {'; '.join(wrong)}: config.json and the weights are not of one model; save both again "
            "(model.resize_token_embeddings changes both)"
        )
    known = config.get_text_config().vocab_size
    held = min([known, *(stored for _, stored, _ in rows)])
    if tokens > held:
        raise DataError(
            f"{folder}: the tokenizer has {tokens:,} tokens (its highest id + 1) and the model {held:,} rows for them; "
            "call model.resize_token_embeddings(len(tokenizer)) and train the new rows, or put back the tokenizer that "
            "the model was trained with"
        )


def stored_rows(folder: Path, checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """(key, rows in the files, rows by the config) of the embeddings and of the head; what is tied is stored once."""
    model = meta_model(str(folder))
    weights = weight_table(model, checkpoint.keys()).weights
    found = [(path, weights.get(f"{path}.weight")) for path in embedding_paths(model)]
    return [
        (weight.key, checkpoint.shape(weight.key)[0], model.get_parameter(f"{path}.weight").shape[0])
        for path, weight in found
        if weight is not None and weight.part == (0, 1)
    ]
