"""Trained adapters and the disk: saved as plain PEFT folders, loaded strictly, swapped where PEFT does it right."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.plan import RankPlan
from rankwise.core.site import PEFT_PREFIX, nearest
from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import (
    CONFIG_NAME,
    COPY,
    ORIGINAL,
    LoraAdapter,
    LoraPair,
    adapter_files,
    adapter_tensors,
    read_adapter,
    write_adapter,
)
from rankwise.files.adapter_config import EXPERTS, lora_config, place_rows
from rankwise.files.atomic import atomic_files, read_object
from rankwise.files.checkpoint import ADAPTER_NAMES, Checkpoint
from rankwise.files.run_folder import SITES
from rankwise.models.adapt import (
    ADAPTER,
    built_shapes,
    factor_weights,
    full_copies,
    lora_layers,
    lora_pairs,
    model_places,
    quiet_peft,
)
from rankwise.models.per_expert import in_todays_layout
from rankwise.models.sites import weight_table
from rankwise.models.targets import scales
from rankwise.models.vocabulary import fit_vocabulary

CONVERTED = 1e-5  # relative: what float32 leaves of a weight that gave away its leading directions and got them back


def write_sites(folder: Path, plan: RankPlan, left_out: list[str], full: Mapping[str, str] | None = None) -> Path:
    """`sites.json`: what is adapted, with rank and scale; what of the plan was left out; what is trained in full.

    full: path → tower of the modules that are trained in full.
    """
    scale = scales(plan)
    rows = [
        {**row.site.as_dict(), "rank": row.rank, "scale": scale[row.site.path], "clipped": row.clipped}
        for row in plan.sites
        if row.rank
    ]
    left_out = left_out + [row.site.path for row in plan.sites if not row.rank]
    whole = [{"path": path, "tower": tower} for path, tower in (full or {}).items()]
    content = {"model_name": plan.model_name, "sites": rows, "left_out": left_out}
    return SITES.write(folder, {**content, "full": whole})


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    initial: Mapping[str, LoraPair] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json, both or neither.

    Args:
        base_name: what the config names as the base (a hub id rather than its cache folder).
        initial: the pairs right after an initialisation that moved base weights (pissa, olora); the adapter is then
            saved as the plain LoRA s·(B·A − B₀·A₀), of twice the rank, which fits the untouched base.
        state: the gathered state dict, where parameters are sharded.
    """
    config = model.peft_config[ADAPTER]
    if initial:
        settings = lora_config(base_name, dropout=config.lora_dropout, modules_to_save=config.modules_to_save)
        write_adapter(folder, LoraAdapter(settings, subtract_pairs(lora_pairs(model), initial), full_weights(model)))
        return
    config.base_model_name_or_path = base_name
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
        model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        if places := model_places(model):
            EXPERTS.write(temporary, place_rows(places))
        publish(Path(temporary), folder)


def full_weights(model: PeftModel) -> dict[str, Tensor]:
    """Name in the base model → weight, of what is trained in full."""
    return {
        f"{path}.{name}": tensor
        for path, copy in full_copies(model).items()
        for name, tensor in copy.state_dict().items()
    }


def publish(source: Path, folder: Path) -> list[Path]:
    """Move the files of a saved adapter to their place and return them; its config marks it as plain B·A."""
    content = read_object(source / CONFIG_NAME) | {"init_lora_weights": True, "eva_config": None}
    names = [ADAPTER_NAMES[0], CONFIG_NAME, *(name for name in (EXPERTS.name,) if (source / name).is_file())]
    with atomic_files(*(folder / name for name in names)) as (weights, config, *record):
        (source / ADAPTER_NAMES[0]).rename(weights)
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in record:
            (source / EXPERTS.name).rename(file)
    if EXPERTS.name not in names:
        (folder / EXPERTS.name).unlink(missing_ok=True)  # an earlier adapter's
    return [folder / name for name in names]


def subtract_pairs(now: Mapping[str, LoraPair], before: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """Pairs whose B·A is the difference of two: [B, −B₀]·[A; A₀], exact."""
    return {
        path: replace(
            pair,
            lora_A=torch.cat([pair.lora_A, before[path].lora_A], -2),
            lora_B=torch.cat([pair.lora_B, -before[path].lora_B], -1),
        )
        for path, pair in now.items()
    }


def require_converted(model: PeftModel, folder: Path, base: Checkpoint, skeleton: PreTrainedModel) -> None:
    """VerificationError where the untouched base with the adapter in this folder is not the trained model, whose
    initialisation moved base weights: site by site, the base's weight from its files."""
    places, pairs = weight_table(skeleton, base.keys()).weights, read_adapter(folder).pairs
    wrong = []
    for path, layer in lora_layers(model).items():
        now, pair = layer.get_base_layer().weight, pairs[path]
        stored, change = places[f"{path}.weight"].read(base).float(), pair.change()
        trained = now.detach().cpu().float() + layer.get_delta_weight(ADAPTER).detach().cpu().float()
        error = trained - stored - change
        rounding = max(torch.finfo(now.dtype).eps, CONVERTED)
        if not float(error.norm()) <= rounding * float(stored.norm()) + CONVERTED * float(change.norm()):
            wrong.append(path)
    if wrong:
        raise VerificationError(
            f"the adapter in {folder} is not what was trained: on the unmodified base {len(wrong)} sites have "
            f"another delta ({wrong[0]} …); use the last checkpoint"
        )


def load_adapter(model: PreTrainedModel, path: Path | str, *, trainable: bool = False) -> PeftModel:
    """The model with a saved adapter, of any PEFT type; in evaluation mode.

    Raises DataError, naming adapter and model, where keys are missing or left over, shapes differ, the matched
    sites are not those of `sites.json`, or a LoRA adapter changes nothing.
    """
    weights, config_file = adapter_files(in_todays_layout(model, path))
    if config_file is None:
        raise DataError(f"{path}: {CONFIG_NAME} is missing next to the weights; it names the adapted modules")
    folder, given = weights.parent, adapter_files(Path(path))[0].parent  # as named, not where it was converted to
    where = f"adapter {given} (made for {read_object(config_file).get('base_model_name_or_path')})"
    where += f" on model {model.name_or_path}"
    state = fit_vocabulary(model, adapter_tensors(weights), read_object(config_file), where)
    adapted = attach_layers(model, folder, where, trainable)
    fill_weights(adapted, state, where)
    check_recorded(adapted, folder, where)
    check_effect(adapted, where)
    return adapted.train(trainable)


def attach_layers(model: PreTrainedModel, folder: Path, where: str, trainable: bool) -> PeftModel:
    """The model with the adapter's layers, not yet with its weights."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    if hasattr(config, "init_lora_weights") and config.init_lora_weights in ("eva", "loftq"):
        config.init_lora_weights = True  # needs data that loading does not; the weights replace it anyway
    try:
        with quiet_peft():
            return PeftModel(model, config, ADAPTER)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def fill_weights(model: PeftModel, state: Mapping[str, Tensor], where: str, *, assign: bool = False) -> None:
    """Load an adapter's tensors (names as `adapter_tensors` has them) with PEFT. DataError, naming both, for keys that
    are missing or left over and for other shapes. Tensors of the base itself are loaded as PEFT does, onto the base.

    assign: the tensors themselves become the parameters, so that weights which are views of one zero stay that.
    """
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key.replace(COPY, "."): tensor for key, tensor in saved.items() if ORIGINAL not in key}
    own = model.state_dict()
    found = {name if name in expected else PEFT_PREFIX + name: tensor for name, tensor in state.items()}
    shared = {key for key in found if key not in expected and f"{key}.{ADAPTER}" in own}  # a tied module's token rows
    found = {key: tensor for key, tensor in found.items() if key not in shared}
    compare_keys(expected | {key: own[key] for key in found if key in own}, found, where)
    left = set_peft_model_state_dict(model, found, low_cpu_mem_usage=assign).unexpected_keys
    if left:
        raise DataError(f"{where}: {len(left)} unexpected weights ({left[0]} …)")


def compare_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing or extra:
        lines = [f"{len(missing)} weights are missing ({missing[0]} …)"] if missing else []
        if extra:
            near = ", ".join(nearest(extra[0], expected)) or "none"
            lines.append(f"{len(extra)} unexpected weights ({extra[0]} …; nearest: {near})")
        raise DataError(f"{where}: {'; '.join(lines)}")
    other = [key for key, value in found.items() if value.shape != expected[key].shape]
    if other:
        shapes = f"{tuple(found[other[0]].shape)} in the adapter, {tuple(expected[other[0]].shape)} in the model"
        raise DataError(f"{where}: {len(other)} weights have different shapes ({other[0]}: {shapes}); another base?")


def check_recorded(model: PeftModel, folder: Path, where: str) -> None:
    """Check that the sites and whole modules that PEFT matched are those of `sites.json`, where there is one."""
    if not (folder / SITES.name).is_file():
        return
    content = SITES.read(folder)
    whole = {row["path"] for row in content.get("full", ())} ^ set(full_copies(model))
    if whole and "full" in content:
        raise DataError(f"{where}: modules trained in full differ from {SITES.name} ({min(whole)} …)")
    recorded = {row["path"]: row["shape"] for row in content["sites"]}
    matched = {path: [b[-2], a[-1]] for path, (a, b) in built_shapes(model).items()}
    if matched != recorded:
        wrong = sorted(path for path in {**recorded, **matched} if recorded.get(path) != matched.get(path))
        raise DataError(f"{where}: {len(wrong)} sites differ from {SITES.name} ({wrong[0]} …)")


def check_effect(model: PeftModel, where: str) -> None:
    """Refuse a plain LoRA adapter whose products are all zero: an untrained or misread one."""
    config: Any = model.peft_config[ADAPTER]
    if config.peft_type != "LORA" or config.use_dora or config.bias != "none" or config.modules_to_save:
        return
    pairs = [factor_weights(path, layer) for path, layer in lora_layers(model).items()]
    if pairs and not any(bool(a.any()) and bool(b.any()) for a, b in pairs):
        raise DataError(f"{where}: every B·A is zero, so the adapter has no effect; was it saved before training?")
