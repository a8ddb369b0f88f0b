"""Where each tensor of a float32 GGUF comes from in the checkpoint, and what the converter did to it on the way.

    blk.0.attn_q.weight ◀── model.layers.0.self_attn.q_proj.weight   (rope order: llama.cpp rotates pairs, HF halves)
    token_embd.weight   ◀── model.embed_tokens.weight                (same)

float32 holds every half-precision number, so "same" is bit for bit. What no rule explains is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rankwise.errors import VerificationError
from rankwise.files.checkpoint import Checkpoint
from rankwise.ship.gguf.metadata import IDEFICS, PLAIN, QWEN_MERGER
from rankwise.ship.gguf.names import SUFFIXES, forms, gguf_names, name_table
from rankwise.ship.gguf.reading import GGUFFile
from rankwise.ship.gguf.relation import (
    PART,
    PATCHES,
    PLUS_ONE,
    ROPE,
    ROTATED,
    ROWS,
    SAME,
    TRANSPOSED,
    divides,
    is_one_of,
    relation,
    rope_order,
)

BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "attn.bias", "attention.bias")
SHOWN = 4
HEADS = ("attention.head_count", "attention.head_count_kv", "vision.attention.head_count")
# What the converter does to tensors of families that are known (llama's queries and keys: `rotary_heads`). A transposed
# matrix, a norm stored plus one, a part of a tensor: what is right for one family is damage in another.
DONE = dict.fromkeys((*PLAIN, IDEFICS), frozenset([SAME])) | {QWEN_MERGER: frozenset([SAME, PART])}
SPLIT = ("attn_q", "attn_k", "attn_v")  # row blocks of Qwen2.5-VL's fused weight, in order
ROPE_FACTORS = "rope_"  # begins the names of the vectors that a converter makes itself


@dataclass(frozen=True)
class Origin:
    """A tensor of the GGUF: the checkpoint's key, and how the two relate. heads: of the rope order."""

    key: str
    how: str
    heads: int | None = None

    def apply(self, tensor: Tensor) -> Tensor | None:
        """Another tensor of the checkpoint's form, as the converter would write it; None where that is not known."""
        if self.how == SAME:
            return tensor
        return rope_order(tensor, self.heads) if self.heads else None


@dataclass(frozen=True)
class Origins:
    """found: by GGUF name. made: tensors of the converter's own (rope factors). left_out: keys that are not in it."""

    found: dict[str, Origin]
    made: tuple[str, ...]
    left_out: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        hows = [origin.how for origin in self.found.values()]
        return {how: hows.count(how) for how in (SAME, ROPE, ROWS, TRANSPOSED, PLUS_ONE, PART) if how in hows}


def origins(file: GGUFFile, checkpoint: Checkpoint) -> Origins:
    """Find every tensor's origin: by name first, else by content.

    VerificationError, naming both, where a tensor is not its namesake's, or a matrix comes from nowhere.
    """
    named = gguf_names(checkpoint, file)
    found: dict[str, Origin] = {}
    made, wrong = [], []
    for name in file.tensors:
        stored = file.tensor(name)
        keys = [named[name]] if name in named else candidates(checkpoint, tuple(stored.shape), set(named.values()))
        origin = next(related(name, stored, keys, checkpoint, file), None)
        if origin:
            found[name] = origin
        elif name not in named and stored.dim() < 2 and (name.startswith(ROPE_FACTORS) or family(file) not in DONE):
            made.append(name)
        else:
            wrong.append(f"{name} is not {named[name]}" if name in named else f"{name} is in no tensor of it")
    if wrong:
        raise VerificationError(f"{file.path.name} is not {checkpoint.path}: {shown(wrong)}")
    used = {origin.key for origin in found.values()}
    return Origins(found, tuple(made), tuple(key for key in checkpoint if key not in used))


def family(file: GGUFFile) -> str:
    """The architecture; of a vision tower the kind of its projector."""
    return str(file.metadata.get("clip.projector_type", file.architecture))


def rotary_heads(architecture: str, name: str, queries: int | None, keys: int | None) -> int | None:
    """How many heads the rows of a query or key weight are reordered in, where llama.cpp's `llama` rotates pairs."""
    if architecture != "llama" or not is_one_of(name, ROTATED):
        return None
    return (keys or queries) if is_one_of(name, frozenset(["attn_k"])) else queries


def is_own_part(name: str, key: str, stored: Tensor, source: Tensor) -> bool:
    """Whether a part of a fused tensor is the one that belongs under its name in Qwen2.5-VL's vision side: a third of
    the rows of its own layer's attention, or one of the two frames of the patch kernel."""
    parts = name.split(".")
    if is_one_of(name, PATCHES):
        return source.dim() == 5 and torch.equal(stored, source[:, :, int(parts[-1] == "1")])
    layers = [next((one for one in path.split(".") if one.isdecimal()), None) for path in (name, key)]
    which = next((number for number, one in enumerate(SPLIT) if one in parts), None)
    return which is not None and layers[0] == layers[1] and torch.equal(stored, source.chunk(len(SPLIT))[which])


def as_converted(kind: str, stored: Tensor, source: Tensor, how: str, heads: int | None) -> bool:
    """Whether that family's converter does this; of one that is not in the table, whatever is a relation at all."""
    if heads is not None:
        flat = source.reshape(stored.shape) if source.numel() == stored.numel() else None
        return flat is not None and divides(heads, stored) and torch.equal(stored, rope_order(flat, heads))
    return kind not in DONE or how in DONE[kind]


def candidates(checkpoint: Checkpoint, shape: tuple[int, ...], taken: set[str]) -> list[str]:
    """Keys that are large enough to hold the tensor: those that no name claims first, and those of its size first.

    A claimed key can hold a second tensor: Qwen2.5-VL's patch kernel for two frames becomes two kernels.
    """
    size = prod(shape)
    sizes = {key: prod(checkpoint.shape(key)) for key in checkpoint}
    fitting = [key for key, elements in sizes.items() if elements >= size]
    return sorted(fitting, key=lambda key: (key in taken, sizes[key] != size))


def related(name: str, stored: Tensor, keys: Sequence[str], checkpoint: Checkpoint, file: GGUFFile) -> Iterator[Origin]:
    counts, kind = head_counts(file), family(file)
    heads = rotary_heads(file.architecture, name, *(file.of_architecture(key) for key in HEADS[:2]))
    for key in keys:
        source = checkpoint.tensor(key).float()
        how = relation(stored, source, counts, name)
        if how is None or not as_converted(kind, stored, source, how[0], heads):
            continue
        if how[0] != PART or kind != QWEN_MERGER or is_own_part(name, key, stored, source):
            yield Origin(key, *how)


def head_counts(file: GGUFFile) -> tuple[int, ...]:
    counts = [file.of_architecture(key) for key in HEADS]
    return tuple(dict.fromkeys(count for count in counts if isinstance(count, int)))


def require_complete(checkpoint: Checkpoint, each: Sequence[Origins], text: GGUFFile | None = None) -> list[str]:
    """Keys that no file holds, with the reason; VerificationError for one that has none.

    text: the text model's file, where the vision tower was left out on purpose: only what the table of names has for
    the text model must be there.
    """
    known = None if text is None else text_keys(checkpoint, text)
    used = {origin.key for one in each for origin in one.found.values()}
    missing = [key for key in checkpoint if key not in used]
    lacking, reasons = [], []
    for key in missing:
        twin = next((other for other in used if same_tensor(checkpoint, key, other)), None)
        if key.endswith(BUFFERS):
            reasons.append(f"{key}: computed, not learnt")
        elif twin:
            reasons.append(f"{key}: the same as {twin}")
        elif not checkpoint.tensor(key).any():
            reasons.append(f"{key}: all zeros")
        elif known is not None and key not in known:
            reasons.append(f"{key}: without --mmproj")
        else:
            lacking.append(key)
    if lacking:
        raise VerificationError(
            f"{checkpoint.path}: {len(lacking)} of its tensors are in no GGUF file: {shown(lacking)}"
        )
    return reasons


def text_keys(checkpoint: Checkpoint, text: GGUFFile) -> set[str]:
    table = name_table(text)
    return {key for key in checkpoint if table and any(table.get_name(form, SUFFIXES) for form in forms(key))}


def same_tensor(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


def shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
