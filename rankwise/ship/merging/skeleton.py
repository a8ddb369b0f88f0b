"""A skeleton of base + adapter: PEFT's layers with their trained factors, around base weights that take no memory.

layers, whole = filled_skeleton(meta_model(base), adapter_folder, shapes, "adapter … on …")
merged = merge_layer(layers["model.layers.0.mlp.down_proj.weight"], weight)     # one layer at a time
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import nearest
from rankwise.errors import DataError
from rankwise.nets.adapt import ADAPTER, PREFIX, lora_layers, quiet_peft
from rankwise.nets.adapters import attached, check_recorded, compare_keys
from rankwise.store.adapter import CONFIG_NAME, adapter_files
from rankwise.store.adapter_config import require_plain
from rankwise.store.checkpoint import open_checkpoint
from rankwise.store.files import read_object

WRAPPERS = ("base_layer", "modules_to_save")
ORIGINAL = ".original_module."  # with bias="all" PEFT also saves the untrained copy


@contextmanager
def quiet_ties() -> Iterator[None]:
    """Without PEFT's advice on adapted tied embeddings, which `merge` unties itself."""
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)
        yield


def mergeable(adapter: Path) -> Path:
    """The adapter's folder. DataError for what is not LoRA or DoRA, or would need the base changed first."""
    weights, config_file = adapter_files(adapter)
    if config_file is None:
        raise DataError(
            f"{weights}: no {CONFIG_NAME} beside it; `rankwise compress {weights} --scale S --energy 1` writes it as a "
            "PEFT adapter"
        )
    config = read_object(config_file)
    require_plain(config | {"use_dora": False}, config_file)
    if config.get("trainable_token_indices"):
        raise DataError(f"{config_file}: trainable_token_indices: trained single tokens cannot be merged here")
    return weights.parent


def filled_skeleton(
    model: PreTrainedModel, folder: Path, shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, LoraLayer], dict[str, Tensor]]:
    """(PEFT layers with their trained factors, parameters that the adapter carries whole), by parameter name."""
    with quiet_ties():
        skeleton = attached(without_weights(model), folder, where, False)
    state = adapter_state(folder)
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise DataError(f"{where}: {broken[0]} has NaN or infinite values: the run it comes from diverged")
    expected = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    compare_keys(expected, {key: tensor for key, tensor in state.items() if is_factor(key) or key in expected}, where)
    whole = {parameter_name(key): tensor for key, tensor in state.items() if not is_factor(key) and ORIGINAL not in key}
    check_whole(whole, shapes, where)
    filled(skeleton, state)
    check_recorded(skeleton, folder, where)
    return {f"{path}.weight": layer for path, layer in lora_layers(skeleton).items()}, whole


def adapter_state(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names. DataError, naming the file, where it cannot be read or is no plain weight
    file: one that was cut off, or a pickle with code in it."""
    weights = open_checkpoint(adapter_files(folder)[0])
    return {key: weights.tensor(key) for key in weights}


def filled(skeleton: PeftModel, state: Mapping[str, Tensor]) -> PeftModel:
    """The skeleton with the adapter's tensors, in float32; assigned, so that weights which are one zero stay that."""
    in_float32 = {key: tensor.float() for key, tensor in state.items()}
    set_peft_model_state_dict(skeleton, in_float32, low_cpu_mem_usage=True)
    return skeleton


def check_whole(whole: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, tensor in whole.items():
        if shapes.get(name) != tuple(tensor.shape):
            near = ", ".join(nearest(name, shapes)) or "none"
            raise DataError(
                f"{where}: the adapter carries {name} {tuple(tensor.shape)}, the base has "
                f"{shapes.get(name) or f'no such weight (nearest: {near})'}"
            )


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with float32 weights that are views of one zero: they carry adapters, and take no memory."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def is_factor(key: str) -> bool:
    """Whether a tensor of a PEFT file belongs to a LoRA layer (lora_A, lora_embedding_B, lora_magnitude_vector …)."""
    return any(part.startswith("lora_") for part in key.split("."))


def parameter_name(key: str) -> str:
    """Name in the base model of a tensor that an adapter carries whole: PEFT's wrappers taken out."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in WRAPPERS)


def merge_layer(layer: LoraLayer, weight: Tensor) -> Tensor:
    """PEFT's merge of one layer, in float32 on a copy of the weight."""
    base = layer.get_base_layer()
    empty = base.weight
    base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    layer.merge(adapter_names=[ADAPTER])
    merged: Tensor = base.weight.data
    base.weight = empty
    layer.merged_adapters.clear()
    return merged
