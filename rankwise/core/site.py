"""A site: one adaptable weight matrix, named by its module path. The only place that parses a module path.

describe("model.layers.3.mlp.down_proj", (64, 172))  →  kind mlp, layer 3, projection down_proj
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rankwise.errors import DataError

ROUTER = "router"  # what chooses the experts, a shared expert's gate included: only the model tells it from a name
KINDS = ("attention", "mlp", "mixer", "embed", "head", ROUTER, "other")

# How PEFT's config names a site. A model with fused experts needs the last two: of a regex PEFT keeps bare names there,
# and takes gate_proj, up_proj, down_proj, w1 … of any module for the experts'.
PEFT_NAMES = {
    "pattern": "one anchored regex in target_modules, for all sites",
    "path": "its full path in target_modules, a list",
    "parameter": "the full name of its parameter in target_parameters",
}

ATTENTION = frozenset(
    "q_proj k_proj v_proj o_proj out_proj qkv_proj qkv c_attn query_key_value Wqkv query key value q_lin k_lin v_lin "
    "out_lin attn_out q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj in_proj q k v to_q to_k to_v to_kv to_out".split()
)
MLP = frozenset(
    "gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc lin1 lin2 dense_h_to_4h dense_4h_to_h w1 w2 w3 fc_in "
    "fc_out wi wi_0 wi_1 wo ffn".split()
)
MIXER = frozenset("x_proj dt_proj linear_x linear_y".split())
SHARED_NAMES = frozenset("in_proj out_proj dt_proj key value receptance".split())  # the module around them tells first
EMBED = frozenset(["wte", "wpe", "shared", "relative_attention_bias", "embed_tokens", "embed_positions", "embed_in"])
EMBEDDING = re.compile(r"(?:.+_)?(?:emb|embed|embeds|embedding|embeddings)")  # word_embeddings, pos_embed
HEAD = frozenset(["lm_head", "embed_out", "score", "classifier", "pre_classifier", "output_projection"])
LAYER_LIST = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)(?=\.|$)")
# What a module around a projection says of it, the first that fits. A mixer (state space, linear attention, recurrence)
# keeps a state along the text in the place of attention. What is named like one may hold attention and MLP, too
# (Nemotron-H's `mixer`, RecurrentGemma's `temporal_block`): it tells of names that are in no list.
MIXING = re.compile(r"linear_attn|mamba2?|mlstm_layer|ssm", re.IGNORECASE)
PARENTS = {
    "mixer": re.compile(rf"{MIXING.pattern}|mixer|temporal_block|(?:short_)?conv", re.IGNORECASE),
    "attention": re.compile(r".*(?:attn|attention).*", re.IGNORECASE),
    "mlp": re.compile(r".*(?:mlp|feed_forward|ffn|intermediate).*|ff", re.IGNORECASE),
}


@dataclass(frozen=True)
class Site:
    """One adaptable matrix, or a layer's stack of experts: one matrix per expert in one parameter.

    `shape` is (out_features, in_features) = (m, n) whatever the file's orientation; `transposed` says that the
    stored weight is (in, out), as in GPT-2's Conv1D. `projection` is the name shared by the layers (q_proj …).
    `experts`: their number, along the parameter's first axis; 0 for one matrix. A rank is per expert, `shape` one
    expert's, and `path` the parameter's own name. `peft`: how PEFT's config has to name the site, which `PEFT_NAMES`
    explains. `swapped`: PEFT takes the in axis of the experts for their out axis, since they are stored (in, out) and
    their module does not say so (`is_transposed`). `order`: the number of the module's parameters of experts before
    this one, which decides how PEFT nests their pairs.
    """

    path: str
    shape: tuple[int, int]
    tower: str = "unknown"
    kind: str = "other"
    layer: int | None = None
    projection: str = ""
    transposed: bool = False
    experts: int = 0
    peft: str = "pattern"
    swapped: bool = False
    order: int = 0

    def parameters(self, rank: int) -> int:
        """Trainable parameters of the LoRA pairs of this rank: r·(m + n) per matrix."""
        return self.matrices * rank * sum(self.shape)

    @property
    def matrices(self) -> int:
        """The number of matrices: one, or one per expert."""
        return self.experts or 1

    @property
    def size(self) -> int:
        """Entries of all matrices, m·n each."""
        return self.matrices * self.shape[0] * self.shape[1]

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @property
    def largest_rank(self) -> int:
        """⌊mn/(m+n)⌋: above it a LoRA pair has more parameters than the matrix itself."""
        return max(1, self.shape[0] * self.shape[1] // sum(self.shape))

    @property
    def weight(self) -> str:
        """The name of the parameter in the model."""
        return self.path if self.experts else f"{self.path}.weight"

    @property
    def type_path(self) -> str:
        """What the layers share: the path without its numbers. Two modules of a layer may share a projection's
        name (GPT-2's attn.c_proj and mlp.c_proj), never this."""
        return ".".join(part for part in self.path.split(".") if not part.isdigit())

    def as_dict(self) -> dict[str, Any]:
        """The site as a row of a file; `from_row` reads it. What only models with experts have stands where it differs
        from the default."""
        plain = {field.name: field.default for field in fields(self) if field.name in EXPERT_FIELDS}
        row = asdict(self) | {"shape": list(self.shape)}
        return {name: value for name, value in row.items() if name not in plain or value != plain[name]}


EXPERT_FIELDS = ("experts", "peft", "swapped", "order")


def from_row(row: Mapping[str, Any]) -> Site:
    """The site of a row with its path, shape and whatever else `as_dict` wrote. KeyError, TypeError or ValueError where
    it is no such row."""
    told = {name: row[name] for name in ("tower", "transposed", *EXPERT_FIELDS) if name in row}
    told |= {"kind": ROUTER} if row.get("kind") == ROUTER else {}
    return describe(row["path"], row["shape"], **told)


def describe(
    path: str,
    shape: tuple[int, ...],
    tower: str = "unknown",
    transposed: bool = False,
    experts: int = 0,
    peft: str = "pattern",
    swapped: bool = False,
    order: int = 0,
    kind: str | None = None,
) -> Site:
    """The site at a module path, or of the experts in the parameter of this name; shape: (out, in) of one matrix.
    kind: where the path does not tell it (a router's).

    Raises ValueError where the shape is not that of a matrix.
    """
    if len(shape) != 2:
        raise ValueError(f"{path}: a site is a matrix, got shape {tuple(shape)}")
    parts = path.removesuffix(".weight").split(".")
    names = [part for part in parts if not part.isdigit()]
    projection = names[-1] if names else path
    return Site(
        path=path,
        shape=(int(shape[0]), int(shape[1])),
        tower=tower,
        kind=kind or kind_of(projection, ".".join(names[:-1])),
        layer=layer_of(path),
        projection=projection,
        transposed=transposed,
        experts=experts,
        peft=peft,
        swapped=swapped,
        order=order,
    )


def is_expert(path: str) -> bool:
    """Whether a module or parameter is one of a layer's experts, or holds all of them."""
    return "experts" in path.split(".")


def layer_of(path: str) -> int | None:
    """The number after `layers` (or layer, block, blocks, h), else the first one: a list of other modules may stand
    around the layers (`vision_embedding.0.encoder.layers.3`)."""
    found = LAYER_LIST.search(path)
    if found:
        return int(found[1])
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def half_of(towers: Mapping[str, str], *, second: bool) -> frozenset[str]:
    """The paths (path → its tower) in the first or the second half of their tower's layers; those outside of any layer
    are in both. Of an odd number of layers the one in the middle is in the first half."""
    depth: dict[str, int] = {}
    for path, tower in towers.items():
        depth[tower] = max(depth.get(tower, 0), 1 + (layer_of(path) or 0))
    return frozenset(
        path
        for path, tower in towers.items()
        if (layer := layer_of(path)) is None or (2 * layer >= depth[tower]) is second
    )


def kind_of(projection: str, parent: str) -> str:
    """Kind by the projection's own name, else by the nearest module around it that tells (`attn.c_proj`,
    `mlp.c_proj`, BERT's `attention.output.dense`; its `output.dense` is the MLP's)."""
    holders = parent.split(".")[::-1]
    if MIXING.fullmatch(holders[0]):
        return "mixer"
    told = (kind for holder in holders for kind, names in PARENTS.items() if names.fullmatch(holder))
    around = next(told, None)
    if around and projection in SHARED_NAMES:
        return around
    for kind, names in (("attention", ATTENTION), ("mlp", MLP), ("mixer", MIXER), ("embed", EMBED), ("head", HEAD)):
        if projection in names:
            return kind
    if EMBEDDING.fullmatch(projection):
        return "embed"
    return around or ("mlp" if parent.endswith("output") else "other")


def pattern(path: str) -> str:
    """The anchored regex of a path: PEFT matches keys with a free prefix, and the first match wins."""
    return "^" + re.escape(path) + "$"


def nearest(path: str, known: Iterable[str]) -> list[str]:
    """Up to three known paths that look like this one, for error messages."""
    return difflib.get_close_matches(path, list(known), n=3, cutoff=0.5)


PEFT_PREFIX = "base_model.model."
DISTRIBUTED = "module."  # DistributedDataParallel, DataParallel, DeepSpeed: around the whole model
# torch.compile, FSDP (and its older name), activation checkpointing: around any module
WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"])
# In a running model PEFT's parts bear their adapter's name, in a saved adapter they do not.
ADAPTER_NAME = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!weight$|bias$)([^.]+)")
NAMED_PARTS = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)(?=\.|$)")
# What PEFT puts between a module and its weights.
HOLDERS = frozenset(["base_layer", "modules_to_save", "original_module", "token_adapter"])


def unwrapped(keys: Iterable[str], where: object) -> dict[str, str]:
    """Name → key of the tensors of one file or model. `module.` is taken off where every key begins with it.

    Raises DataError, naming `where`, for two keys of one name, and for several adapters in one file.
    """
    keys = list(keys)
    names = [".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys]
    before = None
    while names != before:
        before = names
        names = [name.removeprefix(PEFT_PREFIX) for name in names]
        if all(name.startswith(DISTRIBUTED) for name in names):
            names = [name.removeprefix(DISTRIBUTED) for name in names]
    found: dict[str, str] = {}
    for name, key in zip(without_adapter_name(names, where), keys, strict=True):
        if name in found:
            raise DataError(f"{where}: {found[name]} and {key} are the same tensor, {name}, without wrapper prefixes")
        found[name] = key
    return found


def without_adapter_name(names: list[str], where: object) -> list[str]:
    """`lora_A.default.weight` → `lora_A.weight`, for whatever name the adapter had."""
    adapters = sorted({match[1] for name in names for match in ADAPTER_NAME.finditer(name)})
    if len(adapters) > 1 or (adapters and any(re.search(r"\.lora_[AB]\.weight$", name) for name in names)):
        shown = ", ".join(adapters)
        raise DataError(f"{where}: several adapters in one file ({shown}): save the one to use as a file of its own")
    if not adapters:
        return names
    return [NAMED_PARTS.sub(lambda m: f".{m[1]}" if m[2] == adapters[0] else m[0], name) for name in names]


def parameter_name(name: str) -> str:
    """Name in the base model of a tensor that an adapter carries whole: PEFT's prefix and holders taken out."""
    return ".".join(part for part in name.removeprefix(PEFT_PREFIX).split(".") if part not in HOLDERS)
