"""A site: one adaptable weight matrix, named by its module path. The only place that parses a module path.

describe("model.layers.3.mlp.down_proj", (64, 172))  →  kind mlp, layer 3, projection down_proj
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import DataError

KINDS = ("attention", "mlp", "embed", "head", "other")

ATTENTION = frozenset(
    "q_proj k_proj v_proj o_proj out_proj qkv_proj qkv c_attn query_key_value Wqkv query key value q_lin k_lin v_lin "
    "out_lin attn_out q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj in_proj".split()
)
MLP = frozenset(
    "gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc lin1 lin2 dense_h_to_4h dense_4h_to_h w1 w2 w3 fc_in "
    "fc_out".split()
)
EMBED = frozenset(["wte", "wpe", "shared", "relative_attention_bias", "embed_tokens", "embed_positions", "embed_in"])
EMBEDDING = re.compile(r"(?:.+_)?(?:emb|embed|embeds|embedding|embeddings)")  # word_embeddings, pos_embed
HEAD = frozenset(["lm_head", "embed_out", "score", "classifier", "pre_classifier", "output_projection"])
ATTENTION_PARENT = re.compile(r"attn|attention", re.IGNORECASE)
LAYER_LIST = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)(?=\.|$)")
MLP_PARENT = re.compile(r"mlp|feed_forward|ffn|intermediate", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One adaptable matrix.

    `shape` is (out_features, in_features) = (m, n) whatever the file's orientation; `transposed` says that the
    stored weight is (in, out), as in GPT-2's Conv1D. `projection` is the name shared by the layers (q_proj …).
    """

    path: str
    shape: tuple[int, int]
    tower: str = "unknown"
    kind: str = "other"
    layer: int | None = None
    projection: str = ""
    transposed: bool = False

    def parameters(self, rank: int) -> int:
        """Trainable parameters of a LoRA pair of this rank: r·(m + n)."""
        return rank * sum(self.shape)

    @property
    def size(self) -> int:
        """Entries of the matrix, m·n."""
        return self.shape[0] * self.shape[1]

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @property
    def largest_rank(self) -> int:
        """⌊mn/(m+n)⌋: above it a LoRA pair has more parameters than the matrix itself."""
        return max(1, self.size // sum(self.shape))

    @property
    def type_path(self) -> str:
        """What the layers share: the path without its numbers. Two modules of a layer may share a projection's
        name (GPT-2's attn.c_proj and mlp.c_proj), never this."""
        return ".".join(part for part in self.path.split(".") if not part.isdigit())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}


def describe(path: str, shape: tuple[int, ...], tower: str = "unknown", transposed: bool = False) -> Site:
    """The site at a module path. Raises ValueError where the shape is not that of a matrix."""
    if len(shape) != 2:
        raise ValueError(f"{path}: a site is a matrix, got shape {tuple(shape)}")
    parts = path.split(".")
    names = [part for part in parts if not part.isdigit()]
    projection = names[-1] if names else path
    return Site(
        path=path,
        shape=(int(shape[0]), int(shape[1])),
        tower=tower,
        kind=kind_of(projection, ".".join(names[:-1])),
        layer=layer_of(path),
        projection=projection,
        transposed=transposed,
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
    for kind, names in (("attention", ATTENTION), ("mlp", MLP), ("embed", EMBED), ("head", HEAD)):
        if projection in names:
            return kind
    if EMBEDDING.fullmatch(projection):
        return "embed"
    for holder in reversed(parent.split(".")):
        if ATTENTION_PARENT.search(holder):
            return "attention"
        if MLP_PARENT.search(holder):
            return "mlp"
    return "mlp" if parent.endswith("output") else "other"


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
