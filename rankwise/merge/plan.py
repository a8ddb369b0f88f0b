"""Merge plan: what an adapter changes in its base, checked by name and shape before a byte is written.

    plan = plan_merge("org/base", Path("saved_models/adapter"))

PEFT's own layers merge, so DoRA is right as well: they stand on a skeleton of the model whose base weights are views of
one zero and take no memory. `write.py` gives a layer its weight, lets it merge, and takes the weight away again. Of
experts such a layer would want all at once: each is merged alone, from its own part of the pair.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import parameter_name
from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import CONFIG_NAME, LoraPair, adapter_files, adapter_tensors
from rankwise.files.adapter_config import require_plain
from rankwise.files.atomic import read_object
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.merge.config import merged_config, special_tokens, with_special, with_vocabulary
from rankwise.models.adapt import ADAPTER, factor_weights, layer_site, lora_layers, quiet_peft
from rankwise.models.adapters import attach_layers, check_recorded, fill_weights
from rankwise.models.depth.encoder import ENCODER, DepthSettings, attach_depth, read_depth
from rankwise.models.expert_files import BLOCKS, ExpertFiles
from rankwise.models.load import is_mxfp4, meta_model
from rankwise.models.per_expert import in_todays_layout
from rankwise.models.sites import WeightTable, tower_of, tower_prefixes, weight_table
from rankwise.models.vocabulary import fit_vocabulary, row_count, row_names


@dataclass(frozen=True)
class Entry:
    """A tensor that is still to be made. `source`: the base's key that it comes from; `names`: the module parameters
    that are row blocks of it, `sizes` their rows where they are not equal. `experts`: where the base has the parameter
    of experts that it belongs to."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    experts: ExpertFiles | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Skeleton:
    """What an adapter changes, by parameter name.

    `layers`: PEFT layers with their trained factors. `experts`: the pairs of experts. `whole`: parameters that it
    carries whole (a trained head, biases, modules trained in full). `tokens`: trained rows of single tokens, (token
    ids, rows). `rowed`: parameters with a row per token, changed or not.
    """

    layers: Mapping[str, LoraLayer]
    whole: dict[str, Tensor]
    tokens: Mapping[str, tuple[Tensor, Tensor]]
    rowed: frozenset[str]
    experts: Mapping[str, LoraPair] = field(default_factory=dict)

    @property
    def touched(self) -> frozenset[str]:
        return frozenset([*self.layers, *self.experts, *self.whole, *self.tokens])

    def alike(self, one: str, other: str) -> bool:
        """Whether two parameters that are tied in the base are still equal with the adapter."""
        whole, tokens = (self.whole.get(one), self.whole.get(other)), (self.tokens.get(one), self.tokens.get(other))
        return (
            not {one, other} & {*self.layers, *self.experts}
            and same(*whole)
            and all(same(*parts) for parts in zip(*(rows or (None, None) for rows in tokens), strict=True))
        )


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@dataclass(frozen=True)
class MergePlan:
    """Merge plan: which tensors are written, their sources, and their changes.

    `change`: what the adapter makes of which parameter. `untied`: parameters that shared another one's storage and no
    longer do. `rows`: of the embeddings, before and after. `special`: special tokens that the adapter's own tokenizer
    has in place of the base's. `sees`: something of a vision tower or projector changes, which only images show.
    `depth`: how the merged model takes depth, with the trained gate's value.
    """

    base: Checkpoint
    adapter: Path
    entries: tuple[Entry, ...]
    change: Skeleton
    config: Mapping[str, Any]
    untied: tuple[str, ...]
    rows: tuple[int, int]
    special: Mapping[str, int]
    sees: bool = False
    depth: DepthSettings | None = None

    @cached_property
    def touched(self) -> frozenset[str]:
        return self.change.touched | self.resized

    @cached_property
    def resized(self) -> frozenset[str]:
        """Parameters with a row per token, where the adapter has another number of them."""
        return self.change.rowed if self.rows[0] != self.rows[1] else frozenset()

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What the changed tensors are written as, the coarsest first."""
        changed = {entry.dtype for entry in self.entries if self.touched & set(entry.names)}
        return sorted(changed, key=lambda dtype: -torch.finfo(dtype).eps)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


def plan_merge(base: str, adapter: Path, dtype: str = "auto") -> MergePlan:
    """Check that the adapter fits the base, name by name and shape by shape.

    DataError, naming both, where it does not, for adapters that cannot be merged, and for quantized bases;
    VerificationError where the adapter has no effect, or needs embeddings untied that the architecture ties.
    """
    folder = mergeable_folder(adapter)
    checkpoint, model = open_checkpoint(resolve(base)), meta_model(base)
    where = f"adapter {folder} (made for {read_object(folder / CONFIG_NAME).get('base_model_name_or_path')}) on {base}"
    folder = in_todays_layout(model, folder)
    refuse_quantized(base, checkpoint.config or {})
    table = weight_table(model, checkpoint.keys())
    depth = read_depth(folder) or read_depth(checkpoint.path)
    if depth:
        attach_depth(model, depth)
    before, tied, towers = row_count(model), dict(model.all_tied_weights_keys), tower_prefixes(model)
    change = build_skeleton(model, folder, where)
    rows = before, row_count(model)
    depth = take_gate(depth, model, change.whole)
    refuse_no_effect(change, where)
    alike = {one: other for one, other in tied.items() if change.alike(one, other)}
    touched = change.touched | (change.rowed if rows[0] != rows[1] else set())
    apart = {one: other for one, other in tied.items() if one not in alike and touched & {one, other}}
    partner = {one: other for pair in apart.items() for one, other in (pair, pair[::-1])}
    experts = written_alone(table, change)
    held = {*table.weights, *experts, *partner, *alike}
    lacking = [name for name in touched if name not in held]
    if lacking:
        raise DataError(f"{where}: the files store {lacking[0]} in a different layout: it cannot be merged")
    for name, files in experts.items():
        if problem := files.problem(checkpoint):
            raise DataError(f"{checkpoint.path}: {name} {problem}")
    special = special_tokens(checkpoint.path, folder, rows[1])
    config = with_special(merged_config(checkpoint.config or {}, dtype, bool(partner)), special)
    if rows[0] != rows[1]:
        config = with_vocabulary(config, model.config, rows[1])
    if partner:
        check_untied(model, config, partner)
    entries = entries_of(checkpoint, table.weights, partner, change, rows, dtype)
    entries = with_experts(entries, experts, dtype)
    sees = any(tower_of(name.rpartition(".")[0], towers) in ("vision", "projector") for name in touched)
    return MergePlan(checkpoint, folder, entries, change, config, tuple(partner), rows, special, sees, depth)


def written_alone(table: WeightTable, change: Skeleton) -> dict[str, ExpertFiles]:
    """The parameters whose experts are written one by one: those that change, and those that the base has in MXFP4."""
    return {
        name: files
        for name, files in table.experts.items()
        if files.quantized or name in change.experts or (name in change.whole and name not in table.weights)
    }


def mergeable_folder(adapter: Path) -> Path:
    """The adapter's folder. DataError for what is not LoRA or DoRA, or would need the base changed first."""
    weights, config_file = adapter_files(adapter)
    if config_file is None:
        raise DataError(
            f"{weights}: no {CONFIG_NAME} beside it; `rankwise compress {weights} --scale S --energy 1` writes it as a "
            "PEFT adapter"
        )
    require_plain(read_object(config_file) | {"use_dora": False}, config_file)
    return weights.parent


def refuse_quantized(base: str, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization and not is_mxfp4(quantization):
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise DataError(
            f"{base}: its files are quantized ({kind}), and merging into rounded weights would round the adapter away; "
            "give the full-precision model it was made from with --base_model"
        )


def build_skeleton(model: PreTrainedModel, folder: Path, where: str) -> Skeleton:
    """The adapter on the model's structure, whose embeddings get the adapter's number of rows."""
    state = {name: tensor.float() for name, tensor in read_state(model, folder, where).items()}
    rowed = row_names(model)
    with quiet_ties():
        skeleton = attach_layers(strip_weights(model), folder, where, False)
    fill_weights(skeleton, state, where, assign=True)
    check_recorded(skeleton, folder, where)
    layers = lora_layers(skeleton)
    sites = {path: site for path, layer in layers.items() if (site := layer_site(path, layer))}
    return Skeleton(
        {f"{path}.weight": layer for path, layer in layers.items() if path not in sites},
        {parameter_name(name): tensor for name, tensor in state.items() if not is_factor(name)},
        token_rows(skeleton),
        rowed,
        {
            path: LoraPair(*factor_weights(path, layers[path]), float(layers[path].scaling[ADAPTER]), site.transposed)
            for path, site in sites.items()
        },
    )


def read_state(model: PreTrainedModel, folder: Path, where: str) -> dict[str, Tensor]:
    """The adapter's tensors; the model's embeddings are resized to theirs."""
    weights, config_file = adapter_files(folder)
    assert config_file is not None
    return fit_vocabulary(model, adapter_tensors(weights), read_object(config_file), where)


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


def strip_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with float32 weights that are views of one zero: they carry adapters, and take no memory."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def is_factor(name: str) -> bool:
    """Whether a tensor of an adapter belongs to a PEFT layer (lora_A, lora_magnitude_vector, trained tokens …)."""
    return any(part.startswith(("lora_", "trainable_tokens_")) for part in name.split("."))


@contextmanager
def quiet_ties() -> Iterator[None]:
    """Without PEFT's advice on adapted tied embeddings, which `merge` unties itself."""
    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)
        yield


def take_gate(depth: DepthSettings | None, model: PreTrainedModel, replaced: dict[str, Tensor]) -> DepthSettings | None:
    """The settings with the adapter's own gate, taken out of what it carries whole: checkpoints hold none."""
    gate = replaced.pop(f"{model.base_model_prefix}.{ENCODER}.gate", None)
    return depth if depth is None or gate is None else replace(depth, gate_value=float(gate))


def refuse_no_effect(change: Skeleton, where: str) -> None:
    pairs = [[one for name, one in layer.named_parameters() if "lora_" in name] for layer in change.layers.values()]
    pairs += [[pair.lora_A, pair.lora_B] for pair in change.experts.values()]
    if not change.whole and not change.tokens and not any(all(bool(one.any()) for one in pair) for pair in pairs):
        raise VerificationError(f"{where}: every B·A is zero, so the adapter has no effect; was it saved untrained?")


def check_untied(model: PreTrainedModel, config: Mapping[str, Any], partner: Mapping[str, str]) -> None:
    """Check that the architecture has two separate weights once its config unties them."""
    with torch.device("meta"):
        fresh = type(model)(type(model.config).from_dict(dict(config)))
    stuck = [name for name in partner if name in fresh.all_tied_weights_keys]
    if stuck:
        raise VerificationError(
            f"the adapter changes {stuck[0]}, which {type(model).__name__} always ties to {partner[stuck[0]]}: "
            "such a model cannot hold the merged weights; leave that site out of the adapter"
        )


def entries_of(
    base: Checkpoint,
    weights: Mapping[str, Weight],
    partner: Mapping[str, str],
    change: Skeleton,
    rows: tuple[int, int],
    dtype: str,
) -> tuple[Entry, ...]:
    """The base's own keys, and a key of their own for parameters that no file holds yet."""
    names: dict[str, list[str]] = {}
    for name, weight in sorted(weights.items(), key=lambda item: item[1].part[0]):
        names.setdefault(weight.key, []).append(name)
    sizes = {weight.key: weight.sizes for weight in weights.values()}
    sources = {key: (key, tuple(names.get(key, ()))) for key in base}
    sources |= {name: (weights[other].key, (name,)) for name, other in partner.items() if name not in weights}
    resized = change.rowed if rows[0] != rows[1] else frozenset()
    entries = []
    for key, (source, blocks) in sources.items():
        shape, stored = base.shape(source), base.dtype(source)
        shape = (rows[1], *shape[1:]) if resized & set(blocks) else shape
        kept = dtype == "auto" or not stored.is_floating_point
        entries.append(Entry(key, shape, stored if kept else getattr(torch, dtype), source, blocks, sizes.get(key, ())))
    return tuple(entries)


def with_experts(entries: Sequence[Entry], experts: Mapping[str, ExpertFiles], dtype: str) -> tuple[Entry, ...]:
    """The entries, with those told that hold experts; what is in MXFP4 becomes one tensor under the parameter's key."""
    owners = {key: files for files in experts.values() for key in files.keys}
    found = []
    for entry in entries:
        files = owners.get(entry.key)
        if files is None:
            found.append(entry)
        elif not files.quantized:
            found.append(replace(entry, names=(files.parameter,), experts=files))
        elif entry.key.endswith(BLOCKS):
            kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
            key = entry.key.removesuffix(BLOCKS)
            found.append(Entry(key, files.shape, kind, entry.source, (files.parameter,), experts=files))
    return tuple(found)
