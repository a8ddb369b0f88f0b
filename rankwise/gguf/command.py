"""rankwise export: merged checkpoint → GGUF files and their mmproj, proven tensor by tensor before they are named.

rankwise export merged_model -o exported_model
rankwise export --install-converter
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.data.device import DeviceTarget, read_target
from rankwise.data.example import Example, Turn
from rankwise.data.input_record import announce_prompts, recorded
from rankwise.data.renderer_for import rendered_as, renderer_for, shown_as
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import adapter_files, carry, contracts
from rankwise.files.atomic import atomic_folder, fingerprint, sha256
from rankwise.files.checkpoint import resolve
from rankwise.files.lineage import trained_rows
from rankwise.files.run_folder import RunFolder, without_places
from rankwise.gguf.converter import Converter, converter_folder, find_converter, install_converter
from rankwise.gguf.export import write_export
from rankwise.gguf.lora import largest_rank, read_plain, refuse_experts, require_text_sites, write_adapter_gguf
from rankwise.gguf.plan import ExportPlan, plan_export, require_model, require_space
from rankwise.gguf.reading import EXPORT, MMPROJ, TEXT, Exported, read_export
from rankwise.models.load import load_config
from rankwise.options.commands import ExportConfig
from rankwise.options.sections import ModelSection
from rankwise.page.text import command_line, plural

STAGE = "export"
ASKED = Example("probe", "probe", (Turn("user", "a"), Turn("assistant", "b")))


def run(config: ExportConfig) -> Exported | Path | None:
    """Run the command. Returns the export, the adapter's GGUF, or None where only the converter was installed."""
    check(config)
    if config.model or config.adapter_gguf:
        RunFolder(config.output_dir).refuse_other_content(STAGE)
    if config.adapter_gguf:
        refuse_experts(Path(config.adapter_gguf))
    converter = the_converter(config)
    if config.adapter_gguf:
        return export_adapter(config, Path(config.adapter_gguf), converter)
    if not config.model:
        return None
    started = time.monotonic()
    plan = plan_of(config, converter)
    check_input(config, plan)
    out = RunFolder(config.output_dir)
    require_space(plan, out.path)
    with out.lock():
        print(f"converting {config.model} ({', '.join(plan.kinds)}: {', '.join(plan.outtypes)})", flush=True)
        with atomic_folder(out.path) as temporary:
            inside = RunFolder(temporary)
            with inside.recording(STAGE, {"model": plan.model}) as record:
                content = write_export(plan, temporary)
                files = [files[kind] for files in content["files"].values() for kind in (TEXT, MMPROJ) if files[kind]]
                record.outputs |= {name: temporary / name for name in (EXPORT.name, *files)}
                record.outputs |= contracts(temporary)
                record.facts["converter"] = content["converter"]
                inside.save_config(config)
    report(plan, content, config, time.monotonic() - started)
    return read_export(out.path)


def check(config: ExportConfig) -> None:
    """Check the options before anything is read."""
    if not (config.model or config.adapter_gguf or config.install_converter):
        raise UsageError("export needs a merged model: rankwise export merged_model -o exported_model")
    if not config.outtype:
        raise UsageError("export needs a quantization type: --outtype f16,q8_0")
    if config.adapter_gguf and config.mmproj:
        raise UsageError("--adapter_gguf writes a LoRA for the text model; --mmproj does not go with it")


def check_installed(config: ExportConfig) -> None:
    """UsageError where llama.cpp's converter is not here: in a recipe, before the stages that lead here."""
    if (config.model or config.adapter_gguf) and not config.install_converter:
        find_converter(config.llama_cpp_dir)


def the_converter(config: ExportConfig) -> Converter:
    if config.install_converter:
        converter = install_converter()
        print(f"llama.cpp's converter (llama-cpp-python {converter.version}) is in {converter.folder}")
        if not config.llama_cpp_dir:
            return converter
    return find_converter(config.llama_cpp_dir)


def plan_of(config: ExportConfig, converter: Converter) -> ExportPlan:
    return plan_export(config, converter, target=given_target(config), begins=begins(resolve(str(config.model))))


def begins(model: Path) -> bool:
    """Whether training's prompts open with a start token: a chat template may write none though the tokenizer adds one
    to other texts, and llama.cpp adds one to every prompt where the GGUF says so. True where nothing is recorded."""
    require_model(model)
    record = recorded([model]).record
    if record is None:
        return True
    renderer, _ = rendered_as(shown_as(record), ModelSection(), str(model), load_config(str(model)))
    return renderer.prompt_ids(ASKED)[:1] == [renderer.tokenizer.bos_token_id]


def check_input(config: ExportConfig, plan: ExportPlan) -> None:
    """How prompts are made, said. UsageError for another device than the training's, DataError for a tokenizer or a
    template that is not."""
    found = recorded([plan.model])
    if found.record is None:
        announce_prompts(None, found)
        return
    geometry, target, name = found.record.image_geometry, given_target(config), str(plan.model)
    if target and geometry is not None and target.geometry != geometry:
        raise UsageError(
            f"--target {config.target}: image preparation differs from training's ({target.geometry} against "
            f"{geometry or 'pictures as the processor takes them'}); leave it out, or train for that device"
        )
    renderer_for(shown_as(found.record), ModelSection(), name, load_config(name), strict=True)


def given_target(config: ExportConfig) -> DeviceTarget | None:
    if not config.target:
        return None
    target = read_target(config.target)
    if target is None:
        raise DataError(f"--target {config.target}: no device.json there")
    return target


# --- what people read --------------------------------------------------------------------------------------------


def report(plan: ExportPlan, content: Mapping[str, Any], config: ExportConfig, seconds: float) -> None:
    for note in content["notes"]:
        print(f"note: {note}")
    for outtype, files in content["files"].items():
        for kind, size in files["bytes"].items():
            kept = content["kept_wider"][files[kind]]
            wider = f" ({plural(len(kept), 'tensor')} wider than {outtype}: {', '.join(kept)})" if kept else ""
            print(f"  {files[kind]}  {size / 1e6:,.1f} MB{wider}")
    print(verdict(plan, content["verification"]))
    print(f"exported to {config.output_dir} in {seconds:.0f} s")
    rows = trained_rows(Path(config.output_dir))
    if rows:
        print(f"next: {command_line('validate', config.output_dir, **rows)}")


def verdict(plan: ExportPlan, proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return "not verified (--no_verify)"
    tensors = sum(proof["checkpoint"]["tensors"].values())
    lines = [f"verified: {plural(tensors, 'tensor')} of the files against the checkpoint; {split(proof['tokenizer'])}"]
    for outtype, kinds in proof["errors"].items():
        worst = max(one["largest_rms"] for one in kinds.values())
        lines.append(f"  {outtype}: at most {worst:.1e} (relative rms) from the float32 weights in any tensor")
    lines += [
        f"  {name}: keeps at least {one['least_kept']:.2%} of the tuning in each of {plural(one['tensors'], 'weight')}"
        for name, one in (proof["tuned"] or {}).items()
    ]
    if other := proof["stored_otherwise_in_the_base"]:
        lines.append(f"  {plural(len(other), 'tensor')} not compared with the base, which stores them otherwise")
    if plan.base is None:
        lines.append("  not compared with the base (give it with --base_model)")
    return "\n".join(lines)


def split(tokenizer: Mapping[str, Any]) -> str:
    """What was compared of the tokenizer."""
    parts = f"the tokenizer's {plural(tokenizer['tokens'], 'token')}{' and template' * tokenizer['chat_template']}"
    if tokenizer["texts"]:
        return f"{parts}; {plural(tokenizer['texts'], 'text')} split as transformers splits them"
    return f"{parts} (`rankwise validate` compares how texts are split)"


def describe(config: ExportConfig) -> list[str]:
    lines = []
    if config.install_converter:
        lines.append(f"download llama.cpp's converter into {converter_folder()}, unless it is there")
    if config.adapter_gguf:
        return [*lines, "write the adapter as GGUF, its scales in B"]
    if not config.model:
        return lines
    tower = {None: "and its vision tower, if it has one", True: "and its vision tower", False: "text only"}
    lines.append(f"convert {config.model} to GGUF: {', '.join(config.outtype)}; {tower[config.mmproj]}")
    if not config.no_verify:
        lines.append("compare every tensor with the checkpoint, and write nothing if one is not what it should be")
    return lines


# --- an adapter --------------------------------------------------------------------------------------------------


def export_adapter(config: ExportConfig, adapter: Path, converter: Converter) -> Path:
    """The adapter's GGUF in the output folder, with an export.json that names it."""
    found, made = read_plain(adapter), recorded([adapter_files(adapter)[0].parent])
    announce_prompts(made.record, made)
    base = config.model or config.base_model or found.base_model
    if not base:
        raise UsageError(f"{adapter}: base model not recorded; give it with --base_model")
    require_text_sites(found, resolve(base), adapter)
    out = RunFolder(config.output_dir)
    name = f"{config.name or adapter.resolve().name}-lora-f32.gguf"
    with out.lock(), atomic_folder(out.path) as temporary:
        inside = RunFolder(temporary)
        with inside.recording(STAGE, {"adapter": adapter, "base": base}) as record:
            record.outputs |= carry(adapter_files(adapter)[0].parent, temporary)
            file = write_adapter_gguf(adapter, resolve(base), temporary / name, converter)
            content = {
                "adapter": {"path": str(adapter), "fingerprint": fingerprint(adapter), "base": without_places(base)},
                "converter": {"version": converter.version, "sha256": converter.sha256},
                "files": {},
                "adapter_file": {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)},
            }
            EXPORT.write(temporary, content)
            record.outputs |= {EXPORT.name: temporary / EXPORT.name, name: file}
            inside.save_config(config)
    sites, rank = len(found.pairs), largest_rank(found)
    print(f"wrote {plural(sites, 'site')} (largest rank {rank}) of {adapter} to {out / name}, checked factor by factor")
    loaded = shlex.join(["llama-server", "-m", "BASE.gguf", "--lora", str(out / name)])
    print(f"next, with BASE.gguf exported from {base}: {loaded}")
    return out / name
