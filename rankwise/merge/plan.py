"""A skeleton of base + adapter: PEFT's layers with their trained factors, around base weights that take no memory.

skeleton = filled_skeleton(meta_model(base), adapter_folder, "adapter … on …")
merged = merge_layer(skeleton.layers["model.layers.0.mlp.down_proj.weight"], weight)     # one layer at a time
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import parameter_name
from rankwise.errors import DataError
from rankwise.files.adapter import CONFIG_NAME, adapter_files, adapter_tensors, require_plain
from rankwise.files.atomic import read_object
from rankwise.models.adapt import ADAPTER, lora_layers, quiet_peft
from rankwise.models.adapters import attached, check_recorded, fill
from rankwise.models.vocabulary import fitted, row_names


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
    require_plain(read_object(config_file) | {"use_dora": False}, config_file)
    return weights.parent


@dataclass(frozen=True)
class Skeleton:
    """What an adapter changes, by parameter name.

    `layers`: PEFT layers with their trained factors. `whole`: parameters that it carries whole (a trained head, biases,
    modules trained in full). `tokens`: trained rows of single tokens, (token ids, rows). `rowed`: parameters with a row
    per token, changed or not.
    """

    layers: Mapping[str, LoraLayer]
    whole: dict[str, Tensor]
    tokens: Mapping[str, tuple[Tensor, Tensor]]
    rowed: frozenset[str]

    @property
    def touched(self) -> frozenset[str]:
        return frozenset([*self.layers, *self.whole, *self.tokens])

    def alike(self, one: str, other: str) -> bool:
        """Whether two parameters that are one weight in the base are still equal with the adapter."""
        whole, tokens = (self.whole.get(one), self.whole.get(other)), (self.tokens.get(one), self.tokens.get(other))
        return (
            not {one, other} & set(self.layers)
            and same(*whole)
            and all(same(*parts) for parts in zip(*(rows or (None, None) for rows in tokens), strict=True))
        )


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def filled_skeleton(model: PreTrainedModel, folder: Path, where: str) -> Skeleton:
    """The adapter on the model's structure, whose embeddings get the adapter's number of rows."""
    state = {name: tensor.float() for name, tensor in fitted_state(model, folder, where).items()}
    rowed = row_names(model)
    with quiet_ties():
        skeleton = attached(without_weights(model), folder, where, False)
    fill(skeleton, state, where, assign=True)
    check_recorded(skeleton, folder, where)
    return Skeleton(
        {f"{path}.weight": layer for path, layer in lora_layers(skeleton).items()},
        {parameter_name(name): tensor for name, tensor in state.items() if not is_factor(name)},
        token_rows(skeleton),
        rowed,
    )


def fitted_state(model: PreTrainedModel, folder: Path, where: str) -> dict[str, Tensor]:
    """The adapter's tensors; the model's embeddings are resized to theirs."""
    weights, config_file = adapter_files(folder)
    assert config_file is not None
    return fitted(model, adapter_tensors(weights), read_object(config_file), where)


def token_rows(skeleton: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter → (token ids, their trained rows), of PEFT's trainable_token_indices."""
    return {
        f"{parameter_name(path)}.weight": (
            torch.tensor(module.token_indices[ADAPTER]),
            module.trainable_tokens_delta[ADAPTER].detach(),
        )
        for path, module in skeleton.named_modules()
        if isinstance(module, TrainableTokensLayer)
    }


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with float32 weights that are views of one zero: they carry adapters, and take no memory."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def is_factor(name: str) -> bool:
    """Whether a tensor of an adapter belongs to a PEFT layer (lora_A, lora_magnitude_vector, trained tokens …)."""
    return any(part.startswith(("lora_", "trainable_tokens_")) for part in name.split("."))


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
