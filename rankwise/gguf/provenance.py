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
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.metadata import IDEFICS, PLAIN, QWEN_MERGER
from rankwise.gguf.reading import SUFFIXES, first_few, forms, gguf_names, name_table
from rankwise.gguf.stacks import ALTERNATE, BY_HEADS, HALF, JOINED, STACKED, Cut, stacks, strangers

SAME, ROPE, ROWS, TRANSPOSED, PLUS_ONE, PART = (
    "same",
    "rope order",
    "rows reordered",
    "transposed",
    "plus one",
    "part of it",
)
ROTATED = frozenset(["attn_q", "attn_k"])
FUSED = frozenset(["attn_qkv", "attn_gate"])  # whole heads change places in these
PATCHES = frozenset(["patch_embd"])
ODD = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ / the golden ratio, as a signed number: spreads neighbouring values


def relation(
    stored: Tensor, source: Tensor, heads: Sequence[int] = (), name: str = ""
) -> tuple[str, int | None] | None:
    """The transformation from a checkpoint's tensor to a GGUF's, simplest first; None where there is none.

    heads: the counts that the file states. name: the tensor's in the GGUF, which decides what orders it may have.
    """
    if stored.numel() != source.numel():
        return (PART, None) if holds(source, stored, heads if is_one_of(name, ROTATED) else ()) else None
    flat = source.reshape(stored.shape)
    if torch.equal(stored, flat):
        return SAME, None
    for count in heads:
        if divides(count, stored) and torch.equal(stored, rope_order(flat, count)):
            return ROPE, count
    if source.dim() == 2 and stored.shape == source.T.shape and torch.equal(stored, source.T):
        return TRANSPOSED, None
    if stored.dim() == 1 and torch.equal(stored, flat + 1):
        return PLUS_ONE, None
    if is_one_of(name, PATCHES) and colours_last(stored, source):
        return TRANSPOSED, None
    return (ROWS, None) if reordered(stored, flat, heads, name) else None


def is_one_of(name: str, kinds: frozenset[str]) -> bool:
    return not kinds.isdisjoint(name.split("."))


def divides(heads: int, weight: Tensor) -> bool:
    return heads > 0 and weight.shape[0] % (2 * heads) == 0


def rope_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head, (first half, second half) → pairs: llama.cpp rotates neighbours, transformers halves."""
    head = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def half_order(weight: Tensor, heads: int) -> Tensor:
    """The way back from `rope_order`."""
    head = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def colours_last(stored: Tensor, source: Tensor) -> bool:
    """(width, 3, side, side) of a linear map over patches whose pixels are (side, side, 3), as SigLIP 2 has it."""
    if stored.dim() != 4 or source.dim() != 2 or len(source) != len(stored):
        return False
    width, colours, high, wide = stored.shape
    return torch.equal(stored, source.reshape(width, high, wide, colours).permute(0, 3, 1, 2))


def reordered(stored: Tensor, source: Tensor, heads: Sequence[int], name: str) -> bool:
    """Whether rows of an attention weight are in an order that a converter makes.

    Such orders exchange two axes of the row number: of queries and keys, inside each head (pairs of other families); of
    fused weights, whole blocks (heads · 3 · head → 3 · heads · head). Any other order is an error of somebody's.
    """
    inside, between = is_one_of(name, ROTATED), is_one_of(name, FUSED)
    if stored.dim() > 2 or not (inside or between):
        return False
    there, here = (row_keys(one.reshape(len(one), -1)) for one in (stored, source))
    if not torch.equal(there.sort().values, here.sort().values):
        return False
    numbers = torch.arange(len(here))
    return any(
        torch.equal(there, here[numbers.reshape(shape).swapaxes(1, 2).reshape(-1)])
        for shape in exchanges(len(here))
        if (inside and any(count and shape[0] % count == 0 for count in heads)) or (between and shape[3] > 1)
    )


def exchanges(rows: int) -> Iterator[tuple[int, int, int, int]]:
    """All (a, b, c, d) with a · b · c · d = rows and b, c > 1: rows as four axes, of which the middle two change."""
    for outer in divisors(rows):
        for first in divisors(rows // outer)[1:]:
            for second in divisors(rows // outer // first)[1:]:
                yield outer, first, second, rows // outer // first // second


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def holds(whole: Tensor, part: Tensor, heads: Sequence[int] = ()) -> bool:
    """Whether `part` was cut out of `whole`: split, fused and sliced weights.

    All rows of its last dimension are rows of the whole and come in the same order, or do so once the rope order of a
    head count in `heads` is undone; a vector is a run of entries.
    """
    if part.numel() >= whole.numel() or (part.dim() != 1 and whole.shape[-1] != part.shape[-1]):
        return False
    if part.dim() == 1:
        return whole.dim() == 1 and bool((whole.unfold(0, len(part), 1) == part).all(1).any())
    forms = [part, *(half_order(part, count) for count in heads if divides(count, part))]
    return any(in_order(row_keys(form), row_keys(whole)) for form in forms)


def in_order(some: Tensor, every: Tensor) -> bool:
    """Whether `some` is a subsequence of `every`."""
    if not torch.isin(some, every).all():
        return False
    rest = iter(every.tolist())
    return all(key in rest for key in some.tolist())


def row_keys(tensor: Tensor) -> Tensor:
    """(rows,) a 64-bit number of each row of the last dimension, from its bits."""
    bits = tensor.contiguous().reshape(-1, tensor.shape[-1]).view(torch.int32).long()
    factors = (torch.arange(1, bits.shape[1] + 1) * ODD) | 1
    return (bits * factors).sum(1)


BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "attn.bias", "attention.bias")
HEADS = ("attention.head_count", "attention.head_count_kv", "vision.attention.head_count")
# What the converter does to tensors of families that are known (llama's queries and keys: `rotary_heads`). A transposed
# matrix, a norm stored plus one, a part of a tensor: what is right for one family is damage in another.
DONE = dict.fromkeys((*PLAIN, IDEFICS), frozenset([SAME])) | {QWEN_MERGER: frozenset([SAME, PART])}
SPLIT = ("attn_q", "attn_k", "attn_v")  # row blocks of Qwen2.5-VL's fused weight, in order
ROPE_FACTORS = "rope_"  # begins the names of the vectors that a converter makes itself


@dataclass(frozen=True)
class Origin:
    """A tensor of the GGUF: the checkpoint's key, and how the two relate. heads: of the rope order. cuts: the matrices
    that a stack was made of, each with its own key; `key` is the first one's."""

    key: str
    how: str
    heads: int | None = None
    cuts: tuple[Cut, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(cut.key for cut in self.cuts) or (self.key,)

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
        known = (SAME, ROPE, ROWS, TRANSPOSED, PLUS_ONE, PART, JOINED, STACKED, HALF, ALTERNATE, BY_HEADS)
        return {how: hows.count(how) for how in known if how in hows}


def origins(file: GGUFFile, checkpoint: Checkpoint) -> Origins:
    """Find every tensor's origin: by name first, else by content.

    VerificationError, naming both, where a tensor is not its namesake's, or a matrix comes from nowhere.
    """
    named, stacked = gguf_names(checkpoint, file), stacks(file, checkpoint)
    found: dict[str, Origin] = {}
    made: list[str] = []
    wrong: list[str] = []
    for name in file.tensors:
        if name in stacked:
            wrong += strangers(file, name, stacked, checkpoint)
            found[name] = Origin(stacked[name][0].key, stacked[name][0].how, cuts=stacked[name])
            continue
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
        raise VerificationError(f"{file.path.name} is not {checkpoint.path}: {first_few(wrong)}")
    used = {key for origin in found.values() for key in origin.keys}
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
    """Keys large enough to contain the tensor: unclaimed ones first, and those of equal size first.

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
    used = {key for one in each for origin in one.found.values() for key in origin.keys}
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
            f"{checkpoint.path}: {len(lacking)} of its tensors are in no GGUF file: {first_few(lacking)}"
        )
    return reasons


def text_keys(checkpoint: Checkpoint, text: GGUFFile) -> set[str]:
    table = name_table(text)
    return {key for key in checkpoint if table and any(table.get_name(form, SUFFIXES) for form in forms(key))}


def same_tensor(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))
