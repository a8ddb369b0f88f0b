"""rankwise merge: adapter into base → Hugging Face checkpoint, compared with base + adapter before it gets its name.

rankwise merge saved_models/dynamic_lora_model -o merged_model
rankwise merge RUN --task conversations --data_path val.jsonl --dtype float16 -o merged_model

plan_merge ─▶ reference_logits ─▶ write_merged ─▶ require_written ─▶ compare ─▶ rename the folder
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rankwise.data.dataset import check_samples
from rankwise.data.input_record import announce_prompts, recorded
from rankwise.data.renderer_for import renderer_for, require_input
from rankwise.data.sources.load import read_examples, task_of
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import adapter_files, recorded_base
from rankwise.files.atomic import about_to_write, atomic_folder
from rankwise.files.checkpoint import HUB_ID
from rankwise.files.lineage import trained_rows
from rankwise.files.run_folder import RunFolder
from rankwise.merge.config import TOKENIZER_CONFIG
from rankwise.merge.logits import Batch, free_memory, needs_layers, prompt_batch, whole_bytes
from rankwise.merge.plan import MergePlan, plan_merge
from rankwise.merge.routing import RoutedExperts, adapted_experts
from rankwise.merge.verify import (
    Agreement,
    ReferenceLogits,
    compare,
    merged_logits,
    proof_words,
    reference_logits,
    require_written,
)
from rankwise.merge.write import Written, dtype_name, require_space, shard_bytes, write_merged
from rankwise.models.load import another_base, is_mxfp4, load_config
from rankwise.options.commands import MergeConfig
from rankwise.options.sections import ModelSection
from rankwise.page.text import command_line, memory, plural


def run(config: MergeConfig) -> Agreement | None:
    """Plan, write, verify; returns what the verification measured."""
    adapter, base = made_from(config)
    out, agreement = RunFolder(config.output_dir), None
    out.refuse_other_content("merge")
    plan = plan_merge(base, adapter, config.dtype)
    with out.lock():
        require_space(plan, out.path)
        found = recorded([plan.adapter])
        announce_prompts(found.record, found)
        about_to_write()
        layered = not config.no_verify and by_layers(config, plan)
        reference = None if config.no_verify else reference_of(config, plan, base, layered)
        with atomic_folder(out.path) as temporary:
            inside = RunFolder(temporary)
            with inside.recording("merge", {"base": base, "adapter": adapter_files(adapter)[0].parent}) as record:
                written = write_merged(plan, temporary, config.max_shard_size)
                require_input(temporary)
                if reference:
                    share = require_written(plan, temporary)
                    agreement = compare(reference, merged_logits(temporary, reference.batches, layered=layered))
                    agreement.require(plan.dtypes[0])
                    how = {"on": inputs_of(config), "layer_by_layer": layered, "share_of_rounding": share}
                    how |= {"experts": asdict(reference.reach)} if reference.reach else {}
                    record.facts["verification"] = agreement.as_dict() | how
                record.outputs |= {file.name: file for file in written.files}
                record.facts |= written.as_facts()
                inside.save_config(config)
    report(config, plan, base, written, agreement, reference.reach if reference else None)
    return agreement


def describe(config: MergeConfig) -> list[str]:
    lines = [f"merge the adapter into {config.base_model or 'the base that it records'}"]
    if not config.no_verify:
        lines.append(
            f"compare every tensor with base + adapter, and the merged model's logits on {inputs_of(config)}; write "
            "nothing if they differ"
        )
    return [*lines, f"write a Hugging Face checkpoint in files of {config.max_shard_size}"]


def check(config: MergeConfig) -> Path:
    """Refuse what is wrong before anything is read; returns the adapter's path."""
    if not config.adapter:
        raise UsageError("merge needs an adapter: rankwise merge ADAPTER [--base_model BASE] -o merged_model")
    shard_bytes(config.max_shard_size)
    if config.max_memory:
        shard_bytes(config.max_memory, "--max_memory")
    data = config.data
    if data.task and not data.data_path:
        raise UsageError("merge: --task needs --data_path, the file or folder of the rows")
    if data.data_path and not task_of(data):
        raise UsageError("merge: --data_path needs --task, which says how rows become prompts")
    return Path(config.adapter)


def made_from(config: MergeConfig) -> tuple[Path, str]:
    """The adapter and the name of its base: the option's, else what the adapter records."""
    adapter = check(config)
    base = config.base_model or recorded_base(adapter)
    if not base:
        raise DataError(f"{adapter}: the adapter names no base model; give it with --base_model")
    if not config.base_model and not Path(base).exists() and not HUB_ID.fullmatch(base):
        raise DataError(f"{adapter}: made for {base}, which is not on this machine; give the base with --base_model")
    return adapter, base


def by_layers(config: MergeConfig, plan: MergePlan) -> bool:
    """Whether to compare with one layer in memory at a time, which is announced: every pass reads the files again."""
    allowed = shard_bytes(config.max_memory, "--max_memory") if config.max_memory else free_memory()
    if not needs_layers(plan.base, allowed):
        return False
    print(
        f"note: compared layer by layer: the whole model takes {memory(whole_bytes(plan.base))} in float32, and "
        f"{memory(allowed)} may be used (--max_memory)"
    )
    return True


def reference_of(config: MergeConfig, plan: MergePlan, base: str, layered: bool) -> ReferenceLogits:
    prompts = prompts_of(config, base, plan.adapter)
    return reference_logits(
        base,
        plan.adapter,
        pictures=plan.sees,
        prompts=prompts,
        layered=layered,
        rows=plan.rows,
        experts=adapted_experts(plan.change),
    )


def prompts_of(config: MergeConfig, base: str, adapter: Path) -> Batch | None:
    """The first --num_samples prompts that fit; None without --data_path."""
    if not config.data.data_path:
        return None
    data = replace(config.data, task=task_of(config.data), overlong="drop")
    renderer = renderer_for(data, ModelSection(model_name=base), base, load_config(base), [adapter])
    found = read_examples(data, config.data.data_path, config.split, sees_images=renderer.sight is not None)
    first = list(islice(found.items, config.num_samples))
    usable = check_samples(first, renderer, prompts=True).usable
    return prompt_batch(renderer, [first[index] for index in usable])


def inputs_of(config: MergeConfig) -> str:
    """Inputs of the logit comparison."""
    path = config.data.data_path
    return f"{plural(config.num_samples, 'prompt')} of {path}" if path else "random tokens"


def report(
    config: MergeConfig,
    plan: MergePlan,
    base: str,
    written: Written,
    agreement: Agreement | None,
    reach: RoutedExperts | None,
) -> None:
    for note in notes(config, plan, base):
        print(f"note: {note}")
    dtypes = ", ".join(map(dtype_name, plan.dtypes))
    weights = plural(len(plan.touched), "weight")
    print(f"merged {weights} of {config.adapter} into {base} ({dtypes}, {memory(plan.bytes)})")
    if sentence := written.rounding.sentence():
        print(sentence)
    print(verdict(agreement, inputs_of(config)))
    if reach:
        print(reach.sentence())
    print(f"checkpoint in {config.output_dir}")
    rows: dict[str, Any] = trained_rows(Path(config.output_dir))
    print(f"next: {command_line('evaluate' if rows else 'export', config.output_dir, **rows)}")


def notes(config: MergeConfig, plan: MergePlan, base: str) -> list[str]:
    """Notes on deviations from adapter or base: another base, weights no longer tied, the adapter's own tokens."""
    before, after = plan.rows
    found = another_base("the adapter", recorded_base(Path(str(config.adapter))), base)
    if is_mxfp4((plan.base.config or {}).get("quantization_config")):
        found.append(
            f"the base's experts are in MXFP4: trained and merged dequantized, written as "
            f"{dtype_name(plan.dtypes[0])}, without its quantization_config"
        )
    if plan.untied:
        found.append(f"{' and '.join(sorted(plan.untied))} were one weight and are two now (tie_word_embeddings false)")
    if before != after:
        found.append(f"the embeddings have {after:,} rows, as the adapter's, and the base's {before:,}")
    if before < after and not (plan.adapter / TOKENIZER_CONFIG).is_file():
        found.append(
            "the adapter's folder has no tokenizer: the merged model's is the base's, without the added tokens"
        )
    if plan.special:
        tokens = ", ".join(f"{name} {token}" for name, token in plan.special.items())
        found.append(f"special tokens as in the adapter's tokenizer: {tokens}")
    return found


def verdict(agreement: Agreement | None, on: str) -> str:
    if agreement is None:
        return "not verified (--no_verify)"
    parts = "every tensor of the files is base + adapter within its type's rounding"
    return f"verified on {on}: {proof_words(agreement.as_dict())}; {parts}"
