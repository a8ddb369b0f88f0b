"""An adapter that was trained with added tokens: the base's embeddings get as many rows as the adapter has.

    state = fitted(model, adapter_tensors(weights), config, where)      # model.resize_token_embeddings, new rows zero

The adapter brings the rows: whole (modules_to_save, or the resized base that PEFT saves beside the factors), or token
by token (trainable_token_indices). What it does not bring was lost when it was saved, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.site import parameter_name
from rankwise.errors import DataError
from rankwise.models.load import embedding_paths


def fit_vocabulary(
    model: PreTrainedModel, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """Resize the model's embeddings to the adapter's, and return the adapter's tensors, those of tied weights on both.

    DataError where the adapter's sizes differ, or it lacks rows that the base does not have.
    """
    paths = embedding_paths(model)
    state = dict(state) | share_tied(model, state, paths)
    before = row_count(model)
    rows = embedding_rows(state, config, paths, before, where)
    if rows != before:
        require_rows(model, state, config, range(before, rows), where)
        resize(model, rows)
    return state


def row_names(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters with a row per token."""
    ends = {f"{path}.{name}" for path in embedding_paths(model) for name in ("weight", "bias")}
    return frozenset(ends & {name for name, _ in model.named_parameters(remove_duplicate=False)})


def token_count(tokenizer: Any) -> int:
    """Rows that a tokenizer needs: its highest id + 1, added tokens included."""
    ids: Mapping[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def row_count(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def resize(model: PreTrainedModel, rows: int) -> None:
    """As many rows, and the config's vocab_size with them; new ones are zero until an adapter fills them."""
    before = row_count(model)
    model.resize_token_embeddings(rows, pad_to_multiple_of=1, mean_resizing=False)
    with torch.no_grad():
        for path in embedding_paths(model):
            model.get_submodule(path).weight[before:] = 0


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """The first rows of a weight, and zeros for those that are not there yet."""
    return torch.cat([weight[:rows], weight.new_zeros(max(0, rows - len(weight)), *weight.shape[1:])])


def share_tied(model: PreTrainedModel, state: Mapping[str, Tensor], paths: Collection[str]) -> dict[str, Tensor]:
    """A base weight that the adapter carries for one of two tied modules is the other's as well."""
    found = {}
    for one, other in model.all_tied_weights_keys.items():
        for name, partner in ((one, other), (other, one)):
            path = name.removesuffix(".weight")
            weight = state.get(f"{path}.base_layer.weight", state.get(f"{path}.token_adapter.base_layer.weight"))
            carried = any(parameter_name(key) == partner for key in state)
            if path in paths and weight is not None and not carried:
                found[partner] = weight
    return found


def embedding_rows(
    state: Mapping[str, Tensor], config: Mapping[str, Any], paths: Collection[str], before: int, where: str
) -> int:
    """Rows of the embeddings that the adapter was trained with; the base's where it says nothing of them."""
    sizes: dict[str, int] = {}
    for path in paths:
        sizes |= {key: tensor.shape[0] for key, tensor in state.items() if parameter_name(key) == f"{path}.weight"}
        sizes |= {key: state[key].shape[1] for key in (f"{path}.lora_embedding_A",) if key in state}
        sizes |= {key: state[key].shape[0] for key in (f"{path}.lora_B.weight",) if key in state}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise DataError(f"{where}: the adapter's tensors have different vocabulary sizes: {shown}")
    trained = [token for path in paths for token in trained_tokens(path, config)]
    return next(iter(sizes.values()), max([before, *(token + 1 for token in trained)]))


def require_rows(
    model: PreTrainedModel, state: Mapping[str, Tensor], config: Mapping[str, Any], new: range, where: str
) -> None:
    """DataError where a module's new rows are nowhere in the adapter."""
    tied = model.all_tied_weights_keys
    for path in embedding_paths(model):
        name = f"{path}.weight"
        group = {name, tied.get(name, name), *(one for one, other in tied.items() if other == name)}
        trained = {token for one in group for token in trained_tokens(one.removesuffix(".weight"), config)}
        whole = any(parameter_name(key) == name and ".trainable_tokens_" not in key for key in state)
        if not whole and not trained.issuperset(new):
            raise DataError(
                f"{where}: the adapter was trained with {len(new)} tokens that the base does not have, and does not "
                f"carry their rows of {name} (not saved: PEFT's save_pretrained takes save_embedding_layers=True)"
            )


def trained_tokens(path: str, config: Mapping[str, Any]) -> list[int]:
    """The tokens of this module that PEFT's trainable_token_indices names."""
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, Mapping):
        return [token for name, tokens in indices.items() if path.endswith(name) for token in tokens]
    return list(indices)
