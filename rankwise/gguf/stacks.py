"""Matrices of a GGUF that a converter joins, splits or turns, each with its own place in the checkpoint.

    blk.1.ffn_gate_exps.weight[3] ◀── model.layers.1.mlp.experts.3.gate_proj.weight   (alone in its file: joined)
                                  ◀── model.layers.1.mlp.experts.gate_up_proj[3]      (first half, or every other row)
    blk.1.attn_k_b.weight         ◀── model.layers.1.self_attn.kv_b_proj.weight       (of each head the first rows)

Which rows are the gate's and which axis is the outputs' is the loaded model's to say (`is_concatenated`, a site's
`transposed`): values alone would take an exchange of gate and up for another storage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rankwise.core.site import is_expert
from rankwise.errors import DataError
from rankwise.files.checkpoint import Checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.metadata import config_of
from rankwise.gguf.reading import SUFFIXES, first_few, forms, name_table
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites, weight_table

JOINED, STACKED, HALF, ALTERNATE, BY_HEADS = "joined", "stacked", "half", "alternate rows", "by heads"
ALONE = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")  # the number of an expert whose matrices have keys of their own
# End of a fused tensor's key → what llama.cpp's table calls its two parts, the gate first, as every family has them.
FUSED = {
    "experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj"),
    "block_sparse_moe.input_linear": ("block_sparse_moe.experts.w1", "block_sparse_moe.experts.w3"),
    "shared_mlp.input_linear": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
}
EXPERTS = frozenset(["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
LATENT, KEYS, VALUES = "kv_b_proj.weight", "k_b_proj.weight", "v_b_proj.weight"


@dataclass(frozen=True)
class Cut:
    """A matrix out of a checkpoint's tensor. expert: its number; None where the tensor of the GGUF is no stack."""

    key: str
    how: str
    expert: int | None
    take: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Storage:
    """How a fused tensor holds its experts. transposed: (in, out). alternate: gate and up row by row, not by halves."""

    transposed: bool = False
    alternate: bool = False


def stacks(file: GGUFFile, checkpoint: Checkpoint) -> dict[str, tuple[Cut, ...]]:
    """Name in the file → its matrices in order, for every stack of experts and every part of a fused tensor."""
    found: dict[str, dict[int, Cut]] = {}
    table, storages = name_table(file), fused_storages(checkpoint)
    for key in checkpoint if table else ():
        for form, half in forms_of(key):
            names = (table.get_name(one, SUFFIXES) for one in forms(form))
            name = next((name for name in names if name in file.tensors), None)
            if name is not None and is_cut(name, half):
                cuts = cuts_of(key, checkpoint.shape(key), half, storages.get(key, Storage()), file.tensors[name].shape)
                found.setdefault(name, {}).update(cuts)
    return {name: tuple(cut for _, cut in sorted(cuts.items())) for name, cuts in found.items()}


def is_cut(name: str, half: int | None) -> bool:
    """Whether a name's rule stands here: of experts, and of what is a part of a fused tensor."""
    return half is not None or not EXPERTS.isdisjoint(name.split("."))


def forms_of(key: str) -> Iterator[tuple[str, int | None]]:
    """(what the table may know a key's content as, which half of it) for each of its parts."""
    name = ALONE.sub("", key)
    stem, suffix = name.removesuffix("_bias"), ".bias"
    if stem == name:
        suffix = next((end for end in SUFFIXES if name.endswith(end)), "")
        stem, suffix = name.removesuffix(suffix), suffix or ".weight"
    if (stem + suffix).endswith(LATENT):
        yield from ((name.replace(LATENT, part), half) for half, part in enumerate((KEYS, VALUES)))
        return
    end = next((end for end in FUSED if stem.endswith(end)), None)
    if end is None:
        yield stem + suffix, None
        return
    yield from ((stem.removesuffix(end) + part + suffix, half) for half, part in enumerate(FUSED[end]))


def cuts_of(
    key: str, shape: tuple[int, ...], half: int | None, storage: Storage, stored: tuple[int, ...]
) -> dict[int, Cut]:
    """The cuts of one key by expert. stored: shape in the GGUF, of which a bias has one axis less."""
    if key.endswith(LATENT):
        return {0: Cut(key, BY_HEADS, None, partial(of_heads, half=half or 0, stored=stored))}
    how = STACKED if half is None else ALTERNATE if storage.alternate else HALF
    if alone := ALONE.search(key):
        return {int(alone[1]): Cut(key, JOINED, int(alone[1]), partial(piece, half=half))}
    if len(shape) < len(stored) or (half is not None and len(shape) == len(stored) and shape[0] != stored[0]):
        return {0: Cut(key, how, None, partial(piece, half=half, storage=storage))}
    take = partial(piece, half=half, storage=storage)
    return {one: Cut(key, how, one, partial(take, expert=one)) for one in range(shape[0])}


def piece(tensor: Tensor, half: int | None, storage: Storage = Storage(), expert: int | None = None) -> Tensor:
    """(out, in) of one matrix, or (out,) of a bias."""
    one = tensor if expert is None else tensor[expert]
    if storage.transposed and one.dim() == 2:
        one = one.T
    if half is None:
        return one
    return one[half::2] if storage.alternate else one.chunk(2)[half]


def of_heads(tensor: Tensor, half: int, stored: tuple[int, ...]) -> Tensor:
    """Keys or values of latent attention: each head's first rows, turned, or its last."""
    heads = tensor.reshape(stored[0], -1, tensor.shape[-1])
    return heads[:, : stored[2]].mT if half == 0 else heads[:, -stored[1] :]


def fused_storages(checkpoint: Checkpoint) -> Mapping[str, Storage]:
    """Key → storage of the fused experts, as the class of the model has it; {} where transformers has no such class."""
    stacked = [key for key in checkpoint if len(checkpoint.shape(key)) > 1 and is_expert(key) and not ALONE.search(key)]
    if not stacked or config_of(checkpoint.path) is None:
        return {}
    model = meta_model(str(checkpoint.path))
    keys = {name: weight.key for name, weight in weight_table(model, checkpoint.keys()).weights.items()}
    found: dict[str, Storage] = {}
    for site in model_sites(model).values():
        if not site.experts or site.weight not in keys:
            continue
        owner = model.get_submodule(site.weight.rpartition(".")[0])
        storage = Storage(site.transposed, not getattr(owner, "is_concatenated", True))
        # Biases stand beside the weights, under their name and `_bias`.
        found |= dict.fromkeys((keys[site.weight], f"{keys[site.weight]}_bias"), storage)
    return found


def require_every_expert(checkpoint: Checkpoint) -> None:
    """DataError, naming the expert, where a layer's experts are not all there with the same matrices."""
    layers: dict[str, dict[int, set[str]]] = {}
    for key in checkpoint:
        if alone := ALONE.search(key):
            layers.setdefault(key[: alone.start()], {}).setdefault(int(alone[1]), set()).add(key[alone.end() + 1 :])
    every = {number for experts in layers.values() for number in experts}
    lacking = []
    for layer, experts in layers.items():
        wanted = set().union(*experts.values())
        for number in range(max(every) + 1):
            missing = sorted(wanted - experts.get(number, set()))
            lacking += [
                f"{layer}.{number}" if missing == sorted(wanted) else f"{layer}.{number}.{one}" for one in missing
            ]
    if lacking:
        raise DataError(
            f"{checkpoint.path}: experts are missing: {first_few(list(dict.fromkeys(lacking)))}; is a shard missing? "
            "Save or download the model again"
        )


def strangers(file: GGUFFile, name: str, every: Mapping[str, tuple[Cut, ...]], checkpoint: Checkpoint) -> list[str]:
    """What is not in its place among a stack's matrices, in words; [] where all are."""
    cuts, shape = every[name], file.tensors[name].shape
    whole = cuts[0].expert is None
    if not whole and len(cuts) != shape[0]:
        return [f"{name} holds {shape[0]} experts and {checkpoint.path.name} {len(cuts)}"]
    wrong = [cut for cut in cuts if not same(stored(file, name, cut), cut, checkpoint)]
    return [f"{label(name, cut)}, {instead(file, name, cut, every, checkpoint)}" for cut in wrong]


def stored(file: GGUFFile, name: str, cut: Cut) -> Tensor:
    return file.tensor(name) if cut.expert is None else file.part(name, cut.expert)


def label(name: str, cut: Cut) -> str:
    """blk.0.ffn_gate_exps.weight, expert 3"""
    return name if cut.expert is None else f"{name}, expert {cut.expert}"


def same(found: Tensor, cut: Cut, checkpoint: Checkpoint) -> bool:
    wanted = cut.take(checkpoint.tensor(cut.key))
    return wanted.shape == found.shape and torch.equal(wanted.float(), found)


def instead(file: GGUFFile, name: str, cut: Cut, every: Mapping[str, tuple[Cut, ...]], checkpoint: Checkpoint) -> str:
    """What stands in a matrix's place: another one of the layer, its own rows in another order, or other values."""
    found, layer = stored(file, name, cut), name.split(".")[:2]
    for other, cuts in every.items():
        for one in cuts if other.split(".")[:2] == layer else ():
            if same(found, one, checkpoint):
                return f"is {label(other, one)} ({one.key})"
    wanted = cut.take(checkpoint.tensor(cut.key)).float()
    if wanted.dim() == 2 and wanted.shape == found.shape and sorted(found.tolist()) == sorted(wanted.tolist()):
        return f"has the rows of {cut.key} in another order"
    return f"is not {cut.key}"
