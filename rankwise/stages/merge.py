"""rankwise merge: adapter into base → Hugging Face checkpoint, compared with base + adapter before it gets its name.

rankwise merge saved_models/dynamic_lora_model -o merged_model
"""

from __future__ import annotations

from pathlib import Path

from rankwise.config import MergeConfig
from rankwise.errors import DataError, UsageError
from rankwise.ship.merge import MergePlan, plan_merge, write_merged
from rankwise.ship.shards import shard_bytes
from rankwise.ship.verify import Agreement, compare, merged_logits, reference_logits, require_memory
from rankwise.show.format import memory, plural
from rankwise.store.adapter import CONFIG_NAME, adapter_files
from rankwise.store.checkpoint import HUB_ID
from rankwise.store.files import atomic_folder, read_object
from rankwise.store.run import RunFolder


def run(config: MergeConfig) -> Agreement | None:
    """The whole command; returns what the verification measured."""
    adapter, base = check(config)
    plan = plan_merge(base, adapter, config.dtype)
    out, agreement = RunFolder(config.output_dir), None
    with out.lock():
        refuse_other_content(out)
        if not config.no_verify:
            require_memory(plan.base)
        reference = None if config.no_verify else reference_logits(base, plan.adapter, pictures=plan.sees)
        with atomic_folder(out.path) as temporary:
            inside = RunFolder(temporary)
            with inside.recording("merge", {"base": base, "adapter": plan.adapter}) as record:
                files = write_merged(plan, temporary, config.max_shard_size)
                if reference:
                    agreement = compare(reference, merged_logits(temporary, reference.batches))
                    agreement.require(plan.dtypes[0])
                    record.facts["verification"] = agreement.as_dict()
                record.outputs |= {file.name: file for file in files}
                inside.save_config(config)
    report(config, plan, base, agreement)
    return agreement


def check_options(config: MergeConfig) -> Path:
    """What can be said before anything is read; returns the adapter's path."""
    if not config.adapter:
        raise UsageError("merge needs an adapter: rankwise merge ADAPTER [--base_model BASE] -o merged_model")
    shard_bytes(config.max_shard_size)
    return Path(config.adapter)


def check(config: MergeConfig) -> tuple[Path, str]:
    """The adapter and the name of its base: the option's, else what the adapter records."""
    adapter = check_options(config)
    recorded = recorded_base(adapter)
    base = config.base_model or recorded
    if not base:
        raise DataError(f"{adapter}: the adapter does not say what its base is; give it with --base_model")
    if not config.base_model and not Path(base).exists() and not HUB_ID.fullmatch(base):
        raise DataError(f"{adapter}: made for {base}, which is not on this machine; give the base with --base_model")
    return adapter, base


def recorded_base(adapter: Path) -> str | None:
    config_file = adapter_files(adapter)[1]
    return (read_object(config_file).get("base_model_name_or_path") or None) if config_file else None


def refuse_other_content(out: RunFolder) -> None:
    """The output replaces the folder as a whole, so nothing may lie in it but an earlier merge."""
    visible = [entry.name for entry in out.path.iterdir() if not entry.name.startswith(".")]
    if visible and "merge" not in out.stages():
        raise UsageError(
            f"{out.path}: holds other files ({', '.join(sorted(visible)[:3])} …); choose a new --output_dir"
        )


def report(config: MergeConfig, plan: MergePlan, base: str, agreement: Agreement | None) -> None:
    recorded = recorded_base(Path(str(config.adapter)))
    if recorded and recorded != base:
        print(f"note: the adapter records the base {recorded}; merged into {base}, whose names and shapes fit")
    if plan.untied:
        print(f"note: {' and '.join(sorted(plan.untied))} were one weight and are two now (tie_word_embeddings false)")
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in plan.dtypes)
    size = memory(sum(entry.bytes for entry in plan.entries))
    print(f"merged {plural(len(plan.touched), 'weight')} of {config.adapter} into {base} ({dtypes}, {size})")
    print(verdict(agreement))
    print(f"checkpoint in {config.output_dir}")
    print(f"next: rankwise evaluate {config.output_dir} --task … --data_path …")


def verdict(agreement: Agreement | None) -> str:
    if agreement is None:
        return "not verified (--no_verify)"
    return (
        f"verified: logits within {agreement.error:.1e} (relative rms) of base + adapter's, same top token at "
        f"{agreement.same_top1:.1%}, KL {agreement.kl:.1e}; the adapter's own effect is {agreement.effect:.1e}, of "
        f"which rounding costs {agreement.effect_lost:.2%}"
    )


def describe(config: MergeConfig) -> list[str]:
    adapter = check_options(config)  # in a recipe an earlier stage may still have to make it
    base = check(config)[1] if adapter.exists() else config.base_model or "the base that it records"
    lines = [f"merge the adapter {adapter} ({CONFIG_NAME} and weights checked first) into {base}"]
    if not config.no_verify:
        lines.append("compare the merged model's logits with those of base + adapter, and write nothing if they differ")
    return [*lines, f"write a Hugging Face checkpoint to {config.output_dir}, in files of {config.max_shard_size}"]
